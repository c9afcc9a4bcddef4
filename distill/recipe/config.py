"""Every key of a recipe: its type, default, unit and range, in the order in which the data passes.

A recipe is one flat YAML file that fills a :class:`Run`. Nothing here imports torch, so that a misspelt key is answered
before anything heavy is loaded. Keys called ``_target_`` hold the dotted path of a class; its arguments are the keys beside it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from distill.errors import UserError

SPARSE = ("sampled", "top_k")  # outputs that hold a few tokens of a distribution
OUTPUTS = ("cached", "online", "hidden", *SPARSE)
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("dense", "torchao", "packed", "onnx", "openvino", "executorch")
QUANTIZE = ("int8", "weights", "dynamic", "static")
SCHEDULES = ("constant", "linear", "cosine")
STRATEGIES = ("auto", "ddp", "fsdp")
PARTS = (
    "loss",
    "supervised",
    "divergence",
)  # what the log calls the parts of the loss, beside the extra terms
WANDB_MODES = ("auto", "online", "offline", "disabled")


def _in_range(name: str, value: float | None, low: float, high: float, hint: str) -> None:
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        limits = (
            f"must lie in [{low:g}, {high:g}]"
            if high < float("inf")
            else f"must be at least {low:g}"
        )
        raise UserError(f"{name} is {value:g}, but it {limits}: {hint}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{name} is {value}, but it must be one of {', '.join(choices)}: choose one of them"
        )


def _above_zero(name: str, value: float | None, hint: str) -> None:
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{name} is {value:g}, but it must be a number above 0: {hint}")


@dataclass
class Data:
    """Where the examples come from. A split that is null is held out of the training split."""

    source: str = MISSING  # Hub dataset, local file or folder (CSV, JSON, Parquet), or dotted path of a function -> DatasetDict
    config: str | None = None  # Hub configuration, such as sst2
    train: str = "train"  # split names
    validation: str | None = "validation"
    test: str | None = "test"
    holdout: float = 0.1  # share of the training examples held out for each split that is null
    text: list[str] = field(default_factory=lambda: ["text"])  # one column, or two for pairs
    label: str | None = "label"  # column; empty cells are unlabelled examples
    labels: list[str] | None = (
        None  # label names in the order of their ids; default: as the data declare them, else sorted
    )
    labelled: int | None = (
        None  # training examples that keep their label; the others become unlabelled
    )
    unlabelled: str | None = (
        None  # a further split or source, of texts alone: they take part in the divergence only
    )
    batch_size: int = 32  # examples per optimizer step, over all accumulated micro-batches
    group_by_length: bool = True  # batches of similar length, to pad little
    workers: int = 0  # processes that load batches

    def __post_init__(self) -> None:
        _in_range("data.holdout", self.holdout, 0.001, 0.5, "0.1 holds out a tenth")
        _above_zero("data.batch_size", self.batch_size, "32 is a good start")
        _above_zero("data.labelled", self.labelled, "leave it out to keep every label")
        _in_range("data.workers", self.workers, 0, float("inf"), "0 loads in the training process")
        if not 1 <= len(self.text) <= 2:
            raise UserError(
                f"data.text is {list(self.text)}, but it must name one column, or two for pairs: [premise, hypothesis]"
            )
        columns = [*self.text, *([] if self.label is None else [self.label])]
        if len(set(columns)) < len(columns):
            raise UserError(
                f"data.text is {list(self.text)} and data.label is {self.label}, but each must be another column: rename one"
            )


@dataclass
class Tokenizer:
    """The teacher's own tokenizer, unless one is named or trained."""

    model: str | None = None  # Hub name or folder
    vocab_size: int | None = (
        None  # train a byte-level BPE of this many tokens on the training texts
    )

    def __post_init__(self) -> None:
        _in_range(
            "tokenizer.vocab_size",
            self.vocab_size,
            300,
            float("inf"),
            "256 bytes, the special tokens and some merges must fit",
        )
        if self.model is not None and self.vocab_size is not None:
            raise UserError(
                f"tokenizer.model is {self.model} and tokenizer.vocab_size is {self.vocab_size}, but only one can be used: drop one of them"
            )


@dataclass
class Finetune:
    """Training of the teacher on the labelled examples before it is frozen; what is not named here is as for the student."""

    epochs: float = 3.0  # passes over the labelled training examples
    lr: float = 5e-5  # peak learning rate

    def __post_init__(self) -> None:
        _above_zero(
            "teacher.finetune.epochs",
            self.epochs,
            "leave teacher.finetune out to take the teacher as it is",
        )
        _above_zero("teacher.finetune.lr", self.lr, "5e-5 is a good start")


@dataclass
class Teacher:
    """The frozen model to learn from: a name, or a config for a random one."""

    model: str | None = None  # Hub name, folder, or package:<distribution>/<folder in it>
    config: dict[str, Any] | None = (
        None  # of a randomly initialised model: model_type, hidden_size, ...
    )
    finetune: Finetune | None = None  # null: use it as it is
    outputs: str = "cached"  # cached: once, kept beside the examples; online: at each step; language models: hidden, sampled, top_k too
    tokens: int = 50  # sampled: draws from each predicted token's distribution; top_k: its likeliest tokens, which alone are kept
    dtype: str = (
        "auto"  # of its forward; auto: bfloat16 where the device has units for it, else float32
    )

    def __post_init__(self) -> None:
        _one_of("teacher.outputs", self.outputs, OUTPUTS)
        _one_of("teacher.dtype", self.dtype, ("auto", *DTYPES))
        _in_range(
            "teacher.tokens",
            self.tokens,
            1,
            64,
            "fewer take fewer bytes, more are nearer to the whole",
        )
        if (self.model is None) == (self.config is None):
            raise UserError(
                "teacher needs exactly one of model and config: name a model, or describe a random one"
            )


@dataclass
class Student:
    """The trainable model: a name, a config for a random one, or some of the teacher's layers."""

    model: str | None = None  # Hub name or folder
    config: dict[str, Any] | None = None  # of a randomly initialised model
    layers: list[int] | None = None  # cut from the teacher: its layers to keep, counted from 0
    architecture: str | None = (
        None  # model_type of a cut student, such as distilbert; default: the teacher's
    )

    def __post_init__(self) -> None:
        given = [key for key in ("model", "config", "layers") if getattr(self, key) is not None]
        if len(given) != 1:
            raise UserError(
                f"student has {given or 'none'} of model, config and layers, but it needs exactly one: say where the student comes from"
            )
        if self.architecture is not None and self.layers is None:
            raise UserError(
                f"student.architecture is {self.architecture}, but only one cut from layers takes it: give student.layers"
            )


@dataclass
class Loss:
    """alpha * CE(labels, student) + (1 - alpha) * T^2 * divergence(teacher, student) + sum of weight * term."""

    alpha: float = 0.5  # weight of the labels, in [0, 1]
    temperature: float = 2.0  # T, divides both models' logits
    divergence: str | None = (
        None  # a function of distill.losses, or a dotted path; default: the task's
    )
    beta: float = (
        0.5  # weight of the teacher in the mixture of jensen_shannon and of skew_kl, in (0, 1)
    )
    terms: dict[str, Any] = field(
        default_factory=dict
    )  # name -> {_target_: distill.terms...., weight: ...}
    chunk: int | None = (
        None  # language models: predicted tokens whose logits are in memory at a time; null: at most 32 MB; 0: all
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether anything in the loss comes from the teacher."""
        return self.alpha < 1 or bool(self.terms)

    def __post_init__(self) -> None:
        _in_range(
            "loss.alpha", self.alpha, 0, 1, "0 trains on the teacher only, 1 on the labels only"
        )
        _in_range(
            "loss.chunk",
            self.chunk,
            0,
            float("inf"),
            "null chooses, 0 has all logits in memory at once",
        )
        _above_zero(
            "loss.temperature",
            self.temperature,
            "1 leaves the logits as they are, 2 to 8 softens them",
        )
        if not 0 < self.beta < 1:
            raise UserError(
                f"loss.beta is {self.beta:g}, but it must lie between 0 and 1: 0.5 mixes evenly, forward_kl and reverse_kl are the limits"
            )
        for name in self.terms:
            if name in PARTS or not name.isidentifier():
                raise UserError(
                    f"loss.terms has {name!r}, but a term needs a name of its own, without dots, other than {', '.join(PARTS)}: rename it"
                )


@dataclass
class Optimizer:
    """AdamW with warm-up and decay."""

    lr: float = 5e-5  # peak learning rate
    weight_decay: float = 0.01  # not applied to biases and normalisation weights
    warmup: float = 0.1  # share of the steps over which the rate rises
    schedule: str = "linear"  # how it falls afterwards
    clip: float | None = 1.0  # largest gradient norm

    def __post_init__(self) -> None:
        _above_zero("optimizer.lr", self.lr, "5e-5 is a good start")
        _in_range("optimizer.weight_decay", self.weight_decay, 0, float("inf"), "0 turns it off")
        _in_range("optimizer.warmup", self.warmup, 0, 1, "0.1 warms up over a tenth of the steps")
        _one_of("optimizer.schedule", self.schedule, SCHEDULES)
        _above_zero("optimizer.clip", self.clip, "null turns clipping off")


@dataclass
class Checkpoint:
    """When the state of a training is saved: at these intervals, after every look at the validation split, and at the end."""

    steps: int | None = None  # optimizer steps; null: not by steps
    minutes: float | None = 10.0  # null: not by time
    keep: int = 2  # the newest ones; the one that did best is kept as well

    def __post_init__(self) -> None:
        _above_zero("trainer.checkpoint.steps", self.steps, "null does not save by steps")
        _above_zero("trainer.checkpoint.minutes", self.minutes, "null does not save by time")
        _above_zero(
            "trainer.checkpoint.keep", self.keep, "2 leaves one should the newest be damaged"
        )


@dataclass
class Trainer:
    """How long, in which precision, and when to look at the validation split."""

    epochs: float = 3.0  # passes over the training examples
    max_steps: int | None = None  # optimizer steps; takes the place of epochs
    accumulate: int = 1  # micro-batches per optimizer step
    precision: str = "auto"  # auto: bf16-mixed where the device has bf16 units, else 32-true
    accelerator: str = "auto"  # auto, cpu, gpu
    devices: int = 1  # processes of this machine, one a device; torchrun and srun, which start them, know better
    nodes: int = 1  # machines; more than one needs torchrun or srun
    strategy: str = "auto"  # of several processes: auto, ddp: each has the whole models; fsdp: each has its share of them
    validations: int = (
        4  # looks at the validation split per run, evenly spaced; the last step is one of them
    )
    patience: int | None = None  # stop after this many looks without improvement
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    compile: bool = False  # torch.compile the student: its first steps take a minute or so, and most GPUs are faster afterwards
    progress: bool = True  # progress bar

    def __post_init__(self) -> None:
        _above_zero("trainer.epochs", self.epochs, "3 is a good start")
        _above_zero("trainer.max_steps", self.max_steps, "leave it out to train by epochs")
        _above_zero("trainer.accumulate", self.accumulate, "1 does not split the batch")
        _above_zero("trainer.validations", self.validations, "1 looks at the end only")
        _above_zero("trainer.patience", self.patience, "null never stops early")
        _one_of("trainer.precision", self.precision, PRECISIONS)
        _one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        _above_zero("trainer.devices", self.devices, "1 trains in one process")
        _above_zero("trainer.nodes", self.nodes, "1 is this machine")
        _one_of("trainer.strategy", self.strategy, STRATEGIES)


@dataclass
class Tracking:
    """metrics.csv is always written; Weights & Biases beside it."""

    wandb: str = "auto"  # auto: online where the user is logged in, else offline
    project: str = "distill"

    def __post_init__(self) -> None:
        _one_of("tracking.wandb", self.wandb, WANDB_MODES)


@dataclass
class Evaluate:
    """What is measured after training, on the test split."""

    batch_size: int = 32  # examples per batch, for quality and throughput
    bootstrap: int = 1000  # resamples behind each 95 % interval
    requests: int = 50  # timed single requests
    batches: int = 8  # timed batches
    threads: int = 1  # CPU threads of the timed processes

    def __post_init__(self) -> None:
        for key in ("batch_size", "bootstrap", "requests", "batches", "threads"):
            _above_zero(f"evaluate.{key}", getattr(self, key), "1 is the least")


@dataclass
class Export:
    """The artefact, written only once it is proven."""

    format: str | None = (
        "dense"  # torchao: int8 tensors; packed: 2 to 8 bits a weight; of a runtime: onnx, ...; null: no export
    )
    dtype: str = "float32"  # of what is stored unquantized
    quantize: str | None = (
        None  # weights; dynamic or static: inputs of linear layers too, to 8 bits; int8: what suits the runtime
    )
    bits: int = 8  # a weight of `quantize`
    examples: int = 200  # held-out examples on which the proof compares predictions

    def __post_init__(self) -> None:
        _one_of("export.dtype", self.dtype, DTYPES)
        _above_zero("export.examples", self.examples, "200 is a good start")
        _in_range("export.bits", self.bits, 2, 8, "8 changes least, 4 halves its bytes")
        if self.format is not None:
            _one_of("export.format", self.format, FORMATS)
        if self.quantize is not None:
            _one_of("export.quantize", self.quantize, QUANTIZE)


@dataclass
class Run:
    """One complete run: what `recipes/*.yaml` fill in."""

    name: str = MISSING  # of the run folder: runs/<name>/<time>
    seed: int = 0
    task: dict[str, Any] = MISSING  # _target_: a class of distill.tasks, and its arguments
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    teacher: Teacher | None = None  # null: train the student on the labels alone
    student: Student = MISSING
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    trainer: Trainer = field(default_factory=Trainer)
    callbacks: dict[str, Any] = field(
        default_factory=dict
    )  # name -> {_target_: a Lightning callback, ...}
    tracking: Tracking = field(default_factory=Tracking)
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)

    def __post_init__(self) -> None:
        _in_range("seed", self.seed, 0, 2**32 - 1, "0 is as good as any")
