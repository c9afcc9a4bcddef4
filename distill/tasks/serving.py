"""Serving of a task's models: requests, programs, the proof of an export, the model card.

An answer is the result of an exported model for a request. The defaults are for tasks whose models
map the tokens of a text to logits.

Shapes: B = requests of a batch, L = tokens of the longest of them, C = classes or vocabulary,
N = rows of logits that count.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from torch import Tensor

from distill.recipe.config import Data
from distill.tasks.batch import Batch
from distill.tasks.comparison import (
    NEAR,
    SPACING,
    Comparison,
    NotComparableError,
    RuntimeComparison,
    break_ties,
)

EXAMPLE = """from transformers import pipeline

run = pipeline("{pipeline}", model="path/of/this/folder"{options})
print(run({request}))"""


class Serving:
    """The part of :class:`distill.tasks.Task` that export and evaluation use."""

    pipeline: ClassVar[str]  # the pipeline of transformers that serves the models
    example: ClassVar[str] = EXAMPLE  # template of the usage example in the model card

    # Function of the isolated proof script; `forward` runs the model on token ids.
    proof: ClassVar[str] = "forward"
    # Program that runs the model in a runtime: distill/packing/programs/<program>_<format>.py.
    program: ClassVar[str] = "run"
    # Form of a program's answers: `logits`, or `next_token` (the most likely token and its logit).
    answer: ClassVar[str] = "logits"
    # Whether keys and values of earlier tokens may be inputs and outputs of a runtime's graph.
    generates: ClassVar[bool] = False
    # Whether :meth:`compare` takes the rows of all positions, possibly as factors.
    compares_positions: ClassVar[bool] = False

    # Attributes and methods of Task that the defaults use.
    max_length: int
    names: tuple[str, ...]
    encode: Callable[[dict[str, list[Any]], Any, Data], dict[str, list[Any]]]
    select_rows: Callable[[Tensor, Batch], Tensor]
    agreement: Callable[[Tensor, Tensor], Tensor]
    outcomes: Callable[[Tensor, Batch], dict[str, Tensor]]

    # What a request is

    def request_columns(self, data: Data) -> list[str]:
        """The text columns that make up one request."""
        return list(data.text)

    def requests(self, texts: Dataset, data: Data, tokenizer: Any) -> list[list[str]]:
        """The cells of each request, one per column, from raw rows; a missing cell is empty."""
        columns = (texts[column] for column in self.request_columns(data))
        return [[cell or "" for cell in row] for row in zip(*columns, strict=True)]

    def truncate_request(self, cells: list[str], tokenizer: Any) -> list[str]:
        """The part of each cell that the model reads, for requests that are timed."""
        tokens = tokenizer(
            *cells, truncation=True, max_length=self.max_length, return_offsets_mapping=True
        )
        offsets = list(zip(tokens["offset_mapping"], tokens.sequence_ids(), strict=True))
        ends = [
            max((end for (_, end), sequence in offsets if sequence == cell), default=0)
            for cell in range(len(cells))
        ]
        return [text[:end] for text, end in zip(cells, ends, strict=True)]

    def encode_requests(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data, keep_end: bool = False
    ) -> dict[str, list[Any]]:
        """Encode raw rows as a deployed model reads them; by default as :meth:`Task.encode`.

        Args:
            examples: columns of raw rows.
            tokenizer: the student's tokenizer.
            data: names the text columns.
            keep_end: whether to truncate on the left, as programs for text generation do.
        """
        return self.encode(examples, tokenizer, data)

    # The proof of an export that transformers loads

    def proof_requests(
        self, cells: list[list[str]], batches: Sequence[Batch], tokenizer: Any
    ) -> list[Any]:
        """The inputs of the isolated proof script's function :attr:`proof`, as JSON values.

        By default the encoded inputs of each example, and its texts with the token ids that the
        exported tokenizer must give.
        """
        texts = [{"cells": row, "ids": tokenizer(*row)["input_ids"]} for row in cells]
        return [
            {"inputs": {name: tensor.tolist() for name, tensor in batch.inputs.items()}}
            | (texts[index] if index < len(texts) else {})
            for index, batch in enumerate(batches)
        ]

    def compare(
        self,
        answers: Sequence[dict[str, Any]],
        batches: Sequence[Batch],
        logits: Iterable[Any],
        model_config: Any,
    ) -> Comparison:
        """Compare the answers of the proof script with the student's.

        Args:
            answers: one per element of :meth:`proof_requests`.
            batches: the encoded examples, one per batch.
            logits: the student's logits of each batch, in float32 on the CPU; with
                :attr:`compares_positions` the rows of all positions, on any device.
            model_config: the student's config.

        Raises:
            NotComparableError: the answers have other tokens, labels or shapes.
        """
        pairs = [
            (
                self._rows(answer["logits"], student.shape, batch),
                self._rows(student, student.shape, batch),
            )
            for answer, student, batch in zip(answers, logits, batches, strict=True)
        ]
        return self.compare_rows(*(torch.cat(rows) for rows in zip(*pairs, strict=True)))

    def compare_rows(self, export_NC: Tensor, student_NC: Tensor) -> Comparison:
        """Compare rows of logits; a prediction that is tied within rounding counts as the same."""
        scale = float(student_NC.abs().max())
        agreed_N = self._agreed(export_NC, student_NC, scale)
        difference = float((export_NC - student_NC).abs().max())
        ties = {
            dtype: int((self._agreed(export_NC, student_NC, 0, eps) > agreed_N).sum())
            for dtype, eps in SPACING.items()
        }
        return Comparison(len(agreed_N), float(agreed_N.mean()), difference, scale, ties)

    def _agreed(
        self, export_NC: Tensor, student_NC: Tensor, scale: float, spacing: float = 0.0
    ) -> Tensor:
        """1 for rows with the same prediction, but for ties.

        Args:
            export_NC: the export's logits.
            student_NC: the student's.
            scale: the student's largest absolute logit; a share NEAR of it is a tie.
            spacing: share of a row's largest absolute logit that is a tie too.
        """
        near_N1 = (spacing * student_NC.abs().amax(-1, keepdim=True)).clamp(min=NEAR * scale)
        return self.agreement(export_NC, break_ties(student_NC, export_NC, near_N1 / 2))

    def _rows(self, logits: Any, shape: Sequence[int], batch: Batch) -> Tensor:
        """The relevant rows of the logits of one batch, whose shape is checked."""
        logits = torch.as_tensor(logits)
        if logits.shape != torch.Size(shape):
            raise NotComparableError(
                f"its logits have the shape {list(logits.shape)}, the student's have {list(shape)}"
            )
        return self.select_rows(logits, batch)

    # Programs of runtimes

    def runtime_tokenizer(self, tokenizer: Any) -> Tokenizer:
        """A tokenizer of the package `tokenizers`, whose `encode_batch` truncates and pads."""
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.enable_truncation(self.max_length, direction=tokenizer.truncation_side)
        backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        return backend

    def runtime_labels(self, model_config: Any) -> dict[int, str]:
        """`id2label` of a runtime's config.json."""
        return dict(enumerate(self.names)) or model_config.id2label

    def served_logits(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The part of a model's logits that a program returns for a batch of requests."""
        return logits

    def compare_runtime(
        self,
        answers: Sequence[dict[str, Any]],
        batches: Sequence[Batch],
        served: Sequence[Tensor],
    ) -> RuntimeComparison:
        """Compare a program's answers with the student's.

        Args:
            answers: one for each request, in the form :attr:`answer`.
            batches: the encoded requests, in the program's batches.
            served: the student's :meth:`served_logits` of each batch, in float32 on the CPU.

        Raises:
            NotComparableError: the answers have other shapes.
        """
        shapes = [tensor.shape for tensor in served]
        export = self.answered_rows([answer["logits"] for answer in answers], batches, shapes)
        student = [
            self._rows(logits, logits.shape, batch)
            for logits, batch in zip(served, batches, strict=True)
        ]
        export_NC, student_NC = torch.cat(export), torch.cat(student)
        scale = float(student_NC.abs().max())
        difference = float((export_NC - student_NC).abs().max())
        agreed_N = self._agreed(export_NC, student_NC, scale)
        return RuntimeComparison(agreed_N, difference, scale, export, student)

    def answered_rows(
        self,
        answers: Sequence[Any],
        batches: Sequence[Batch],
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> list[Tensor]:
        """The relevant rows of answers that hold logits, (N, C) for each batch.

        Args:
            answers: the logits of each request, padded to the longest of a batch.
            batches: the encoded requests.
            shapes: the shape that the logits of each batch must have; None accepts any.
        """
        rows, first = [], 0
        for index, batch in enumerate(batches):
            logits = torch.tensor(answers[first : first + len(batch.size)])
            rows.append(self._rows(logits, shapes[index] if shapes else logits.shape, batch))
            first += len(batch.size)
        return rows

    def compare_answers(
        self, answers: Sequence[Any], reference: Sequence[Any], batches: Sequence[Batch]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Compare the answers of two programs, in the form :attr:`answer`, to the same batches.

        Returns:
            1 for each row whose prediction is the reference's, else 0, (N,); and the outcomes that
            :meth:`Task.compute_metrics` takes, or None if the answers are not enough for them.
        """
        rows = self.answered_rows(answers, batches)
        agreed_N = self.agreement(
            torch.cat(rows), torch.cat(self.answered_rows(reference, batches))
        )
        return agreed_N, self.joined_outcomes(rows, batches)

    def joined_outcomes(
        self, rows: Sequence[Tensor], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """The outcomes of all batches, from their rows of logits."""
        parts = [self.outcomes(*pair) for pair in zip(rows, batches, strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def prompts(
        self, cells: list[list[str]], batches: Sequence[Batch], count: int
    ) -> list[tuple[str, list[int]]]:
        """At most `count` texts, with their tokens, for a program to continue; none by default."""
        return []

    # The model card

    def usage(self, data: Data, options: str) -> str:
        """Python code for the model card; `options` are further arguments of `pipeline(...)`."""
        cells = self.request_columns(data)
        request = '"a text"' if len(cells) == 1 else '{"text": "a text", "text_pair": "another"}'
        return self.example.format(pipeline=self.pipeline, options=options, request=request)

    def runtime_notes(self, cached: bool) -> list[str]:
        """Sentences for a runtime's model card; `cached`: keys and values are inputs."""
        return []
