"""The next token: one row of logits for each predicted token.

Shapes: B = examples (windows of texts), L = tokens of the longest, N = predicted tokens,
C = vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import List, Value
from torch import Tensor
from transformers import PreTrainedConfig

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import Task, check_max_length
from distill.tasks.batch import Batch
from distill.tasks.collation import model_inputs, pad_column
from distill.tasks.conversations import Conversations, read_template
from distill.tasks.generation import CHAT_EXAMPLE, TextGeneration, start_token
from distill.tasks.messages import Conversation, contents
from distill.tasks.special_tokens import LANGUAGE_TOKENS
from distill.tasks.windows import Tokens, completion_windows, tokenize, windows, with_context


class CausalLanguageModelling(TextGeneration, Task):
    """Predicts each token from the tokens before it.

    With one text column every token is predicted. With two, the first is a prompt, which is context
    only, and the second its completion, to which the end-of-text token is appended. The beginning-
    or end-of-text token precedes each text, so that its first token is predicted too, unless the
    tokenizer has neither.

    Texts longer than `max_length` are split into windows that overlap by one token, which is
    context in the second. A prompt that does not fit with its completion loses its beginning, down
    to half a window; a completion that does not fit beside that half is split into windows, each
    with the half before it as context. Each token is predicted exactly once: the number of
    predicted tokens does not depend on `max_length`. Windows without predicted tokens are left out.

    With `learn`, the column holds conversations: lists of messages in the form of OpenAI (`role`,
    `content`, `tool_calls`, `reasoning_content`) or ShareGPT (`from`, `value`), or JSON text of
    one; a column `tools` describes tools. The chat template of the tokenizer makes a text of each.
    The assistant's messages are predicted, from the end of the generation prompt to the end-of-turn
    token. A conversation longer than `max_length` is cut at the user's messages: its oldest turns
    are examples of their own after the same system message, or are left out with `last`. Templates
    that write today's date get 26 Jul 2024.

    Args:
        max_length: Tokens of a window.
        learn: Predicted tokens of conversations: `assistant`, those of all messages of the
            assistant; `last`, of its last message; `all`. None: the column holds texts.
        template: A chat template in Jinja, as a file or as text; None: that of the tokenizer.
        unanswered: What is done with a conversation without a message to predict: `refuse`, which
            names its row, or `drop`.
    """

    auto_class = "AutoModelForCausalLM"
    primary_metric = "perplexity"
    maximize = False
    divergences = losses.ONE_OF_C
    selects_positions = True
    predicts_tokens = True
    uses_labels = False
    label_feature = List(Value("int64"))
    conversations: Conversations | None = None  # how they are read; None: the column holds texts

    def __init__(
        self,
        max_length: int = 256,
        learn: str | None = None,
        template: str | None = None,
        unanswered: str = "refuse",
    ) -> None:
        self.max_length = check_max_length(
            max_length, 2, "a window holds a context and a token to predict"
        )
        if learn is not None:
            self.conversations = Conversations(learn, unanswered, read_template(template))
        elif template is not None:
            raise UserError(
                "task.template is set, but task.learn is null, so that the column holds texts: "
                "set task.learn to assistant, or leave task.template out"
            )

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def adapt_config(self, config: PreTrainedConfig) -> None:
        """Make an encoder attend to earlier tokens only: it must not see what it predicts."""
        if config.to_dict().get("is_decoder") is False:
            config.is_decoder = True

    def special_tokens(self) -> dict[str, str]:
        return LANGUAGE_TOKENS

    # ---- conversations

    @property
    def reads_messages(self) -> bool:
        return self.conversations is not None

    def parse_text(self, cell: Any, tools: Any) -> str:
        assert self.conversations is not None
        return self.conversations.parse(cell, tools)

    def plain_texts(self, texts: Iterable[str]) -> Iterable[str]:
        if self.conversations is None:
            return texts
        return (each for text in texts for each in contents(Conversation.from_json(text)))

    def added_texts(self, tokenizer: Any) -> list[str]:
        template = tokenizer.chat_template if self.reads_messages else None
        return [*template.values()] if isinstance(template, dict) else [template or ""]

    def prepare_tokenizer(self, tokenizer: Any) -> None:
        """Give it the template of the recipe, which is saved with it."""
        if self.conversations is not None and self.conversations.template is not None:
            tokenizer.chat_template = self.conversations.template

    def has_prompts(self, data: Data) -> bool:
        return self.reads_messages or super().has_prompts(data)

    def reference_replies(self, examples: dict[str, list[Any]], data: Data) -> list[str]:
        if self.conversations is None:
            return super().reference_replies(examples, data)
        cells = examples[self.request_columns(data)[0]]
        return [self.conversations.reference(cell or "") for cell in cells]

    def request_texts(self, cells: Sequence[str | None], tokenizer: Any) -> list[str]:
        """Texts, or conversations up to the generation prompt of the message to predict."""
        if self.conversations is None:
            return super().request_texts(cells, tokenizer)
        read = self.conversations.prompt
        return [read(cell or "", tokenizer, self.max_length) for cell in cells]

    def start(self, tokenizer: Any) -> list[int]:
        """The start token; a chat template writes its own."""
        return [] if self.reads_messages else super().start(tokenizer)

    def usage(self, data: Data, options: str) -> str:
        example = CHAT_EXAMPLE if self.reads_messages else self.example
        return example.format(options=options)

    # ---- data

    def encode(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data
    ) -> dict[str, list[Any]]:
        """Tokenize texts into windows.

        `labels` holds the token at each position, or -100 for context; `size` is the number of
        UTF-8 bytes of the predicted tokens. `first_window` is 1 for the first window of a text;
        `truncated` of the first is SPLIT if there are several, plus SHORTENED if the prompt lost
        its beginning, plus TURNS if a conversation was cut.
        """
        columns: dict[str, list[Any]] = {
            name: []
            for name in (
                "input_ids",
                "labels",
                "size",
                "length",
                "rows",
                "truncated",
                "first_window",
            )
        }
        for window in self._windows(examples, tokenizer, data):
            for name, value in window.items():
                columns[name].append(value)
        return columns

    def _windows(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data
    ) -> Iterator[dict[str, Any]]:
        """The windows of conversations, texts, or prompts with their completions."""
        if self.conversations is not None:
            cells = examples[data.text[0]]
            yield from self.conversations.windows(cells, tokenizer, self.max_length)
            return
        texts = zip(*(tokenize(examples[column], tokenizer) for column in data.text), strict=True)
        start = start_token(tokenizer)
        for parts in texts:
            yield from self._text_windows(list(parts), start, tokenizer.eos_token_id)

    def _text_windows(
        self, parts: list[Tokens], start: list[int], end: int | None
    ) -> Iterator[dict[str, Any]]:
        """The windows of a text, or of a prompt and its completion."""
        if len(parts) == 1:
            return windows(with_context(start, parts[0]), self.max_length)
        prompt, (ids, _, sizes) = parts
        if end is not None:
            ids, sizes = [*ids, end], [*sizes, 0]
        text = with_context([*start, *prompt.ids], Tokens(ids, ids, sizes))
        return completion_windows(text, start, self.max_length)

    def collate(self, examples: list[dict[str, Any]], pad_id: int) -> Batch:
        """Pad the windows; the logits at position i are compared with the label at i + 1."""
        labels_BL = _shift(pad_column(examples, "labels", losses.IGNORED))
        positions = torch.from_numpy(np.flatnonzero(labels_BL.numpy() != losses.IGNORED))
        return Batch(
            inputs=model_inputs(examples, pad_id),
            labels=labels_BL.flatten()[positions],
            positions=positions,
            example=positions // labels_BL.shape[1],
            size=torch.tensor([example["size"] for example in examples]),
            rows=len(positions),
            tokens=sum(len(example["input_ids"]) for example in examples),
        )

    def select_rows(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits.flatten(0, 1)[batch.positions]

    # The function itself, by which `distill.losses.fused` recognizes it.
    label_loss = staticmethod(losses.cross_entropy)  # type: ignore[assignment]

    def row_outcomes(self, logits_NC: Tensor, labels: Tensor) -> dict[str, Tensor]:
        correct_N = (logits_NC.argmax(-1) == labels).float()
        nll_N = self.label_loss(logits_NC, labels)
        return {"nll": nll_N, "tokens": torch.ones_like(correct_N), "correct": correct_N}

    def sum_outcomes(self, columns_N: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return super().sum_outcomes(columns_N, batch) | {"bytes": batch.size}

    def weighted_metrics(self, columns: dict[str, Tensor], weights_NR: Tensor) -> dict[str, Tensor]:
        """Perplexity, bits per UTF-8 byte, loss in nats per token, share of correct tokens."""
        nll, tokens, correct, size = (
            columns[name].double() @ weights_NR for name in ("nll", "tokens", "correct", "bytes")
        )
        return {
            "perplexity": (nll / tokens).clamp(max=700).exp(),
            "bits_per_byte": torch.where(size > 0, nll / math.log(2) / size, math.nan),
            "nll": nll / tokens,
            "accuracy": correct / tokens,
        }

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return (student_NC.argmax(-1) == teacher_NC.argmax(-1)).float()


def _shift(labels_BL: Tensor) -> Tensor:
    """The label for the logits at each position, (B, L), -100 if there is none."""
    return torch.nn.functional.pad(labels_BL[:, 1:], (0, 1), value=losses.IGNORED)
