"""The process that `WarmProcess` starts: imports, then a fork for each connection.

    python -I distill/isolated fork_server settings.json

A connection sends `[script, request file, response file]`, and receives `0` once the script has
succeeded. A script ends with its connection, the process with the pipe of its standard input.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
from array import array
from collections.abc import Callable
from pathlib import Path

RunScript = Callable[[str, Path, Path], None]


def serve(settings_file: str, run_script: RunScript) -> None:
    """Import what the settings name, and run `run_script` for each connection, in a fork."""
    settings = json.loads(Path(settings_file).read_text())
    sys.path += [entry for entry in settings["packages"] if entry not in sys.path]
    listener = socket.socket(fileno=settings["listener"])
    _import(settings["auto_class"])
    pages = resident_file_pages()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        _reap()
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            _supervise(connection, run_script, pages)
        connection.close()


def _reap() -> None:
    """Remove the entries of forks that have ended from the process table."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:  # there are none
        pass


def _import(auto_class: str) -> None:
    import torch  # noqa: F401
    import transformers

    getattr(transformers, auto_class)


def resident_file_pages() -> list[int]:
    """Addresses of the pages of mapped files, such as libraries, that are in this process's memory.

    Linux does not copy their entries in the page table of a fork, so that its resident memory would
    lack them.
    """
    size, pages = os.sysconf("SC_PAGE_SIZE"), []
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in maps:
            addresses, rights, _, _, inode = line.split()[:5]
            if inode == "0" or not rights.startswith("r"):
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            pagemap.seek(start // size * 8)
            flags = array("Q", pagemap.read((end - start) // size * 8))
            pages += [start + size * i for i, flag in enumerate(flags) if flag >> 63]
    return pages


def _supervise(connection: socket.socket, run_script: RunScript, pages: list[int]) -> None:
    """Run a request in another fork, report how it ended, and exit."""
    script, *files = json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
    request, response = map(Path, files)
    pid = os.fork()
    if pid == 0:
        for address in pages:  # a fork shares them, but they count only once they are read
            ctypes.string_at(address, 1)
        _work(script, request, response, run_script)
    threading.Thread(target=_kill_when_closed, args=(connection, pid), daemon=True).start()
    _, status = os.waitpid(pid, 0)
    connection.sendall(b"0" if status == 0 else b"1")
    os._exit(0)


def _kill_when_closed(connection: socket.socket, pid: int) -> None:
    """Kill a script whose request was given up: its parent was interrupted, or has ended."""
    hang_up = select.poll()
    hang_up.register(connection, 0)
    hang_up.poll()
    os.kill(pid, signal.SIGKILL)


def _work(script: str, request: Path, response: Path, run_script: RunScript) -> None:
    code = 1
    try:
        os.chdir(request.parent)
        run_script(script, request, response)
        code = 0
    finally:  # an error is reported by the process that is then started for the request
        os._exit(code)
