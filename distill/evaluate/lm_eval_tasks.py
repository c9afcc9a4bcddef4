"""Metrics of language models on tasks of lm-eval, in a separate process."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distill import isolated
from distill.errors import RunFailed, UserError
from distill.evaluate.quality import LEVEL, NORMAL
from distill.evaluate.record_parts import Interval, number
from distill.recipe import config
from distill.tasks.base import Task


def check_settings(settings: config.Evaluate, task: Task) -> None:
    """Check `evaluate.generate` and `evaluate.harness` before anything is trained.

    Raises:
        UserError: the models do not generate, or lm-eval or one of its tasks is missing.
    """
    for key in ("generate", "harness"):
        value = getattr(settings, key)
        if value and not task.generates:
            raise UserError(
                f"evaluate.{key} is {_shown(value)}, but the models of {type(task).__name__} "
                "generate no text: leave it out"
            )
    if not settings.harness:
        return
    if find_spec("lm_eval") is None:
        raise UserError(
            f"evaluate.harness is {_shown(settings.harness)}, but lm-eval is not installed: "
            'pip install "distill[harness]", or leave it out'
        )
    path = settings.harness_path
    if path is not None and not Path(path).expanduser().is_dir():
        raise UserError(
            f"evaluate.harness_path is {path}, but there is no such folder: "
            "give the folder of the task files"
        )
    unknown = _run(settings, {"models": {}})["unknown"]
    if unknown:
        raise UserError(
            f"evaluate.harness has {', '.join(unknown)}, but lm-eval "
            f"{'' if path is None else f'and {path} '}has no such task: "
            "`lm-eval ls tasks` lists them, and evaluate.harness_path adds others"
        )


def measure_harness(
    settings: config.Evaluate, request: dict[str, Any], tokenizers: Mapping[str, Path]
) -> dict[str, dict[str, Interval]]:
    """The metrics of models, with intervals by their standard errors.

    Args:
        settings: The recipe's section `evaluate`.
        request: The models, see :func:`distill.evaluate.cost.model_request`.
        tokenizers: The folder of each model's tokenizer.

    Raises:
        RunFailed: lm-eval fails.
    """
    paths = {name: str(folder) for name, folder in tokenizers.items()}
    measured = _run(settings, request | {"tokenizers": paths})["metrics"]
    return {
        name: {metric: _interval(*pair) for metric, pair in metrics.items()}
        for name, metrics in measured.items()
    }


def _run(settings: config.Evaluate, request: dict[str, Any]) -> dict[str, Any]:
    path = settings.harness_path
    arguments = {
        "tasks": list(settings.harness),
        "path": None if path is None else str(Path(path).expanduser().resolve()),
        "limit": settings.harness_limit,
        "batch_size": settings.batch_size,
        "threads": settings.threads,
        "online": True,  # tasks download their data
    }
    try:
        return isolated.run_isolated("harness", arguments | request)
    except isolated.ProcessError as error:
        raise RunFailed(
            f"evaluate.harness is {_shown(settings.harness)}, but lm-eval failed ({error}): "
            "repair the task, or leave it out"
        ) from error


def _interval(value: float, error: float | None) -> Interval:
    reach = NORMAL.inv_cdf((1 + LEVEL) / 2) * number(error)
    return Interval(value, value - reach, value + reach)


def _shown(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value).lower()
