"""What is computed once and used again, addressed by its ingredients: another ingredient is another entry.

An entry is a folder with a manifest of SHA-256 checksums. It is written under a temporary name and renamed when whole; one
whose files differ from its manifest is never used. What a killed process left half-written is removed by the next one.
"""

import errno
import fcntl
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
from typing import Any

from distill.errors import UserError

log = logging.getLogger(__name__)

MANIFEST, LOCK = "manifest.json", "lock"
TEMPORARY_PREFIX = ".writing-"  # begins what is not whole yet
OLD = 24 * 3600  # seconds after which also what has no lock belongs to nobody
PATIENCE = 15  # seconds that the helpers of a killed process may outlive it


def cache_root() -> Path:
    """DISTILL_CACHE, or ~/.cache/distill."""
    return Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distill")


def entry_path(kind: str, ingredients: dict[str, Any]) -> Path:
    """The folder in which something made of exactly these ingredients is, or will be."""
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return cache_root() / kind / hashlib.sha256(text.encode()).hexdigest()[:32]


def is_intact(folder: Path) -> bool:
    """Whether an entry is there and every file is as it was written."""
    if not folder.is_dir():
        return False
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text())
        damaged = [name for name, checksum in manifest.items() if sha256(folder / name) != checksum]
    except (OSError, ValueError) as error:
        damaged = [str(error)]
    if damaged:
        log.warning("%s is damaged (%s): it is made again", folder, ", ".join(damaged))
    return not damaged


@contextmanager
def write_entry(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes its name only when all of it is there.

    Where another process has made the same entry meanwhile, that one stays: somebody may be reading it.
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
        while not _published(inside, folder, temporary / "earlier"):
            pass
        fsync(folder.parent)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder that is gone afterwards; should this process be killed, the next one that comes here removes it.

    It is told from those of living processes by a lock, which the system opens when a process ends, however it ends.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent)
    temporary, lock = _held(parent)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _held(parent: Path) -> tuple[Path, int]:
    """A new folder and its lock, taken; a process that swept at this very moment may have removed the first one."""
    while True:
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=TEMPORARY_PREFIX))
        with suppress(FileNotFoundError):
            lock = os.open(temporary / LOCK, os.O_CREAT | os.O_RDWR)
            if _lock(lock) and (temporary / LOCK).exists():
                return temporary, lock
            os.close(lock)


def _published(inside: Path, folder: Path, aside: Path) -> bool:
    """Give the folder its name; False where another process was faster, whose folder is to be looked at first."""
    if folder.exists():
        if _manifest(folder) == _manifest(inside) and is_intact(folder):
            return True
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(FileNotFoundError):  # another process has put it aside
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


def remove_abandoned(parent: Path, owned: bool = False) -> None:
    """Remove what killed processes have left half-written in a folder; `owned`: no living process writes there."""
    for left in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if (left / LOCK).exists() and not owned:
            _remove_abandoned(left)
        elif owned or _old(left):
            left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
        elif left.is_dir():
            with suppress(OSError):
                left.rmdir()  # empty: its process was killed before it had a lock, or makes another folder


def _remove_abandoned(left: Path) -> None:
    with suppress(FileNotFoundError):
        lock = os.open(left / LOCK, os.O_RDWR)
        try:
            if _lock(lock):
                log.debug("removing %s, which a killed process has left", left)
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def _old(left: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - left.stat().st_mtime > OLD
    return False


def _lock(handle: int) -> bool:
    """Take a lock; False where another process has it, True also where the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def exclusive_access(folder: Path, patience: float | None = None) -> Iterator[None]:
    """Inside, no other process is at work in this folder; UserError where one still is after so many seconds."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        waiting = time.monotonic() + (PATIENCE if patience is None else patience)
        while not _lock(handle):
            if time.monotonic() > waiting:
                way_out = "wait for its end, or name another with hydra.run.dir"
                raise UserError(
                    f"the run folder is {folder}, but another process is at work in it: {way_out}"
                )
            time.sleep(0.2)
        yield
    finally:
        os.close(handle)


def write_file(file: Path, content: bytes | memoryview) -> None:
    """Write a file whole: it has its name only when every byte is on the disk, and after an error nothing is left of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{TEMPORARY_PREFIX}{file.name}")
    try:
        with draft.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync(file.parent)


def fsync(path: Path) -> None:
    """Returns when the disk has what was written to a file, or which names a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Returns when the disk has a folder and everything in it."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def link_tree(source: Path, target: Path) -> None:
    """The same files under a second name: hard links where the file system has them, copies elsewhere."""
    for file in (file for file in source.rglob("*") if file.is_file()):
        link_file(file, target / file.relative_to(source))


def link_file(file: Path, name: Path) -> None:
    """A second name for a file, in the place of what had it before."""
    name.parent.mkdir(parents=True, exist_ok=True)
    draft = name.with_name(f"{TEMPORARY_PREFIX}{name.name}")
    draft.unlink(missing_ok=True)
    try:
        os.link(file, draft)
    except OSError:
        shutil.copy2(file, draft)
    draft.replace(name)
    draft.unlink(missing_ok=True)  # two names of one file are left as they are by a renaming
