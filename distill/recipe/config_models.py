"""The recipe's sections about data and models: `data`, `tokenizer`, `teacher` and `student`."""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING

from distill.errors import UserError
from distill.recipe.formats import DTYPES
from distill.recipe.validation import check_choice, check_positive, check_range, check_served

__all__ = ["OUTPUTS", "SPARSE", "Data", "Finetune", "Lora", "Student", "Teacher", "Tokenizer"]

SPARSE = ("sampled", "top_k")  # values of teacher.outputs that keep some tokens of a distribution
OUTPUTS = ("cached", "online", "base", "hidden", *SPARSE, "served")


@dataclass
class Data:
    """The examples and how they are batched."""

    source: str = MISSING
    """Hub dataset, local file or folder (CSV, TSV, JSON, Parquet, text; also .gz), or dotted path
    of a function that returns a DatasetDict"""
    config: str | None = None
    """Hub configuration, such as sst2"""
    train: str = "train"
    """name of the training split"""
    validation: str | None = "validation"
    """name of the validation split; null holds examples out of the training split"""
    test: str | None = "test"
    """name of the test split; null holds examples out of the training split"""
    holdout: float = 0.1
    """share of the training examples held out for each split that is null"""
    text: list[str] = field(default_factory=lambda: ["text"])
    """text column, or two columns for pairs; with task.learn one column of messages"""
    label: Any = "label"
    """label column; an empty cell is an unlabeled example; for MultiLabelClassification also a list
    of columns that hold 0 and 1"""
    labels: list[str] | None = None
    """label names in the order of their ids; null: as the dataset declares them, else sorted"""
    labelled: int | None = None
    """training examples that keep their label, the others become unlabeled; null: all"""
    unlabelled: str | None = None
    """another split or source of texts without labels, used by the divergence only"""
    batch_size: int = 32
    """examples per optimizer step, over all micro-batches and processes"""
    group_by_length: bool = True
    """batch examples of similar length, which saves padding"""
    pad_to_multiple_of: int | None = None
    """round the lengths of training batches up to a multiple; null: not, or with trainer.compile to
    one of 8 lengths"""
    packing: bool = False
    """for language models: the examples of a micro-batch follow each other without padding, each
    attending to itself only"""
    workers: int = 0
    """processes that load batches; 0 loads in a thread of the training process"""
    streaming: bool = False
    """read the shards of the training split (Parquet, JSON, JSONL, Hub) while it trains, without a
    first pass; for language models, with trainer.max_steps and without stored teacher outputs.
    Examples are batched as they come, whatever group_by_length: set packing"""
    stream_buffer: int = 10_000
    """rows of a shard that are shuffled together in a stream"""
    stream_holdout: int = 1_000
    """first rows of a stream that become each split that is null; holdout is not used"""

    def __post_init__(self) -> None:
        check_range("data.holdout", self.holdout, 0.001, 0.5, "0.1 holds out a tenth")
        check_positive("data.batch_size", self.batch_size, "32 is a good start")
        check_positive("data.labelled", self.labelled, "leave it out to keep every label")
        check_range("data.workers", self.workers, 0, inf, "0 loads in the training process")
        check_positive("data.stream_buffer", self.stream_buffer, "10000 is a good start")
        check_positive("data.stream_holdout", self.stream_holdout, "1000 is a good start")
        check_positive("data.pad_to_multiple_of", self.pad_to_multiple_of, "null does not round")
        if self.packing and self.pad_to_multiple_of is not None:
            raise UserError(
                f"data.packing is true and data.pad_to_multiple_of is {self.pad_to_multiple_of}, "
                "but packed batches have no padding: leave one of them out"
            )
        for key in ("labelled", "unlabelled"):
            if self.streaming and getattr(self, key) is not None:
                raise UserError(
                    f"data.streaming is true and data.{key} is {getattr(self, key)}, but a stream "
                    "has no first pass that could choose examples: leave one of them out"
                )
        if not 1 <= len(self.text) <= 2:
            raise UserError(
                f"data.text is {list(self.text)}, but it must name one column, or two for pairs: "
                "write [premise, hypothesis]"
            )
        if isinstance(self.label, int | float):  # a column whose name is a number
            self.label = str(self.label)
        labels = self.label if isinstance(self.label, list) else [self.label or "-"]
        if not labels or not all(isinstance(column, str) for column in labels):
            raise UserError(
                f"data.label is {self.label}, but it must name a column, or several in a list: "
                "write label: topic, or label: null if there is none"
            )
        columns = [*self.text, *([] if self.label is None else labels)]
        if len(set(columns)) < len(columns):
            raise UserError(
                f"data.text is {list(self.text)} and data.label is {self.label}, "
                "but each must be another column: rename one"
            )

    @property
    def label_column(self) -> str | None:
        """The label column, or the one that several columns of 0 and 1 are joined into."""
        return "+".join(self.label) if isinstance(self.label, list) else self.label


@dataclass
class Tokenizer:
    """The tokenizer, if it is not the teacher's."""

    model: str | None = None
    """Hub name or folder of a tokenizer; null: the teacher's"""
    vocab_size: int | None = None
    """train a byte-level BPE tokenizer with this many tokens on the training texts"""

    def __post_init__(self) -> None:
        hint = "256 bytes, the special tokens and some merges must fit"
        check_range("tokenizer.vocab_size", self.vocab_size, 300, inf, hint)
        if self.model is not None and self.vocab_size is not None:
            raise UserError(
                f"tokenizer.model is {self.model} and tokenizer.vocab_size is {self.vocab_size}, "
                "but only one can be used: drop one of them"
            )


@dataclass
class Finetune:
    """Training of the teacher on labeled examples; other settings are the student's."""

    epochs: float = 3.0
    """passes over the labeled training examples"""
    lr: float = 5e-5
    """peak learning rate"""

    def __post_init__(self) -> None:
        hint = "leave teacher.finetune out to use the teacher unchanged"
        check_positive("teacher.finetune.epochs", self.epochs, hint)
        check_positive("teacher.finetune.lr", self.lr, "5e-5 is a good start")


@dataclass
class Teacher:
    """The frozen model to distill."""

    model: str | None = None
    """Hub name, folder or GGUF file; in an installed package: package:<distribution>/<path>"""
    config: dict[str, Any] | None = None
    """config of a randomly initialized model: model_type, hidden_size, ..."""
    finetune: Finetune | None = None
    """train the teacher on the labels first; null: use it unchanged"""
    outputs: str = "cached"
    """cached: logits, computed once; online: computed at each step; base: the same by the student
    without its adapter, for a student.lora of the teacher itself; for language models also hidden
    (last hidden states), sampled (drawn tokens) and top_k (likeliest tokens), each computed once;
    served: the likeliest tokens and the probability of all others, from a server, asked once"""
    url: str | None = None
    """for outputs=served: address of a vLLM, SGLang or llama.cpp server, as http://host:8000/v1; a
    key that it needs is in the environment variable DISTILL_TEACHER_KEY"""
    served_model: str | None = None
    """name of the teacher on that server; null: `model`, or the only one that it serves"""
    tokens: int = 50
    """tokens per position that outputs=sampled draws and outputs=top_k and served keep"""
    writes: bool = False
    """for language models: the teacher writes the completions of the training examples, once, and
    they replace those in the data, also as labels (sequence-level distillation); their length and
    temperature are loss.completion_tokens and loss.sampling_temperature"""
    dtype: str = "auto"
    """float type of its forward pass; auto: bfloat16 where the device supports it, else float32;
    outputs=base computes as the student does"""
    quantize: str | None = None
    """memory of an online teacher: int8 or nf4 (4 bits) for the weights of its blocks, which needs
    torchao; null: none"""
    offload: bool = False
    """keep the teacher's blocks in the memory of the CPU, each on the GPU only while it runs: less
    GPU memory, slower steps, the same outputs"""

    def __post_init__(self) -> None:
        check_choice("teacher.outputs", self.outputs, OUTPUTS)
        check_choice("teacher.dtype", self.dtype, ("auto", *DTYPES))
        hint = "fewer need less memory, more approximate the distribution better"
        check_range("teacher.tokens", self.tokens, 1, 64, hint)
        if self.quantize is not None:
            check_choice("teacher.quantize", self.quantize, ("int8", "nf4"))
            if self.outputs != "online":
                raise UserError(
                    f"teacher.quantize is {self.quantize}, but teacher.outputs is {self.outputs}, "
                    "which keeps no teacher in memory while the student trains: leave it out"
                )
        check_served(self.outputs, self.url, self.served_model)
        if self.outputs == "served":
            self._check_without_weights()
            return
        if (self.model is None) == (self.config is None):
            count = "neither" if self.model is None else "both"
            raise UserError(
                f"teacher has {count} of model and config, but it needs exactly one: "
                "name a model, or describe a random one"
            )

    def _check_without_weights(self) -> None:
        """Refuse what needs the weights of a teacher that is served."""
        for key in ("config", "finetune", "writes", "offload"):
            if getattr(self, key) not in (None, False):
                raise UserError(
                    f"teacher.{key} is set, but teacher.outputs=served loads no weights: "
                    f"leave teacher.{key} out"
                )


@dataclass
class Lora:
    """A low-rank adapter that is trained in place of the student's weights, and merged into them
    at the end (Hu et al. 2021)."""

    rank: int = 16
    """inner width of the two matrices beside each layer"""
    alpha: float | None = None
    """their product is multiplied by alpha / rank; null: twice the rank"""
    dropout: float = 0.0
    """share of the adapter's inputs that are dropped while training"""
    targets: list[str] | None = None
    """patterns of names of linear layers, such as "*.q_proj"; null: all in the blocks"""
    quantize: str | None = None
    """nf4: the weights of these layers take 4 bits in memory, which needs torchao, and the export
    holds the values of these 4 bits; null: none"""

    def __post_init__(self) -> None:
        check_positive("student.lora.rank", self.rank, "16 is a good start")
        check_positive("student.lora.alpha", self.alpha, "null is twice the rank")
        check_range("student.lora.dropout", self.dropout, 0, 0.99, "0 turns it off")
        if self.quantize is not None:
            check_choice("student.lora.quantize", self.quantize, ("nf4",))


@dataclass
class Student:
    """The model to train. Exactly one of `model`, `config` and `layers` is set."""

    model: str | None = None
    """Hub name or folder"""
    config: dict[str, Any] | None = None
    """config of a randomly initialized model: model_type, hidden_size, ..."""
    layers: list[int] | None = None
    """indices, from 0, of the teacher's layers that the student is initialized from"""
    gradient_checkpointing: bool = False
    """keep only the inputs of each block in memory, and compute the rest again for the gradients:
    less memory, about a third more time"""
    architecture: str | None = None
    """model_type of a student built from layers, such as distilbert; null: the teacher's"""
    lora: Lora | None = None
    """train an adapter, and outside the blocks the head of a classifier (not with
    teacher.outputs=base), in place of all weights; needs peft; null: train all weights"""

    def __post_init__(self) -> None:
        sources = [key for key in ("model", "config", "layers") if getattr(self, key) is not None]
        if len(sources) != 1:
            raise UserError(
                f"student has {' and '.join(sources) or 'none'} of model, config and layers, "
                "but it needs exactly one: choose where the student comes from"
            )
        if self.architecture is not None and self.layers is None:
            raise UserError(
                f"student.architecture is {self.architecture}, but it is only used with layers "
                "of the teacher: set student.layers"
            )
