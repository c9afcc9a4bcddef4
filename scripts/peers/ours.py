"""Our student stage after filling the teacher's cache: `ours.py FOLDER key=value ...`."""

import logging
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).parents[1]
sys.path.append(str(SCRIPTS))

from benchmark import compose_run
from job import FOLDER, load_model, print_result, timed

from distill import student, teacher
from distill.prepare import prepare_run
from distill.training.loggers import Tracker


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    run = compose_run(dict(argument.split("=", 1) for argument in sys.argv[2:]))
    made = prepare_run(run)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        tracker = Tracker(run, folder)
        model = teacher.obtain(run, made, folder, tracker)

        def fill() -> None:
            cached = teacher.with_outputs(run, made, model)
            made.examples["train"] = cached.examples["train"]

        filling = timed(fill)
        training = timed(lambda: student.train_student(run, made, model, [], folder, tracker))
        print_result(load_model(str(folder / "student")), training, filling=filling)


if __name__ == "__main__":
    main()
