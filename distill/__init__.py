"""Knowledge distillation of Transformers models that proves what it hands over.

    recipe -> Run -> examples -> teacher, student -> logits -> loss -> step -> metrics -> artefact

The map, in the order in which the data passes:

    recipe.py    recipe file -> Run; unknown keys refused
    config.py    every key: type, default, unit, range
    targets.py   `_target_`: dotted path -> class
    tasks/       what differs between tasks: encoding, collation, which logits count, labels, metrics
    corpora.py   data sets that need no network
    data/        Run.data -> encoded examples -> batches
    models/      Run.teacher, Run.student -> models; a student cut from its teacher
    teacher.py   fine-tunes the teacher where asked; caches its outputs beside the examples
    losses.py    logits -> losses, as pure functions
    terms.py     hidden states and attention of both models -> extra loss terms
    module.py    batch -> loss: one training step
    fit.py       the Lightning Trainer -> best weights
    student.py   builds, trains and saves the student
    quality.py   outcomes -> metrics with intervals, paired test
    cost.py      model folders -> latency, throughput, memory, bytes, in fresh processes
    evaluate.py  run -> metrics.json and its table
    export.py    run -> artefact, once it is proven
    proof.py     artefact -> answers, with plain transformers
    card.py      metrics -> the artefact's model card
    train.py     all of it: python -m distill.train
    store.py     what is computed once and used again
    stages.py    named stages and their times
    tracking.py  metrics.csv and Weights & Biases
    cli.py       errors -> one sentence and an exit code
    errors.py    the two ways in which a run ends early
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Run": "config",
    "RunFailed": "errors",
    "UserError": "errors",
    "load_recipe": "recipe",
    "Distillation": "module",
    "Task": "tasks.base",
    "Batch": "tasks.base",
    "Term": "terms",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import distill` itself costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module distill has no attribute {name}: choose from {', '.join(__all__)}")
    return getattr(import_module(f"distill.{_PUBLIC[name]}"), name)
