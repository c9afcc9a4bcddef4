"""Load a model by name or config, with the task's head, in float32 and eval mode."""

import copy
import logging
from difflib import get_close_matches
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

from distill import internals
from distill.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.models.hub import resolve_path, silence_transformers, translate_errors
from distill.models.preflight import check_labels, compare_labels
from distill.models.saving import REMOTE_CLASS
from distill.models.stored_tensors import check_tensors, is_in_head
from distill.remote_code import container
from distill.tasks.base import Task

log = logging.getLogger("distill")


def load(
    model: str | None,
    config: dict[str, Any] | None,
    task: Task,
    role: str = "teacher",
    tokenizer: PreTrainedTokenizerBase | None = None,
    strict: bool = False,
) -> PreTrainedModel:
    """Load a model by name, or initialize one at random from a config.

    A trained head keeps its label names in its config, for :func:`distill.models.check_labels`.

    Args:
        model: A folder, `package:<distribution>/<folder>` or a name on the Hub; None uses `config`.
        config: Keys of the config of a random model, with `model_type`.
        task: Decides the head.
        role: `teacher` or `student`, for messages.
        tokenizer: If given, the model must have an embedding for each of its ids.
        strict: Whether the tensors of the head, too, must be in the model's file.

    Raises:
        UserError: The model does not exist, or does not fit the task or the tokenizer.
    """
    if model is None:
        loaded = random(config or {}, task, role, tokenizer)
    else:
        loaded = pretrained(model, task, role, strict)
    if tokenizer is not None:
        _fit_tokenizer(loaded, tokenizer, role)
    return loaded.eval()


def load_trained(
    model: str, task: Task, role: str, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load a model whose tensors are all in its file and whose labels are the task's."""
    loaded = load(model, None, task, role, tokenizer, strict=True)
    check_labels(loaded, task, role)
    return loaded


def random(
    config: dict[str, Any], task: Task, role: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Initialize a model at random, from the global generator.

    The tokenizer gives the defaults of `vocab_size` and of the ids of special tokens.
    """
    options = _check_keys(config, f"{role}.config")
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
    with translate_errors(str(config), f"{role}.config"), silence_transformers():
        return from_config(
            AutoConfig.for_model(model_type, **(tokens | options | task.model_kwargs())), task
        )


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
    loaded: PreTrainedModel = auto.from_config(
        config, dtype=torch.float32, attn_implementation=attention or best_attention()
    )
    return loaded.eval()


def pretrained(name: str, task: Task, role: str, strict: bool = False) -> PreTrainedModel:
    """Load a model by name. Without `strict`, tensors of its head may be missing from its file."""
    key = f"{role}.model"
    where = resolve_path(name, key)
    local = Path(where).is_dir()
    if local and not (Path(where) / "config.json").is_file():
        raise UserError(
            f"{key} is {name}, but this folder has no config.json: "
            "name a folder that save_pretrained wrote"
        )
    with translate_errors(name, key, local), silence_transformers(bars=local):
        declared = dict(AutoConfig.from_pretrained(where, trust_remote_code=False).id2label)
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **task.model_kwargs())
        task.adapt_config(config)
        loaded, report = _model_class(config, task).from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            attn_implementation=best_attention(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `report`, and check_tensors refuses them
            trust_remote_code=False,
        )
    if any(is_in_head(tensor, loaded) for tensor, *_ in report["mismatched_keys"]):
        compare_labels(declared, task.names, role)
    check_tensors(loaded, report, name, role, strict)
    _restore_labels(loaded, report["missing_keys"], declared, task, role)
    return loaded


def _model_class(config: PreTrainedConfig, task: Task) -> Any:
    """The class whose `from_pretrained` reads the files.

    A compressed student is loaded by this library's copy of its remote code; the code in the folder
    is never run.
    """
    named = (config.to_dict().get("auto_map") or {}).values()
    if not container.needs_code(config) and REMOTE_CLASS not in named:
        return getattr(transformers, task.auto_class)
    stored = "".join((config.architectures or [])[:1])
    expected = internals.model_class(task.auto_class, config)
    expected_name = None if expected is None else expected.__name__
    if stored != expected_name:
        raise ValueError(f"it is compressed as a {stored}, and the task needs a {expected_name}")
    return container.CompressedModel


def _restore_labels(
    model: PreTrainedModel, missing: set[str], declared: dict[int, str], task: Task, role: str
) -> None:
    """Restore the label names of the loaded config if the head was trained."""
    if missing:
        log.info(
            "%s: %d tensors of the head are initialized at random (%s)",
            role,
            len(missing),
            ", ".join(sorted(missing)),
        )
    head_is_new = any(not name.startswith(f"{model.base_model_prefix}.") for name in missing)
    if task.names and not head_is_new:
        model.config.id2label = declared
        model.config.label2id = {label: i for i, label in declared.items()}


def _fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    """Set the model's padding id; UserError if the model lacks ids of the tokenizer."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    pad_id = model.config.pad_token_id
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(
            f"the {role} has embeddings for {rows} tokens, but the tokenizer's ids go up to "
            f"{highest}: use its own tokenizer"
        )
    if pad_id == tokenizer.pad_token_id:
        return
    family = ARCHITECTURES.get(model.config.model_type)
    if pad_id is not None and family is not None and family.positions_after_pad:
        raise UserError(
            f"the {role}'s padding id is {pad_id}, but the tokenizer's is "
            f"{tokenizer.pad_token_id}, and the {role} counts positions from it: "
            "use its own tokenizer"
        )
    model.config.pad_token_id = tokenizer.pad_token_id


def _check_keys(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A copy of the config; UserError if its model type or one of its keys is unknown."""
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{key}.model_type is {model_type}, but it must be a model type of transformers: "
            "choose one, such as bert, gpt2 or llama"
        )
    family = CONFIG_MAPPING[model_type]
    known = family().to_dict().keys() | family.attribute_map.keys()
    for name in config.keys() - known:
        suggestions = get_close_matches(name, known, n=3) or sorted(known)[:8]
        raise UserError(
            f"{key} has {name}, but a {model_type} config has no such key: "
            f"did you mean {', '.join(suggestions)}?"
        )
    return copy.deepcopy(config)


def best_attention() -> str:
    """The faster attention for short texts: `eager` on CPUs, `sdpa` on GPUs."""
    return "sdpa" if torch.cuda.is_available() else "eager"
