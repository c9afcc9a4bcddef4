"""A run on conversations: trained, measured, exported with its template, and served."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.train import train
from tests.chat_templates import QWEN25
from tests.worlds import LLAMA, tiny

CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def conversation(number):
    question = {"role": "user", "content": f"{number}?"}
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": str(number + 1)}
    reply = {"role": "assistant", "content": f"{number + 1}."}
    turns = [question, calls, result, reply] if number % 2 else [question, reply]
    return {"messages": json.dumps(turns), "tools": TOOLS if number % 2 else None}


@pytest.mark.slow
def test_a_chat_model_is_trained_measured_and_exported_with_its_template(tmp_path):
    rows = "\n".join(json.dumps(conversation(number)) for number in range(40))
    (tmp_path / "chats.jsonl").write_text(rows)
    (tmp_path / "chat.jinja").write_text(QWEN25)
    recipe = LLAMA | {
        "task": {
            "_target_": "distill.tasks.CausalLanguageModelling",
            "max_length": 32,
            "learn": "assistant",
            "template": str(tmp_path / "chat.jinja"),
        },
        "data": {
            "source": str(tmp_path / "chats.jsonl"),
            "text": ["messages"],
            "label": None,
            "validation": None,
            "test": None,
            "batch_size": 8,
        },
        "trainer": {"max_steps": 3, "validations": 1, "precision": "32-true"},
        "export": {"examples": 4},
    }
    run, folder = tiny(**recipe), tmp_path / "run"
    folder.mkdir()
    metrics = train(run, folder)
    assert metrics["student"]["quality"]["bits_per_byte"]["value"] > 0
    card = (folder / "export" / "README.md").read_text()
    assert '"role": "user"' in card
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert tokenizer.chat_template == QWEN25
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert student.generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
