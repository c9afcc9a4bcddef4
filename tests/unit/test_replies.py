"""Greedy replies of language models: their tokens, fidelity, times and cache."""

import json
import math

import pytest
import torch
from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

from distill import data, isolated
from distill.errors import RunFailed
from distill.evaluate import cost, measure, measure_replies, replies, table
from distill.evaluate.inputs import ModelInputs
from distill.evaluate.record_parts import Generation, Interval, Replies
from distill.evaluate.settings import MeasureSettings
from distill.models import train_tokenizer
from distill.prepare import Prepared
from distill.recipe import config
from distill.tasks import LANGUAGE_TOKENS, CausalLanguageModelling
from tests.chat_templates import TEMPLATES
from tests.unit import test_evaluate, tiny_runs

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16, 17, 18]]
SIZES = {
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 40},
    "bloom": {"n_layer": 2, "hidden_size": 16, "n_head": 2},
    "bert": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "is_decoder": True,
    },
}


def made(model_type, seed=0):
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(
        model_type,
        vocab_size=60,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **SIZES[model_type],
    )
    model = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for tensor in model.parameters():  # so that replies differ by prompt
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


def written_by_hand(model, prompt, stop, count):
    """The replies without a cache, without padding and without `generate`."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("model_type", SIZES)
def test_replies_are_those_of_a_loop_without_cache_and_padding(model_type):
    model = made(model_type)
    expected = [written_by_hand(model, prompt, [], 8) for prompt in PROMPTS]
    stop = [expected[0][3], expected[2][1]]
    expected = [written_by_hand(model, prompt, stop, 8) for prompt in PROMPTS]
    assert len({tuple(reply) for reply in expected}) > 1
    for size in (1, 3, 8):
        assert replies.write_replies(model, PROMPTS, stop, 8, size) == expected


def test_a_model_that_reads_padding_gets_none(monkeypatch):
    model, forward = made("gpt2"), GPT2LMHeadModel.forward
    model.forward = lambda input_ids, attention_mask=None, position_ids=None, **rest: forward(
        model, input_ids=input_ids, **rest
    )
    expected = [written_by_hand(model, prompt, [], 8) for prompt in PROMPTS]
    assert replies.write_replies(model, PROMPTS, [], 8, 8) == expected
    monkeypatch.setattr(replies, "allows_left_padding", lambda *_: True)
    assert replies.write_replies(model, PROMPTS, [], 8, 8) != expected


def test_settings_of_a_model_change_no_reply_and_stay():
    model = made("llama")
    expected = replies.write_replies(model, PROMPTS, [], 6, 5)
    model.generation_config.update(do_sample=True, temperature=0.1, repetition_penalty=3.0)
    before = model.generation_config.to_dict()
    assert replies.write_replies(model, PROMPTS, [], 6, 5) == expected
    assert model.generation_config.to_dict() == before


def test_distinct_n_grams_are_counted_over_all_replies():
    assert replies.distinct([[1, 2, 1], [1, 2]], 1) == 2 / 5
    assert replies.distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3
    assert math.isnan(replies.distinct([[1]], 2))


def prepared(folder, columns=("text",), seeds=(0, 0)):
    """Models in folders, and what `measure_replies` takes of a run."""
    task = CausalLanguageModelling(max_length=16)
    run, task, raw, tokenizer, _ = tiny_runs.made(folder, task, "gpt2", columns=columns)
    loaded = {}
    for name, seed in zip(("teacher", "student"), seeds, strict=True):
        loaded[name] = made_for(tokenizer, seed)
        loaded[name].save_pretrained(folder / name)
    return run, task, raw, tokenizer, loaded


def made_for(tokenizer, seed):
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES["llama"],
    )
    model = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def measured(made, **settings):
    run, task, raw, tokenizer, loaded = made
    inputs = dict.fromkeys(loaded, ModelInputs(tokenizer, None))
    evaluate = config.Evaluate(generate=True, max_new_tokens=6, requests=7, **settings)
    settings = MeasureSettings(evaluate, run.data, run.trainer, 0)
    return measure_replies.measure_replies(task, loaded, inputs, raw, settings, "cpu")


@pytest.mark.parametrize("columns", [("text",), ("prompt", "completion")])
def test_a_model_agrees_with_itself(tmp_path, columns):
    result = measured(prepared(tmp_path, columns))
    teacher, student = result.models["teacher"], result.models["student"]
    assert (student.agreement, student.divergence) == (1.0, pytest.approx(0, abs=1e-6))
    assert teacher.agreement is None
    assert teacher.tokens == student.tokens <= 6
    assert teacher.stopped == student.stopped
    for example in result.replies.examples:
        assert example["teacher"] == example["student"]


def test_fidelity_is_that_of_all_logits_on_the_replies_of_the_student(tmp_path):
    made = prepared(tmp_path, seeds=(0, 1))
    _, _, raw, tokenizer, loaded = made
    result = measured(made, batch_size=2)
    rows = raw[[index * len(raw) // 7 for index in range(7)]]
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows["text"]]
    agreed, divergence, count = 0, 0.0, 0
    for ids in texts:
        start = [tokenizer.eos_token_id, *ids][: 16 - 6]
        prompt = start[: (len(start) + 1) // 2]
        reply = written_by_hand(loaded["student"], prompt, [tokenizer.eos_token_id], 6)
        with torch.no_grad():
            log_p, log_q = (
                loaded[name](input_ids=torch.tensor([prompt + reply]))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
                for name in ("teacher", "student")
            )
        agreed += int((log_p.argmax(-1) == torch.tensor(reply)).sum())
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(reply)
    assert result.models["student"].agreement == pytest.approx(agreed / count)
    assert result.models["student"].divergence == pytest.approx(divergence / count, rel=1e-4)
    assert result.models["student"].tokens == pytest.approx(count / 7)


def test_a_prompt_is_the_first_column_or_the_first_half_of_a_text(tmp_path):
    run, task, raw, tokenizer, _ = prepared(tmp_path, ("prompt", "completion"))
    inputs = {"student": ModelInputs(tokenizer, None)}
    evaluate = config.Evaluate(requests=3, max_new_tokens=100)
    prompts = measure_replies.encode_prompts(task, inputs, raw, run.data, evaluate)
    assert prompts.new_tokens == 8
    first = tokenizer(raw["prompt"][0], add_special_tokens=False)["input_ids"]
    assert prompts.tokens["student"][0] == [tokenizer.eos_token_id, *first[-7:]]
    plain = config.Data(source="texts.csv", text=["prompt"], label=None)
    (half, *_) = measure_replies.encode_prompts(task, inputs, raw, plain, evaluate).tokens[
        "student"
    ]
    assert half == [tokenizer.eos_token_id, *first][: (min(8, len(first) + 1) + 1) // 2]


def test_a_prompt_of_messages_ends_where_the_last_reply_begins():
    settings = config.Data(source="chats", text=["messages"], label=None)
    task = CausalLanguageModelling(256, learn="assistant", template=TEMPLATES["chatml"])
    turns = [f"{role} {place}" for place in range(4) for role in ("ask", "answer")]
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(turns)
    ]
    tokenizer = train_tokenizer([*turns, "system user assistant"] * 4, 320, LANGUAGE_TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    task.prepare_tokenizer(tokenizer)
    cells = {"messages": [task.parse_text(messages, None)]}
    for room, kept in ((200, turns[:-1]), (40, turns[-4:-1])):
        (ids,) = task.encode_prompts(cells, tokenizer, settings, room)
        text = tokenizer.decode(ids)
        assert len(ids) <= room
        assert text.endswith(f"{turns[-2]}<|im_end|>\n<|im_start|>assistant\n")
        assert [turn for turn in turns if f"{turn}<|im_end|>" in text] == kept


def test_without_prompts_nothing_is_measured(tmp_path, caplog):
    run, task, raw, tokenizer, loaded = prepared(tmp_path, ("prompt", "completion"))
    tokenizer.eos_token = None
    empty = raw.map(lambda row: {"prompt": ""})
    assert measured((run, task, empty, tokenizer, loaded)) is None
    assert "all prompts are empty" in caplog.text


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_costs_of_generation(tmp_path, monkeypatch, own_process):
    if not own_process:
        monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)
    made = prepared(tmp_path, seeds=(0, 1))
    result = measured(made, batch_size=4)
    folders = {name: tmp_path / name for name in ("teacher", "student")}
    request = cost.model_request(folders, made[1].auto_class, 1, "cpu")
    records = result.with_costs(request, config.Evaluate(batch_size=4))
    for record in records.values():
        # layers * (keys, values) * heads * width of a head * bytes of float32
        assert record.cache_bytes_per_token == 2 * 2 * 2 * 4 * 4
        assert record.first_token_ms > 0 and record.token_ms > 0
        assert record.batch_tokens_per_s > record.tokens_per_s > 0
        assert record.memory_peak_bytes > 50 << 20
    written = {name: record.to_json() for name, record in records.items()}
    read = {name: Generation.from_json(values) for name, values in written.items()}
    assert read == records


def test_generation_changes_no_other_metric(tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)
    run, task, raw, tokenizer, loaded = prepared(tmp_path, seeds=(0, 1))
    split = DatasetDict(test=raw)
    made = Prepared(task, tokenizer, split, data.encode(split, task, tokenizer, run.data))
    paths = {name: str(tmp_path / name) for name in loaded}
    records = []
    for generate in (False, True):
        evaluate = config.Evaluate(
            generate=generate, bootstrap=5, requests=2, batches=1, max_new_tokens=3
        )
        settings = MeasureSettings(evaluate, run.data, run.trainer, 0)
        records.append(measure.measure(settings, made, paths, "test").to_json())
    without, added = records
    assert added.pop("replies")["prompts"] == 2
    for name in paths:
        assert added[name].pop("generation")["cache_bytes_per_token"] > 0
        for values in (without, added):
            assert set(values[name].pop("cost")) >= {"latency_p50_ms", "memory_peak_bytes"}
    assert added == without


def test_a_failure_of_lm_eval_loses_nothing_that_was_measured(tmp_path, monkeypatch):
    def fail(*_):
        raise RunFailed("lm-eval failed")

    shown = []
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)
    monkeypatch.setattr(measure, "measure_harness", fail)
    monkeypatch.setattr("distill.evaluate.console.show", shown.append)
    run, task, raw, tokenizer, _ = prepared(tmp_path)
    split = DatasetDict(test=raw)
    made = Prepared(task, tokenizer, split, data.encode(split, task, tokenizer, run.data))
    evaluate = config.Evaluate(harness=["arc_easy"], bootstrap=5, requests=1, batches=1)
    settings = MeasureSettings(evaluate, run.data, run.trainer, 0)
    with pytest.raises(RunFailed, match="lm-eval failed"):
        measure.measure(settings, made, {"student": str(tmp_path / "student")}, "test")
    assert shown[0].models["student"].quality["perplexity"].value > 1
    found = {"student": {"arc_easy acc": Interval(0.5, 0.4, 0.6)}}
    monkeypatch.setattr(measure, "measure_harness", lambda *_: found)
    metrics = measure.measure(settings, made, {"student": str(tmp_path / "student")}, "test")
    assert metrics.models["student"].harness == found["student"]


def with_replies():
    metrics = test_evaluate.metrics()
    record = Generation(
        stopped=Interval(0.5, 0.4, 0.6),
        tokens=12.0,
        distinct_1=0.3,
        distinct_2=math.nan,
        scores={"word_f1": Interval(0.25, 0.125, 0.375)},
    )
    for model in metrics.models.values():
        object.__setattr__(model, "generation", record)
        object.__setattr__(model, "harness", {"arc acc": Interval(0.25, math.nan, math.nan)})
    examples = [
        {"prompt": "a | b", "reference": "four", "teacher": "one\ntwo", "student": "*three*"}
    ]
    object.__setattr__(metrics, "replies", Replies(7, 6, 4, examples))
    return metrics


def test_replies_are_in_the_file_the_report_and_the_terminal(capsys):
    from distill import evaluate

    metrics = with_replies()
    written = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert evaluate.Metrics.from_json(written).to_json() == metrics.to_json()
    report = table.markdown(metrics)
    assert r"| a \| b | four | one<br>two | \*three\* |" in report
    assert "| arc acc | 0.250 | 0.250 | 1.00x |" in report
    evaluate.show(metrics)
    shown = capsys.readouterr().out
    assert all(
        text in shown
        for text in ("a | b", "one", "*three*", "0.500 [0.400, 0.600]", "0.250 [0.125, 0.375]")
    )
