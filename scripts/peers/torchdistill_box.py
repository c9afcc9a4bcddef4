"""torchdistill's DistillationBox with its KDLoss, as its own examples put them together: `torchdistill_box.py FOLDER`."""

import torch
from job import JOB, answer, collated, model, split, timed
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.datasets.registry import register_collate_func

HEAD = "classifier"


@register_collate_func
def padded(items):
    return collated(
        [example for example, *_ in items]
    )  # beside it its label, and what torchdistill adds


@register_forward_proc_func
def without_labels(model, sample_batch, targets=None, supp_dict=None, **kwargs):
    return model(
        input_ids=sample_batch["input_ids"], attention_mask=sample_batch["attention_mask"]
    ).logits


def main() -> None:
    tapped = {"forward_hook": {"input": [], "output": [HEAD]}, "forward_proc": "without_labels"}
    paths = {
        f"{who}_module_{part}": value
        for who in ("student", "teacher")
        for part, value in (("path", HEAD), ("io", "output"))
    }
    # sums, for a batch without any label would have no mean; AdamW does not see the difference
    loss = {"temperature": JOB["temperature"], "alpha": JOB["alpha"], "reduction": "sum", **paths}
    settings = {
        "num_epochs": JOB["epochs"],
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
            "collate_fn": "padded",
            "kwargs": {"batch_size": JOB["batch_size"]},
        },
        "teacher": {**tapped, "requires_grad": False},
        "student": {**tapped, "requires_grad": True},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": JOB["lr"]}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}
            },
        },
    }
    torch.manual_seed(JOB["seed"])
    teacher, student = model("teacher").eval(), model("start")
    examples = [(example, example["labels"]) for example in split("train")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    box = get_distillation_box(
        teacher.to(device),
        student.to(device),
        {"train": examples},
        settings,
        device,
        None,
        False,
        1.0,
    )

    def train() -> None:
        for epoch in range(box.num_epochs):
            box.pre_epoch_process(epoch=epoch)
            for batch in box.train_data_loader:
                moved = {name: tensor.to(device) for name, tensor in batch.items()}
                box.post_forward_process(box.forward_process(moved, moved["labels"]))
            box.post_epoch_process()

    answer(student.cpu(), timed(train))


if __name__ == "__main__":
    main()
