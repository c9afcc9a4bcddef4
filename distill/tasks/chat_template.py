"""A tokenizer's chat template: conversations as text, and the parts of it that the assistant wrote.

A part that the assistant wrote begins where the generation prompt ends, as the model is served, and
ends with its end-of-turn token. A template that marks it with `{% generation %}` is followed.
Otherwise it lies between the rendering of the messages before it with the generation prompt and
that of the messages up to it, if both begin the whole. A template may render a message differently
when others follow, for example without its reasoning; then renderings with other contents show
which text of the whole is the message's.
"""

import re
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from distill.errors import UserError
from distill.tasks.messages import Conversation, Message
from distill.tasks.windows import check_fast

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that write today's date get this one: the examples are the same on every day.
DATE = (
    '{%- macro strftime_now(format) -%}{{ {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26"}'
    '.get(format, "July 26, 2024") }}{%- endmacro -%}'
)
# Options with which templates write a generation prompt whose reasoning is empty.
NO_REASONING = {"enable_thinking": False, "thinking": False}
_MARKS = [chr(0xE000 + code) for code in range(64)]  # for private use: no text should hold them
_FIXED = ("role", "type", "id", "tool_call_id", "weight")  # fields that are no text of a message


class Span(NamedTuple):
    """A part of a text, in characters."""

    start: int
    end: int


class Rendering(NamedTuple):
    """A conversation as text."""

    text: str
    tagged: list[Span]  # the parts within `{% generation %}`


class ChatTemplate:
    """Renders conversations with the template of a tokenizer.

    Args:
        tokenizer: Has a chat template.

    Raises:
        UserError: It has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        check_fast(tokenizer)
        if not tokenizer.chat_template:
            raise UserError(
                "task.learn is set, but the tokenizer has no chat template, which turns messages "
                "into text: set task.template to one, as a file or as text"
            )
        tokens = tokenizer.added_tokens_decoder
        # Tokens that mark the end of a turn are among the first, those that are no text the second.
        self.added = {*tokens, *tokenizer.all_special_ids}
        self.special = {id for id in self.added if id not in tokens or tokens[id].special}

    def render(self, conversation: Conversation, prompt: bool = False, **options: Any) -> Rendering:
        """The whole conversation as text.

        Args:
            conversation: Its messages and tools.
            prompt: Whether the generation prompt of a reply follows.
            options: Further variables of the template.

        Raises:
            UserError: The template is wrong, or refuses the conversation.
        """
        source = self.source(conversation)
        try:
            rendered: Any = render_jinja_template(
                [conversation.messages],
                tools=conversation.tools,
                chat_template=(DATE if "strftime_now" in source else "") + source,
                return_assistant_tokens_mask=GENERATION.search(source) is not None,
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **options},
            )
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template has a mistake in line {error.lineno} ({error.message}), but it "
                "must be Jinja: correct it, or set task.template to another"
            ) from error
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(
                f"the chat template refuses the conversation {excerpt(conversation)} ({error}), "
                "but each must be rendered: correct it, or set task.template to another template"
            ) from error
        (text,), tagged = rendered
        return Rendering(text, [Span(*pair) for pair in tagged[0]] if tagged else [])

    def source(self, conversation: Conversation) -> str:
        """The text of the template for a conversation; a tokenizer may have another for tools."""
        try:
            source: str = self.tokenizer.get_chat_template(tools=conversation.tools)
        except ValueError as error:
            raise UserError(
                "the tokenizer has several chat templates, but none is named default: "
                "set task.template to one of them, as a file or as text"
            ) from error
        return source

    def prompt_options(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Options of the possible generation prompts, the longest prompt first."""
        source = self.source(conversation)
        return [NO_REASONING, {}] if any(name in source for name in NO_REASONING) else [{}]

    def served_options(self, conversation: Conversation) -> dict[str, Any]:
        """Options of the generation prompt that precedes the last message in training."""
        text = self.render(conversation).text
        before = conversation._replace(messages=conversation.messages[:-1])
        for options in self.prompt_options(conversation):
            if text.startswith(self.render(before, True, **options).text):
                return options
        return {}

    def reply_spans(
        self, conversation: Conversation, rendering: Rendering, replies: list[int]
    ) -> list[Span]:
        """Where the assistant's text of some messages lies in the rendering of all.

        Args:
            conversation: The whole conversation.
            rendering: Its text.
            replies: Indices of messages of the assistant.
        """
        roles = [message["role"] for message in conversation.messages]
        turns = [index for index, role in enumerate(roles) if role == "assistant"]
        if len(rendering.tagged) == len(turns):
            return [rendering.tagged[turns.index(index)] for index in replies]
        parts = _Parts(self, conversation, rendering.text)
        spans = [span for span in map(parts.span, replies) if span.start < span.end]
        if not rendering.tagged:
            return spans
        return [tag for tag in rendering.tagged if any(_overlap(tag, span) for span in spans)]


class _Parts:
    """Finds the text of messages in a rendering, by comparing it with other renderings."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, text: str) -> None:
        self.template, self.conversation, self.text = template, conversation, text
        self.mark = next((mark for mark in _MARKS if mark not in text), _MARKS[0])

    def span(self, index: int) -> Span:
        """The part of the text that the assistant wrote as this message."""
        return Span(self._start(index), self._end(index))

    def _start(self, index: int) -> int:
        """Where the generation prompt ends that precedes the message."""
        try:
            return self._prompt_end(index) if index else self._content(0).start
        except UserError:  # a template may refuse a part of a conversation
            return self._content(index).start

    def _prompt_end(self, index: int) -> int:
        options = self.template.prompt_options(self.conversation)
        for prompt in (self._before(index, each) for each in options):
            if self.text.startswith(prompt):
                return len(prompt)
        before, start = self._content(index - 1).end, self._content(index).start
        tails = [self._after(index - 1, True, each) for each in options]
        complete = [tail for tail in tails if self.text.startswith(tail, before)]
        shared = _common_prefix(self.text[before:start], tails[-1])
        return before + len(complete[0] if complete else shared)

    def _end(self, index: int) -> int:
        """Where the end of the turn ends."""
        through = self._render(self.conversation.messages[: index + 1], False, {})
        if self.text.startswith(through):
            return len(through)
        end = self._content(index).end
        return end + len(_common_prefix(self.text[end:], self._after(index, False, {})))

    def _before(self, index: int, options: dict[str, Any]) -> str:
        """The messages before one, with the generation prompt."""
        return self._render(self.conversation.messages[:index], True, options)

    def _content(self, index: int) -> Span:
        """The text of a message: what changes in the whole with the message's fields."""
        changed = self._render(self._marked(index, len(self.conversation.messages)), False, {})
        return _difference(self.text, changed)

    def _after(self, index: int, prompt: bool, options: dict[str, Any]) -> str:
        """What follows the text of a message if it is the last."""
        text = self._render(self.conversation.messages[: index + 1], prompt, options)
        changed = self._render(self._marked(index, index + 1), prompt, options)
        return text[_difference(text, changed).end :]

    def _marked(self, index: int, count: int) -> list[Message]:
        """The first messages, one of them with other texts."""
        messages = list(self.conversation.messages[:count])
        messages[index] = _replace_texts(messages[index], self.mark)
        return messages

    def _render(self, messages: list[Message], prompt: bool, options: dict[str, Any]) -> str:
        part = self.conversation._replace(messages=messages)
        return self.template.render(part, prompt, **options).text


def _replace_texts(value: Any, mark: str) -> Any:
    """A message with a mark in the place of each text."""
    if isinstance(value, dict):
        return {
            key: each if key in _FIXED else _replace_texts(each, mark)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_replace_texts(each, mark) for each in value]
    return mark if isinstance(value, str) else value


def _difference(text: str, other: str) -> Span:
    """The part of a text between the beginning and the end that it shares with another."""
    start = len(_common_prefix(text, other))
    rest, other = text[start:], other[start:]
    end = len(text) - len(_common_prefix(rest[::-1], other[::-1]))
    return Span(start, end)


def _overlap(one: Span, other: Span) -> bool:
    return max(one.start, other.start) < min(one.end, other.end)


def _common_prefix(text: str, other: str) -> str:
    """The longest text with which both begin."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def excerpt(conversation: Conversation) -> str:
    """The beginning of a conversation, by which its row is found."""
    texts = (message["content"] for message in conversation.messages)
    return repr(next((text for text in texts if text.strip()), "")[:60])
