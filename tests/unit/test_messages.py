"""A column of messages: forms, files, and cells that are refused by their row."""

import json
import logging

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import event, given, settings, strategies
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from distill import data as pipeline
from distill.errors import UserError
from distill.models.tokenizers import train_tokenizer
from distill.recipe.config import Data
from distill.tasks import LANGUAGE_TOKENS, CausalLanguageModelling
from distill.tasks.chat_template import ChatTemplate
from distill.tasks.messages import Conversation, contents, parse_conversation
from tests.chat_templates import CHATML, QWEN25

PLAIN = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]
SHARE_GPT = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "q"},
    {"from": "gpt", "value": "a"},
]
PARTS = [
    {"role": "developer", "content": [{"type": "text", "text": "s"}]},
    {
        "role": "user",
        "content": [{"type": "input_text", "text": "q"}, {"type": "text", "text": ""}],
    },
    {"role": "model", "content": ["a"]},
]
FORMS = [
    PLAIN,
    SHARE_GPT,
    PARTS,
    {"messages": PLAIN},
    {"conversations": SHARE_GPT},
    [message | {"name": None, "tool_calls": None} for message in PLAIN],
]
CALL = {"name": "find", "arguments": {"city": "x", "empty": None}}
OPEN_AI_CALL = {
    "role": "assistant",
    "content": None,
    "reasoning": "r",
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": CALL | {"arguments": json.dumps(CALL["arguments"])},
        }
    ],
}
SHARE_GPT_CALL = {"from": "function_call", "value": json.dumps(CALL)}


@pytest.mark.parametrize("encode", [lambda value: value, json.dumps], ids=["nested", "json"])
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_every_form_is_the_same_conversation(form, encode):
    assert parse_conversation(encode(form)) == Conversation(PLAIN)


def test_a_conversation_is_read_as_it_was_written():
    tools = [{"type": "function", "function": {"name": "find"}}]
    for cell in (tools, json.dumps(tools), [json.dumps(tools[0])]):
        conversation = parse_conversation(json.dumps([*PLAIN, OPEN_AI_CALL]), cell)
        assert conversation.tools == tools
        assert Conversation.from_json(conversation.to_json()) == conversation


@pytest.mark.parametrize("message", [OPEN_AI_CALL, SHARE_GPT_CALL])
def test_the_arguments_of_calls_are_objects_and_the_reasoning_has_one_name(message):
    (parsed,) = parse_conversation(json.dumps([message])).messages
    assert parsed["tool_calls"][0]["function"]["arguments"] == CALL["arguments"]
    assert parsed["content"] == ""
    assert parsed.get("reasoning_content") == message.get("reasoning")


WRONG = {
    "text": ("hello", "JSON"),
    "number": (3, "list of messages"),
    "texts": (["hello"], "message 0"),
    "no role": ([{"content": "x"}], "message 0"),
    "role": ([*PLAIN, {"role": "narrator", "content": "x"}], "message 3.*'narrator'"),
    "image": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "'image'"),
    "content": ([{"role": "user", "content": 3}], "content 3"),
    "part": ([{"role": "user", "content": [{"text": 3}]}], "content 3"),
    "reasoning": ([{"role": "gpt", "value": "x", "thinking": [1]}], "content .1."),
    "deep": ("[" * 100_000, "JSON"),
    "surrogate": ('[{"role": "assistant", "content": "\\ud800"}]', "surrogate"),
    "calls": ([PLAIN[0] | {"tool_calls": "[3]"}], "tool_calls"),
    "no reply": (PLAIN[:2], "task.unanswered"),
    "empty": ([], "task.unanswered"),
    "empty reply": ([*PLAIN[:2], {"role": "assistant", "content": " \n"}], "task.unanswered"),
}


FIELDS = "type text thinking reasoning tool_calls function name arguments value content weight"
JSON = strategies.recursive(
    strategies.none() | strategies.integers() | strategies.text() | strategies.just("[]"),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(strategies.sampled_from(FIELDS.split()), inner, max_size=4)
    ),
    max_leaves=12,
)
MESSAGE = strategies.builds(
    lambda role, fields: role | fields,
    strategies.sampled_from([{"role": "assistant"}, {"from": "function_call"}, {"from": "human"}]),
    strategies.dictionaries(
        strategies.sampled_from(FIELDS.split()),
        strategies.text() | strategies.text() | strategies.just([]) | JSON,
        max_size=3,
    ),
)
CONVERSATION = strategies.lists(MESSAGE, min_size=1, max_size=3)


@settings(max_examples=40, deadline=None, database=None)
@given(
    cell=CONVERSATION | CONVERSATION | JSON,
    tools=strategies.none() | strategies.none() | JSON,
    as_text=strategies.booleans(),
)
def test_any_value_is_a_conversation_of_texts_or_refused_in_a_sentence(cell, tools, as_text):
    tokenizer, problem = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())), ""
    tokenizer.chat_template = QWEN25
    try:
        conversation = parse_conversation(json.dumps(cell) if as_text else cell, tools)
        assert all(isinstance(message["content"], str) for message in conversation.messages)
        assert all(isinstance(text, str) for text in contents(conversation))
        assert Conversation.from_json(conversation.to_json()) == conversation
        ChatTemplate(tokenizer).render(conversation)
    except (ValueError, UserError) as error:
        problem = str(error)
    event(problem[:12])
    assert len(problem.splitlines()) <= 1


def load(cells, task, column="messages", **more):
    source = DatasetDict(train=Dataset.from_dict({column: cells, **more}))
    data = Data(source="x", text=[column], label=None, validation=None, test=None, holdout=0.25)
    return pipeline.columns.read_split(source["train"], "train", data, task)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))


@pytest.mark.parametrize(("cell", "problem"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("row", [0, 3])
def test_what_is_no_conversation_is_refused_by_its_row(cell, problem, row):
    cells = [json.dumps(PLAIN)] * 4
    cells[row] = cell if isinstance(cell, str) else json.dumps(cell)
    with pytest.raises(UserError, match=rf"'messages' .* in row {row}, but .*{problem}"):
        load(cells, CausalLanguageModelling(learn="assistant"))


def test_conversations_without_a_reply_are_dropped_and_counted_by_a_key(caplog):
    cells = [json.dumps(each) for each in (PLAIN[:2], PLAIN, [], PLAIN, PLAIN[:1])]
    with caplog.at_level(logging.INFO, logger="distill"):
        split = load(cells, CausalLanguageModelling(learn="assistant", unanswered="drop"))
    assert split.rows.tolist() == [1, 3]
    assert any("3 of 5 conversations" in record.getMessage() for record in caplog.records)
    with pytest.raises(UserError, match="last"):
        turns = [*PLAIN, *PLAIN[1:2], {"role": "assistant", "content": ""}]
        load([json.dumps(turns)], CausalLanguageModelling(learn="last"))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "tools.jsonl"])
def test_every_file_gives_the_same_conversations(suffix, tmp_path):
    conversations = [
        [*PLAIN[1:2], {"role": "assistant", "content": f"a {number}"}] for number in range(20)
    ]
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    file = tmp_path / f"chats.{suffix}"
    rows = [{"messages": each, "id": number} for number, each in enumerate(conversations)]
    if suffix == "tools.jsonl":
        rows = [row | {"tools": json.dumps(tools)} for row in rows]
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    elif suffix == "csv":
        rows = [row | {"messages": json.dumps(row["messages"])} for row in rows]
        Dataset.from_list(rows).to_csv(str(file))
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    data = Data(source=str(file), text=["messages"], label=None, validation=None, test=None)
    raw, task = pipeline.load(data, CausalLanguageModelling(64, learn="assistant"), 0)
    texts = [text for split in raw.values() for text in split["messages"]]
    expected = {"tools": tools} if suffix == "tools.jsonl" else {}
    assert sorted(texts) == sorted(
        json.dumps({"messages": each, **expected}) for each in conversations
    )
    assert sorted(task.plain_texts(texts)) == sorted(
        message["content"] for each in conversations for message in each
    )


def test_a_column_of_messages_without_learn_names_the_key():
    with pytest.raises(UserError, match=r"messages.*task\.learn"):
        load([PLAIN], CausalLanguageModelling())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learn": "user"}, r"task\.learn is .*user"),
        ({"learn": "last", "unanswered": "keep"}, r"task\.unanswered is .*keep"),
        ({"learn": "last", "template": "none.jinja"}, r"task\.template is none\.jinja"),
        ({"template": CHATML}, r"task\.template .* task\.learn"),
    ],
)
def test_values_of_keys_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        CausalLanguageModelling(**arguments)


def encode(template, *conversations, **arguments):
    tokenizer = train_tokenizer(["a q s"] * 4, 300, LANGUAGE_TOKENS)
    task = CausalLanguageModelling(64, **{"learn": "assistant", "template": template} | arguments)
    task.prepare_tokenizer(tokenizer)
    data = Data(source="x", text=["messages"], label=None)
    texts = [Conversation(each).to_json() for each in conversations]
    raw = DatasetDict(train=Dataset.from_dict({"messages": texts}))
    return pipeline.encode(raw, task, tokenizer, data)["train"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"task\.template"),
        ("{% for m in messages %}", "mistake in line 1"),
        ("{{ raise_exception('no system') }}", "'s'.*no system"),
        ("{{ messages[9].content }}", "refuses the conversation 's'"),
        (
            "{% for m in messages if m.role != 'assistant' %}.{% endfor %}",
            "'s' has no token to predict",
        ),
    ],
)
def test_a_template_that_is_missing_wrong_or_silent_is_refused(template, message):
    with pytest.raises(UserError, match=message):
        encode(template, PLAIN)


def test_a_template_may_be_a_file_and_its_text_decides_which_examples_are_stored(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    first = encode(str(file), PLAIN)
    assert first["input_ids"] == encode(CHATML, PLAIN)["input_ids"]
    file.write_text(CHATML.replace("<|im_end|>", "<|end|>"))
    assert encode(str(file), PLAIN)["input_ids"] != first["input_ids"]


def test_predicted_tokens_are_counted(caplog):
    with caplog.at_level(logging.INFO, logger="distill"):
        encoded = encode(CHATML, PLAIN, PLAIN)
    rows, length = sum(encoded["rows"]), sum(encoded["length"])
    assert 0 < rows < length
    assert any(f"{rows} of {length} tokens" in each.getMessage() for each in caplog.records)
