"""The process that `run_isolated` starts.

    python -I distill/isolated SCRIPT request.json response.json
    python -I distill/isolated fork_server settings.json

Python puts this folder on `sys.path`, so that `scripts` is a top-level package and `distill` is
not imported.
"""

import json
import os
import sys
from importlib import import_module, metadata
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class ImportBlocker(MetaPathFinder):
    """Raises ModuleNotFoundError for some packages."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(
                f"{name} is blocked: an export must work without it", name=name
            )


def run_script(script: str, request_file: Path, response_file: Path) -> None:
    """Run a script and write its response."""
    request = json.loads(request_file.read_text())
    sys.path += [entry for entry in request["packages"] if entry not in sys.path]
    sys.meta_path.insert(0, ImportBlocker(request.get("blocked", [])))
    set_modules_cache(request_file.parent / "modules")
    response = import_module(f"scripts.{script}").run(request)
    if "libraries" in request:
        versions = {name: metadata.version(name) for name in request["libraries"]}
        response["versions"] = {"python": sys.version.split()[0]} | versions
    response_file.write_text(json.dumps(response))


def set_modules_cache(folder: Path) -> None:
    """Set where transformers copies the code of models; other processes must not share it."""
    os.environ["HF_MODULES_CACHE"] = str(folder)
    sys.path.insert(0, str(folder))
    loader: Any = sys.modules.get("transformers.dynamic_module_utils")
    if loader is not None:  # it has read the environment already
        loader.HF_MODULES_CACHE = str(folder)


def main() -> None:
    script, *files = sys.argv[1:]
    if script == "fork_server":
        from fork_server import serve

        serve(files[0], run_script)
        return
    request_file, response_file = (Path(file).resolve() for file in files)
    run_script(script, request_file, response_file)


if __name__ == "__main__":
    main()
