"""Losses of low-precision factors have the values and gradients of an exact product.

The reference multiplies the same rounded factors in float64 and differentiates by hand: it shares
no code with the losses. N = rows, V = vocabulary, D = width.
"""

import pytest
import torch

from distill import losses
from distill.losses import chunked, products
from distill.losses.chunked import FactoredLogits
from distill.losses.products import linear_float32

N, V, D = 96, 1021, 64
LOW = [torch.bfloat16, torch.float16]
LABELS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_models(noise, dtype, device="cpu"):
    """A teacher with peaked distributions, and a student that differs from it by noise."""
    hidden, weight = normal(1, N, D), normal(2, V, D) * 0.5
    teacher = FactoredLogits(hidden.to(dtype).to(device), weight.to(dtype).to(device), None)
    tensors = (hidden + noise * normal(3, N, D), weight + noise * 0.5 * normal(4, V, D))
    student = FactoredLogits(*(tensor.to(device).requires_grad_() for tensor in tensors), None)
    return student, teacher


def log_softmax(logits):
    return logits - logits.exp().sum(-1, keepdim=True).log()


def exact(student, teacher, dtype, name):
    """Value, and its gradients with respect to hidden states and weight, in float64."""
    hidden, weight = (tensor.detach().to(dtype).double().cpu() for tensor in student[:2])
    log_q = log_softmax(hidden @ weight.T)
    log_p = log_softmax(teacher.hidden_ND.double().cpu() @ teacher.weight_VD.double().cpu().T)
    q, p = log_q.exp(), log_p.exp()
    m = (p + q) / 2
    onehot = torch.zeros(N, V, dtype=torch.float64)
    onehot[torch.arange(N), LABELS] = 1
    value, slope = {
        "cross_entropy": (-(onehot * log_q), q - onehot),
        "forward_kl": (p * (log_p - log_q), q - p),
        "reverse_kl": (q * (log_q - log_p), q * (log_q - log_p)),
        "jensen_shannon": (p / 2 * (p / m).log() + q / 2 * (q / m).log(), q / 2 * (q / m).log()),
    }[name]
    if name in ("reverse_kl", "jensen_shannon"):
        slope = slope - q * slope.sum(-1, keepdim=True)
    return value.sum(), slope @ weight, slope.T @ hidden


def loss_of(name):
    def sums(student, teacher, labels):
        if name == "cross_entropy":
            return losses.cross_entropy(student, labels).sum()[None]
        return getattr(losses, name)(student, teacher, 1.0).sum()[None]

    return sums


def relative(value, right):
    return ((value.double().cpu() - right).norm() / right.norm()).item()


def errors(name, noise, dtype, whole=False, device="cpu"):
    """(true value per row, errors of value, of the hidden gradient, of the weight gradient)."""
    student, teacher = two_models(noise, dtype, device)
    with torch.autocast(device, dtype):
        given = student.logits() if whole else student
        total = chunked.sum_in_chunks(
            loss_of(name), given, teacher, (LABELS.to(device),), None if whole else 37
        )[0]
    gradients = torch.autograd.grad(total, student[:2])
    rights = exact(student, teacher, dtype, name)
    values = zip((total.detach(), *gradients), rights, strict=True)
    return rights[0].item() / N, *(relative(value, right) for value, right in values)


@pytest.fixture(params=["float32", "native"])
def product_of_device(request, monkeypatch):
    """Float32 copies, as CPUs multiply, or a GPU's product of low precision into float32.

    The latter's operators are defined here by what torch documents of them.
    """
    if request.param == "float32":
        return
    product = torch.mm

    def mm(left, right, out_dtype=None):
        return product(left, right) if out_dtype is None else product(left.float(), right.float())

    def add_product(total, left, right, factor):
        total.add_(product(left.float(), right.float()), alpha=factor)

    def native(dtype, device):
        return products.Products(dtype, dtype in LOW)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(products, "add_product", add_product)
    for module in (products, chunked):
        monkeypatch.setattr(module, "products_of", native)


@pytest.mark.usefixtures("product_of_device")
@pytest.mark.parametrize("whole", [False, True], ids=["chunked", "whole"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("noise", "nats", "most"), [(0.0423, 0.02, 0.01), (0.01337, 0.002, 0.03)], ids=["0.02", "0.002"]
)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_small_divergences_have_exact_gradients(name, noise, nats, most, dtype, whole):
    true, value, hidden, weight = errors(name, noise, dtype, whole)
    # The Jensen-Shannon divergence of neighbours is a quarter of their KL.
    assert true == pytest.approx(nats / (4 if name == "jensen_shannon" else 1), rel=0.3)
    assert value < 0.01
    assert hidden < most
    assert weight < most


@pytest.mark.usefixtures("product_of_device")
@pytest.mark.parametrize("whole", [False, True], ids=["chunked", "whole"])
@pytest.mark.parametrize("dtype", LOW)
def test_cross_entropy_has_an_exact_gradient(dtype, whole):
    _, value, hidden, weight = errors("cross_entropy", 0.0423, dtype, whole)
    assert value < 0.001
    assert hidden < 0.01
    assert weight < 0.01


def test_the_law_refuses_logits_that_were_rounded():
    """Rounded logits, as autocast makes them, break it by far."""
    student, teacher = two_models(0.0423, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.nn.functional.linear(*student).float()
    teacher_rounded = (teacher.hidden_ND @ teacher.weight_VD.T).float()
    total = losses.forward_kl(rounded, teacher_rounded, 1.0).sum()
    (gradient,) = torch.autograd.grad(total, student.hidden_ND)
    assert relative(gradient, exact(student, teacher, torch.bfloat16, "forward_kl")[1]) > 0.05


@pytest.mark.usefixtures("product_of_device")
@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_a_linear_layer_gives_float32_and_the_gradients_of_its_factors(dtype):
    hidden, weight, bias = (
        tensor.to(dtype).requires_grad_()
        for tensor in (normal(1, 2, 3, D), normal(2, V, D), normal(3, V))
    )
    logits = linear_float32(hidden, weight, bias)
    outer = normal(4, 2, 3, V)
    gradients = torch.autograd.grad((logits * outer).sum(), (hidden, weight, bias))
    rights = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    right = rights[0] @ rights[1].T + rights[2]
    expected = torch.autograd.grad((right * outer).sum(), rights)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(logits.double(), right, rtol=1e-5, atol=1e-4)
    for value, expected_value in zip(gradients, expected, strict=True):
        assert value.dtype == dtype
        assert relative(value, expected_value) < 4 * torch.finfo(dtype).eps


def test_a_cpu_with_instructions_for_bf16_uses_them_for_rounded_factors_only(monkeypatch):
    used = []
    multiply = torch.nn.functional.linear

    def linear(*factors):
        used.append(torch.backends.mkldnn.matmul.fp32_precision)
        return multiply(*factors)

    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(products.internals, "cpu_supports_bf16", lambda: True)
    monkeypatch.setattr(products.F, "linear", linear)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        linear_float32(normal(1, 3, D).to(dtype), normal(2, V, D).to(dtype), None)
    assert used == ["bf16", before, before]
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_small_gradients_of_float16_survive_without_a_gradient_scaler():
    """Each is a ten millionth, and float16 ends at 6e-8."""
    native = products.Products(torch.float16, native=True)
    gradient = torch.full((4, V), 1e-7)
    factor = native.gradient_factor(gradient)
    assert factor.dtype == torch.float16
    torch.testing.assert_close(factor.float() / native.scale, gradient, rtol=1e-2, atol=0)
    assert native.gradient_factor(torch.full((1, 1), 1e9)).isfinite().all()
