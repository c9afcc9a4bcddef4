"""What each compression technique costs and saves: one dense student, then every technique on it, in the loop and one-shot.

    python scripts/compress_table.py recipe=bert_to_distil [folder=runs/compress] [epochs=4] [only=int8,2:4] [key=value ...]

The recipe's student is trained once. Each technique then starts from it. In the loop: it acts on its schedule during `epochs` further
epochs of distillation. One-shot: it acts after ten batches on which nothing is learned (they are what activations are measured on),
and nothing repairs it. The dense row has had the same further epochs. Finished rows are kept in the folder: a second call goes on.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill import evaluate, store, student, teacher, train
from distill.recipe import compose, config, targets
from distill.training.loggers import Tracker

STILL = {"max_steps": 10, "validations": 1}  # with a learning rate that moves no float32
LEARNING_RATE = 1e-12


def technique(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"distill.callbacks.{name}", **arguments}


def pruned(score: str, **how: Any) -> dict[str, Any]:
    return {"prune": technique("PruneWeights", score=score, **how)}


def quantized(bits: int, **how: Any) -> dict[str, Any]:
    return {"quantize": technique("Quantize", bits=bits, **how)}


COMBINED = {
    name: dict(spec) for name, spec in compose.load_recipe("bert_prune_quantize").callbacks.items()
}
TECHNIQUES: dict[str, tuple[str, dict[str, Any]]] = {  # row -> export format, callbacks
    "dense": ("dense", {}),
    **{
        f"magnitude {share:.0%}": ("packed", pruned("magnitude", sparsity=share))
        for share in (0.5, 0.8, 0.9)
    },
    **{
        f"Wanda {share:.0%}": ("packed", pruned("wanda", scope="row", sparsity=share))
        for share in (0.5, 0.8, 0.9)
    },
    "movement 50%": ("packed", pruned("movement", sparsity=0.5)),
    "2:4": ("packed", pruned("magnitude", pattern="2:4")),
    "half of the FFN": ("dense", {"neurons": technique("PruneNeurons", amount=0.5)}),
    "a third of the heads": ("dense", {"heads": technique("PruneHeads", amount=1 / 3)}),
    **{f"linear {bits} bit": ("packed", quantized(bits)) for bits in (8, 4, 3, 2)},
    **{
        f"codebook {bits} bit": ("packed", quantized(bits, method="codebook")) for bits in (4, 3, 2)
    },
    "NF4": ("packed", quantized(4, method="nf4")),
    "int8 and dynamic inputs": ("torchao", quantized(8, activations="dynamic")),
    "int8 and static inputs": ("packed", quantized(8, activations="static")),
    "SVD rank 96": ("dense", {"factorize": technique("Factorize", rank=96, weighted=True)}),
    "combined (bert_prune_quantize)": ("packed", COMBINED),
}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folder, epochs = Path(given.pop("folder", "runs/compress")), float(given.pop("epochs", "4"))
    only = given.pop("only", "")
    rows = [row for row in TECHNIQUES if not only or row in only.split(",")]
    run = described(given)
    if not (folder / "start" / "metrics.json").is_file():
        (folder / "start").mkdir(parents=True, exist_ok=True)
        train.train(replace(run, callbacks={}), folder / "start")
    table = Table(run, folder, epochs)
    print(
        "| | in the loop | agreement | one-shot | agreement | size | bits a weight | latency | throughput |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(table.line(row), flush=True)


def described(given: dict[str, str]) -> config.Run:
    """The recipe with keys of the command line laid over it."""
    run = compose.load_recipe(given.pop("recipe", "bert_to_distil"))
    changes = OmegaConf.from_dotlist([f"{key}={value}" for key, value in given.items()])
    return compose.validate(OmegaConf.merge(OmegaConf.structured(run), changes))  # type: ignore[arg-type]


class Table:
    """What all rows share: data, teacher and its outputs, made once."""

    def __init__(self, run: config.Run, folder: Path, epochs: float) -> None:
        from distill import data, models

        start = config.Student(model=str(folder / "start" / "student"))
        tracking = replace(run.tracking, wandb="disabled")
        self.run = replace(
            run,
            student=start,
            tracking=tracking,
            trainer=replace(run.trainer, epochs=epochs, progress=False),
        )
        self.folder = folder
        self.task = targets.instantiate(run.task)
        self.raw = data.load(run.data, self.task, run.seed)
        self.tokenizer = models.build_tokenizer(run, self.task, self.raw["train"])
        self.examples = data.encode(self.raw, self.task, self.tokenizer, run.data)
        self.teacher = teacher.obtain(
            run,
            self.task,
            self.tokenizer,
            self.examples,
            folder / "start",
            Tracker(self.run, folder),
        )
        self.examples["train"] = teacher.with_outputs(
            run, self.teacher, self.examples["train"], self.task, self.tokenizer
        )

    def line(self, row: str) -> str:
        """One row of the table: quality and size against the teacher."""
        looped, shot = (
            self.measured(row, self.in_loop(row)),
            self.measured(f"{row}, one-shot", self.one_shot(row)),
        )
        dense = json.loads((self.folder / "start" / "metrics.json").read_text())["student"]["cost"][
            "disk_bytes"
        ]
        ours, theirs = (looped[who]["cost"] for who in ("student", "teacher"))
        cells = [
            *quality(looped),
            *quality(shot),
            f"{ours['disk_bytes'] / dense:.3f}",
            f"{ours['bits_per_weight']:.2f}",
        ]
        cells += [
            f"{ours['latency_p50_ms'] / theirs['latency_p50_ms']:.2f}",
            f"{ours['examples_per_s'] / theirs['examples_per_s']:.2f}",
        ]
        return f"| {row} | {' | '.join(cells)} |"

    def in_loop(self, row: str) -> config.Run:
        packing, callbacks = TECHNIQUES[row]
        return replace(
            self.run, callbacks=callbacks, export=replace(self.run.export, format=packing)
        )

    def one_shot(self, row: str) -> config.Run:
        looped = self.in_loop(row)
        last = {name: at_the_end(spec) for name, spec in looped.callbacks.items()}
        trainer, optimizer = (
            replace(looped.trainer, **STILL),
            replace(looped.optimizer, lr=LEARNING_RATE),
        )
        return replace(looped, callbacks=last, trainer=trainer, optimizer=optimizer)

    def measured(self, name: str, run: config.Run) -> dict[str, Any]:
        """metrics.json of one trained student, made where it is not there yet."""
        folder = self.folder / name.replace(" ", "_").replace(",", "").replace("%", "").replace(
            ":", "_"
        )
        if not (folder / "metrics.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            compose.save_recipe(run, folder / "recipe.yaml")
            callbacks = student.bind_callbacks(
                run,
                self.task,
                self.tokenizer,
                student.build_callbacks(run),
                self.raw["train"],
                self.examples["train"],
            )
            trained = (
                self.task,
                self.tokenizer,
                self.examples,
                self.teacher,
                callbacks,
                folder,
                Tracker(run, folder),
            )
            training = student.distil(run, *trained)
            store.link_tree(self.folder / "start" / "teacher", folder / "teacher")
            metrics = evaluate.evaluate(
                run, self.task, self.raw["test"], self.examples["test"], self.tokenizer, folder
            )
            evaluate.write(metrics | {"training": training}, folder)
        return json.loads((folder / "metrics.json").read_text())


def at_the_end(spec: dict[str, Any]) -> dict[str, Any]:
    """The same technique, all of it after the last step."""
    known = targets.read_signature(spec["_target_"])
    return spec | {key: 1.0 for key in ("start", "end") if known is not None and key in known.names}


def quality(metrics: dict[str, Any]) -> list[str]:
    """The primary metric with its 95 % interval, and the agreement with the teacher."""
    found = metrics["student"]["quality"][metrics["comparison"]["metric"]]
    return [
        f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]",
        f"{metrics['fidelity']['agreement']:.3f}",
    ]


if __name__ == "__main__":
    main()
