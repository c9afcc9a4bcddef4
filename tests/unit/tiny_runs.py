"""Run folders of random models, small enough to be made again for every test."""

import json
import threading
from importlib import import_module

import torch
from datasets import Dataset
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill import export, isolated, models
from distill.compress import quantizer
from distill.packing import ExportSpec
from distill.recipe import config
from distill.remote_code.modeling import CompressionConfig, build_compressed_layers
from distill.tasks import SingleLabelClassification

TEXTS = [
    f"{subject} {verb} the {thing}"
    for subject in ("a cat", "the old dog", "she")
    for verb in ("sees", "eats")
    for thing in ("bird", "red ball")
]
SIZES = {  # model type -> its key for the number of layers, and the others
    "bert": (
        "num_hidden_layers",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
        },
    ),
    "distilbert": (
        "n_layers",
        {"dim": 16, "hidden_dim": 32, "n_heads": 2, "max_position_embeddings": 40},
    ),
    "gpt2": ("n_layer", {"n_embd": 16, "n_head": 2, "n_positions": 40}),
}


def made(folder, task, model_type="bert", teacher_layers=3, columns=("text",), **settings):
    """A run folder with a random teacher and a smaller random student, and its recipe and data."""
    torch.manual_seed(0)
    tokenizer = models.train_tokenizer(TEXTS, 320, task.special_tokens())
    depth, sizes = SIZES.get(model_type, SIZES["bert"])
    for name, layers in (("teacher", teacher_layers), ("student", 1)):
        model = models.load(
            None, {"model_type": model_type, depth: layers, **sizes}, task, name, tokenizer
        )
        with torch.no_grad():
            for tensor in model.parameters():  # a random head predicts one label for all texts
                tensor.mul_(3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    raw = Dataset.from_dict(
        {column: [text[shift:] for text in TEXTS] for shift, column in enumerate(columns)}
    )
    run = config.Run(
        name="tiny",
        task={"_target_": f"distill.tasks.{type(task).__name__}", "max_length": task.max_length},
        data=config.Data(source="texts.csv", text=list(columns), label=None),
        teacher=config.Teacher(config={"model_type": model_type}),
        student=config.Student(layers=[0]),
        trainer=config.Trainer(accelerator="cpu"),
        export=config.Export(**settings),
    )
    return run, task, raw, tokenizer, folder


def spec_of(made, train=None):
    """What `export` takes of a run folder; `train` is what calibrates."""
    run, task, raw, tokenizer, _ = made
    return ExportSpec(run.export, run.data, task, tokenizer, raw if train is None else train)


def exported(run, task, raw, tokenizer, folder, metrics=None):
    """The folder of the export of a run folder's student."""
    spec = spec_of((run, task, raw, tokenizer, folder))
    return export.export(run, spec, raw, folder, metrics)


def quantized(
    folder,
    task,
    tokenizer,
    activations=None,
    sparse=0.0,
    kinds=(nn.Linear, nn.Embedding, Conv1D),
    **spec,
):
    """The student of a run folder with weights on a grid and some zeros, as callbacks leave it."""
    spec = quantizer.QuantSpec(**spec)
    student = models.load(str(folder / "student"), None, task, "student", tokenizer, strict=True)
    record = {"weights": {}, "sparse": [], "activations": {}}
    for name, module in student.named_modules():
        if isinstance(module, kinds):
            on_grid(module, spec, sparse if not isinstance(module, nn.Embedding) else 0.0)
            record["weights"][f"{name}.weight"] = spec.as_dict()
            if isinstance(module, nn.Linear | Conv1D):
                record["sparse"] += [f"{name}.weight"] if sparse else []
                record["activations"] |= {name: activations} if activations else {}
    earlier = student.config.to_dict().get("compression") or {}
    student.config.compression = earlier | {part: value for part, value in record.items() if value}
    compression = CompressionConfig.from_json({"activations": record["activations"]})
    build_compressed_layers(student, compression)
    models.save(student, tokenizer, folder / "student")
    return student


@torch.no_grad()
def on_grid(module, spec, sparse):
    weight_OI = module.weight.T if isinstance(module, Conv1D) else module.weight
    if sparse:
        weight_OI[torch.rand_like(weight_OI) < sparse] = 0
    weight_OI.copy_(quantizer.fake_quantize_weight(weight_OI, spec, sparse=bool(sparse)))


def classifier(*names, kind=SingleLabelClassification):
    task = kind(max_length=12)
    task.names = names
    return task


# transformers patches its classes while it loads a model, which two threads must not do at once.
LOCK = threading.Lock()


def run_here(script, request):
    """A stand-in for `run_isolated` that runs the script in this process."""
    with LOCK:
        try:
            module = import_module(f"distill.isolated.scripts.{script}")
            response = module.run(json.loads(json.dumps(request)))
        except (SystemExit, Exception) as error:
            raise isolated.ProcessError(str(error)) from error
    return response | {"versions": dict.fromkeys(request.get("libraries", []), "5")}
