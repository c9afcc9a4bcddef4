"""What the student of a run is worth and costs in each runtime, as a Markdown table: bytes, agreement, quality, ratios to the teacher.

    python scripts/runtime_table.py run=FOLDER[,FOLDER...] [runtimes=torch,onnx_int8,...] [key=value ...]

The other keys are those of `python -m distill.evaluate`. A run that has been measured in these runtimes, in this order, is not again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distill.evaluate import RUNTIMES, table

FORMS = "torch,torch_bf16,torch_compile_bf16,torch_compile_int8"
WANTED = f"{FORMS},onnx,onnx_int8,onnx_static,openvino,openvino_int8,executorch,executorch_int8"


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folders, wanted = given.pop("run").split(","), given.pop("runtimes", WANTED)
    for folder in folders:
        print(
            f"\n{Path(folder).name}\n\n{markdown(measured(Path(folder), wanted, given))}",
            flush=True,
        )


def measured(folder: Path, wanted: str, options: dict[str, str]) -> dict[str, Any]:
    """runtimes.json of a run, made where it holds other runtimes or none."""
    file = folder / RUNTIMES
    known = json.loads(file.read_text()) if file.is_file() else {"runtimes": {}, "baseline": None}
    if [name for name in known["runtimes"] if name != known["baseline"]] != wanted.split(","):
        arguments = [
            f"run={folder}",
            f"runtimes=[{wanted}]",
            *(f"{key}={value}" for key, value in options.items()),
        ]
        subprocess.run(
            [sys.executable, "-m", "distill.evaluate", *arguments], check=True, stdout=sys.stderr
        )
    return json.loads(file.read_text())


def markdown(metrics: dict[str, Any]) -> str:
    titles = table.RUNTIME_COLUMNS
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *table.runtime_rows(metrics)]
    return "\n".join(
        [*(f"| {' | '.join(cells)} |" for cells in lines), "", table.runtime_conditions(metrics)]
    )


if __name__ == "__main__":
    main()
