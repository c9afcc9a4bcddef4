"""Quality and cost of each compression technique on one student, trained and one-shot.

    python scripts/compress_table.py recipe=bert_to_distil [folder=runs/compress] [epochs=4]
                                     [only=int8,2:4] [key=value ...]

The recipe's student is trained once, and every technique starts from it. Trained: the technique
follows its schedule during `epochs` further epochs of distillation. One-shot: it is applied after
ten batches with a learning rate of about 0, on which activations are measured, and no training
follows. The dense row has the same further epochs. Finished rows stay in the folder, and a second
call continues.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill import evaluate, packing, store, student, teacher, train
from distill.prepare import prepare_run
from distill.recipe import compose, config, targets
from distill.training import Tracker, bind_callbacks, build_callbacks

ONE_SHOT: dict[str, Any] = {"max_steps": 10, "validations": 1}
LEARNING_RATE = 1e-12  # too small to change float32 weights
TITLES = (
    "trained",
    "agreement",
    "one-shot",
    "agreement",
    "size",
    "bits a weight",
    "latency",
    "throughput",
)


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
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folder = Path(arguments.pop("folder", "runs/compress"))
    epochs, only = float(arguments.pop("epochs", "4")), arguments.pop("only", "")
    rows = [row for row in TECHNIQUES if not only or row in only.split(",")]
    run = compose_run(arguments)
    if not (folder / "start" / "metrics.json").is_file():
        (folder / "start").mkdir(parents=True, exist_ok=True)
        train.train(replace(run, callbacks={}), folder / "start")
    table = Table(run, folder, epochs)
    print(f"| | {' | '.join(TITLES)} |\n|---|{'---:|' * len(TITLES)}")
    for row in rows:
        print(table.line(row), flush=True)


def compose_run(arguments: dict[str, str]) -> config.Run:
    """The recipe with the command line's keys applied to it."""
    run = compose.load_recipe(arguments.pop("recipe", "bert_to_distil"))
    changes = OmegaConf.from_dotlist([f"{key}={value}" for key, value in arguments.items()])
    return compose.validate(OmegaConf.merge(OmegaConf.structured(run), changes))  # type: ignore[arg-type]


class Table:
    """The rows of the table; data, teacher and its outputs are prepared once."""

    def __init__(self, run: config.Run, folder: Path, epochs: float) -> None:
        start = config.Student(model=str(folder / "start" / "student"))
        tracking = replace(run.tracking, wandb="disabled")
        self.run = replace(
            run,
            student=start,
            tracking=tracking,
            trainer=replace(run.trainer, epochs=epochs, progress=False),
        )
        self.folder = folder
        made = prepare_run(run)
        self.teacher = teacher.obtain(run, made, folder / "start", Tracker(self.run, folder))
        self.made = teacher.with_outputs(run, made, self.teacher)

    def line(self, row: str) -> str:
        """One row of the table: quality and size against the teacher."""
        trained = self.measure(row, self.trained(row))
        one_shot = self.measure(f"{row}, one-shot", self.one_shot(row))
        dense = json.loads((self.folder / "start" / "metrics.json").read_text())["student"]["cost"]
        student, teacher = (trained[who]["cost"] for who in ("student", "teacher"))
        cells = [
            *quality(trained),
            *quality(one_shot),
            f"{student['disk_bytes'] / dense['disk_bytes']:.3f}",
            f"{student['bits_per_weight']:.2f}",
            f"{student['latency_p50_ms'] / teacher['latency_p50_ms']:.2f}",
            f"{student['examples_per_s'] / teacher['examples_per_s']:.2f}",
        ]
        return f"| {row} | {' | '.join(cells)} |"

    def trained(self, row: str) -> config.Run:
        format, callbacks = TECHNIQUES[row]
        export = replace(self.run.export, format=format)
        return replace(self.run, callbacks=callbacks, export=export)

    def one_shot(self, row: str) -> config.Run:
        run = self.trained(row)
        return replace(
            run,
            callbacks={name: at_the_end(spec) for name, spec in run.callbacks.items()},
            trainer=replace(run.trainer, **ONE_SHOT),
            optimizer=replace(run.optimizer, lr=LEARNING_RATE),
        )

    def measure(self, name: str, run: config.Run) -> dict[str, Any]:
        """metrics.json of one student, which is trained unless its folder has it."""
        folder = self.folder / re.sub("[ :]", "_", re.sub("[,%]", "", name))
        if not (folder / "metrics.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            compose.save_recipe(run, folder / "recipe.yaml")
            made = self.made
            callbacks = bind_callbacks(
                build_callbacks(run.callbacks, run.trainer, run.export),
                made.tokenizer,
                made.raw["train"],
                run.data.text,
                student.count_steps(made, run.loss, run.trainer, run.data.batch_size),
            )
            tracker = Tracker(run, folder)
            training = student.train_student(run, made, self.teacher, callbacks, folder, tracker)
            store.link_tree(self.folder / "start" / "teacher", folder / "teacher")
            spec = evaluate.export_spec(run.export, run.data, made, folder / "student")
            with packing.temporary_artefact(spec, folder / "student") as shipped:
                metrics = evaluate.evaluate(run, made, folder, shipped)
            evaluate.write_metrics(replace(metrics, training=training), folder)
        return json.loads((folder / "metrics.json").read_text())


def at_the_end(spec: dict[str, Any]) -> dict[str, Any]:
    """The same technique, applied after the last step."""
    signature = targets.read_signature(spec["_target_"])
    names = () if signature is None else signature.names
    return spec | {key: 1.0 for key in ("start", "end") if key in names}


def quality(metrics: dict[str, Any]) -> list[str]:
    """The primary metric with its 95 % interval, and the agreement with the teacher."""
    value = metrics["student"]["quality"][metrics["comparison"]["metric"]]
    return [
        f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]",
        f"{metrics['fidelity']['agreement']:.3f}",
    ]


if __name__ == "__main__":
    main()
