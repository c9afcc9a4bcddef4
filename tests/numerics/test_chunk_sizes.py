"""Rows and bytes of chunks, on CPUs and on a GPU that is pretended. N = rows, V = vocabulary."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.losses import chunk_loss, chunk_sizes, chunked, fused, products
from distill.losses.chunked import FactoredLogits
from tests.live_bytes import LiveBytes

GB = 10**9
H100 = 80 * GB
LOSS = fused.FusedLoss(0.5, 2.0, "forward_kl")


def chunks(rows, width, memory):
    return -(-rows // chunk_sizes.chunk_rows(rows, width, memory))


def test_a_gpu_reads_the_head_a_few_times():
    assert chunks(8192, 128_256, H100) <= 10
    assert chunks(8192, 32_000, H100) <= 4
    assert chunks(2048, 32_000, H100) == 1


@pytest.mark.parametrize("memory", [8 * GB, 16 * GB, 24 * GB, H100, 141 * GB])
@pytest.mark.parametrize("width", [7_500, 32_000, 128_256, 262_144])
@pytest.mark.parametrize("rows", [1, 100, 2047, 8192, 65_536])
def test_chunks_of_a_gpu_fit_and_fill_its_tiles(rows, width, memory):
    size = chunk_sizes.chunk_rows(rows, width, memory)
    assert size % chunk_sizes.TILE == 0
    assert 4 * width * size <= max(memory / 100, 4 * width * chunk_sizes.TILE)


@pytest.mark.parametrize("width", [7_500, 128_256])
@pytest.mark.parametrize("rows", [1, 8192])
def test_chunks_of_a_cpu_fit_into_its_budget(rows, width):
    size = chunk_sizes.chunk_rows(rows, width)
    assert 4 * width * size <= chunk_sizes.CHUNK_BYTES


def test_slices_cover_all_rows_once():
    for rows in (1, 5, 12):
        parts = [range(rows)[part] for part in chunk_sizes.chunk_slices(rows, 5)]
        assert [row for part in parts for row in part] == list(range(rows))


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Fake tensors take the path of a GPU; autograd knows no CUDA in builds for CPUs."""

    def native(dtype, device):
        return products.Products(dtype, dtype in products.LOW_PRECISION)

    for module in (chunked, chunk_loss):
        monkeypatch.setattr(module, "device_memory", lambda device: H100)
    monkeypatch.setattr(chunked, "products_of", native)
    monkeypatch.setattr(chunk_loss, "has_kernel", lambda *_: True)


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(
    "kernel", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kernel", "autograd"]
)
@pytest.mark.parametrize(("width", "most"), [(128_256, 4.2), (32_000, 1.46)])
def test_the_peak_of_bytes_on_a_gpu(width, most, kernel):
    """All logits at once take 38.4 and 9.6 GB; the goals are 0.11 and 0.15 of that.

    It includes the head in bfloat16 and its gradient in float32.
    """
    rows, hidden = 8192, 2048
    with FakeTensorMode():
        states = torch.empty(rows, hidden, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(width, hidden, requires_grad=True)
        teacher = FactoredLogits(states.detach(), weight.detach().bfloat16(), None)
        labels = torch.zeros(rows, dtype=torch.long)
        with LiveBytes() as live:
            with torch.autocast("cpu", torch.bfloat16):
                loss = chunked.sum_in_chunks(
                    LOSS.sums,
                    FactoredLogits(states, weight, None),
                    teacher,
                    (labels,),
                    loss=LOSS if kernel else None,
                )[0]
            loss.backward()
    assert 4 * width * hidden < live.peak < most * GB
    assert weight.grad is not None and weight.grad.shape == weight.shape
