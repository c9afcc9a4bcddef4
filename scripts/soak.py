"""Pulls the plug at random moments, resumes, and compares with a run that was left alone.

python scripts/soak.py [kills=40] [devices=1] [seed=0] [folder=/tmp/soak] [key=value ...]

Every attempt is the command itself on the tiny recipe, in a folder and with a store of its own, killed by SIGKILL at a random moment of
one stage after another, and resumed until it is finished. Prints a Markdown table: stage, kills tried, identical endings. What differed
stays in the folder; the rest is removed.
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

from tests.integration.killed import contents  # noqa: E402

STAGES = ("data", "teacher", "cache", "student", "evaluate", "export")
SIZES = [
    "trainer.accumulate=2",
    "trainer.checkpoint.steps=5",
    "evaluate.bootstrap=20",
    "evaluate.requests=1",
    "evaluate.batches=1",
]
TOOK = re.compile(r"^(\w+) took ([\d.]+) s$")


def command(folder, *arguments):
    """The command, running in a process group of its own."""
    own = {
        "DISTILL_CACHE": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "distill.train", *arguments],
        cwd=folder,
        env=os.environ | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def begun(folder, arguments):
    folder.mkdir(parents=True)
    return command(folder, "recipe=tiny", "hydra.run.dir=run", *SIZES, *arguments)


def left_alone(folder, arguments):
    """Seconds of each stage of a run that nobody kills."""
    process = begun(folder, arguments)
    said = [line.strip() for line in process.stderr]
    if process.wait():
        sys.exit("\n".join(said[-20:]))
    return {match[1]: float(match[2]) for match in map(TOOK.match, said) if match}


def killed(folder, arguments, stage, seconds):
    """Whether a run was killed so many seconds into a stage; its end may have been faster."""
    process = begun(folder, arguments)
    for line in process.stderr:
        if line.startswith(f"── {stage} "):
            time.sleep(seconds)
            break
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.stderr.close()
    return process.wait() == -signal.SIGKILL


def resumed(folder):
    """What the command says that goes on; it may have been killed before there was anything to go on with."""
    there = (folder / "run" / "recipe.yaml").exists()
    process = command(folder, "resume=run") if there else None
    said = process.communicate()[1] if process is not None else "nothing was there to resume"
    return None if process is None or process.returncode == 0 else said


def main():
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    kills, folder = int(given.pop("kills", 40)), Path(given.pop("folder", "/tmp/soak"))
    rng, arguments = (
        random.Random(int(given.pop("seed", 0))),
        [f"trainer.devices={given.pop('devices', 1)}"],
    )
    arguments += [f"{key}={value}" for key, value in given.items()]
    shutil.rmtree(folder, ignore_errors=True)
    seconds = left_alone(folder / "whole", arguments)
    expected = contents(folder / "whole")
    table = {stage: [0, 0] for stage in STAGES}
    for number in range(kills):
        stage = STAGES[number % len(STAGES)]
        place = folder / f"{number} {stage}"
        if not killed(place, arguments, stage, rng.uniform(0, seconds[stage])):
            shutil.rmtree(place)
            continue
        failure, ended = resumed(place), contents(place)
        different = sorted(
            name for name in expected.keys() | ended.keys() if expected.get(name) != ended.get(name)
        )
        table[stage][0] += 1
        table[stage][1] += failure is None and not different
        print(
            f"{number + 1} of {kills}: {stage}: {failure or different or 'identical'}",
            file=sys.stderr,
            flush=True,
        )
        if failure is None and not different:
            shutil.rmtree(place)
    print(f"| stage ({arguments[0]}) | kills tried | identical endings |\n|---|---|---|")
    for stage, (tried, same) in [
        *table.items(),
        ("all", [sum(column) for column in zip(*table.values(), strict=True)]),
    ]:
        print(f"| {stage} | {tried} | {same} |")


if __name__ == "__main__":
    main()
