"""Conversations -> encoded examples and requests of a language model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from distill import losses
from distill.errors import UserError
from distill.recipe.validation import check_choice
from distill.tasks.base import TURNS
from distill.tasks.chat_template import ChatTemplate, Rendering, Span, excerpt
from distill.tasks.messages import (
    LEARN,
    Conversation,
    Message,
    is_answered,
    parse_conversation,
    reference_reply,
    reply_indices,
)
from distill.tasks.windows import Tokens, byte_sizes, completion_windows

UNANSWERED = ("refuse", "drop")


@dataclass(frozen=True)
class Conversations:
    """How a language model reads conversations.

    Args:
        learn: Tokens that are predicted: those of all messages of the assistant, of its last
            message, or all.
        unanswered: Whether a conversation without a message to predict is refused or dropped.
        template: Text of a chat template; None: that of the tokenizer.
    """

    learn: str
    unanswered: str
    template: str | None

    def __post_init__(self) -> None:
        check_choice("task.learn", self.learn, LEARN)
        check_choice("task.unanswered", self.unanswered, UNANSWERED)

    def parse(self, cell: Any, tools: Any) -> str:
        """The conversation in a cell as JSON text; empty if it is dropped.

        Raises:
            ValueError: It is no conversation, or has no message to predict and is refused.
        """
        conversation = parse_conversation(cell, tools)
        if is_answered(conversation, self.learn):
            text = conversation.to_json()
            text.encode()  # a ValueError for half of a surrogate pair, which is no character
            return text
        if self.unanswered == "drop":
            return ""
        raise ValueError(
            f"it has no message to predict with task.learn={self.learn}: correct it, or set "
            "task.unanswered=drop"
        )

    def windows(
        self, cells: Sequence[str], tokenizer: Any, max_length: int
    ) -> Iterator[dict[str, Any]]:
        """Encoded examples of conversations, usually one of each.

        Args:
            cells: Results of :meth:`parse`.
            tokenizer: Has a chat template.
            max_length: Tokens of an example.

        Raises:
            UserError: A conversation has no token to predict and is refused.
        """
        template = ChatTemplate(tokenizer)
        for cell in cells:
            conversation = Conversation.from_json(cell)
            parts = self._parts(conversation, template, max_length)
            examples = [window for part in parts for window in self._examples(*part, max_length)]
            if not examples and self.unanswered == "refuse":
                raise UserError(
                    f"the conversation {excerpt(conversation)} has no token to predict in the chat "
                    "template's text of it: correct it, or set task.unanswered=drop"
                )
            is_cut = len(parts[0][0].messages) < len(conversation.messages)
            for number, window in enumerate(examples):
                window["first_window"] = int(number == 0)
                window["truncated"] |= TURNS if is_cut and number == 0 else 0
                yield window

    def prompt(self, cell: str, tokenizer: Any, max_length: int) -> str:
        """The text that a model continues with the last message of the assistant.

        Its oldest turns are left out if it is longer than `max_length`.
        """
        conversation, template = Conversation.from_json(cell), ChatTemplate(tokenizer)
        replies = reply_indices(conversation.messages, self.learn)
        options: dict[str, Any] = {}
        if replies and replies[-1] > 0:
            through, conversation = (
                conversation._replace(messages=conversation.messages[:count])
                for count in (replies[-1] + 1, replies[-1])
            )
            options = template.served_options(through)
        most = _last_turn(conversation.messages, len(conversation.messages))
        return _fit(_Reading(template, True, options), conversation, most, max_length)[1].text

    def reference(self, cell: str) -> str:
        """The text of the message that follows the prompt; empty if it is not only a text."""
        return reference_reply(Conversation.from_json(cell).messages, self.learn)

    def _parts(
        self, conversation: Conversation, template: ChatTemplate, max_length: int
    ) -> list[tuple[Conversation, "_Text"]]:
        """Conversations of as many turns as fit, from the last turn on, and their texts.

        Each has the system's messages at the beginning of the whole. If only the last message is
        predicted, the first of them is left out.
        """
        parts: list[tuple[Conversation, _Text]] = []
        rest = conversation
        while not parts or (self.learn != "last" and is_answered(rest, self.learn)):
            last = len(rest.messages)
            if self.learn != "all":
                last = reply_indices(rest.messages, self.learn)[-1]
            most = _last_turn(rest.messages, last)
            parts.append(_fit(_Reading(template), rest, most, max_length))
            rest = _first_turns(rest, parts[-1][0])
        return parts[::-1]

    def _examples(
        self, part: Conversation, text: "_Text", max_length: int
    ) -> Iterator[dict[str, Any]]:
        """The windows of a text: several if its only turn does not fit."""
        spans = [Span(0, len(text.text))]
        if self.learn != "all":
            replies = reply_indices(part.messages, self.learn)
            spans = text.template.reply_spans(part, text.rendering, replies)
        labelled, bos = text.labelled(spans), text.template.tokenizer.bos_token_id
        start = [bos] if labelled.ids[:1] == [bos] else []
        return completion_windows(labelled, start, max_length)


class _Reading(NamedTuple):
    """How a conversation becomes a text."""

    template: ChatTemplate
    prompt: bool = False  # whether the generation prompt follows
    options: Mapping[str, Any] = MappingProxyType({})  # variables of the template

    def text(self, conversation: Conversation) -> "_Text":
        rendering = self.template.render(conversation, self.prompt, **self.options)
        return _Text.of(self.template, rendering)


class _Text(NamedTuple):
    """A rendered conversation and its tokens."""

    template: ChatTemplate
    rendering: Rendering
    ids: list[int]
    offsets: list[tuple[int, int]]

    @classmethod
    def of(cls, template: ChatTemplate, rendering: Rendering) -> "_Text":
        tokens = template.tokenizer(
            rendering.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return cls(template, rendering, tokens["input_ids"], tokens["offset_mapping"])

    @property
    def text(self) -> str:
        return self.rendering.text

    @property
    def size(self) -> int:
        """Number of tokens, without white space after the end of the last turn."""
        return self._end_of_turn(range(len(self.ids))) + 1

    def labelled(self, spans: Sequence[Span]) -> Tokens:
        """The tokens up to the last predicted one; those that begin in a span are predicted."""
        count = len(self.ids)
        labels, sizes = [losses.IGNORED] * count, [0] * count
        bytes_ = byte_sizes(self.text, self.offsets)
        last = 0
        for span in spans:
            inside = range(self._first_token(span.start), self._first_token(span.end))
            last = self._end_of_turn(inside)
            for position in range(max(inside.start, 1), last + 1):
                id = self.ids[position]
                labels[position] = id
                sizes[position] = 0 if id in self.template.special else bytes_[position]
        return Tokens(self.ids[: last + 1], labels[: last + 1], sizes[: last + 1])

    def _first_token(self, character: int) -> int:
        """The first token that begins at or after a character.

        Texts that differ may share the beginning of an added token, which is then after it.
        """
        token = _first(0, len(self.ids), lambda token: self.offsets[token][0] >= character)
        start, end = self.offsets[token - 1] if token else (0, 0)
        parts = self.text[start:character].strip(), self.text[character:end].strip()
        return token - (all(parts) and self.ids[token - 1] in self.template.added)

    def _end_of_turn(self, tokens: range) -> int:
        """The last of these tokens, without white space after a token that ends a turn."""
        for token in reversed(tokens):
            if self.ids[token] in self.template.added:
                return token
            if self.text[slice(*self.offsets[token])].strip():
                break
        return tokens.stop - 1


def read_template(value: str | None) -> str | None:
    """The text of a chat template, which is given as text or as a file; UserError if neither."""
    if value is None or "{{" in value or "{%" in value:
        return value
    file = Path(value).expanduser()
    if not file.is_file():
        raise UserError(
            f"task.template is {value}, but it is neither a file nor the text of a template, "
            "which has {{ or {%: correct the path"
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"task.template is {value}, but the file is not in UTF-8 ({error.reason}): "
            "save it as UTF-8"
        ) from error


def _turn_starts(messages: Sequence[Message]) -> list[int]:
    """The messages at which a turn begins: one of the user, and the first after the system's."""
    first = next((i for i, each in enumerate(messages) if each["role"] != "system"), len(messages))
    rest = range(first + 1, len(messages))
    return [first, *(index for index in rest if messages[index]["role"] == "user")]


def _last_turns(messages: Sequence[Message], left_out: int) -> list[Message]:
    """The messages without the oldest turns; those of the system at the beginning stay."""
    starts = _turn_starts(messages)
    return [*messages[: starts[0]], *messages[starts[left_out] :]]


def _first_turns(conversation: Conversation, last: Conversation) -> Conversation:
    """The turns that :func:`_last_turns` left out, after the system's messages; or no message."""
    left_out = len(conversation.messages) - len(last.messages)
    first = _turn_starts(conversation.messages)[0]
    return conversation._replace(messages=conversation.messages[: left_out and first + left_out])


def _last_turn(messages: Sequence[Message], index: int) -> int:
    """The number of the turn in which a message lies: so many older ones may be left out."""
    return sum(start <= index for start in _turn_starts(messages)) - 1


def _fit(
    reading: _Reading, conversation: Conversation, most: int, max_length: int
) -> tuple[Conversation, _Text]:
    """The conversation without some of its oldest turns, at most `most`, and its text."""

    def read(left_out: int) -> tuple[Conversation, _Text]:
        part = conversation._replace(messages=_last_turns(conversation.messages, left_out))
        return part, reading.text(part)

    def fits(left_out: int) -> bool:
        return read(left_out)[1].size <= max_length

    if most < 1 or sum(len(each["content"]) for each in conversation.messages) < 4 * max_length:
        complete = read(0)
        if most < 1 or complete[1].size <= max_length:
            return complete
    step = 1
    while step < most and fits(most - step):  # few turns are cheap to read
        step *= 2
    return read(_first(max(0, most - step), most - step // 2, fits))


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first number from `low` for which a condition holds that stays true; else `high`."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
