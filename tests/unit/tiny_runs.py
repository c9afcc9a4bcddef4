"""Run folders of random models, small enough to be made again for every test."""

import json
import threading

import torch
from datasets import Dataset

from distill import config, fresh, models
from distill.evaluate import cost
from distill.export import proof
from distill.tasks import SingleLabelClassification

TEXTS = [
    f"{subject} {verb} the {thing}"
    for subject in ("a cat", "the old dog", "she")
    for verb in ("sees", "eats")
    for thing in ("bird", "red ball")
]
SIZES = {  # model type -> its key for the number of layers, and the others
    "bert": ("num_hidden_layers", {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 40}),
    "distilbert": ("n_layers", {"dim": 16, "hidden_dim": 32, "n_heads": 2, "max_position_embeddings": 40}),
    "gpt2": ("n_layer", {"n_embd": 16, "n_head": 2, "n_positions": 40}),
}


def made(folder, task, model_type="bert", teacher_layers=3, columns=("text",), **settings):
    """A run folder with a random teacher and a smaller random student, and what `export` wants to know about it."""
    torch.manual_seed(0)
    tokenizer = models.train_tokenizer(TEXTS, 320, task.pipeline == "text-classification")
    depth, sizes = SIZES.get(model_type, SIZES["bert"])
    for name, layers in (("teacher", teacher_layers), ("student", 1)):
        model = models.load(None, {"model_type": model_type, depth: layers, **sizes}, task, name, tokenizer)
        with torch.no_grad():
            for tensor in model.parameters():  # a random head predicts one label for all texts
                tensor.mul_(3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    raw = Dataset.from_dict({column: [text[shift:] for text in TEXTS] for shift, column in enumerate(columns)})
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


def classifier(*names, kind=SingleLabelClassification):
    task = kind(max_length=12)
    task.names = names
    return task


ONE_AT_A_TIME = threading.Lock()  # transformers patches its classes while it loads, which two threads of one process would undo wrongly


def ask_here(script, question):
    """The scripts of distill.fresh without their own process: the same functions, called in this one."""
    with ONE_AT_A_TIME:
        return _answer(json.loads(json.dumps(question)))


def _answer(question):
    try:
        if "measure" in question:
            return {"speed": cost.speed, "memory": cost.memory}[question["measure"]](question)
        answer = {"text-classification": proof.classify, "text-generation": proof.predict_next}[question["pipeline"]]
        return {"answers": answer(question, *proof.load(question)), "versions": {"transformers": "5"}}
    except (SystemExit, Exception) as error:
        raise fresh.ProcessError(str(error)) from error
