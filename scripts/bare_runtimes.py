"""Whether a run's exports answer where nothing but their runtime is installed, as a Markdown table.

    python scripts/bare_runtimes.py run=FOLDER [formats=onnx,openvino,executorch] [quantize=int8] [texts=4]

For each format: an environment of its own in a temporary folder, which gets the packages that the export's README names, in the versions
that are installed here; the export without its proof; and the program of that README, asked held-out texts. A language model's answer to
the first is how its program goes on with it.
"""

import json
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from distill import evaluate, export, models, packing
from distill.evaluate.measure import evenly_spaced
from distill.export.runtime_proof import Given, given, student_rows
from distill.packing import runtime_folder
from distill.recipe import capabilities, compose, config
from distill.tasks.base import Task

TITLES = (
    "format",
    "packages in the environment",
    "MB installed",
    "answer to the first text",
    "same as the student's",
)
ASK = """import json, runpy, sys
program = runpy.run_path("program.py")
answer, write = program["answer"], program.get("write")
texts = [tuple(cells) if len(cells) > 1 else cells[0] for cells in json.loads(sys.argv[1])]
said = [int(answer([text])[0].argmax()) for text in texts]
print(json.dumps({"said": said, "written": write(texts[0], 8) if write else said[:1]}))"""


def main() -> None:
    asked = {"formats": ",".join(capabilities.RUNTIMES), "texts": "4"} | dict(
        argument.split("=", 1) for argument in sys.argv[1:]
    )
    folder = evaluate.finished(asked["run"])
    run = compose.load_recipe(str(folder / "recipe.yaml"))
    task, raw, tokenizer = export.prepared(run, folder)
    raw = raw.select(evenly_spaced(len(raw), int(asked["texts"])))
    run = replace(run, evaluate=replace(run.evaluate, batch_size=1))
    texts = given(run, task, raw, tokenizer)
    expected = own(task, tokenizer, folder / "student", texts)
    print("\n".join(line(cells) for cells in (TITLES, ["---"] * len(TITLES))), flush=True)
    for format in asked["formats"].split(","):
        run = replace(run, export=config.Export(format=format, quantize=asked.get("quantize")))  # type: ignore[arg-type]
        capabilities.check(
            run.callbacks, format, run.export.dtype, run.export.quantize, run.export.bits
        )
        with TemporaryDirectory() as temporary:
            print(
                line(row(run, task, tokenizer, folder, texts.cells, expected, Path(temporary))),
                flush=True,
            )


def own(task: Task, tokenizer: Any, student: Path, asked: Given) -> list[int]:
    """What the student answers, by torch."""
    model = models.load(str(student), None, task, "student", tokenizer, strict=True)
    return [
        int(row_C.argmax()) for row_C in torch.cat(list(student_rows(task, model, asked.batches)))
    ]


def row(
    run: config.Run,
    task: Task,
    tokenizer: Any,
    folder: Path,
    texts: list[list[str]],
    expected: list[int],
    temporary: Path,
) -> list[str]:
    """One format: made, asked, compared."""
    format, target = str(run.export.format), temporary / "export"
    target.mkdir()
    packing.write_artefact(run, task, tokenizer, folder / "student", target)
    (target / "program.py").write_text(runtime_folder.runtime_program(format, task.pipeline))
    python, packages, size = environment(
        capabilities.RUNTIMES[format].libraries, temporary / "environment"
    )
    answered = json.loads(
        called([python, "-I", "-c", ASK, json.dumps(texts)], target).splitlines()[-1]
    )
    told = answered["said"]
    names = json.loads((target / "config.json").read_text())["id2label"]
    first = names[str(told[0])] if names else repr(tokenizer.decode(answered["written"]))
    same = sum(answer == other for answer, other in zip(told, expected, strict=True))
    return [format, ", ".join(packages), f"{size / 1e6:.0f}", str(first), f"{same} of {len(texts)}"]


def environment(libraries: list[str], folder: Path) -> tuple[Path, list[str], int]:
    """Its Python, the packages that it holds, and their bytes."""
    venv.create(folder, symlinks=True, with_pip=True)
    python = folder / "bin" / "python"
    wanted = [f"{library}=={metadata.version(library).partition('+')[0]}" for library in libraries]
    called([python, "-I", "-m", "pip", "install", "--quiet", *wanted], folder)
    found = json.loads(called([python, "-I", "-m", "pip", "list", "--format=json"], folder))
    size = sum(
        file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink()
    )
    return (
        python,
        [each["name"] for each in found if each["name"] not in ("pip", "setuptools")],
        size,
    )


def called(command: list[Any], folder: Path) -> str:
    """What it prints; what it says on its other stream is shown where it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(
            f"{' '.join(str(part) for part in command[:4])} failed: {done.stderr.strip()[-2000:]}"
        )
    return done.stdout


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
