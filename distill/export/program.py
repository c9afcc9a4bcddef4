"""Runs the program of a runtime's export as its user does: in the exported folder, and without what it must do without.

python -I program.py question.json answer.json
"""

import json
import os
import sys
import time
from importlib import metadata
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Blocked(MetaPathFinder):
    """Refuses to import packages, so that a program which needs them does not run."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(
                f"{name} is blocked: the program must run without it", name=name
            )


def load(question: dict[str, Any]) -> dict[str, Any]:
    """What the program defines, of the folder that this process then is in."""
    os.chdir(question["folder"])
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(question["program"], "program", "exec"), names)
    return names


def told(row_C: Any, every: bool) -> dict[str, Any]:
    """One row of logits: all of them, or the most likely class, its logit and the logarithm of the sum of all exponentials."""
    import numpy

    if every:
        return {"logits": row_C.tolist()}
    top = row_C.max()
    return {
        "next": int(row_C.argmax()),
        "top": float(top),
        "logsumexp": float(top + numpy.log(numpy.exp(row_C - top).sum())),
    }


def answers(question: dict[str, Any], program: dict[str, Any]) -> dict[str, Any]:
    """Every batch answered as a batch, then the first texts one by one, for their seconds; texts continued, where the program can."""
    answer, write = program["answer"], program.get("write")
    batches = [
        [text[0] if len(text) == 1 else tuple(text) for text in batch]
        for batch in question["batches"]
    ]
    rows = [told(row_C, question["every"]) for batch in batches for row_C in answer(batch)]
    seconds = []
    for text in batches[0]:
        start = time.perf_counter()
        answer([text])
        seconds.append(time.perf_counter() - start)
    written = (
        [] if write is None else [write(text, question["most"]) for text in question["continued"]]
    )
    return {"answers": rows, "seconds": seconds, "written": written}


def main() -> None:
    """Answer the texts of one question."""
    asked, answered = sys.argv[1:]
    question = json.loads(Path(asked).read_text())
    sys.path += [entry for entry in question["packages"] if entry not in sys.path]
    sys.meta_path.insert(0, Blocked(question["blocked"]))
    found = answers(question, load(question))
    versions = {"python": sys.version.split()[0]} | {
        name: metadata.version(name) for name in question["libraries"]
    }
    Path(answered).write_text(json.dumps(found | {"versions": versions}))


if __name__ == "__main__":
    main()
