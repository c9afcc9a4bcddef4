"""Conversations: each token that the assistant writes is predicted, and no other."""

import random

import pytest

from distill.models.tokenizers import train_tokenizer
from distill.recipe.config import Data
from distill.tasks import LANGUAGE_TOKENS, CausalLanguageModelling
from tests.chat_templates import NOT_SPECIAL, REPLY, SPECIAL, TAKE_TOOLS, TEMPLATES

DATA = Data(source="none", text=["messages"], label=None)
CALL = {"type": "function", "function": {"name": "find w03", "arguments": {"city": "w04", "n": 3}}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"city": "string"}}}]


def said(role, content, **fields):
    return {"role": role, "content": content, **fields}


CONVERSATIONS = {
    "one turn": [said("user", "w01"), said("assistant", "w02 w03")],
    "system": [said("system", "w00"), said("user", "w01"), said("assistant", "w02\n\nw03 é🦊")],
    "turns": [
        said("system", "w00"),
        said("user", "w01"),
        said("assistant", "w02"),
        said("user", "w01"),
        said("assistant", "w02"),
        said("user", "w05 assistant w06"),
        said("assistant", "w07 user w08"),
    ],
    "repeated": [said("user", "ok"), said("assistant", "ok")] * 2,
    "unanswered": [said("user", "w01"), said("assistant", "w02"), said("user", "w03")],
    "reasoning": [
        said("user", "w01"),
        said("assistant", "w02", reasoning_content="w03"),
        said("user", "w04"),
        said("assistant", "w05", reasoning_content="w06 w07"),
    ],
    "white space": [
        said("user", " w01\n"),
        said("assistant", "w02\n w03"),
        said("user", "\n"),
        said("assistant", "w04 ."),
    ],
}
WITH_TOOLS = {
    "one call": [
        said("user", "w01"),
        said("assistant", "", tool_calls=[CALL]),
        said("tool", "w02"),
        said("assistant", "w05"),
    ],
    "calls, reasoning and turns": [
        said("system", "w00"),
        said("user", "w01"),
        said("assistant", "", tool_calls=[CALL], reasoning_content="w10"),
        said("tool", "w02"),
        said("assistant", "", tool_calls=[CALL]),
        said("tool", "w02"),
        said("assistant", "w05", reasoning_content="w11"),
        said("user", "w06"),
        said("assistant", "", tool_calls=[CALL], reasoning_content="w12"),
        said("tool", "w07"),
        said("tool", "w09"),
        said("assistant", "w08"),
    ],
}
CASES = [
    (name, case)
    for name in TEMPLATES
    for case in (*CONVERSATIONS, *(WITH_TOOLS if name in TAKE_TOOLS else ()))
]


@pytest.fixture(scope="module")
def tokenizer():
    words = " ".join(f"w{number:02}" for number in range(12))
    made = train_tokenizer([words, "system user assistant model"] * 4, 320, LANGUAGE_TOKENS)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.add_tokens(NOT_SPECIAL)
    return made


def windows_of(tokenizer, messages, template="chatml", tools=None, max_length=2000, **arguments):
    """Encoded examples of one conversation."""
    task = CausalLanguageModelling(
        max_length, **{"learn": "assistant", "template": TEMPLATES[template]} | arguments
    )
    task.prepare_tokenizer(tokenizer)
    columns = task.encode({"messages": [task.parse_text(messages, tools)]}, tokenizer, DATA)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def predicted(tokenizer, window):
    return tokenizer.decode([label for label in window["labels"] if label != -100])


def whole_text(tokenizer, template, messages, tools):
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


def replies(messages):
    return [index for index, each in enumerate(messages) if each["role"] == "assistant"]


@pytest.mark.parametrize(("template", "case"), CASES)
def test_each_token_of_the_assistant_is_predicted_and_no_other(template, case, tokenizer):
    messages, tools = CONVERSATIONS.get(case), None
    if messages is None:
        messages, tools = WITH_TOOLS[case], TOOLS
    (window,) = windows_of(tokenizer, messages, template, tools)
    written = [REPLY[template](messages, index) for index in replies(messages)]
    assert predicted(tokenizer, window) == "".join(written)
    assert window["rows"] == sum(label != -100 for label in window["labels"])
    assert all(
        label in (-100, id) for label, id in zip(window["labels"], window["input_ids"], strict=True)
    )
    text = "".join(written)
    for token in SPECIAL:
        text = text.replace(token, "")
    assert window["size"] == len(text.encode())
    (last,) = windows_of(tokenizer, messages, template, tools, learn="last")
    assert predicted(tokenizer, last) == written[-1]


@pytest.mark.parametrize(("template", "case"), CASES)
def test_the_ids_are_those_of_the_template_and_all_are_predicted_but_the_first(
    template, case, tokenizer
):
    messages = CONVERSATIONS.get(case) or WITH_TOOLS[case]
    (window,) = windows_of(tokenizer, messages, template, learn="all")
    if template == "llama3":
        return  # its date is fixed
    text = whole_text(tokenizer, template, messages, None)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert window["input_ids"] == ids[: len(window["input_ids"])]
    assert tokenizer.decode(ids[len(window["input_ids"]) :]).strip() == ""
    assert window["labels"] == [-100, *window["input_ids"][1:]]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_request_ends_where_the_last_reply_begins(template, tokenizer):
    messages = CONVERSATIONS["turns"]
    task = CausalLanguageModelling(2000, learn="assistant", template=TEMPLATES[template])
    task.prepare_tokenizer(tokenizer)
    (text,) = task.request_texts([task.parse_text(messages, None)], tokenizer)
    (window,) = windows_of(tokenizer, messages, template, learn="last")
    context = [label == -100 for label in window["labels"]].index(False)
    assert task.start(tokenizer) == []
    assert task.has_prompts(DATA)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert task.runtime_tokenizer(tokenizer).encode(text).ids == ids
    columns = task.encode_requests({"messages": [task.parse_text(messages, None)]}, tokenizer, DATA)
    assert columns["input_ids"] == [ids]
    if template == "reasoner":  # it opens the reasoning for the model
        assert tokenizer.decode(ids).removesuffix("<think>\n") == tokenizer.decode(
            window["input_ids"][:context]
        )
    elif template != "qwen3":
        assert ids == window["input_ids"][:context]


PIECES = ["w01", "é🦊", "user", "assistant", '{"a": [1]}', "<b>", "- x", "\n", "\n\n", " ", "w02"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("template", TEMPLATES)
def test_replies_of_random_conversations_are_predicted(template, seed, tokenizer):
    generator = random.Random(seed)

    def words():
        return "".join(["w", *generator.choices(PIECES, k=generator.randrange(6)), "."])

    messages = [said("system", words())] * generator.randrange(2)
    for _ in range(generator.randrange(1, 5)):
        messages += [said("user", words()), said("assistant", words())]
        if template == "qwen3" and generator.random() < 0.5:
            messages[-1]["reasoning_content"] = words()
    (window,) = windows_of(tokenizer, messages, template)
    written = [REPLY[template](messages, index) for index in replies(messages)]
    assert predicted(tokenizer, window) == "".join(written)
    (window,) = windows_of(tokenizer, messages, template, learn="last")
    assert predicted(tokenizer, window) == written[-1]


LONG = [
    said("system", "w00"),
    *(
        message
        for turn in range(1, 9)
        for message in (said("user", f"w0{turn}"), said("assistant", f"w10 w0{turn}"))
    ),
]


@pytest.mark.parametrize("template", ["chatml", "qwen3", "gemma", "llama2"])
@pytest.mark.parametrize("max_length", [20, 31, 47, 64, 1000])
def test_a_long_conversation_is_cut_at_turns_and_each_reply_is_predicted_once(
    template, max_length, tokenizer
):
    windows = windows_of(tokenizer, LONG, template, max_length=max_length)
    written = [REPLY[template](LONG, index) for index in replies(LONG)]
    assert "".join(predicted(tokenizer, window) for window in windows) == "".join(written)
    assert all(window["length"] == len(window["input_ids"]) <= max_length for window in windows)
    assert [window["first_window"] for window in windows] == [1] + [0] * (len(windows) - 1)
    if max_length < 1000:
        assert windows[0]["truncated"] & 4
    if max_length >= 47:  # a turn fits beside the system's message
        assert all("w00" in tokenizer.decode(window["input_ids"]) for window in windows)
    (last,) = windows_of(tokenizer, LONG, template, max_length=max_length, learn="last")
    assert predicted(tokenizer, last) == written[-1]


def test_a_reply_longer_than_the_context_is_split_after_the_end_of_its_prompt(tokenizer):
    messages = [said("user", "w01 " * 30), said("assistant", "w02 " * 30)]
    windows = windows_of(tokenizer, messages, max_length=24)
    assert "".join(predicted(tokenizer, each) for each in windows) == "w02 " * 30 + "<|im_end|>"
    assert windows[0]["truncated"] == 1 + 2
    assert all(window["rows"] > 0 and window["length"] <= 24 for window in windows)


def test_a_request_is_cut_at_turns(tokenizer):
    task = CausalLanguageModelling(47, learn="assistant", template=TEMPLATES["chatml"])
    task.prepare_tokenizer(tokenizer)
    (text,) = task.request_texts([task.parse_text(LONG, None)], tokenizer)
    assert text.startswith("<|im_start|>system\nw00<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_start|>user\nw08<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 47


def test_what_the_generation_prompt_supplies_without_reasoning_is_context(tokenizer):
    messages = [said("user", "w01"), said("assistant", "w02")]
    (window,) = windows_of(tokenizer, messages, "qwen3")
    context = [label == -100 for label in window["labels"]].index(False)
    task = CausalLanguageModelling(2000, learn="assistant", template=TEMPLATES["qwen3"])
    (text,) = task.request_texts([task.parse_text(messages, None)], tokenizer)
    assert text.endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(window["input_ids"][:context]) == text


def test_replies_that_hold_nothing_or_weigh_nothing_are_context(tokenizer):
    messages = [
        *(said("user", "w01"), said("assistant", " ")),
        *(said("user", "w02"), said("assistant", "w03", weight=0)),
        *(said("user", "w04"), said("assistant", "w05", weight=1)),
    ]
    for template in ("chatml", "tagged"):
        (window,) = windows_of(tokenizer, messages, template)
        assert predicted(tokenizer, window) == "w05<|im_end|>"
