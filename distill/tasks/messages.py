"""Cells of a column of messages -> conversations in one form, as JSON text.

A conversation is a list of messages, `{"role", "content", ...}` (OpenAI) or `{"from", "value"}`
(ShareGPT), or the same as JSON text. An object `{"messages": [...], "tools": [...]}` is one too.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from distill.recipe.targets import did_you_mean

LEARN = ("assistant", "last", "all")

# Roles of data sets -> roles of chat templates.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # its text is a call
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_LISTS = ("messages", "conversations", "conversation")  # names of the list in an object
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of content parts that hold text
_REASONING_PARTS = ("reasoning", "thinking")
_COPIED = ("name", "tool_call_id", "weight")

Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages with `role` and `content`, and perhaps `reasoning_content` and `tool_calls`."""

    messages: list[Message]
    tools: list[Any] | None = None

    def to_json(self) -> str:
        content: dict[str, Any] = {"messages": self.messages}
        return json.dumps(
            content | ({"tools": self.tools} if self.tools else {}), ensure_ascii=False
        )

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        content = json.loads(text)
        return cls(content["messages"], content.get("tools"))


def parse_conversation(cell: Any, tools: Any = None) -> Conversation:
    """The conversation in a cell.

    Args:
        cell: A list of messages, an object that holds one, or JSON text of either.
        tools: The cell of the column `tools`, in these forms.

    Raises:
        ValueError: The message says what the cell should be.
    """
    value = _from_json(cell)
    if isinstance(value, dict):
        tools = value.get("tools") or tools
        value = next((value[name] for name in _LISTS if value.get(name) is not None), value)
    if not isinstance(value, list):
        raise ValueError("a conversation is a list of messages, or JSON text of one")
    messages = [_parse_message(message, number) for number, message in enumerate(value)]
    return Conversation(messages, _parse_tools(tools))


def reply_indices(messages: Sequence[Message], learn: str) -> list[int]:
    """The messages that are predicted: replies that hold something, or only the last message of
    the assistant. A reply of weight 0 is none."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if learn == "last":
        turns = turns[-1:]
    return [index for index in turns if _is_reply(messages[index])]


def reference_reply(messages: Sequence[Message], learn: str) -> str:
    """The content of the last message that is predicted.

    Empty if no message precedes it, or if it has reasoning or calls too, whose text is the
    template's.
    """
    replies = reply_indices(messages, learn)
    if not replies or replies[-1] == 0:
        return ""
    message = messages[replies[-1]]
    others = message.get("tool_calls") or message.get("reasoning_content")
    return "" if others else str(message["content"])


def is_answered(conversation: Conversation, learn: str) -> bool:
    """Whether a conversation has a message to predict."""
    if learn == "all":
        return any(_is_filled(message) for message in conversation.messages)
    return bool(reply_indices(conversation.messages, learn))


def contents(conversation: Conversation) -> Iterable[str]:
    """The texts of the messages."""
    for message in conversation.messages:
        yield from (message[key] for key in ("reasoning_content", "content") if message.get(key))


def _is_filled(message: Message) -> bool:
    """Whether a message has a text, reasoning or a call."""
    texts = (message["content"], message.get("reasoning_content") or "")
    return bool(message.get("tool_calls")) or any(text.strip() for text in texts)


def _is_reply(message: Message) -> bool:
    return message.get("weight") != 0 and _is_filled(message)


def _from_json(cell: Any) -> Any:
    """The value of JSON text, or a cell of nested columns without the fields that are None."""
    if not isinstance(cell, str):
        return _without_nulls(cell)
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it must be JSON text of a list of messages ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Nested values without None: Arrow gives each object the fields of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _parse_message(value: Any, number: int) -> Message:
    """A message in the form of OpenAI, with a role of ROLES and a text as content."""
    where = f"message {number}"
    if not isinstance(value, dict) or not {"role", "from"} & value.keys():
        raise ValueError(
            f"{where} is {value!r:.80}, which has neither `role` and `content` nor `from` and "
            "`value`"
        )
    name = value.get("role", value.get("from"))
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise ValueError(f"{where} has the role {name!r}: {did_you_mean(str(name), [*ROLES])}")
    text, reasoning = _parse_content(value.get("content", value.get("value")), where)
    for key in _REASONING:
        reasoning = reasoning or _text_of(value.get(key), where)
    message: Message = {"role": ROLES[name.lower()], "content": text}
    calls = _parse_calls(_from_json(value.get("tool_calls") or []), where)
    if name.lower() == "function_call":
        message["content"], calls = _call_in_text(text)
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message | {key: value[key] for key in _COPIED if value.get(key) is not None}


def _parse_content(value: Any, where: str) -> tuple[str, str]:
    """The text of a message, and the reasoning among its parts."""
    if not isinstance(value, list):
        return _text_of(value, where), ""
    texts: list[str] = []
    reasoning: list[str] = []
    for part in value:
        fields = part if isinstance(part, dict) else {"text": part}
        kind = fields.get("type", "text")
        if kind not in (*_TEXT_PARTS, *_REASONING_PARTS):
            raise ValueError(f"{where} holds a part of the type {kind!r}, but only text is read")
        text = _text_of(fields.get("text", fields.get("thinking")), where)
        (texts if kind in _TEXT_PARTS else reasoning).append(text)
    return "".join(texts), "".join(reasoning)


def _text_of(value: Any, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"{where} has the content {value!r:.80}, but a content is a text")


def _parse_calls(calls: Any, where: str) -> list[Any]:
    """Calls of tools, with arguments as objects: templates write them as JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{where} has tool_calls that are no list of objects")
    return [_parse_call(call) for call in calls]


def _parse_call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _parse_call(call["function"])}
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return call
    return call | {"arguments": arguments}


def _call_in_text(text: str) -> tuple[str, list[Any]]:
    """The call that a message of ShareGPT's role function_call is; its text if it is not JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return text, []
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return text, []
    return "", [{"type": "function", "function": _parse_call(call)} for call in calls]


def _parse_tools(cell: Any) -> list[Any] | None:
    """Descriptions of tools; None without any."""
    if not cell:
        return None
    tools = _from_json(cell)
    if not isinstance(tools, list):
        raise ValueError("the column tools must hold a list of descriptions, or JSON text of one")
    tools = [_from_json(tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("the column tools must hold a list of objects, or JSON text of one")
    return tools or None
