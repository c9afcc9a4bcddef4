"""Folders that a run writes into, tried before anything is computed."""

import os
import tempfile
from pathlib import Path

from distill import store
from distill.errors import UserError

__all__ = ["check_places", "check_writable"]

_PROBE = bytes(2**16)  # a full disk may still take a file without content


def check_places(folder: Path) -> None:
    """Check that a run can write into its folder, the store and the folder of temporary files.

    Raises:
        UserError: one cannot be written: it is read-only or full, or a file is in its place.
    """
    check_writable(folder, "hydra.run.dir")
    check_writable(store.cache_root(), "DISTILL_CACHE")
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError as error:
        raise UserError(
            f"TMPDIR is {os.environ.get('TMPDIR', 'not set')}, but no folder for temporary files "
            "can be written: set it to one with room"
        ) from error
    check_writable(temporary, "TMPDIR")


def check_writable(folder: Path, key: str) -> None:
    """Write a temporary file into a folder, which is made if there is none.

    Args:
        folder: The folder.
        key: What names it, for the message.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(_PROBE)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(
            f"{key} is {folder}, but nothing can be written there ({error.strerror}): make room, "
            "or choose another folder"
        ) from error
