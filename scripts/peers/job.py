"""Shared by the programs here: the job of `scripts/bench_peers.py`, collation, accuracy."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

if torch.version.cuda is None and find_spec("torchvision"):
    # torchvision's wheel is built for CUDA: without these operators its import fails on CPU builds
    vision = torch.library.Library("torchvision", "DEF")
    vision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    vision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import AutoModelForSequenceClassification

FOLDER = Path(sys.argv[1])
# lr, epochs, batch_size, alpha, temperature, seed, pad_id
JOB: dict[str, Any] = json.loads((FOLDER / "job.json").read_text())


def load_model(name: str, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(FOLDER / name, **options)


def load_split(name: str) -> list[dict[str, Any]]:
    """Encoded examples; the label of an unlabelled one is -100."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest example, as DataCollatorWithPadding does."""
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
    student = student.float().cpu().eval()
    batches = (collate(examples[start : start + 32]) for start in range(0, len(examples), 32))
    right = (
        student(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1) == batch["labels"]
        for batch in batches
    )
    return torch.cat(list(right)).float().mean().item()


def timed(train: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall time and of CPU time."""
    clock, processor = time.perf_counter(), time.process_time()
    train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processor


def print_result(student: Any, seconds: Iterable[float], **others: Any) -> None:
    """Print one line of JSON for `scripts/bench_peers.py`."""
    accuracies = {name: accuracy(student, load_split(name)) for name in ("validation", "test")}
    print(json.dumps({"seconds": list(seconds), **accuracies, **others}))
