"""Kills runs at random moments, resumes them, and compares the results with a run that was not
killed.

    python scripts/soak.py [kills=40] [devices=1] [seed=0] [folder=/tmp/soak] [key=value ...]

Every attempt is the command on the tiny recipe in its own folder and store. It is killed by SIGKILL
at a random moment of one stage after another, and resumed until it finishes. Prints a Markdown
table: stage, kills tried, identical results. Folders of runs whose results differ are kept, the
others removed.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.integration.killed import contents

STAGES = ("data", "teacher", "cache", "student", "evaluate", "export")
SIZES = [
    "trainer.accumulate=2",
    "trainer.checkpoint.steps=5",
    "evaluate.bootstrap=20",
    "evaluate.requests=1",
    "evaluate.batches=1",
]
STAGE_TIME = re.compile(r"^(\w+) took ([\d.]+) s$")


def start(folder, *arguments):
    """Start the command in its own process group."""
    variables = {
        "DISTILL_CACHE": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "distill.train", *arguments],
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_run(folder, arguments):
    folder.mkdir(parents=True)
    return start(folder, "recipe=tiny", "hydra.run.dir=run", *SIZES, *arguments)


def stage_seconds(folder, arguments):
    """Seconds of each stage of a run that is not killed."""
    process = start_run(folder, arguments)
    lines = [line.strip() for line in process.stderr]
    if process.wait():
        sys.exit("\n".join(lines[-20:]))
    return {match[1]: float(match[2]) for match in map(STAGE_TIME.match, lines) if match}


def kill_in_stage(folder, arguments, stage, seconds):
    """Kill a run some seconds into a stage; False if it had finished by then."""
    process = start_run(folder, arguments)
    for line in process.stderr:
        if line.startswith(f"── {stage} "):
            time.sleep(seconds)
            break
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.stderr.close()
    return process.wait() == -signal.SIGKILL


def resume(folder):
    """Resume a run; returns the error output if that fails, else None."""
    if not (folder / "run" / "recipe.yaml").exists():
        return "the run was killed before it wrote its recipe"
    process = start(folder, "resume=run")
    output = process.communicate()[1]
    return output if process.returncode else None


def differences(expected, folder):
    """Names of the files that are missing, additional, or have other contents."""
    actual = contents(folder)
    names = expected.keys() | actual.keys()
    return sorted(name for name in names if expected.get(name) != actual.get(name))


def main():
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    kills, folder = int(options.pop("kills", 40)), Path(options.pop("folder", "/tmp/soak"))
    rng, devices = random.Random(int(options.pop("seed", 0))), options.pop("devices", 1)
    arguments = [f"trainer.devices={devices}"]
    arguments += [f"{key}={value}" for key, value in options.items()]
    shutil.rmtree(folder, ignore_errors=True)
    seconds = stage_seconds(folder / "uninterrupted", arguments)
    expected = contents(folder / "uninterrupted")
    counts = {stage: [0, 0] for stage in STAGES}
    for number in range(kills):
        stage = STAGES[number % len(STAGES)]
        attempt = folder / f"{number} {stage}"
        if not kill_in_stage(attempt, arguments, stage, rng.uniform(0, seconds[stage])):
            shutil.rmtree(attempt)
            continue
        problem = resume(attempt) or differences(expected, attempt)
        counts[stage][0] += 1
        counts[stage][1] += not problem
        print(f"{number + 1} of {kills}: {stage}: {problem or 'identical'}", file=sys.stderr)
        if not problem:
            shutil.rmtree(attempt)
    show(counts, devices)


def show(counts, devices):
    print(f"| stage ({devices} processes) | kills tried | identical results |\n|---|---|---|")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    for stage, (tried, identical) in [*counts.items(), ("all", total)]:
        print(f"| {stage} | {tried} | {identical} |")


if __name__ == "__main__":
    main()
