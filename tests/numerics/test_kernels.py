"""The Triton kernel gives the values and gradients of `divergences.py` in float64.

On a GPU, or on a CPU through Triton's interpreter where Triton is installed:

    TRITON_INTERPRET=1 pytest -m gpu tests/numerics/test_kernels.py
"""

import importlib.util
import os
from math import inf, nan

import pytest
import torch

from distill import losses
from distill.losses import chunk_loss, chunked, fused
from distill.losses.fused import FusedLoss
from tests.numerics.test_chunked import LABELS, factors, teacher

pytestmark = [
    pytest.mark.gpu,
    # Triton's interpreter converts arrays so; it needs numpy below 2.4.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
N = 6
LOSSES = [
    FusedLoss(0.3, 1.0, "forward_kl"),
    FusedLoss(0.3, 2.0, "forward_kl"),
    FusedLoss(1.0, 0.5, "forward_kl"),
    FusedLoss(0.3, 2.0, "reverse_kl"),
    FusedLoss(0.0, 1.0, "reverse_kl"),
    FusedLoss(0.3, 2.0, "jensen_shannon", 0.5),
    FusedLoss(0.3, 1.0, "jensen_shannon", 0.1),
    FusedLoss(0.3, 2.0, "skew_kl", 0.5),
    FusedLoss(0.3, 0.7, "skew_kl", 0.9),
]


@pytest.fixture
def device():
    if INTERPRETED and importlib.util.find_spec("triton"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, or Triton and TRITON_INTERPRET=1")
    return torch.device("cuda", 0)


def rows(device, width, noise=1.0, dtype=torch.float32):
    """Logits of student and teacher, and labels, one of them missing."""
    generator = torch.Generator().manual_seed(width)
    student = 4 * torch.randn(N, width, generator=generator)
    teacher_rows = (student + noise * torch.randn(N, width, generator=generator)).to(dtype)
    labels = torch.randint(width, (N,), generator=generator)
    labels[2] = losses.IGNORED
    return student.to(device), teacher_rows.to(device), labels.to(device)


def by_kernel(loss, student, teacher_rows, labels, dtype=torch.float32, scale=1.0):
    gradient = torch.full_like(student, nan, dtype=dtype)
    values = fused.sums_and_gradient(loss, student, teacher_rows, labels, gradient, scale)
    return values, gradient


def exact(loss, student, teacher_rows, labels):
    student = student.double().requires_grad_()
    teacher_rows = None if teacher_rows is None else teacher_rows.double()
    values = loss.sums(student, teacher_rows, labels)
    return values.detach(), torch.autograd.grad(values[0], student)[0]


def assert_near(results, rights, tolerance=1e-5):
    for value, right in zip(results, rights, strict=True):
        limits = {"rtol": tolerance, "atol": tolerance * right.abs().max().item()}
        torch.testing.assert_close(value.double(), right, **limits)


@pytest.mark.parametrize("width", [5, 5003])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.divergence}-{loss.temperature:g}")
def test_values_and_gradients_are_those_of_float64(loss, width, device):
    given = rows(device, width)
    assert_near(by_kernel(loss, *given), exact(loss, *given))


def test_rows_that_fill_their_blocks(device):
    given = rows(device, 2048)
    assert_near(by_kernel(LOSSES[0], *given), exact(LOSSES[0], *given))


@pytest.mark.parametrize("loss", LOSSES[1::2], ids=lambda loss: loss.divergence)
def test_gradients_of_small_divergences_are_exact(loss, device):
    given = rows(device, 3001, noise=0.01)
    loss = loss._replace(alpha=0.0)
    assert_near(by_kernel(loss, *given)[1:], exact(loss, *given)[1:], 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES[1::3], ids=lambda loss: loss.divergence)
def test_gradients_and_teachers_of_low_precision(loss, dtype, device):
    given = rows(device, 2500, dtype=dtype)
    values, gradient = by_kernel(loss, *given, dtype=dtype, scale=256.0)
    rights = exact(loss, *given)
    assert gradient.dtype == dtype
    assert_near([values], rights[:1])
    assert_near([gradient], [256 * rights[1]], 2 * torch.finfo(dtype).eps)


def test_labels_alone(device):
    student, _, labels = rows(device, 3001)
    given = (FusedLoss(1.0, 2.0, "forward_kl"), student, None, labels)
    assert_near(by_kernel(*given), exact(*given))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.divergence}-{loss.temperature:g}")
def test_equal_models_have_no_divergence(loss, device):
    student, _, labels = rows(device, 3001)
    loss = loss._replace(alpha=0.0)
    values, gradient = by_kernel(loss, student, student.clone(), labels)
    assert values[0] == values[2] == 0
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.divergence}-{loss.temperature:g}")
def test_columns_that_a_vocabulary_masks(loss, device):
    student, teacher_rows, labels = rows(device, 3001)
    labels = labels.clamp(max=2900)
    for logits in (student, teacher_rows):
        logits[:, 2950:] = -inf
    teacher_rows[:, 2940:] = -inf
    given = (student, teacher_rows, labels)
    if loss.divergence == "reverse_kl":  # the student's share of masked tokens is infinitely bad
        given = (student, teacher_rows.clamp(min=-50.0), labels)
    results = by_kernel(loss, *given)
    assert_near(results, exact(loss, *given))
    assert results[1][:, 2950:].eq(0).all()


@pytest.mark.parametrize("loss", LOSSES[::2], ids=lambda loss: loss.divergence)
def test_without_a_gradient_the_values_are_the_same(loss, device):
    given = rows(device, 3001)
    values = fused.sums_and_gradient(loss, *given, None)
    torch.testing.assert_close(values, by_kernel(loss, *given)[0], rtol=1e-6, atol=0)


def test_the_gradient_may_overwrite_the_logits(device):
    student, teacher_rows, labels = rows(device, 5003)
    values, gradient = by_kernel(LOSSES[1], student.clone(), teacher_rows, labels)
    again = fused.sums_and_gradient(LOSSES[1], student, teacher_rows, labels, student)
    assert torch.equal(again, values)
    assert torch.equal(student, gradient)


@pytest.mark.parametrize("place", [0, 1], ids=["student", "teacher"])
def test_what_is_not_finite_shows_in_the_loss(place, device):
    given = rows(device, 3001)
    given[place][1, 77] = nan
    assert by_kernel(LOSSES[1], *given)[0][0].isnan()


def test_a_label_that_is_no_column_shows_in_the_loss(device):
    student, teacher_rows, labels = rows(device, 3001)
    labels[0] = 3001
    assert by_kernel(LOSSES[1], student, teacher_rows, labels)[0][1].isnan()


def test_no_rows(device):
    student, teacher_rows, labels = (tensor[:0] for tensor in rows(device, 300))
    assert by_kernel(LOSSES[1], student, teacher_rows, labels)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES[1::2], ids=lambda loss: loss.divergence)
def test_the_check_before_it_is_used_passes(loss, dtype, device):
    fused.is_exact.cache_clear()
    assert fused.is_exact(loss, device, dtype, aligned=False)
    assert fused.kernel_error(loss, device, dtype, 3001) < torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES[1::2], ids=lambda loss: loss.divergence)
def test_chunks_with_the_kernel_equal_chunks_without(loss, precision, device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(chunk_loss, "has_kernel", lambda *_: True)
    ends = []
    for kernel in (None, loss):
        student, given = (
            type(each)(*(None if tensor is None else tensor.detach().to(device) for tensor in each))
            for each in (factors(torch.float32), teacher(torch.float32))
        )
        for tensor in student:
            tensor.requires_grad_()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            total = chunked.sum_in_chunks(
                loss.sums, student, given, (LABELS.to(device),), 5, kernel
            )
        total[0].backward()
        ends.append((total.detach(), *(tensor.grad for tensor in student)))
    tolerance = max(1e-5, torch.finfo(precision).eps)
    assert_near(ends[1], [right.double() for right in ends[0]], tolerance)
