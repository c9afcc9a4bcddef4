"""Serving of text generation; see serving.py.

Shapes: L = tokens of a text, N = predicted tokens, V = vocabulary, B = texts of a batch.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from datasets import Dataset
from tokenizers import Tokenizer, processors
from torch import Tensor

from distill import losses
from distill.losses.chunked import LogitRows, rows_in_chunks
from distill.recipe.config import Data
from distill.tasks.comparison import (
    NEAR,
    SPACING,
    Comparison,
    NotComparableError,
    RuntimeComparison,
)
from distill.tasks.serving import Serving

if TYPE_CHECKING:
    from distill.tasks.batch import Batch

EXAMPLE = """from transformers import pipeline

write = pipeline("text-generation", model="path/of/this/folder"{options})
print(write("The", max_new_tokens=50))"""
CHAT_EXAMPLE = """from transformers import pipeline

write = pipeline("text-generation", model="path/of/this/folder"{options})
print(write([{{"role": "user", "content": "Hello"}}], max_new_tokens=50))"""
CACHED = """One graph processes the prompt, and then one generated token at a time: keys and values
of earlier tokens are inputs (`past_key_values.*`, of length 0 at first) and outputs (`present.*`),
as `generate` shows."""
UNCACHED = "It reads the complete text for each generated token: keys and values are not cached."


class TextGeneration(Serving):
    """Requests are texts to continue; answers are compared by their most likely next tokens."""

    pipeline = "text-generation"
    proof = "predict_next"
    program = "generate"
    answer = "next_token"
    generates = True
    compares_positions = True
    example = EXAMPLE

    def request_columns(self, data: Data) -> list[str]:
        """The first column, the prompt: a second column holds completions."""
        return data.text[:1]

    def request_texts(self, cells: Sequence[str | None], tokenizer: Any) -> list[str]:
        """The text of each request that a model continues, from cells of the first column."""
        return [cell or "" for cell in cells]

    def start(self, tokenizer: Any) -> list[int]:
        """The tokens that are put before each text."""
        return start_token(tokenizer)

    def requests(self, texts: Dataset, data: Data, tokenizer: Any) -> list[list[str]]:
        cells = texts[self.request_columns(data)[0]]
        return [[text] for text in self.request_texts(cells, tokenizer)]

    def truncate_request(self, cells: list[str], tokenizer: Any) -> list[str]:
        """The complete text: programs truncate texts that are too long, on the left."""
        return cells

    def encode_requests(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data, keep_end: bool = False
    ) -> dict[str, list[Any]]:
        """Encode the start token and as much of the text as fits, without labels."""
        start, rows = self.start(tokenizer), []
        for text in self.request_texts(examples[self.request_columns(data)[0]], tokenizer):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            surplus = max(0, len(ids) + len(start) - self.max_length) if keep_end else 0
            rows.append([*start, *ids[surplus:]][: self.max_length])
        labels = [[losses.IGNORED] * len(ids) for ids in rows]
        return {"input_ids": rows, "labels": labels, "size": [0] * len(rows)}

    def has_prompts(self, data: Data) -> bool:
        """Whether requests are prompts, which completions follow, and not plain texts."""
        return len(data.text) > 1

    def with_max_length(self, max_length: int) -> Self:
        """A copy of the task whose texts have at most so many tokens."""
        bounded = copy.copy(self)
        bounded.max_length = max_length
        return bounded

    def encode_prompts(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data, room: int
    ) -> list[list[int]]:
        """Token ids of texts to continue: the requests, or of plain texts the first half.

        Args:
            examples: columns of raw rows.
            tokenizer: the model's tokenizer.
            data: names the text columns.
            room: most tokens of a prompt; those at its end stay.
        """
        complete = self.has_prompts(data)
        columns = self.with_max_length(room).encode_requests(examples, tokenizer, data, complete)
        texts = columns["input_ids"]
        return texts if complete else [ids[: (len(ids) + 1) // 2] for ids in texts]

    def reference_replies(self, examples: dict[str, list[Any]], data: Data) -> list[str]:
        """The completions of the prompts in raw rows; none of plain texts."""
        return [cell or "" for cell in examples[data.text[1]]] if self.has_prompts(data) else []

    def proof_requests(
        self, cells: list[list[str]], batches: Sequence["Batch"], tokenizer: Any
    ) -> list[Any]:
        """The texts, each with its start token and the maximum number of tokens."""
        start = self.start(tokenizer)
        return [{"text": text, "start": start, "max_length": self.max_length} for (text,) in cells]

    def compare(
        self,
        answers: Sequence[dict[str, Any]],
        batches: Sequence["Batch"],
        logits: Iterable[Any],
        model_config: Any,
    ) -> Comparison:
        """Compare, at every token, the next one, its logit, and the log-sum-exp of all logits."""
        agreed, gaps, differences, scale = [], [], [], 0.0
        for answer, batch, rows in zip(answers, batches, logits, strict=True):
            _check_ids(answer["ids"], batch.inputs["input_ids"][0].tolist())
            student = _TopLogits.of(rows, torch.tensor(answer["next"]))
            scale = max(scale, student.scale)
            gap_N = student.top_N - student.chosen_N
            agreed.append((gap_N <= NEAR * scale).float())
            gaps.append(gap_N / student.top_N.abs())
            differences.append(student.differences([answer]))
        agreed_N, gap_N = torch.cat(agreed), torch.cat(gaps)
        ties = {
            dtype: int(((gap_N <= eps) & (agreed_N == 0)).sum()) for dtype, eps in SPACING.items()
        }
        difference = float(torch.cat(differences).max())
        return Comparison(len(agreed_N), float(agreed_N.mean()), difference, scale, ties)

    def runtime_tokenizer(self, tokenizer: Any) -> Tokenizer:
        """A tokenizer that also adds the start token, and truncates on the left."""
        backend = super().runtime_tokenizer(tokenizer)
        names = tokenizer.convert_ids_to_tokens(self.start(tokenizer))
        special = [(name, backend.token_to_id(name)) for name in names]
        backend.post_processor = processors.TemplateProcessing(
            single=[*names, "$A"], special_tokens=special
        )
        backend.enable_truncation(self.max_length, direction="left")
        return backend

    def runtime_labels(self, model_config: Any) -> dict[int, str]:
        """Empty: classes are tokens."""
        return {}

    def served_logits(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The logits of each text's last token, (B, V)."""
        return logits[torch.arange(len(logits)), inputs["attention_mask"].sum(1) - 1]

    def compare_runtime(
        self,
        answers: Sequence[dict[str, Any]],
        batches: Sequence["Batch"],
        served: Sequence[Tensor],
    ) -> RuntimeComparison:
        """Compare the next token of each text, its logit, and the log-sum-exp of all logits."""
        next_B = torch.tensor([answer["next"] for answer in answers])
        student = _TopLogits.of(torch.cat(list(served)), next_B)
        agreed_B = (student.top_N - student.chosen_N <= NEAR * student.scale).float()
        difference = float(student.differences(answers).max())
        return RuntimeComparison(agreed_B, difference, student.scale, None, None)

    def compare_answers(
        self, answers: Sequence[Any], reference: Sequence[Any], batches: Sequence["Batch"]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Compare the most likely tokens; they are not enough to compute metrics."""
        return torch.tensor(answers) == torch.tensor(reference), None

    def prompts(
        self, cells: list[list[str]], batches: Sequence["Batch"], count: int
    ) -> list[tuple[str, list[int]]]:
        """The shortest texts, which leave room for the most new tokens."""
        texts = [text for (text,) in cells]
        tokens = [
            ids[mask.bool()].tolist()
            for batch in batches
            for ids, mask in zip(
                batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True
            )
        ]
        pairs = sorted(zip(texts, tokens, strict=True), key=lambda pair: len(pair[1]))
        return pairs[:count]

    def runtime_notes(self, cached: bool) -> list[str]:
        """A sentence about the cache of keys and values."""
        return [CACHED if cached else UNCACHED]


def start_token(tokenizer: Any) -> list[int]:
    """The token before every text, so that its first token has a context too.

    It is the beginning-of-text token, or else the end-of-text token; empty if there is neither.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [first]


def _check_ids(ids: list[int], expected: list[int]) -> None:
    if ids != expected:
        raise NotComparableError(
            f"its tokenizer makes {ids[:8]}... of a text, and the student's makes {expected[:8]}..."
        )


class _TopLogits(NamedTuple):
    """What a comparison needs of rows of logits, on the CPU."""

    top_N: Tensor
    chosen_N: Tensor  # the logit of the token that the export predicts
    logsumexp_N: Tensor
    scale: float  # largest absolute logit

    @classmethod
    def of(cls, rows: LogitRows, next_N: Tensor) -> Self:
        """Computed for some rows at a time."""
        parts, scale = [], 0.0
        for part, (logits_nV,) in rows_in_chunks(rows):
            next_n1 = next_N[part, None].to(logits_nV.device)
            chosen_n = logits_nV.gather(1, next_n1)[:, 0]
            parts.append(torch.stack([logits_nV.amax(-1), chosen_n, logits_nV.logsumexp(-1)]))
            scale = max(scale, float(logits_nV.abs().max()))
        top_N, chosen_N, logsumexp_N = torch.cat(parts, 1).cpu()
        return cls(top_N, chosen_N, logsumexp_N, scale)

    def differences(self, answers: Sequence[dict[str, Any]]) -> Tensor:
        """Absolute differences of largest logits and log-sum-exps to the answers', (2 * N,)."""
        top_N, total_N = (
            torch.tensor([answer[key] for answer in answers]).flatten()
            for key in ("top", "logsumexp")
        )
        return torch.cat([self.top_N - top_N, self.logsumexp_N - total_N]).abs()
