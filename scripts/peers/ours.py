"""Our student stage, with the teacher's outputs filled in before it: `ours.py FOLDER key=value ...`, a recipe with changes."""

import logging
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).parents[1]
sys.path.append(str(SCRIPTS))

from job import FOLDER, answer, model, timed  # noqa: E402
from measured import composed, prepared  # noqa: E402

from distill import student, teacher  # noqa: E402
from distill.training.loggers import Tracker  # noqa: E402


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    run = composed(dict(argument.split("=", 1) for argument in sys.argv[2:]))
    made = prepared(run)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        tracker = Tracker(run, folder)
        tutor = teacher.obtain(run, made.task, made.tokenizer, made.examples, folder, tracker)

        def fill() -> None:
            made.examples["train"] = teacher.with_outputs(
                run, tutor, made.examples["train"], made.task, made.tokenizer
            )

        filling = timed(fill)
        training = timed(
            lambda: student.distil(
                run, made.task, made.tokenizer, made.examples, tutor, [], folder, tracker
            )
        )
        answer(model(str(folder / "student")), training, filling=filling)


if __name__ == "__main__":
    main()
