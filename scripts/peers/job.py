"""What the drivers share: the models and examples that `scripts/bench_peers.py` has laid out, padding, accuracy, and the answer."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

if torch.version.cuda is None and find_spec(
    "torchvision"
):  # its wheel is built for CUDA: transformers could not import it either
    vision = torch.library.Library("torchvision", "DEF")
    vision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    vision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import AutoModelForSequenceClassification

FOLDER = Path(sys.argv[1])
JOB: dict[str, Any] = json.loads(
    (FOLDER / "job.json").read_text()
)  # lr, epochs, batch_size, alpha, temperature, seed, pad_id


def model(name: str, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(FOLDER / name, **options)


def split(name: str) -> list[dict[str, Any]]:
    """Encoded examples; the label of one that has none is -100."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def collated(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to the longest of them, as DataCollatorWithPadding does."""
    longest = max(len(example["input_ids"]) for example in examples)
    rows = [
        example["input_ids"] + [JOB["pad_id"]] * (longest - len(example["input_ids"]))
        for example in examples
    ]
    masks = [
        [1] * len(example["input_ids"]) + [0] * (longest - len(example["input_ids"]))
        for example in examples
    ]
    labels = torch.tensor([example["labels"] for example in examples])
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(masks),
        "labels": labels,
    }


@torch.inference_mode()
def accuracy(student: Any, examples: list[dict[str, Any]]) -> float:
    student = student.float().eval()
    batches = (collated(examples[start : start + 32]) for start in range(0, len(examples), 32))
    right = (
        student(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1) == batch["labels"]
        for batch in batches
    )
    return torch.cat(list(right)).float().mean().item()


def timed(train: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    train()
    return time.perf_counter() - clock, time.process_time() - processor


def answer(student: Any, seconds: Iterable[float], **others: Any) -> None:
    """One line of JSON for the script that compares."""
    found = {name: accuracy(student, split(name)) for name in ("validation", "test")}
    print(json.dumps({"seconds": list(seconds), **found, **others}))
