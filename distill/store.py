"""Cached results, addressed by a hash of their ingredients, and files written atomically.

An entry is a folder with a manifest of SHA-256 checksums. It is written under a temporary name and
renamed when complete. An entry that differs from its manifest is never used. The next process
removes what a killed one left incomplete.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from distill.errors import UserError

__all__ = [
    "LOCK_FILE",
    "MANIFEST",
    "TEMPORARY_PREFIX",
    "atomic_file",
    "cache_root",
    "entry_path",
    "exclusive_access",
    "fsync",
    "fsync_tree",
    "is_intact",
    "link_file",
    "link_tree",
    "remove_abandoned",
    "sha256",
    "temporary_folder",
    "write_entry",
    "write_file",
]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK_FILE = ".lock"  # in a run folder, and in a temporary one
TEMPORARY_PREFIX = ".writing-"  # prefix of incomplete files and folders
_ABANDONED_SECONDS = 24 * 3600  # age from which temporary files without a lock are removed
_LOCK_TIMEOUT = 15  # seconds; DataLoader processes may outlive a killed run for that long
_LOCK_POLL_SECONDS = 0.2
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems without locks


def cache_root() -> Path:
    """The folder of cached results: ``DISTILL_CACHE``, or ``~/.cache/distill``."""
    return Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distill")


def entry_path(kind: str, ingredients: dict[str, Any]) -> Path:
    """The folder of a cached result.

    Args:
        kind: Name of a group of entries, such as ``teachers``.
        ingredients: Everything that the result depends on, as JSON values.
    """
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return cache_root() / kind / hashlib.sha256(text.encode()).hexdigest()[:32]


def is_intact(folder: Path) -> bool:
    """Whether an entry exists and every file matches its checksum."""
    if not folder.is_dir():
        return False
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text())
        damaged = [name for name, checksum in manifest.items() if sha256(folder / name) != checksum]
    except (OSError, ValueError) as error:
        damaged = [str(error)]
    if damaged:
        log.warning("%s is damaged (%s): it is computed again", folder, ", ".join(damaged))
    return not damaged


@contextmanager
def write_entry(folder: Path) -> Iterator[Path]:
    """A temporary folder, which is renamed to the entry's at the end of the block.

    If another process has written the same entry meanwhile, that one is kept: it may be in use.

    Example::

        with write_entry(entry_path("teachers", ingredients)) as folder:
            model.save_pretrained(folder)
    """
    with temporary_folder(folder.parent) as temporary:
        inside = temporary / folder.name
        inside.mkdir()
        yield inside
        manifest = {
            str(file.relative_to(inside)): sha256(file)
            for file in sorted(inside.rglob("*"))
            if file.is_file()
        }
        (inside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        fsync_tree(inside)
        while not _published(inside, folder, temporary / "replaced"):
            pass
        fsync(folder.parent)


def _published(inside: Path, folder: Path, aside: Path) -> bool:
    """Rename the folder; False if another process was faster and its entry must be checked."""
    if folder.exists():
        if _manifest(folder) == _manifest(inside) and is_intact(folder):
            return True
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(FileNotFoundError):  # another process has moved it
            folder.replace(aside)
    try:
        inside.replace(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _manifest(folder: Path) -> str:
    try:
        return (folder / MANIFEST).read_text()
    except OSError:
        return ""


# ---- temporary folders and locks


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder that is removed at the end of the block.

    If this process is killed, the next call with the same parent removes the folder. It is locked
    while this process lives: the operating system releases the lock of a killed process.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent)
    temporary, lock = _locked_folder(parent)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.release()


def _locked_folder(parent: Path) -> tuple[Path, FileLock]:
    """A new folder and its lock; another process may remove the folder before it is locked."""
    while True:
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=TEMPORARY_PREFIX))
        with suppress(FileNotFoundError, FileExistsError):
            lock = _try_lock(temporary / LOCK_FILE)
            if lock and (temporary / LOCK_FILE).exists():
                return temporary, lock
            if lock:
                lock.release()


def remove_abandoned(parent: Path, owned: bool = False) -> None:
    """Remove the incomplete files and folders of killed processes.

    Args:
        parent: The folder that holds them.
        owned: Whether no other process writes in `parent`; otherwise locked folders and files
            younger than a day are kept.
    """
    for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if (path / LOCK_FILE).exists() and not owned:
            _remove_unlocked(path)
        elif owned or _is_old(path):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            with suppress(OSError):
                path.rmdir()  # empty and unlocked: its process was killed, or makes another


def _remove_unlocked(folder: Path) -> None:
    with suppress(FileNotFoundError, FileExistsError):  # another process is removing it
        if lock := _try_lock(folder / LOCK_FILE):
            log.debug("removing %s, which a killed process left", folder)
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def _is_old(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    return False


@contextmanager
def exclusive_access(folder: Path, timeout: float | None = None) -> Iterator[None]:
    """Lock a run folder for this process.

    Args:
        folder: Its lock is the file ``.lock``, which is not removed.
        timeout: Seconds to wait for another process, 15 by default.

    Raises:
        UserError: if another process still holds the lock.
    """
    lock = _try_lock(folder / LOCK_FILE, _LOCK_TIMEOUT if timeout is None else timeout)
    if lock is None:
        raise UserError(
            f"the run folder is {folder}, but another process is working in it: "
            "wait until it has ended, or choose another folder"
        )
    try:
        yield
    finally:
        lock.release()


def _try_lock(file: Path, timeout: float = 0) -> FileLock | None:
    """Lock a file; None if another process holds it. A file system without locks locks nothing."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=timeout, poll_interval=_LOCK_POLL_SECONDS)
    except Timeout:
        return None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    return lock


# ---- files


def write_file(file: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: on the disk it is complete, or unchanged."""
    with atomic_file(file) as stream:
        stream.write(content)


@contextmanager
def atomic_file(file: Path) -> Iterator[BinaryIO]:
    """A stream to a temporary file, which is on the disk and renamed at the end of the block."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{TEMPORARY_PREFIX}{file.name}")
    try:
        with draft.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync(file.parent)


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """Hard-link all files of a folder; copy them on file systems without hard links."""
    for file in (file for file in source.rglob("*") if file.is_file()):
        link_file(file, target / file.relative_to(source))


def link_file(file: Path, name: Path) -> None:
    """Hard-link a file, or copy it; an existing file of that name is replaced."""
    name.parent.mkdir(parents=True, exist_ok=True)
    draft = name.with_name(f"{TEMPORARY_PREFIX}{name.name}")
    draft.unlink(missing_ok=True)
    try:
        os.link(file, draft)
    except OSError:
        shutil.copy2(file, draft)
    draft.replace(name)
    draft.unlink(missing_ok=True)  # renaming one link of a file to another does nothing
