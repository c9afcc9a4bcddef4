"""Knowledge distillation of Transformers models, with exports that are proven.

    recipe -> Run -> examples -> teacher, student -> logits -> loss -> step -> metrics -> export

From Python, :func:`distill_model` distills models and data that are in memory, and
:class:`Distillation` is a LightningModule for a Trainer of your own. Tasks, compression callbacks
and extra loss terms are in `distill.tasks`, `distill.callbacks` and `distill.terms`.

The map, from the entry points down; each module imports from those below it:

    train.py            every stage of a run, on one screen: distill train
    api.py              the same from Python, for models and data in memory
    cli.py              command lines: errors -> one sentence and an exit code
    teacher.py          the teacher stage: load, fine-tune, cache its outputs
    student.py          the student stage: build, train, save
    dry_run.py          what later stages would refuse, found before the teacher is trained
    prepare.py          a recipe's data -> task, tokenizer, raw and encoded examples
    resume.py           resuming a run folder: allowed changes, repeated stages
    export/             the student of a run -> an exported folder, proven: distill export
    evaluate/           models -> quality, latency and memory, in several runtimes: distill evaluate
    packing/            a student -> files of a format: dense, packed, torchao, onnx, ...
    training/           Lightning's Trainer: checkpoints, loggers, validation runs
    callbacks/          compression techniques as Lightning callbacks
    module/             the LightningModule: one training step
    served/             models behind a server: a teacher's outputs, the student's completions
    teacher_outputs/    a teacher's outputs, computed once and stored with the examples
    compress/           functions of the techniques: masks, quantizers, low-rank factors
    terms.py            extra loss terms on hidden states and attention
    models/             names, configs and layers -> models; checks that they are compatible
    data/               sources -> raw splits -> encoded examples -> batches
    tasks/              tasks: encoding, labels, loss, metrics, serving
    corpora/            data sets that need no network
    stages.py           named stages of a run and their times
    processes/          several processes as one run; signals
    losses/             logits -> losses, as pure functions
    recipe/             recipe files -> Run; every key with its type, default and unit
    remote_code/        two files that are copied into compressed exports
    isolated/           scripts that run in a separate process
    places.py           folders that must be writable
    store.py            cached results of earlier runs; atomic files
    internals.py        private attributes of torch, Lightning and transformers
    errors.py           errors with one sentence for the user
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_PUBLIC = {
    "Batch": "tasks.batch",
    "Compression": "callbacks.compression",
    "DistilledModel": "api",
    "Distillation": "module",
    "Labels": "tasks.labels",
    "Loss": "recipe.config",
    "Optimizer": "recipe.config",
    "Prepared": "prepare",
    "Run": "recipe.config",
    "RunFailed": "errors",
    "Task": "tasks.base",
    "Term": "terms",
    "UserError": "errors",
    "distill_model": "api",
    "load_recipe": "recipe.compose",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import distill` costs nothing."""
    if name == "__version__":
        return version("distill")
    if name not in _PUBLIC:
        raise AttributeError(
            f"module distill has no attribute {name}: choose from {', '.join(__all__)}"
        )
    return getattr(import_module(f"distill.{_PUBLIC[name]}"), name)
