"""Load a model by name or config, with the task's head, in float32 and eval mode."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill import internals
from distill.errors import UserError
from distill.models.finite_weights import check_finite
from distill.models.generation_settings import read_generation
from distill.models.hub import resolve_path, silence_transformers, translate_errors
from distill.models.model_files import check_files, check_head
from distill.models.positions import counts_from_padding
from distill.models.precision import measured_dtype
from distill.models.preflight import check_labels, compare_labels
from distill.models.random_models import best_attention, from_config, random, without_weights
from distill.models.saving import REMOTE_CLASS
from distill.models.stored_tensors import check_tensors, is_in_head
from distill.models.weight_files import check_weights
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
        UserError: The model does not exist, has weights that are not finite, or does not fit the
            task or the tokenizer.
    """
    if model is None:
        loaded = random(config or {}, task, role, tokenizer)
    else:
        loaded = pretrained(model, task, role, strict)
    check_finite(loaded, model, role)
    if tokenizer is not None:
        _fit_tokenizer(loaded, tokenizer, role)
    return loaded.eval()


def skeleton(
    model: str | None,
    config: dict[str, Any] | None,
    task: Task,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """A model as :func:`load` builds it, from its config alone: on the meta device, no weights."""
    with without_weights():
        if model is None:
            built = random(config or {}, task, role, tokenizer)
        else:
            key = f"{role}.model"
            where = resolve_path(model, key)
            content = AutoConfig.from_pretrained(
                where, trust_remote_code=False, **task.model_kwargs()
            )
            check_head(content, task.auto_class, key, model)
            built = from_config(content, task)
            if built.can_generate():
                read_generation(built, where)
    _fit_tokenizer(built, tokenizer, role)
    return built


def load_trained(
    model: str,
    task: Task,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str = "float32",
) -> PreTrainedModel:
    """Load a model whose tensors are all in its file and whose labels are the task's.

    Compressed ones are loaded in float32 whatever `dtype` is.
    """
    loaded = pretrained(model, task, role, strict=True, dtype=dtype).eval()
    check_finite(loaded, model, role)
    _fit_tokenizer(loaded, tokenizer, role)
    check_labels(loaded, task, role)
    return loaded


def pretrained(
    name: str, task: Task, role: str, strict: bool = False, dtype: str = "float32"
) -> PreTrainedModel:
    """Load a model by name. Without `strict`, tensors of its head may be missing from its file."""
    key = f"{role}.model"
    where = resolve_path(name, key)
    local = Path(where).is_dir()
    check_files(name, key)
    if not local:
        log.info("%s: %s is fetched from the Hub, or read from its cache", role, name)
    with translate_errors(name, key, local), silence_transformers():
        declared = dict(AutoConfig.from_pretrained(where, trust_remote_code=False).id2label)
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **task.model_kwargs())
        check_head(config, task.auto_class, key, name)
        check_weights(name, key)
        task.adapt_config(config)
        loaded, report = _model_class(config, task).from_pretrained(
            where,
            config=config,
            dtype=getattr(torch, measured_dtype(Path(where), dtype) if local else dtype),
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
    if pad_id is not None and counts_from_padding(model.config):
        raise UserError(
            f"the {role}'s padding id is {pad_id}, but the tokenizer's is "
            f"{tokenizer.pad_token_id}, and the {role} counts positions from it: "
            "use its own tokenizer"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
