"""A run's exports in environments in which only their runtime is installed, as a Markdown table.

    python scripts/bare_runtimes.py run=FOLDER [formats=onnx,openvino,executorch]
                                    [quantize=int8] [texts=4]

For each format: a new environment in a temporary folder with the packages that the export's README
names, in the versions that are installed here; the export; and the program of that README, run on
test texts. For a language model the first prediction is shown as the text that its program writes.
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

from distill import evaluate, packing
from distill.evaluate.inputs import evenly_spaced
from distill.export.command import prepared
from distill.export.proof_inputs import ProofInputs
from distill.export.verify_program import served_logits
from distill.packing import runtime_folder
from distill.recipe import capabilities, compose, config
from distill.tasks import build_task

TITLES = (
    "format",
    "packages in the environment",
    "MB installed",
    "prediction for the first text",
    "equal to the student's",
)
RUN_PROGRAM = """import json, runpy, sys
program = runpy.run_path("program.py")
predict, generate = program["predict"], program.get("generate")
texts = [tuple(cells) if len(cells) > 1 else cells[0] for cells in json.loads(sys.argv[1])]
predictions = [int(predict([text])[0].argmax()) for text in texts]
written = generate(texts[0], 8) if generate else predictions[:1]
print(json.dumps({"predictions": predictions, "written": written}))"""


def main() -> None:
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    formats = arguments.get("formats", ",".join(capabilities.RUNTIMES)).split(",")
    folder = evaluate.check_run_folder(arguments["run"])
    run = compose.load_recipe(str(folder / "recipe.yaml"))
    inputs = proof_inputs(run, folder, int(arguments.get("texts", "4")))
    predictions = student_predictions(inputs)
    print("\n".join(line(cells) for cells in (TITLES, ["---"] * len(TITLES))), flush=True)
    for format in formats:
        settings = config.Export(format=format, quantize=arguments.get("quantize"))
        techniques = capabilities.techniques_of(run.callbacks)
        capabilities.check_export(format, settings.dtype, settings.quantize, settings.bits)
        capabilities.check_techniques(format, settings.quantize, techniques)
        spec = replace(inputs.spec, settings=settings)
        print(line(row(replace(inputs, spec=spec), predictions)), flush=True)


def proof_inputs(run: config.Run, folder: Path, count: int) -> ProofInputs:
    """Texts evenly spaced over the test split, and the student of a run folder."""
    made = prepared(build_task(run.task), run.data, run.seed, folder)
    spec = packing.ExportSpec(run.export, run.data, made.task, made.tokenizer, made.raw["train"])
    texts = made.raw["test"].select(evenly_spaced(len(made.raw["test"]), count))
    return ProofInputs(spec, texts, folder / "student", None, run.evaluate, "cpu", run.seed)


def student_predictions(inputs: ProofInputs) -> list[int]:
    """What the student predicts for each text in PyTorch."""
    with inputs.load_student(inputs.trained, "cpu") as model:
        logits = served_logits(inputs, model, inputs.batches(1, keep_end=True))
    return [int(each_BC[0].argmax()) for each_BC in logits]


def row(inputs: ProofInputs, expected: list[int]) -> list[str]:
    """Export to one format, run its program in a new environment, and compare."""
    spec = inputs.spec
    format = str(spec.settings.format)
    with TemporaryDirectory() as temporary:
        target = Path(temporary, "export")
        target.mkdir()
        packing.write_artefact(spec, inputs.trained, target)
        (target / "program.py").write_text(runtime_folder.runtime_program(format, spec.task))
        libraries = capabilities.RUNTIMES[format].libraries
        python, packages, size = environment(libraries, Path(temporary, "environment"))
        output = call([python, "-I", "-c", RUN_PROGRAM, json.dumps(inputs.cells)], target)
        labels = json.loads((target / "config.json").read_text())["id2label"]
    result = json.loads(output.splitlines()[-1])
    predictions = result["predictions"]
    text = spec.tokenizer.decode(result["written"])
    first = labels[str(predictions[0])] if labels else repr(text)
    equal = sum(map(int.__eq__, predictions, expected))
    megabytes = f"{size / 1e6:.0f}"
    return [format, ", ".join(packages), megabytes, str(first), f"{equal} of {len(expected)}"]


def environment(libraries: Iterable[str], folder: Path) -> tuple[Path, list[str], int]:
    """The python of a new environment, its packages, and their bytes."""
    venv.create(folder, symlinks=True, with_pip=True)
    python = folder / "bin" / "python"
    pinned = [f"{library}=={metadata.version(library).partition('+')[0]}" for library in libraries]
    call([python, "-I", "-m", "pip", "install", "--quiet", *pinned], folder)
    listed = json.loads(call([python, "-I", "-m", "pip", "list", "--format=json"], folder))
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    packages = [each["name"] for each in listed if each["name"] not in ("pip", "setuptools")]
    return python, packages, sum(file.stat().st_size for file in files)


def call(command: list[Any], folder: Path) -> str:
    """The command's output; exits with the end of its error output if it fails."""
    words = [str(part) for part in command]
    process = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(words[:4])} failed: {process.stderr.strip()[-2000:]}")
    return process.stdout


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
