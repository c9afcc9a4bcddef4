"""The schema of a recipe: one flat YAML file that fills a :class:`Run`.

Every key is a field, and the string below it is its documentation, which ``--help`` prints. Keys
named ``_target_`` hold the dotted path of a class, and the keys beside it are its arguments.
Nothing here imports torch, so that a misspelled key is refused in less than a second.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from distill.errors import UserError
from distill.recipe.config_models import (
    OUTPUTS,
    SPARSE,
    Data,
    Finetune,
    Lora,
    Student,
    Teacher,
    Tokenizer,
)
from distill.recipe.config_training import Checkpoint, Loss, Optimizer, Tracking, Trainer
from distill.recipe.formats import DTYPES, FORMATS
from distill.recipe.validation import check_choice, check_positive, check_range

__all__ = [
    "DTYPES",
    "OUTPUTS",
    "QUANTIZE",
    "SPARSE",
    "Checkpoint",
    "Data",
    "Evaluate",
    "Export",
    "Finetune",
    "Lora",
    "Loss",
    "Optimizer",
    "Run",
    "Student",
    "Teacher",
    "Tokenizer",
    "Tracking",
    "Trainer",
]

QUANTIZE = ("int8", "weights", "dynamic", "static")


@dataclass
class Evaluate:
    """Measurements after training, on the test split."""

    batch_size: int = 32
    """examples per batch, for quality and throughput"""
    bootstrap: int = 1000
    """resamples of each 95 % confidence interval"""
    requests: int = 50
    """single requests timed for the latency"""
    batches: int = 8
    """batches timed for the throughput"""
    threads: int = 1
    """CPU threads of the timed processes"""
    generate: bool = False
    """of language models, also measure greedy replies to `requests` prompts: time to the first and
    to each later token, cache and memory, how replies end, how closely they follow the teacher"""
    max_new_tokens: int = 64
    """tokens of a reply, at most; half of task.max_length if that is less"""
    harness: list[str] = field(default_factory=list)
    """tasks of lm-eval that all models are measured on, as in [arc_easy]: language models only"""
    harness_path: str | None = None
    """folder with more tasks of lm-eval; null: those that it has, whose data are downloaded"""
    harness_limit: int | None = None
    """examples of each of these tasks, the first ones; null: all"""

    def __post_init__(self) -> None:
        for key in ("batch_size", "bootstrap", "requests", "batches", "threads", "max_new_tokens"):
            check_positive(f"evaluate.{key}", getattr(self, key), "1 is the least")
        check_positive("evaluate.harness_limit", self.harness_limit, "null takes all examples")
        for key in ("harness_path", "harness_limit"):
            if getattr(self, key) is not None and not self.harness:
                raise UserError(
                    f"evaluate.{key} is {getattr(self, key)}, but evaluate.harness names no task "
                    "of lm-eval: name one, or leave it out"
                )


@dataclass
class Export:
    """The exported student, which is written only if it is proven to be equivalent."""

    format: str | None = "dense"
    """dense; packed: 2 to 8 bits per weight; torchao: int8 tensors; lora: the adapter of
    student.lora alone; onnx, openvino, executorch: for these runtimes; null: no export"""
    dtype: str = "auto"
    """float type of the weights that are not quantized, in which the models are also measured:
    float32, bfloat16 or float16; auto: that of the teacher's checkpoint where the format has it"""
    quantize: str | None = None
    """quantization after training. weights: weights only; dynamic, static: inputs of linear
    layers too, to 8 bits; int8: the default mode of the runtime; null: none"""
    bits: int = 8
    """bits per weight of quantize, 2 to 8"""
    examples: int = 200
    """test examples on which the predictions of export and student are compared"""
    smaller: bool = True
    """refuse an export whose weights take no fewer bytes than the teacher's; false allows it, as
    for a student of its teacher's size"""

    def __post_init__(self) -> None:
        check_choice("export.dtype", self.dtype, ("auto", *DTYPES))
        check_positive("export.examples", self.examples, "200 is a good start")
        check_range("export.bits", self.bits, 2, 8, "8 changes least, 4 takes half the bytes")
        if self.format is not None:
            check_choice("export.format", self.format, tuple(FORMATS))
        if self.quantize is not None:
            check_choice("export.quantize", self.quantize, QUANTIZE)

    @property
    def stored_dtype(self) -> str:
        """The float type of the export; `auto` that is not resolved is float32."""
        return "float32" if self.dtype == "auto" else self.dtype


@dataclass
class Run:
    """One run: what a recipe fills in."""

    name: str = MISSING
    """name of the run folder, runs/<name>/<time>; default: the name of the recipe file"""
    seed: int = 0
    """seed of all random number generators"""
    task: dict[str, Any] = MISSING
    """{_target_: class of distill.tasks or your own, its arguments}"""
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    teacher: Teacher | None = None
    """the frozen model to distill; null trains the student on the labels only"""
    student: Student = MISSING
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    trainer: Trainer = field(default_factory=Trainer)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """name -> {_target_: class of distill.callbacks or any Lightning callback, its arguments}"""
    tracking: Tracking = field(default_factory=Tracking)
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)

    @property
    def local_teacher(self) -> Teacher | None:
        """The teacher if its weights are loaded here; None if there is none or it is served."""
        served = self.teacher is not None and self.teacher.outputs == "served"
        return None if served else self.teacher

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**32 - 1, "0 is as good as any")
        self._check_writing()
        finetunes = self.teacher is not None and self.teacher.finetune is not None
        if self.loss.class_weights is not None and self.loss.alpha == 0 and not finetunes:
            raise UserError(
                f"loss.class_weights is {self.loss.class_weights}, but loss.alpha is 0, so that no "
                "label is in the loss: set loss.alpha above 0, or leave it out"
            )
        if self.data.packing and self.trainer.compile:
            raise UserError(
                "data.packing is true and trainer.compile is true, but packed batches have another "
                "length at each step, which would be compiled again: leave one of them out"
            )
        if self.data.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        """Refuse what would need a pass over all examples before training."""
        teacher, needed = self.teacher, self.loss.needs_teacher
        outputs = teacher.outputs if teacher is not None and needed else "online"
        finetune = None if teacher is None else teacher.finetune
        for wrong, key, value, way_out in (
            (self.trainer.max_steps is None, "trainer.max_steps", "null", "set it"),
            (outputs not in ("online", "base"), "teacher.outputs", outputs, "set it to online"),
            (self.loss.on_policy > 0, "loss.on_policy", self.loss.on_policy, "set it to 0"),
            (bool(teacher and teacher.writes), "teacher.writes", "true", "leave it out"),
            (
                self.loss.compares_spans,
                "loss.divergence",
                self.loss.divergence,
                "take a student with the teacher's tokenizer",
            ),
            (finetune is not None, "teacher.finetune", finetune, "fine-tune it in another run"),
            (
                self.tokenizer.vocab_size is not None,
                "tokenizer.vocab_size",
                self.tokenizer.vocab_size,
                "name a tokenizer",
            ),
        ):
            if wrong:
                raise UserError(
                    f"data.streaming is true and {key} is {value}, but a stream has no first pass "
                    f"over its examples: {way_out}, or set data.streaming=false"
                )

    def _check_writing(self) -> None:
        share, outputs = self.loss.on_policy, self.teacher.outputs if self.teacher else "null"
        if share and outputs not in ("online", "base"):
            section = "teacher.outputs" if self.teacher else "teacher"
            raise UserError(
                f"loss.on_policy is {share:g}, but {section} is {outputs}, and a teacher must "
                "read what the student writes: set teacher.outputs=online"
            )
        writes = self.teacher is not None and self.teacher.writes
        if writes and outputs == "served":
            raise UserError(
                "teacher.writes is true, but teacher.outputs is served, and its server only reads: "
                "leave teacher.writes out, or name a teacher in teacher.model"
            )
        if writes and self.loss.compares_spans:
            raise UserError(
                f"teacher.writes is true, but loss.divergence is {self.loss.divergence}, which is "
                "for models of different tokenizers, and the teacher's tokens are to be the "
                "student's labels: leave teacher.writes out"
            )
        if (share or writes) and self.trainer.strategy == "fsdp":
            key, who = ("teacher.writes is true", "teacher")
            if share:
                key, who = f"loss.on_policy is {share:g}", "student"
            raise UserError(
                f"{key}, but trainer.strategy is fsdp, and the ranks of a sharded {who} cannot "
                "write texts of different lengths: set trainer.strategy=ddp"
            )
