"""The plumbing of the fused loss: which losses it recognizes, and what chunks make of it."""

from functools import partial

import pytest
import torch

from distill import losses
from distill.losses import chunk_loss, chunked, fused, products
from distill.losses.fused import FusedLoss
from distill.tasks import CausalLanguageModelling
from tests.numerics.test_chunked import LABELS, V, factors, teacher

FORWARD = FusedLoss(0.3, 2.0, "forward_kl")


def test_losses_of_a_kernel_are_recognized():
    assert fused.recognize(losses.cross_entropy, losses.forward_kl, 0.3, 2) == FORWARD
    mixture = partial(losses.skew_kl, beta=0.1)
    assert fused.recognize(losses.cross_entropy, mixture, 1, 1) == FusedLoss(1, 1, "skew_kl", 0.1)


def user_loss(logits, labels):
    return losses.cross_entropy(logits, labels) * 2


def forward_kl(student, teacher, temperature):
    """Of a user: its name alone is not enough."""
    return losses.forward_kl(student, teacher, temperature) * 2


@pytest.mark.parametrize(
    ("label_loss", "divergence"),
    [
        (user_loss, losses.forward_kl),
        (losses.cross_entropy, losses.total_variation),
        (losses.cross_entropy, forward_kl),
        (losses.cross_entropy, lambda *_: 0),
    ],
)
def test_other_losses_are_not(label_loss, divergence):
    assert fused.recognize(label_loss, divergence, 0.3, 2.0) is None


def test_the_loss_of_a_language_model_has_a_kernel_unless_a_subclass_changes_it():
    class Weighted(CausalLanguageModelling):
        def label_loss(self, logits_NC, labels):
            return 2 * super().label_loss(logits_NC, labels)

    tasks = (kind(max_length=8) for kind in (CausalLanguageModelling, Weighted))
    found = [fused.recognize(task.label_loss, losses.forward_kl, 0.3, 2) for task in tasks]
    assert found == [FORWARD, None]


def test_a_kernel_that_cannot_run_is_not_used(caplog):
    """Triton is not installed, or knows no such device."""
    device = torch.device("meta")
    fused.is_exact.cache_clear()
    assert not fused.is_exact(FORWARD, device, torch.float32, aligned=True)
    assert not fused.is_exact(FORWARD, device, torch.float32, aligned=True)
    assert len(caplog.records) == 1


def by_autograd(student, teacher_nV, labels, gradient, divergence, settings):
    """What the kernel promises, in float64."""
    alpha, temperature, beta, scale = settings
    loss = FusedLoss(alpha, temperature, divergence, beta)
    with torch.enable_grad():
        rows = student.double().requires_grad_()
        sums = [
            loss.sums(rows[i : i + 1], teacher_nV[i : i + 1], labels[i : i + 1])
            for i in range(len(rows))
        ]
        total = torch.stack(sums).sum(0)[0]
        slope = torch.autograd.grad(total, rows)[0]
    if gradient is not None:
        limit = torch.finfo(gradient.dtype).max
        gradient.copy_((scale * slope).clamp(-limit, limit))
    return torch.stack(sums).detach()[:, 1:].T.float()


@pytest.fixture
def kernel_by_autograd(monkeypatch):
    monkeypatch.setattr(fused, "loss_rows", by_autograd)
    monkeypatch.setattr(chunk_loss, "has_kernel", lambda *_: True)


@pytest.mark.usefixtures("kernel_by_autograd")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_use_the_gradients_of_the_kernel(dtype, monkeypatch):
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: product(a.float(), b.float()))
    monkeypatch.setattr(
        products,
        "add_product",
        lambda total, a, b, factor: total.add_(product(a.float(), b.float()), alpha=factor),
    )
    native = {"native": dtype != torch.float32}
    monkeypatch.setattr(chunked, "products_of", lambda kind, _: products.Products(kind, **native))
    ends = []
    for loss in (None, FORWARD):
        student, teacher_logits = factors(torch.float32), teacher(dtype)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            values = chunked.sum_in_chunks(
                FORWARD.sums, student, teacher_logits, (LABELS,), 5, loss
            )
        values[0].backward()
        ends.append((values.detach(), *(tensor.grad for tensor in student)))
    for value, right in zip(ends[1], ends[0], strict=True):
        tolerance = max(1e-5, torch.finfo(dtype).eps)
        torch.testing.assert_close(
            value, right, rtol=tolerance, atol=tolerance * right.abs().max().item()
        )
    assert ends[0][2].shape[0] == V
