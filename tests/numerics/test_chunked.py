"""The chunked loss of hidden states equals the loss of full logits, in value and gradient."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from distill import losses
from distill.losses import chunked
from distill.losses.chunked import FactoredLogits

N, V, D = 23, 301, 16
DIVERGENCES = {
    **{name: getattr(losses, name) for name in losses.ONE_OF_C},
    "jensen_shannon_0.1": partial(losses.jensen_shannon, beta=0.1),
    "skew_kl_0.9": partial(losses.skew_kl, beta=0.9),
}
CHUNKS = [1, 5, N, 2 * N, None]


def normal(seed, *shape, dtype=torch.float64, scale=1.0):
    return (
        scale
        * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).to(dtype)


def factors(dtype=torch.float64, bias=True, seed=1, width=D, rows=N):
    """Hidden states, head and bias, all with gradient."""
    tensors = (
        normal(seed, rows, width, dtype=dtype),
        normal(seed + 1, V, width, dtype=dtype),
        normal(seed + 2, V, dtype=dtype),
    )
    return FactoredLogits(
        *(tensor.requires_grad_() for tensor in (tensors if bias else tensors[:2])),
        *([] if bias else [None]),
    )


def teacher(dtype=torch.float64, rows=N):
    return FactoredLogits(
        normal(11, rows, D + 3, dtype=dtype), normal(12, V, D + 3, dtype=dtype), None
    )


LABELS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).where(
    torch.arange(N) % 4 > 0, losses.IGNORED
)
WEIGHTS = torch.linspace(0, 2, N, dtype=torch.float64)


def sums(
    student,
    teacher_logits,
    labels,
    weights=None,
    divergence=losses.forward_kl,
    alpha=0.3,
    temperature=2.0,
):
    supervised = losses.cross_entropy(student, labels)
    divergent = (
        supervised * 0
        if teacher_logits is None
        else divergence(student, teacher_logits, temperature)
    )
    total = losses.distillation(supervised, divergent, alpha) * (1 if weights is None else weights)
    return torch.stack([total.sum(), supervised.sum(), divergent.sum()])


def both(function, student, teacher_logits, columns=(LABELS,), rows=5, autocast=nullcontext):
    """(values, gradients) of full logits and of chunks; the loss is a seventh of the sum."""
    learned = [tensor for tensor in student if tensor is not None]
    for full in (True, False):
        with autocast():
            given = (
                (
                    student.logits(),
                    teacher_logits and chunked.teacher_chunk(teacher_logits, slice(None)),
                )
                if full
                else (student, teacher_logits)
            )
            values = chunked.sum_in_chunks(function, *given, columns, rows)
        yield values.detach(), torch.autograd.grad(values[0] / 7, learned)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("rows", CHUNKS)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_those_of_full_logits_in_float64(name, rows, bias):
    function = partial(sums, divergence=DIVERGENCES[name])
    full, parts = both(function, factors(bias=bias), teacher(), rows=rows)
    torch.testing.assert_close(parts, full, rtol=1e-11, atol=1e-12)
    assert all(gradient.abs().max() > 1e-3 for gradient in parts[1])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_equal_those_of_full_logits_in_float32(name):
    function = partial(sums, divergence=DIVERGENCES[name])
    full, parts = both(function, factors(torch.float32), teacher(torch.float32))
    torch.testing.assert_close(
        parts,
        full,
        rtol=1e-4,
        atol=1e-4 * max(gradient.abs().max().item() for gradient in full[1]),
    )
    exact, _ = both(function, factors(), teacher())
    for value, full_value, right in zip(parts[1], full[1], exact[1], strict=True):
        assert (value - right).norm() < 2 * (full_value - right).norm() + 1e-7 * right.norm()


@pytest.mark.parametrize("teacher_logits", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_exact_as_full_logits(teacher_logits, dtype):
    """The chunks accumulate the head's gradient in float32, which may be more exact."""
    autocast = partial(torch.autocast, "cpu", dtype)
    full, parts = both(sums, factors(torch.float32), teacher(teacher_logits), autocast=autocast)
    exact, _ = both(
        sums,
        factors(),
        FactoredLogits(
            *(None if tensor is None else tensor.double() for tensor in teacher(teacher_logits))
        ),
    )
    torch.testing.assert_close(
        parts[0], full[0], rtol=2e-4, atol=0
    )  # logits of few rows and of many are not rounded alike
    for value, full_value, right in zip(parts[1], full[1], exact[1], strict=True):
        assert value.dtype == full_value.dtype == torch.float32
        assert (value - right).norm() < 1.05 * (full_value - right).norm()
        assert (full_value - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize("rows", CHUNKS)
def test_each_row_has_its_weight(rows):
    full, parts = both(sums, factors(), teacher(), (LABELS, WEIGHTS), rows)
    torch.testing.assert_close(parts, full, rtol=1e-11, atol=1e-12)
    assert parts[1][0][0].eq(0).all()
    assert parts[1][0][1:].abs().amax(1).min() > 0


def test_labels_alone_need_no_teacher():
    full, parts = both(partial(sums, alpha=1.0), factors(), None)
    torch.testing.assert_close(parts, full, rtol=1e-11, atol=1e-12)


def test_cached_logits_give_the_loss_of_their_factors():
    student, teacher_logits = factors(), teacher()
    values = [
        chunked.sum_in_chunks(sums, student, given, (LABELS,), 5)
        for given in (teacher_logits, teacher_logits.logits())
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


def test_no_rows_are_zero_and_attached():
    student = factors(rows=0)
    values = chunked.sum_in_chunks(sums, student, teacher(rows=0), (LABELS[:0],), 5)
    values[0].backward()
    assert values.eq(0).all()
    assert all(tensor.grad.eq(0).all() for tensor in student)


def test_equal_factors_have_no_divergence_and_no_gradient():
    student = factors(torch.float32)
    function = partial(sums, alpha=0.0)
    values = chunked.sum_in_chunks(
        function, student, FactoredLogits(*(tensor.detach() for tensor in student)), (LABELS,), 5
    )
    values[0].backward()
    assert values[0] == 0
    assert max(tensor.grad.abs().max() for tensor in student) < 1e-5


def test_without_gradients_none_is_computed(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        values = chunked.sum_in_chunks(sums, factors(), teacher(), (LABELS,), 5)
    torch.testing.assert_close(values, sums(factors().logits(), teacher().logits(), LABELS))


@pytest.mark.parametrize("learned", [0, 1, 2])
def test_frozen_tensors_have_no_gradient(learned):
    student = factors()
    for place, tensor in enumerate(student):
        tensor.requires_grad_(place == learned)
    chunked.sum_in_chunks(sums, student, teacher(), (LABELS,), 5)[0].backward()
    assert [tensor.grad is not None for tensor in student] == [
        place == learned for place in range(3)
    ]
    _, (_, gradients) = both(sums, factors(), teacher())
    torch.testing.assert_close(
        student[learned].grad, 7 * gradients[learned], rtol=1e-11, atol=1e-12
    )


def test_a_tied_head_has_the_gradients_of_both_uses():
    tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
    ends = []
    for full in (True, False):
        table = normal(3, V, D).requires_grad_()
        student = FactoredLogits(torch.tanh(nn.functional.embedding(tokens, table)), table, None)
        chunked.sum_in_chunks(sums, student.logits() if full else student, teacher(), (LABELS,), 5)[
            0
        ].backward()
        ends.append(table.grad)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_a_compiled_function_may_call_it():
    student, teacher_logits = factors(torch.float32), teacher(torch.float32)

    def loss(hidden, weight, bias):
        given = FactoredLogits(hidden * 2, weight, bias)
        return 3 * chunked.sum_in_chunks(sums, given, teacher_logits, (LABELS,), 5)[0]

    ends = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        value = function(*student)
        ends.append((value.detach(), *torch.autograd.grad(value, student)))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_backward_passes_add_up():
    """Accumulated micro-batches, and a gradient scaler's factor."""
    student, teacher_logits = factors(), teacher()
    for part, factor in ((slice(0, 9), 1.0), (slice(9, N), 1.0), (slice(0, N), 1024.0)):
        value, full_value = (
            each._replace(hidden_ND=each.hidden_ND[part]) for each in (student, teacher_logits)
        )
        (factor * chunked.sum_in_chunks(sums, value, full_value, (LABELS[part],), 4)[0]).backward()
    _, (_, gradients) = both(sums, factors(), teacher_logits)
    for tensor, gradient in zip(student, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, 1025 * 7 * gradient, rtol=1e-10, atol=1e-12)


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers."""

    seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        tensors = [
            each
            for each in (made if isinstance(made, tuple | list) else [made])
            if isinstance(each, torch.Tensor)
        ]
        self.seen = max([self.seen, *(tensor.numel() for tensor in tensors)])
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_or_the_head(dtype):
    student, teacher_logits = (
        factors(torch.float32, rows=500),
        teacher(rows=500, dtype=torch.float32),
    )
    labels = torch.zeros(500, dtype=torch.long)
    for rows, largest in ((10, 500 * (D + 3)), (100, 100 * V)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), Widest() as widest:
            chunked.sum_in_chunks(sums, student, teacher_logits, (labels,), rows)[0].backward()
        assert widest.seen <= largest < 500 * V


class Asked(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators that ask a tensor for its value, for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.names.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nothing_asks_for_a_value(name):
    student, function = factors(torch.float32), partial(sums, divergence=DIVERGENCES[name])
    with Asked() as asked:
        chunked.sum_in_chunks(function, student, teacher(torch.float32), (LABELS,), 5)[0].backward()
    assert asked.names == []
