"""Serving of text generation; see serving.py.

Shapes: L = tokens of a text, N = predicted tokens, V = vocabulary, B = texts of a batch.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from distill import losses
from distill.recipe.config import Data
from distill.tasks.serving import (
    Comparison,
    NotComparableError,
    RuntimeComparison,
    Serving,
    is_likeliest,
)

if TYPE_CHECKING:
    from distill.tasks.batch import Batch

EXAMPLE = """from transformers import pipeline

write = pipeline("text-generation", model="path/of/this/folder"{options})
print(write("The", max_new_tokens=50))"""
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
    example = EXAMPLE

    def request_columns(self, data: Data) -> list[str]:
        """The first column, the prompt: a second column holds completions."""
        return data.text[:1]

    def truncate_request(self, cells: list[str], tokenizer: Any) -> list[str]:
        """The complete text: programs truncate texts that are too long, on the left."""
        return cells

    def encode_requests(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data, keep_end: bool = False
    ) -> dict[str, list[Any]]:
        """Encode the start token and as much of the text as fits, without labels."""
        start, rows = start_token(tokenizer), []
        for text in examples[self.request_columns(data)[0]]:
            ids = tokenizer(text or "", add_special_tokens=False, verbose=False)["input_ids"]
            surplus = max(0, len(ids) + len(start) - self.max_length) if keep_end else 0
            rows.append([*start, *ids[surplus:]][: self.max_length])
        labels = [[losses.IGNORED] * len(ids) for ids in rows]
        return {"input_ids": rows, "labels": labels, "size": [0] * len(rows)}

    def proof_requests(
        self, cells: list[list[str]], batches: Sequence["Batch"], tokenizer: Any
    ) -> list[Any]:
        """The texts, each with its start token and the maximum number of tokens."""
        start = start_token(tokenizer)
        return [{"text": text, "start": start, "max_length": self.max_length} for (text,) in cells]

    def compare(
        self,
        answers: Sequence[dict[str, Any]],
        batches: Sequence["Batch"],
        logits: Iterable[Tensor],
        model_config: Any,
    ) -> Comparison:
        """Compare, at every token, the next one, its logit, and the log-sum-exp of all logits."""
        agreed, differences, scale = [], [], 0.0
        for answer, batch, (logits_LV,) in zip(answers, batches, logits, strict=True):
            _check_ids(answer["ids"], batch.inputs["input_ids"][0].tolist())
            scale = max(scale, float(logits_LV.abs().max()))
            agreed.append(is_likeliest(logits_LV, torch.tensor(answer["next"]), scale))
            differences.append(_top_differences([answer], logits_LV))
        agreed_N = torch.cat(agreed)
        difference = float(torch.cat(differences).max())
        return Comparison(len(agreed_N), float(agreed_N.mean()), difference, scale)

    def runtime_tokenizer(self, tokenizer: Any) -> Tokenizer:
        """A tokenizer that also adds the start token, and truncates on the left."""
        backend = super().runtime_tokenizer(tokenizer)
        names = tokenizer.convert_ids_to_tokens(start_token(tokenizer))
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
        student_BV = torch.cat(list(served))
        scale = float(student_BV.abs().max())
        next_B = torch.tensor([answer["next"] for answer in answers])
        difference = float(_top_differences(answers, student_BV).max())
        agreed_B = is_likeliest(student_BV, next_B, scale)
        return RuntimeComparison(agreed_B, difference, scale, None, None)

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


def _top_differences(answers: Sequence[dict[str, Any]], logits_NV: Tensor) -> Tensor:
    """Absolute differences of largest logits and log-sum-exps to those of the answers, (2 * N,)."""
    top_N, total_N = (
        torch.tensor([answer[key] for answer in answers]).flatten() for key in ("top", "logsumexp")
    )
    return torch.cat([logits_NV.amax(-1) - top_N, logits_NV.logsumexp(-1) - total_N]).abs()
