"""torchdistill's DistillationBox with its KDLoss: `torchdistill_box.py FOLDER`."""

import torch
from job import JOB, collate, load_model, load_split, print_result, timed
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.datasets.registry import register_collate_func

HEAD = "classifier"


@register_collate_func
def padded(items):
    return collate([example for example, *_ in items])  # items also hold labels


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
    # sums, because the mean of a batch without labels is NaN; AdamW is invariant to the scale
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
    teacher, student = load_model("teacher").eval(), load_model("start")
    examples = [(example, example["labels"]) for example in load_split("train")]
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

    print_result(student.cpu(), timed(train))


if __name__ == "__main__":
    main()
