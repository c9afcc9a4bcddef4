"""Knowledge distillation of Transformers models that proves what it hands over.

    recipe -> Run -> examples -> teacher, student -> logits -> loss -> step -> metrics -> artefact

The map, in the order in which the data passes:

    train.py        all of it on one screen: python -m distill.train
    recipe.py       recipe file -> Run; unknown keys refused
    config.py       every key: type, default, unit, range
    formats.py      what each format of an export can hold
    targets.py      `_target_`: dotted path -> class
    corpora.py      data sets that need no network
    tasks/          what differs between tasks: encoding, collation, which logits count, labels, metrics
    data/           Run.data -> raw splits -> encoded examples -> batches in an order fixed by (seed, epoch)
    models/         names, configs, a teacher's own layers -> models; do they agree?
    answers.py      a teacher's answers -> columns beside the examples: all, or what gives them back, or a few without bias
    teacher.py      fine-tunes the teacher where asked; caches its outputs beside the examples
    student.py      builds, trains and saves the student
    losses.py       logits -> losses, as pure functions
    chunked.py      hidden states -> loss and gradients of a language model, some rows of logits at a time
    sparse.py       a distribution over a vocabulary as a few of its tokens
    terms.py        hidden states and attention of both models -> extra loss terms
    module.py       batch -> loss: one training step
    compress/       weights -> masks, codes, factors: what to remove and how to round
    callbacks/      when a function of compress/ is applied to the student
    pace.py         what a step costs beyond the student's arithmetic: memory, compilation, an online teacher
    fit.py          module, batches -> the weights that did best: Lightning's Trainer as it is used here
    runtime/        all that a compressed model needs to load: two files that travel with it
    packing/        student -> files of a format: dense, torchao, packed; onnx, openvino, executorch
    evaluate/       models -> metrics.json and its table; the student in each runtime: python -m distill.evaluate
    export/         student -> artefact, once it is proven: python -m distill.export
    checkpoints.py  when a training's state is saved, and how; which one to go on from
    resume.py       a folder worked in before: is it the same run, and what is done again?
    signals.py      requests to end: SIGTERM, SIGUSR1, Ctrl-C
    ranks.py        several processes as one run: who this one is, what all must agree on
    sharding.py     models split over the processes: trainer.strategy=fsdp
    launch.py       a process per device, started and ended together
    store.py        what is computed once and used again
    fresh.py        a question answered in a process that has nothing of this one
    tracking.py     metrics.csv and Weights & Biases
    stages.py       named stages and their times
    cli.py          command lines: errors -> one sentence and an exit code
    errors.py       the ways in which a run ends early
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Batch": "tasks.base",
    "Distillation": "module",
    "Run": "recipe.config",
    "RunFailed": "errors",
    "Task": "tasks.base",
    "Term": "terms",
    "UserError": "errors",
    "load_recipe": "recipe.compose",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import distill` itself costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(
            f"module distill has no attribute {name}: choose from {', '.join(__all__)}"
        )
    return getattr(import_module(f"distill.{_PUBLIC[name]}"), name)
