"""Functions of the loss that a recipe names: what they return is checked."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill import losses
from distill.errors import UserError
from distill.recipe import config, targets
from distill.tasks.base import Task
from distill.tasks.batch import Batch
from distill.terms import Term

__all__ = ["resolve_divergence", "term_value"]

Divergence = Callable[[Tensor, Tensor, float], Tensor]
_ROWS, _WIDTH = 4, 7  # of the example; the width is that of tasks without a number of labels


def resolve_divergence(task: Task, loss: config.Loss) -> Any:
    """The divergence of the recipe, by default the task's first.

    It is called once on a small example.

    Returns:
        A function (student_NC, teacher_NC, temperature) -> divergence_N.

    Raises:
        UserError: if the divergence is not for the task's kind of logits, raises, or does not
            return a finite value with a gradient for each row.
    """
    name = loss.divergence or task.divergences[0]
    if loss.compares_spans and task.predicts_tokens:
        return getattr(losses, name)
    if "." not in name and name not in task.divergences:
        raise UserError(
            f"loss.divergence is {name}, but {type(task).__name__} needs one that suits its "
            f"logits: choose from {', '.join(task.divergences)}"
        )
    path = name if "." in name else f"distill.losses.{name}"
    arguments = ("student", "teacher", "temperature")
    function = targets.import_function("loss.divergence", path, *arguments, optional=("beta",))
    if "beta" in inspect.signature(function).parameters:
        function = partial(function, beta=loss.beta)
    width = task.model_kwargs().get("num_labels", _WIDTH)
    _try(function, path, width, loss.temperature)
    return function if path.startswith("distill.losses.") else _checked(function, path)


def term_value(name: str, term: Term, batch: Batch) -> Tensor:
    """The value of an extra loss term for a batch; UserError if it is no single number."""
    value = term(batch)
    if isinstance(value, Tensor) and not value.ndim and value.is_floating_point():
        return value
    returned = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UserError(
        f"loss.terms.{name} returned {returned}, but a term is one number, a float tensor of "
        "shape (): sum over the tokens and divide by batch.tokens"
    )


def _try(function: Divergence, path: str, width: int, temperature: float) -> None:
    """Call a divergence on random logits; the number of rows differs from the number of logits."""
    generator = torch.Generator().manual_seed(0)
    shape = (_ROWS + (width == _ROWS), width)
    student_NC, teacher_NC = (torch.randn(shape, generator=generator) for _ in range(2))
    student_NC.requires_grad_()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            values_N = function(student_NC, teacher_NC, temperature)
            _check_shape(values_N, student_NC, path)
            _check_finite(values_N, path, temperature)
            (gradient_NC,) = torch.autograd.grad(values_N.sum(), student_NC)
            _check_finite(gradient_NC, path, temperature)
    except UserError:
        raise
    except OverflowError:  # of temperature**2
        _check_finite(torch.tensor(torch.inf), path, temperature)
    except Exception as error:
        raise targets.user_error("loss.divergence", path, error) from error


def _check_shape(values: Any, student_NC: Tensor, path: str) -> None:
    rows = len(student_NC)
    if not isinstance(values, Tensor):
        returned = f"a {type(values).__name__}"
    elif not values.is_floating_point() or values.device != student_NC.device:
        returned = f"a tensor of {values.dtype} on {values.device}"
    elif tuple(values.shape) != (rows,):
        returned = f"a tensor of shape {tuple(values.shape)}"
    else:
        return
    raise UserError(
        f"loss.divergence is {path}, but for {rows} rows of logits it returned {returned}: let it "
        f"return one number for each row, a float tensor of shape ({rows},)"
    )


def _check_finite(values: Tensor, path: str, temperature: float) -> None:
    if not values.isfinite().all():
        raise UserError(
            f"loss.divergence is {path} and loss.temperature is {temperature:g}, but for ordinary "
            "logits the value or its gradient is not finite: choose a temperature between 0.1 "
            "and 100, or another divergence"
        )


def _checked(function: Divergence, path: str) -> Divergence:
    """The function, which may return another shape for other rows than those of the example."""

    def divergence(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
        values_N = function(student_NC, teacher_NC, temperature)
        _check_shape(values_N, student_NC, path)
        return values_N

    return divergence
