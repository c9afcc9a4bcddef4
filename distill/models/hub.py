"""Names of models and tokenizers: local folders, folders of installed packages, the Hub.

Errors of transformers are raised as a UserError of one sentence, and its output is silenced.
"""

import logging
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

# Libraries that add handlers to their loggers.
_PRINTING = ("transformers", "datasets", "huggingface_hub", "lightning", "torch", "torchmetrics")


def resolve_path(name: str, key: str) -> str:
    """Resolve the name of a model or tokenizer.

    Args:
        name: A local folder, `package:<distribution>/<folder in it>`, or a name on the Hub.
        key: The recipe's key, for error messages.

    Returns:
        The path of the folder; a name on the Hub is returned unchanged.

    Raises:
        UserError: The folder or package does not exist.
    """
    if name.startswith("package:"):
        return _package_folder(name, key)
    path = Path(name).expanduser()
    is_path = path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1
    if not path.is_dir() and is_path:
        raise UserError(
            f"{key} is {name}, but there is no such folder: "
            "name a model folder, or a model on the Hub"
        )
    return str(path) if path.is_dir() else name


def _package_folder(name: str, key: str) -> str:
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError as error:
        raise UserError(
            f"{key} is {name}, but the package {package} is not installed: "
            "pip install 'distill[demo]' installs those of the shipped recipes"
        ) from error
    if not path.is_dir():
        raise UserError(
            f"{key} is {name}, but the package {package} has no folder {inside}: "
            "name one of its folders"
        )
    return str(path)


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
    except SafetensorError as error:
        raise UserError(
            f"{key} is {name}, but its weights are damaged ({error}): "
            "save or download the model again"
        ) from error
    except OSError as error:
        raise UserError(f"{key} is {name}, but {_explain(error, local)}") from error
    except (ValueError, TypeError, RuntimeError, KeyError, StrictDataclassError) as error:
        raise UserError(
            f"{key} is {name}, but transformers cannot use it ({first_sentences(str(error))}): "
            "correct it, or choose another one"
        ) from error


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
        f"it could not be fetched from the Hub ({first}): "
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
