"""The contents of proof.json: what was compared, and what an export costs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.stages import PROOF


@dataclass(frozen=True)
class FasterDtype:
    """Another type in which transformers can load the export, and in which it is faster."""

    dtype: str
    latency_p50_ms: float
    agreement: float  # share of rows with the student's prediction


@dataclass(frozen=True)
class Generated:
    """Tokens that a runtime's program generated after some texts."""

    tokens: int
    agreement: float  # share that are the student's likeliest tokens


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The contents of proof.json.

    Fields that are None by default exist for some formats only.
    """

    texts: int  # held-out texts that were compared
    rows: int  # compared rows: one per text, or one per token
    agreement: float  # share of rows with the student's prediction
    # Rows with another prediction whose logits, in float32, are nearer than `dtype` can tell.
    near_ties: int | None = None
    agreement_interval: list[float] | None = None  # its 95 % interval; runtimes
    max_difference: float  # largest absolute difference of a logit
    tolerance: float | None  # the largest that is accepted; None: any
    max_logit: float  # the student's largest absolute logit
    trained_agreement: float | None = None  # with the student before quantization after training
    trained_max_difference: float | None = None
    quality: dict[str, Any] | None = None  # of "export" and "student": metric -> [value, low, high]
    generated: Generated | None = None
    bytes: int  # of all files
    teacher_bytes: int | None  # None without a teacher
    ratio: float | None  # bytes / teacher_bytes
    bits_per_weight: float  # bits of the weight files per parameter
    latency_p50_ms: float  # median of single texts, tokenization included
    faster: FasterDtype | None = None
    format: str
    dtype: str
    quantize: str | None
    code: bool  # whether transformers must run code beside the weights
    batch: int | None = None  # texts of a batch; runtimes
    cached: bool | None = None  # whether keys and values are inputs and outputs; runtimes
    threads: int
    device: str
    versions: dict[str, str]  # of Python and of the libraries that ran the export

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Proof":
        """The inverse of :meth:`to_json`."""
        fields = dict(fields)
        if fields.get("faster"):
            fields["faster"] = FasterDtype(**fields["faster"])
        if fields.get("generated"):
            fields["generated"] = Generated(**fields["generated"])
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """A dictionary without the fields of other formats."""
        other = {"trained_agreement", "trained_max_difference", "faster", "near_ties"}
        if self.batch is None:
            other |= {"agreement_interval", "quality", "generated", "batch", "cached"}
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in other
        }

    def write(self, folder: Path) -> None:
        """Store it as proof.json."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        (folder / PROOF).write_text(text + "\n")
