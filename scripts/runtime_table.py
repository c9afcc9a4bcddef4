"""Quality and cost of a run's student in each runtime as a Markdown table, with ratios to the
teacher.

    python scripts/runtime_table.py run=FOLDER[,FOLDER...] [runtimes=torch,onnx_int8,...]
                                    [key=value ...]

Other keys are those of `python -m distill.evaluate`. A run is measured again only if its
runtimes.json holds other runtimes.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distill.evaluate import RUNTIMES, RuntimesReport, runtimes_table

TORCH = "torch,torch_bf16,torch_compile_bf16,torch_compile_int8"
ONNX = "onnx,onnx_int8,onnx_static"
ALL = f"{TORCH},{ONNX},openvino,openvino_int8,executorch,executorch_int8"


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folders, runtimes = options.pop("run").split(","), options.pop("runtimes", ALL)
    for folder in map(Path, folders):
        metrics = measure(folder, runtimes, options)
        print(f"\n{folder.name}\n\n{markdown(metrics)}", flush=True)


def measure(folder: Path, runtimes: str, options: dict[str, str]) -> dict[str, Any]:
    """runtimes.json of a run, written first unless it has these runtimes."""
    file = folder / RUNTIMES
    earlier = json.loads(file.read_text()) if file.is_file() else {"runtimes": {}, "baseline": None}
    if [name for name in earlier["runtimes"] if name != earlier["baseline"]] != runtimes.split(","):
        keys = [f"{key}={value}" for key, value in options.items()]
        command = [sys.executable, "-m", "distill.evaluate", f"run={folder}"]
        command += [f"runtimes=[{runtimes}]", *keys]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(file.read_text())


def markdown(metrics: dict[str, Any]) -> str:
    report, titles = RuntimesReport.from_json(metrics), runtimes_table.COLUMNS
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *runtimes_table.rows(report)]
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([*rows, "", runtimes_table.conditions(report)])


if __name__ == "__main__":
    main()
