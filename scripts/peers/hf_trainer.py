"""Hugging Face Trainer with an overridden compute_loss: `hf_trainer.py FOLDER default` or `hf_trainer.py FOLDER tuned`."""

import logging
import sys
import tempfile
from typing import Any

import torch
from job import FOLDER, JOB, answer, collated, model, split, timed
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

TUNED = sys.argv[2] == "tuned"
ALPHA, TEMPERATURE = JOB["alpha"], JOB["temperature"]


class Distilling(Trainer):
    def __init__(self, teacher: Any, **options: Any) -> None:
        super().__init__(**options)
        self._taught_by = (teacher,)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        student = model(**inputs).logits.float()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            teacher = self._taught_by[0](**inputs).logits.float()
        told = [F.log_softmax(logits / TEMPERATURE, -1) for logits in (student, teacher)]
        supervised = F.cross_entropy(student, labels, reduction="sum", ignore_index=-100) / len(
            labels
        )
        loss = ALPHA * supervised + (1 - ALPHA) * TEMPERATURE**2 * F.kl_div(
            *told, log_target=True, reduction="batchmean"
        )
        return (loss, student) if return_outputs else loss


def main() -> None:
    logging.disable(logging.WARNING)
    eager: dict[str, Any] = {"attn_implementation": "eager"} if TUNED else {}
    teacher = model("teacher", **eager, dtype=torch.bfloat16 if TUNED else torch.float32).eval()
    student = model("start", **eager, dtype=torch.float32)
    tuned: dict[str, Any] = (
        {"bf16": True, "train_sampling_strategy": "group_by_length"} if TUNED else {}
    )
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        settings = TrainingArguments(
            folder,
            learning_rate=JOB["lr"],
            num_train_epochs=JOB["epochs"],
            per_device_train_batch_size=JOB["batch_size"],
            seed=JOB["seed"],
            remove_unused_columns=False,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            **tuned,
        )
        examples: Any = split("train")
        trainer = Distilling(
            teacher, model=student, args=settings, train_dataset=examples, data_collator=collated
        )
        seconds = timed(trainer.train)
    answer(student, seconds)


if __name__ == "__main__":
    main()
