"""Runs that are killed at chosen moments and resumed, compared with an uninterrupted one.

Each run is forked from this process.

python tests/integration/killed.py FOLDER JOBS.json    writes FOLDER/results.json

A job is {"changes": of the tiny recipe, "kills": number per stage, "seed": of their moments}, or
{"row": of the techniques, ...}.
"""

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import tests.conftest  # noqa: F401  the tests' environment
from distill import data, isolated, models, module, stages, student
from distill.train import train
from distill.training import checkpoints
from distill.training.loggers import Tracker
from tests.techniques import TECHNIQUES
from tests.unit.tiny_runs import run_here
from tests.worlds import callbacks_of, tiny, world

FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fuse:
    """Counts events and kills this process at event number `at`."""

    def __init__(self, folder, at=0):
        self.folder, self.at, self.process = str(folder), at, os.getpid()
        self.stage, self.moments = "start", []

    def tick(self):
        if os.getpid() == self.process:
            self.moments.append(self.stage)
            if len(self.moments) == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event, arguments):
        if (
            event in FILES
            and str(arguments[0]).startswith(self.folder)
            and (event != "open" or (arguments[2] or 0) & WRITES)
        ):
            self.tick()

    def burn(self):
        """Count file operations in the folder, training and validation steps, and forwards."""
        sys.addaudithook(self.audit)
        for owner, names in (
            (module.Distillation, ("training_step", "validation_step", "on_before_optimizer_step")),
            (checkpoints.CheckpointSaver, ("on_train_batch_start", "on_validation_end")),
            (models, ("logits",)),
            (data, ("load", "encode")),
        ):
            for name in names:
                setattr(owner, name, self._counted(getattr(owner, name)))
        run_stage = stages.Stages.__call__

        @contextmanager
        def counted(stage, name):
            self.stage = name
            with run_stage(stage, name):
                self.tick()
                yield
                self.tick()

        stages.Stages.__call__ = counted

    def _counted(self, function):
        def counted(*arguments, **options):
            self.tick()
            return function(*arguments, **options)

        return counted


def forked(folder, work, at=0):
    """Whether a forked process that runs `work(folder)` was killed, at event number `at`."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with (folder / "output").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            fuse = Fuse(folder, at)
            fuse.burn()
            work(folder)
            (folder / "moments").write_text(json.dumps(fuse.moments))
            code = 0
        except BaseException:  # noqa: BLE001  this process must end
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError((folder / "output").read_text()[-3000:])
    return os.WIFSIGNALED(status)


def compared(place, work, job):
    """For each kill: the stage that it hit, and what was different in the end."""
    alone = place / "uninterrupted"
    forked(alone, work)
    moments, expected = json.loads((alone / "moments").read_text()), contents(alone)
    rng, results = random.Random(job.get("seed", 0)), []
    for stage, count in job["kills"].items():
        of_stage = [number + 1 for number, name in enumerate(moments) if name == stage]
        for at in rng.sample(of_stage, min(count, len(of_stage))):
            for moment in (at, at - 20, at - 40):  # the number of events varies by a few
                folder = place / f"{stage} {moment}"
                if killed := forked(folder, work, moment):
                    break
            again = job.get("twice") and forked(folder, work, rng.randrange(5, 200))
            forked(folder, work)
            ended = contents(folder)
            different = sorted(
                name
                for name in expected.keys() | ended.keys()
                if expected.get(name) != ended.get(name)
            )
            results.append(
                {
                    "stage": stage,
                    "at": at,
                    "of": len(moments),
                    "killed": killed + bool(again),
                    "different": different,
                }
            )
    return results


# ---- results that must be the same


def contents(folder):
    """Checksums of the results of a run, by name."""
    run = folder / "run"
    files = [
        *run.glob("logs/*/metrics.csv"),
        *(file for name in MODELS for file in (run / name).glob("*.safetensors")),
    ]
    checksums = {str(file.relative_to(run)): digest(file.read_bytes()) for file in files}
    checksums |= {
        f"cache {file.name}": digest(file.read_bytes())
        for file in sorted((folder / "cache").glob("outputs/*/outputs.arrow"))
    }
    for file in sorted(run.glob("checkpoints/*.ckpt")):
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["student_config"] = {
            **json.loads(checkpoint["student_config"]),
            "_name_or_path": "",
        }  # each has its own store
        for part in (
            "state_dict",
            "optimizer_states",
            "lr_schedulers",
            "callbacks",
            "student_config",
            "loops",
        ):
            checksums[f"{file.name} {part}"] = digest(nested(checkpoint[part]))
    if (run / "metrics.json").is_file():
        metrics = json.loads((run / "metrics.json").read_text())
        quality = {
            what: metrics[what]["quality"] for what in ("teacher", "student") if what in metrics
        } | {"training": metrics["training"]}
        checksums["metrics.json"] = digest(
            json.dumps([quality, metrics.get("fidelity"), metrics.get("comparison")]).encode()
        )
    checksums["left over"] = sorted(
        str(file) for file in folder.rglob(".*") if file.name.startswith((".writing", ".export"))
    )
    return checksums


MODELS = ("teacher", "dense", "student", "export")


def nested(value):
    """The bytes of a nest of tensors and plain values."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return b"".join(repr(key).encode() + nested(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return b"".join(map(nested, value))
    return repr(value).encode()


def digest(content):
    return hashlib.sha256(content).hexdigest()


# ---- the two kinds of work


def whole_run(changes):
    run = tiny(**changes)

    def work(folder):
        os.environ["DISTILL_CACHE"] = str(folder / "cache")
        train(run, folder / "run")

    return work


def one_technique(row, changes):
    """The training of the student alone, with a teacher in memory."""
    from dataclasses import replace

    made = world(
        **changes,
        teacher={"config": {"num_attention_heads": 4}, "outputs": "online"},
        data={"batch_size": 120},
    )
    packing, callbacks = TECHNIQUES[row]

    def work(folder):
        run = replace(
            made.run, callbacks=callbacks, export=replace(made.run.export, format=packing)
        )
        teacher = made.model().eval()
        built = callbacks_of(run, made)
        tracker = Tracker(run, folder / "run")
        with stages.Stages()("student"):
            student.train_student(run, made, teacher, built, folder / "run", tracker)

    return work


def main():
    folder, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    isolated.run_isolated = run_here
    results = {}
    for name, job in jobs.items():
        work = (
            one_technique(job["row"], job["changes"]) if "row" in job else whole_run(job["changes"])
        )
        results[name] = compared(folder / name.replace("/", "_"), work, job)
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
