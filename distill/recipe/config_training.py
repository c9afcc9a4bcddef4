"""The recipe's sections about training: `loss`, `optimizer`, `trainer` and `tracking`."""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from distill.errors import UserError
from distill.recipe.validation import check_address, check_choice, check_positive, check_range

__all__ = ["Checkpoint", "Loss", "Optimizer", "Tracking", "Trainer"]

_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
_SCHEDULES = ("constant", "linear", "cosine")
_STRATEGIES = ("auto", "ddp", "fsdp")
_ACCELERATORS = ("auto", "cpu", "gpu")
_WANDB_MODES = ("auto", "online", "offline", "disabled")
_LOGGED_PARTS = ("loss", "supervised", "divergence")  # logged values, which a term must not replace


SPANS = ("span_kl", "uld")  # divergences between language models of different tokenizers


@dataclass
class Loss:
    """alpha * CE(labels, student) + (1 - alpha) * T^2 * divergence(teacher, student) + terms."""

    alpha: float = 0.5
    """weight of the labels, in [0, 1]; the divergence has weight 1 - alpha"""
    temperature: float = 2.0
    """T, by which the logits of both models are divided"""
    divergence: str | None = None
    """function of distill.losses, or a dotted path; null: the task's default. For language models
    of different tokenizers span_kl (likelihoods of the same bytes) or uld (sorted probabilities)"""
    beta: float = 0.5
    """weight of the teacher in the mixture of jensen_shannon and skew_kl, in (0, 1)"""
    class_weights: Any = None
    """factors of the loss against the labels, also in teacher.finetune: {name: factor}, a list in
    the order of the labels, or balanced (examples / (classes * examples of the class)); with
    several labels per text, of the labels that are 1 (balanced: those without / those with the
    label); null: all 1"""
    terms: dict[str, Any] = field(default_factory=dict)
    """name -> {_target_: class of distill.terms or your own, weight: ..., its arguments}"""
    chunk: int | None = None
    """for language models: token positions whose logits are in memory at once; null: as many as
    take 32 MB, on a GPU 1/128 of its memory; 0: all"""

    on_policy: float = 0.0
    """for language models with teacher.outputs=online: share of the optimizer steps, in [0, 1],
    whose completions the student writes; their loss is the divergence alone, times 1 - alpha"""
    completion_tokens: int = 128
    """tokens that a model writes at most, but no more than half of task.max_length"""
    sampling_temperature: float = 1.0
    """temperature at which a model writes; 0 takes the likeliest token"""
    completions_url: str | None = None
    """address of a server (vLLM for an adapter, SGLang) that writes the student's completions and
    reads its weights in the run folder, http://127.0.0.1:8000/v1; null: this process writes"""
    completions_every: int = 1
    """on-policy steps after which the server gets the student's weights again"""

    @property
    def compares_spans(self) -> bool:
        """Whether the divergence is for language models of different tokenizers."""
        return self.divergence in SPANS

    @property
    def needs_teacher(self) -> bool:
        """Whether a part of the loss is computed from the teacher."""
        return self.alpha < 1 or bool(self.terms)

    def __post_init__(self) -> None:
        hint = "0 trains on the teacher only, 1 on the labels only"
        check_range("loss.alpha", self.alpha, 0, 1, hint)
        check_range("loss.chunk", self.chunk, 0, inf, "null chooses, 0 computes all logits at once")
        hint = "1 leaves the logits as they are, 2 to 8 softens them"
        check_range("loss.temperature", self.temperature, 1e-3, 1e4, hint)
        if not 0 < self.beta < 1:
            raise UserError(
                f"loss.beta is {self.beta:g}, but it must lie between 0 and 1: "
                "0.5 mixes evenly, forward_kl and reverse_kl are the limits"
            )
        self._check_class_weights()
        self._check_writing()
        for name in self.terms:
            if name in _LOGGED_PARTS or not name.isidentifier():
                raise UserError(
                    f"loss.terms has {name!r}, but the name of a term must be an identifier other "
                    f"than {', '.join(_LOGGED_PARTS)}: rename it"
                )

    def _check_writing(self) -> None:
        hint = "0 trains on the completions in the data only, 1 on the student's only"
        check_range("loss.on_policy", self.on_policy, 0, 1, hint)
        check_positive("loss.completion_tokens", self.completion_tokens, "128 is a good start")
        hint = "1 draws from the model's distribution, 0 takes the likeliest token"
        check_range("loss.sampling_temperature", self.sampling_temperature, 0, inf, hint)
        check_positive("loss.completions_every", self.completions_every, "1 gives it at each step")
        if self.completions_url is not None:
            check_address("loss.completions_url", self.completions_url)
            if not self.on_policy:
                raise UserError(
                    f"loss.completions_url is {self.completions_url}, but loss.on_policy is 0, so "
                    "that the student writes nothing: set loss.on_policy above 0"
                )
        if self.on_policy and self.alpha == 1:
            raise UserError(
                f"loss.on_policy is {self.on_policy:g}, but loss.alpha is 1, and completions of "
                "the student have no labels: set loss.alpha below 1"
            )

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if isinstance(weights, dict):  # YAML reads 1 and yes as other things than names
            self.class_weights = weights = {str(name): each for name, each in weights.items()}
        factors = [*weights.values()] if isinstance(weights, dict) else weights
        if weights in (None, "balanced"):
            return
        numbers = isinstance(factors, list | tuple) and all(
            isinstance(each, int | float) and 0 <= each < inf for each in factors
        )
        if not numbers or not any(factors):
            raise UserError(
                f"loss.class_weights is {weights}, but it must hold a factor, at least 0, for "
                "each label: write {name: factor, ...}, balanced, or null"
            )


@dataclass
class Optimizer:
    """AdamW with warmup and decay of the learning rate."""

    lr: float = 5e-5
    """peak learning rate"""
    weight_decay: float = 0.01
    """decay of the weight matrices; biases and normalization weights have none"""
    warmup: float = 0.1
    """share of the steps over which the learning rate rises, in [0, 1]"""
    schedule: str = "linear"
    """decay after the warmup: constant, linear or cosine"""
    clip: float | None = 1.0
    """largest gradient norm; null: no clipping"""
    bits: int = 32
    """bits of each of AdamW's two moments per weight: 32, or 8, which needs torchao"""
    fused: bool | None = None
    """one kernel for the steps of many weights: true or false; null: yes, but with 16-mixed or
    8 bits no"""

    def __post_init__(self) -> None:
        check_positive("optimizer.lr", self.lr, "5e-5 is a good start")
        check_range("optimizer.weight_decay", self.weight_decay, 0, inf, "0 turns it off")
        hint = "0.1 warms up over a tenth of the steps"
        check_range("optimizer.warmup", self.warmup, 0, 1, hint)
        check_choice("optimizer.schedule", self.schedule, _SCHEDULES)
        check_positive("optimizer.clip", self.clip, "null turns clipping off")
        if self.bits not in (8, 32):
            raise UserError(
                f"optimizer.bits is {self.bits}, but it must be 32 or 8: "
                "8 takes a quarter of the memory"
            )
        if self.fused and self.bits == 8:
            raise UserError(
                "optimizer.fused is true, but optimizer.bits is 8, and torchao's AdamW is not "
                "fused: leave one of them out"
            )


@dataclass
class Checkpoint:
    """When the training state is saved, besides every validation run and the last step."""

    steps: int | None = None
    """optimizer steps between two checkpoints; null: not by steps"""
    minutes: float | None = 10.0
    """minutes between two checkpoints; null: not by time"""
    keep: int = 2
    """newest checkpoints to keep, besides the best one"""

    def __post_init__(self) -> None:
        check_positive("trainer.checkpoint.steps", self.steps, "null does not save by steps")
        check_positive("trainer.checkpoint.minutes", self.minutes, "null does not save by time")
        hint = "2 leaves one if the newest is damaged"
        check_positive("trainer.checkpoint.keep", self.keep, hint)


@dataclass
class Trainer:
    """Length, precision and hardware of the training."""

    epochs: float = 3.0
    """passes over the training examples"""
    max_steps: int | None = None
    """optimizer steps; overrides epochs"""
    accumulate: int = 1
    """micro-batches per optimizer step, whose gradients are accumulated"""
    precision: str = "auto"
    """32-true, bf16-mixed or 16-mixed (on a CPU bf16-mixed); auto: bf16-mixed if the device
    supports it, else 32-true"""
    accelerator: str = "auto"
    """auto, cpu or gpu"""
    devices: int = 1
    """processes on this machine, one per device; ignored under torchrun and srun"""
    nodes: int = 1
    """machines; more than one needs torchrun or srun"""
    strategy: str = "auto"
    """of several processes: ddp (auto) replicates the models, fsdp shards them"""
    validations: int = 4
    """validation runs, evenly spaced; one of them is after the last step"""
    patience: int | None = None
    """stop after this many validation runs without improvement; null: never"""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    compile: bool = False
    """compile a step with torch.compile: the first take minutes, later ones are faster on most
    GPUs"""
    deterministic: bool = True
    """the same weights at each repetition and resume; false: algorithms that are faster on most
    GPUs"""
    progress: bool = True
    """show a progress bar"""

    def __post_init__(self) -> None:
        check_positive("trainer.epochs", self.epochs, "3 is a good start")
        check_positive("trainer.max_steps", self.max_steps, "leave it out to train by epochs")
        check_positive("trainer.accumulate", self.accumulate, "1 does not split the batch")
        check_positive("trainer.validations", self.validations, "1 validates at the end only")
        check_positive("trainer.patience", self.patience, "null never stops early")
        check_choice("trainer.precision", self.precision, _PRECISIONS)
        check_choice("trainer.accelerator", self.accelerator, _ACCELERATORS)
        check_positive("trainer.devices", self.devices, "1 trains in one process")
        check_positive("trainer.nodes", self.nodes, "1 is this machine")
        check_choice("trainer.strategy", self.strategy, _STRATEGIES)


@dataclass
class Tracking:
    """Weights & Biases; metrics.csv is always written."""

    wandb: str = "auto"
    """online, offline or disabled; auto: online if the user is logged in, else offline"""
    project: str = "distill"
    """name of the project"""

    def __post_init__(self) -> None:
        check_choice("tracking.wandb", self.wandb, _WANDB_MODES)
