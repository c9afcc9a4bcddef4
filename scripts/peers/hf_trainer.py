"""Hugging Face Trainer with an overridden compute_loss: `hf_trainer.py FOLDER {default,tuned}`."""

import logging
import sys
import tempfile
from typing import Any

import torch
from job import FOLDER, JOB, collate, load_model, load_split, print_result, timed
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

TUNED = sys.argv[2] == "tuned"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHA, TEMPERATURE = JOB["alpha"], JOB["temperature"]


class DistillationTrainer(Trainer):
    def __init__(self, teacher: Any, **options: Any) -> None:
        super().__init__(**options)
        self._teacher = (teacher,)  # out of the student

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        student = model(**inputs).logits.float()
        with torch.no_grad(), torch.autocast(DEVICE, enabled=False):
            teacher = self._teacher[0](**inputs).logits.float()
        student_NC, teacher_NC = (
            F.log_softmax(each / TEMPERATURE, -1) for each in (student, teacher)
        )
        supervised = F.cross_entropy(student, labels, reduction="sum", ignore_index=-100) / len(
            labels
        )
        loss = ALPHA * supervised + (1 - ALPHA) * TEMPERATURE**2 * F.kl_div(
            student_NC, teacher_NC, log_target=True, reduction="batchmean"
        )
        return (loss, student) if return_outputs else loss


def main() -> None:
    logging.disable(logging.WARNING)
    attention: dict[str, Any] = {}
    if TUNED and DEVICE == "cpu":
        attention = {"attn_implementation": "eager"}
    teacher = load_model(
        "teacher", **attention, dtype=torch.bfloat16 if TUNED else torch.float32
    ).eval()
    teacher.to(DEVICE)
    student = load_model("start", **attention, dtype=torch.float32)
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
            use_cpu=DEVICE == "cpu",
            **tuned,
        )
        examples: Any = load_split("train")
        trainer = DistillationTrainer(
            teacher, model=student, args=settings, train_dataset=examples, data_collator=collate
        )
        seconds = timed(trainer.train)
    print_result(student, seconds)


if __name__ == "__main__":
    main()
