"""The family table: each model family with each technique and export format, as Markdown.

    python scripts/family_table.py [--families bert,phi3] [--rows neurons,heads] [--exports]

A cell is `works` where a tiny random model was distilled with the technique, exported and proven,
and otherwise the number of the sentence below the table that refuses it. With `--exports`, the
columns are the export formats of a student of two layers; formats need their extras installed.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from distill import isolated
from distill.errors import RunFailed, UserError
from tests.families import EXPORTS, FAMILIES, GRID, outcome
from tests.unit.tiny_runs import run_here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rows", default=",".join(GRID))
    parser.add_argument("--exports", nargs="?", const=",".join(EXPORTS), default="")
    parser.add_argument("--isolated", action="store_true", help="prove in processes of their own")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    if not options.isolated:
        isolated.run_isolated = run_here
    columns = (options.exports or options.rows).split(",")
    print("| family |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    sentences: list[str] = []
    for family in options.families.split(","):
        cells = []
        for column in columns:
            row, form = ("layers", column) if options.exports else (column, None)
            cells.append(cell(family, row, form, sentences))
        print(f"| {family} |", " | ".join(cells), "|", flush=True)
    print()
    for number, sentence in enumerate(sentences, 1):
        print(f"{number}. {sentence}")


def cell(family: str, row: str, form: str | None, sentences: list[str]) -> str:
    os.chdir(Path(__file__).parents[1])  # a proof in this process may have changed it
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = outcome(family, row, Path(folder), form)
        except (UserError, RunFailed) as error:
            result = str(error)
        except Exception as error:  # noqa: BLE001 (a cell of the table)
            result = f"**{type(error).__name__}**: {error}"
    if result == "works":
        return result
    result = result.replace(folder, "RUN").replace(f"is {family}", "is *family*").strip()
    if result not in sentences:
        sentences.append(result)
    return str(sentences.index(result) + 1)


if __name__ == "__main__":
    main()
