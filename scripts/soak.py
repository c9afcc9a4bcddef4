"""Kills runs at random moments, resumes them, and compares the results with runs that were not
killed.

    python scripts/soak.py [minutes=600] [kills=60] [only=language] [seed=0] [folder=/tmp/soak]
        [key=value ...]

Each attempt is the command on small models, in its own folder and store: one of SETTINGS, with one,
two or three processes. It is killed by SIGKILL at a random moment of one stage after another, one
kill in each, resumed in between, and in the end its files are compared with those of the run that
was not killed. Stops after so many minutes or kills, and prints a Markdown table. Folders of
attempts whose results differ are kept, the others removed.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.integration.killed import contents

STAGES = ("data", "teacher", "cache", "student", "evaluate", "export")
SIZES = [
    "trainer.accumulate=2",
    "teacher.finetune.epochs=2",
    "trainer.epochs=2",
    "trainer.checkpoint.steps=5",
    "evaluate.bootstrap=20",
    "evaluate.requests=1",
    "evaluate.batches=1",
    "export.examples=20",
]
QUANTIZE = "callbacks.quantize={_target_: distill.callbacks.Quantize, bits: 4, start: 0.7}"
NEURONS = (
    "callbacks.neurons={_target_: distill.callbacks.PruneNeurons, amount: 0.5, start: 0.2, "
    "end: 0.6, every: 1}"
)
WEIGHTS = "callbacks.prune={_target_: distill.callbacks.PruneWeights, sparsity: 0.5, start: 0.2}"
ONLINE = "teacher.outputs=online"
LANGUAGE = [
    "task={_target_: distill.tasks.CausalLanguageModelling, max_length: 32}",
    "data.label=null",
    "teacher.config.model_type=llama",
    "student.architecture=null",
]


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
CONVERSATIONS = [
    *LANGUAGE[1:],
    "task={_target_: distill.tasks.CausalLanguageModelling, max_length: 32, learn: assistant, "
    f"template: '{TEMPLATE}'}}",
    "data={source: ../../conversations, text: [messages], label: null, validation: null, "
    "test: null, batch_size: 8, packing: true}",
]
STREAMED = [
    *LANGUAGE,
    "data={source: ../../texts, label: null, validation: null, test: null, batch_size: 8, "
    "streaming: true, stream_buffer: 8, stream_holdout: 12, workers: 1}",
    "tokenizer={model: ../../tokenizer, vocab_size: null}",
    "teacher.finetune=null",
    "trainer.max_steps=14",
]


class Setting(NamedTuple):
    """What an attempt runs."""

    processes: int
    arguments: list[str]


SETTINGS = {
    "classifier": Setting(1, []),
    "compression, workers": Setting(
        1, [QUANTIZE, NEURONS, "export.format=packed", "data.workers=2"]
    ),
    "language model, online": Setting(1, [*LANGUAGE, ONLINE]),
    "online, workers": Setting(2, [ONLINE, "data.workers=1"]),
    "compression": Setting(2, [WEIGHTS, QUANTIZE, "export.format=packed"]),
    "language model, hidden states": Setting(2, [*LANGUAGE, "teacher.outputs=hidden"]),
    "online, compression": Setting(3, [ONLINE, NEURONS]),
    "language model, online, compression": Setting(
        3, [*LANGUAGE, ONLINE, QUANTIZE, "export.format=packed", "data.workers=1"]
    ),
    "conversations, packed, on-policy": Setting(2, [*CONVERSATIONS, ONLINE, "loss.on_policy=0.5"]),
    "conversations, packed, adapter": Setting(1, [*CONVERSATIONS, ONLINE, "student.lora.rank=4"]),
    "streamed shards": Setting(2, [*STREAMED, ONLINE]),
}
STAGE_TIME = re.compile(r"^(\w+) took ([\d.]+) s$")


def write_corpora(folder: Path) -> None:
    """Write the files that the settings name: conversations, shards of texts, a tokenizer."""
    from distill import models
    from distill.corpora import generated

    texts = generated()["train"]["text"]
    turns = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]}
        for ask, reply in zip(texts[::2], texts[1::2], strict=True)
    ]
    write_lines(folder / "conversations" / "train.jsonl", turns)
    for shard in range(3):
        rows = [{"text": text} for text in texts[shard::3]]
        write_lines(folder / "texts" / f"train-{shard}.jsonl", rows)
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>"}
    models.train_tokenizer(texts, 400, tokens).save_pretrained(folder / "tokenizer")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as lines of JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
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


def start_or_resume(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """Resume the run in a folder, or start it if it was killed before it wrote its recipe."""
    if (folder / "run" / "recipe.yaml").exists():
        return start(folder, "resume=run")
    folder.mkdir(parents=True, exist_ok=True)
    return start(folder, "recipe=tiny", "hydra.run.dir=run", *SIZES, *arguments)


def finish(process: subprocess.Popen[str]) -> list[str]:
    """The lines of a process that must succeed."""
    assert process.stderr is not None
    lines = [line.strip() for line in process.stderr]
    if process.wait():
        raise RuntimeError("\n".join(lines[-20:]))
    return lines


def kill_in_stage(process: subprocess.Popen[str], stage: str, seconds: float) -> bool:
    """Kill a process and its children some seconds into a stage; False if it ended before."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"── {stage} "):
            time.sleep(seconds)
            break
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.stderr.close()
    return process.wait() == -signal.SIGKILL


def differences(expected: dict[str, Any], folder: Path) -> list[str]:
    """Names of the files that are missing, additional, or have other contents."""
    actual = contents(folder)
    names = expected.keys() | actual.keys()
    return sorted(name for name in names if expected.get(name) != actual.get(name))


class Soak:
    """Attempts of one setting, and what became of them."""

    def __init__(self, name: str, folder: Path, changes: list[str]) -> None:
        self.name, self.processes = name, SETTINGS[name].processes
        self.arguments = [
            f"trainer.devices={self.processes}",
            *SETTINGS[name].arguments,
            *changes,
        ]
        self.folder = folder / name.replace(", ", "-").replace(" ", "_")
        self.expected: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.attempts = self.identical = 0
        self.kills = dict.fromkeys(STAGES, 0)

    def measure(self) -> None:
        """Run once without kills, for the expected results and the seconds of each stage."""
        alone = self.folder / "uninterrupted"
        lines = finish(start_or_resume(alone, self.arguments))
        matches = filter(None, map(STAGE_TIME.match, lines))
        self.seconds = {match[1]: float(match[2]) for match in matches if match[1] in STAGES}
        self.expected = contents(alone)

    def attempt(self, rng: random.Random, ends: float) -> None:
        """Kill one run in each stage, finish it, and compare."""
        if not self.expected:
            self.measure()
        folder = self.folder / str(self.attempts)
        for stage, seconds in self.seconds.items():
            if time.monotonic() > ends:
                break
            process = start_or_resume(folder, self.arguments)
            self.kills[stage] += kill_in_stage(process, stage, rng.uniform(0, seconds))
        try:
            finish(start_or_resume(folder, self.arguments))
            problem = ", ".join(differences(self.expected, folder))
        except RuntimeError as error:
            problem = str(error)
        self.attempts += 1
        self.identical += not problem
        kills = sum(self.kills.values())
        print(f"{self.name}: {kills} kills: {problem or 'identical'}", file=sys.stderr, flush=True)
        if not problem:
            shutil.rmtree(folder)


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    kills, minutes = int(options.pop("kills", 60)), float(options.pop("minutes", 600))
    folder, only = Path(options.pop("folder", "/tmp/soak")), options.pop("only", "")
    rng = random.Random(int(options.pop("seed", 0)))
    changes = [f"{key}={value}" for key, value in options.items()]
    shutil.rmtree(folder, ignore_errors=True)
    write_corpora(folder)
    soaks = [Soak(name, folder, changes) for name in SETTINGS if only in name]
    ends = time.monotonic() + 60 * minutes
    for soak in cycle(soaks):
        if time.monotonic() > ends or sum(sum(each.kills.values()) for each in soaks) >= kills:
            break
        soak.attempt(rng, ends)
    show(soaks)


def show(soaks: list[Soak]) -> None:
    print(f"| run | processes | {' | '.join(STAGES)} | kills | runs | identical |")
    print(f"|---|---{'|---:' * (len(STAGES) + 3)}|")
    total = [0] * (len(STAGES) + 3)
    for soak in soaks:
        row = [*soak.kills.values(), sum(soak.kills.values()), soak.attempts, soak.identical]
        total = [before + count for before, count in zip(total, row, strict=True)]
        print(f"| {soak.name} | {soak.processes} | {' | '.join(map(str, row))} |")
    print(f"| all | | {' | '.join(map(str, total))} |")


if __name__ == "__main__":
    main()
