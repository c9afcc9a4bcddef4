"""A config -> a random model, and the keys of the config that cannot be used.

B = examples, L = tokens of an example.
"""

import copy
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill.errors import UserError
from distill.models.forward import forward_arguments
from distill.models.hub import describe, silence_transformers
from distill.models.model_files import check_head
from distill.models.start_tokens import set_decoder_tokens
from distill.tasks.base import Task

__all__ = [
    "best_attention",
    "check_config_keys",
    "check_runs",
    "from_config",
    "random",
    "without_weights",
]

_WITHOUT_WEIGHTS = ContextVar("without_weights", default=False)
_SMALL = 100_000_000  # parameters of a model that is built to find out why it cannot run
# Keys that count something.
_TABLES = ("positions", "position_embeddings", "vocab_size")
_SIZE = re.compile(r"(num|n)_\w+|\w+_(size|dim|layers|heads|positions|embeddings)|dim|\w+_inner")


def random(
    config: dict[str, Any], task: Task, role: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Initialize a model at random, from the global generator.

    The tokenizer gives the defaults of `vocab_size` and of the ids of special tokens.
    """
    key = f"{role}.config"
    check_config_keys(config, key)
    build = partial(_from_keys, task=task, key=key, tokenizer=tokenizer)
    try:
        return build(config)
    except UserError:
        raise
    except Exception as error:
        raise _config_error(config, key, lambda others: _works(build, others), error) from error


def check_runs(
    model: PreTrainedModel,
    config: dict[str, Any],
    task: Task,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Run a random model, which may be on the meta device, on the longest text in training mode.

    Raises:
        UserError: It cannot, and a key of its config is to blame.
    """
    key, length = f"{role}.config", task.max_length
    build = partial(_from_keys, task=task, key=key, tokenizer=tokenizer)
    error = _forward_error(model, length)
    if error is not None and model.num_parameters() < _SMALL:
        # Some models need the values of tensors, which the meta device does not have.
        with torch.random.fork_rng(devices=[]):
            error = _forward_error(build(config), length)
        if error is not None:
            raise _config_error(
                config, key, lambda others: _works(build, others, length), error
            ) from error


def _works(build: Callable[..., PreTrainedModel], config: dict[str, Any], length: int = 0) -> bool:
    """Whether a model of this config can be built and, with a length, run."""
    try:
        with without_weights():
            model = build(config)
    except Exception:  # noqa: BLE001 another key is wrong
        return False
    return not length or _forward_error(model, length) is None


def _from_keys(
    config: dict[str, Any], task: Task, key: str, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedModel:
    options = copy.deepcopy(config)
    model_type = options.pop("model_type")
    # A family's default ids refer to its own vocabulary.
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        tokens = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        }
    with silence_transformers():
        built = AutoConfig.for_model(model_type, **(tokens | options | task.model_kwargs()))
        check_head(built, task.auto_class, f"{key}.model_type", model_type)
        set_decoder_tokens(built, options, tokenizer)
        return from_config(built, task)


def from_config(
    config: PreTrainedConfig, task: Task, attention: str | None = None
) -> PreTrainedModel:
    """Initialize a model with the task's head at random, in float32.

    Args:
        config: Changed in place if the task needs it.
        task: Decides the head.
        attention: Attention implementation; by default the fastest on this machine.
    """
    auto = getattr(transformers, task.auto_class)
    task.adapt_config(config)
    with torch.device("meta") if _WITHOUT_WEIGHTS.get() else nullcontext():
        loaded: PreTrainedModel = auto.from_config(
            config, dtype=torch.float32, attn_implementation=attention or best_attention()
        )
    return loaded.eval()


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside the context, models that are built from a config are on the meta device."""
    token = _WITHOUT_WEIGHTS.set(True)
    try:
        yield
    finally:
        _WITHOUT_WEIGHTS.reset(token)


def best_attention() -> str:
    """The faster attention for short texts: `eager` on CPUs, `sdpa` on GPUs."""
    return "sdpa" if torch.cuda.is_available() else "eager"


# ---- what is wrong with a config


def check_config_keys(config: Mapping[str, Any], key: str) -> None:
    """UserError if the model type or a key of a config is unknown, or a size is negative."""
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        suggestions = get_close_matches(model_type, CONFIG_MAPPING.keys(), n=3)
        raise UserError(
            f"{key}.model_type is {model_type}, but it must be a model type of transformers: "
            f"choose one, such as {', '.join(suggestions or ('bert', 'gpt2', 'llama'))}"
        )
    family = CONFIG_MAPPING[model_type]
    default = family()
    known = default.to_dict().keys() | family.attribute_map.keys() | _keys_read(family.__module__)
    for name, value in config.items():
        if name not in known:
            raise UserError(
                f"{key} has {name}, but a {model_type} config has no such key: "
                f"did you mean {', '.join(get_close_matches(name, known, n=3, cutoff=0))}?"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}.{name} is {value}, but it must be a finite number: correct it")
        least = int(name.endswith(_TABLES))  # an embedding without rows cannot be read
        is_default = value == getattr(default, name, None)  # -1 or 0 may turn something off
        if _SIZE.fullmatch(name) and _is_below(value, least) and not is_default:
            raise UserError(
                f"{key}.{name} is {value}, but it must be at least {least}: correct it, or leave "
                "it out for the family's own"
            )


def _is_below(value: Any, least: int) -> bool:
    return isinstance(value, int | float) and value < least


def _keys_read(module: str) -> set[str]:
    """Keys that the code of a family reads, some of which its config does not list."""
    modeling = importlib.util.find_spec(module.replace("configuration_", "modeling_"))
    if modeling is None or modeling.origin is None:
        return set()
    pattern = r"config\.([a-z]\w*)\b(?!\()|getattr\(\w*config, \"(\w+)\""
    matches = re.findall(pattern, Path(modeling.origin).read_text())
    return {name for names in matches for name in names if name}


def _forward_error(model: PreTrainedModel, length: int) -> Exception | None:
    """What a model raises for a text of this many tokens in training mode; None if nothing."""
    tokens_BL = torch.ones(2, length, dtype=torch.long, device=model.device)
    inputs: dict[str, Any] = {"input_ids": tokens_BL, "attention_mask": tokens_BL}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens_BL
    known = forward_arguments(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.train()(**{name: each for name, each in inputs.items() if name in known})
    except Exception as error:  # noqa: BLE001 code of any family
        return error
    finally:
        model.eval()
    return None


def _config_error(
    config: Mapping[str, Any],
    key: str,
    works: Callable[[dict[str, Any]], bool],
    error: BaseException,
) -> UserError:
    """The error for a config that transformers cannot use, naming the keys that are to blame.

    Args:
        config: The config of the recipe.
        key: Its key, `teacher.config` or `student.config`.
        works: Whether a model of another config can be built and used.
        error: What was raised.
    """
    others = [name for name in config if name != "model_type"]
    blamed = [name for name in others if any(map(works, _without(config, name)))]
    model_type, reason = config["model_type"], describe(error)
    if len(blamed) == 1:
        start = f"{key}.{blamed[0]} is {config[blamed[0]]!r}"
    else:
        shown = {name: config[name] for name in blamed or others}
        start = f"{key} has {', '.join(f'{name}={value!r}' for name, value in shown.items())}"
    return UserError(
        f"{start}, but transformers cannot use this config of a {model_type} ({reason}): correct it"
    )


def _without(config: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """The config without a key, and with 1 for its value."""
    yield {key: value for key, value in config.items() if key != name}
    yield {**config, name: 1}
