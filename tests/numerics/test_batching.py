"""In any order, padding and number of micro-batches, each example counts once in a step's loss."""

import copy
import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
)

from distill import losses
from distill.corpora import generated_texts
from distill.data import Batching, BatchPlan, encode, load, make_loader
from distill.errors import UserError
from distill.models import logits
from distill.models.tokenizers import train_tokenizer
from distill.recipe.config import Data
from distill.tasks import LANGUAGE_TOKENS, CausalLanguageModelling, SingleLabelClassification

logging.getLogger("transformers").setLevel(logging.ERROR)
WORDS = "the cat sat on a mat while seven foxes ran home over wet grass and nobody saw them again"


def split_of(count: int, longest: int = 60) -> Dataset:
    """Random token ids, lengths and labels, as `encode` stores them for a classifier."""
    generator = np.random.default_rng(count)
    lengths = generator.integers(1, longest + 1, count)
    ids = [generator.integers(1, 50, length).tolist() for length in lengths]
    labels = generator.integers(-1, 3, count)
    columns = {
        "input_ids": ids,
        "labels": np.where(labels < 0, -100, labels),
        "size": [1] * count,
        "length": lengths,
        "rows": [1] * count,
    }
    return Dataset.from_dict(columns)


def texts_of(count: int) -> list[str]:
    """From one word to more than one window."""
    generator = np.random.default_rng(count)
    return [
        " ".join(generator.choice(WORDS.split(), size))
        for size in generator.choice([1, 2, 5, 30], count)
    ]


@pytest.fixture(scope="module")
def language():
    task, tokenizer = (
        CausalLanguageModelling(max_length=24),
        train_tokenizer(texts_of(50), 300, LANGUAGE_TOKENS),
    )
    raw = DatasetDict(train=Dataset.from_dict({"text": texts_of(21)}))
    split = encode(raw, task, tokenizer, Data(source="none"))["train"]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        attn_implementation="eager",
    )
    return task, split, AutoModelForCausalLM.from_config(config).eval(), tokenizer.pad_token_id


@pytest.fixture(scope="module")
def classification():
    task = SingleLabelClassification()
    task.names = ("a", "b", "c")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = BertConfig(
        vocab_size=50, num_labels=3, attn_implementation="eager", initializer_range=0.5, **sizes
    )
    return task, split_of(21), AutoModelForSequenceClassification.from_config(config).eval(), 0


@pytest.fixture(params=["classification", "language"])
def problem(request):
    return request.getfixturevalue(request.param)


# ---- order


PLANS = [
    {"batch_size": size, "accumulate": parts, "seed": seed, "group_by_length": grouped}
    for size, parts in ((8, 1), (8, 3), (7, 7), (3, 2), (1, 1), (500, 2))
    for seed, grouped in ((0, True), (5, False), (None, True), (None, False))
]


@pytest.mark.parametrize("count", [1, 8, 50, 453])
@pytest.mark.parametrize("keys", PLANS)
def test_every_example_comes_once_per_epoch(count, keys):
    plan = BatchPlan(split_of(count), Batching(**keys))
    for epoch in (0, 1):
        plan.set_epoch(epoch)
        micro_batches = list(plan)
        assert sorted(index for micro in micro_batches for index in micro.indices) == list(
            range(count)
        )
        assert len(micro_batches) == len(plan)
        assert all(micro.indices for micro in micro_batches)


@pytest.mark.parametrize("grouped", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(grouped):
    def order(seed, epoch, before=0):
        plan = BatchPlan(split_of(100), Batching(8, 2, seed, grouped))
        for _ in range(before):
            list(plan)
        plan.set_epoch(epoch)
        np.random.default_rng().random(3)
        return [micro.indices for micro in plan]

    assert order(1, 4) == order(1, 4, before=2)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("accumulate", [2, 3, 8])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_number_of_micro_batches_does_not_change_the_examples_of_a_step(accumulate, grouped):
    split = split_of(101)
    full, parts = (
        BatchPlan(split, Batching(8, 1, 0, grouped)),
        BatchPlan(split, Batching(8, accumulate, 0, grouped)),
    )
    micro_batches = list(parts)
    steps = [
        micro_batches[start : start + accumulate]
        for start in range(0, len(micro_batches), accumulate)
    ]
    assert len(steps) == parts.steps == full.steps == len(full)
    for one, several in zip(full, steps, strict=True):
        assert [index for micro in several for index in micro.indices] == one.indices
        assert {(micro.rows, micro.tokens) for micro in several} == {(one.rows, one.tokens)}


def test_the_incomplete_batch_comes_last_and_is_random():
    split = split_of(101)
    plan = BatchPlan(split, Batching(8, 1, seed=0))
    left_over = []
    for epoch in range(200):
        plan.set_epoch(epoch)
        sizes = [len(micro.indices) for micro in plan]
        assert sizes == [8] * 12 + [5]
        left_over += list(plan)[-1].indices
    means = np.asarray(split["length"])[left_over].mean(), np.mean(split["length"])
    assert means[0] == pytest.approx(
        means[1], rel=0.1
    )  # neither the short nor the long ones end each epoch


def test_long_and_short_batches_come_in_any_order():
    split = split_of(400)
    lengths = np.asarray(split["length"])
    means = [lengths[micro.indices].mean() for micro in BatchPlan(split, Batching(8, 1, seed=0))]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4


def test_normalizers_are_sums_over_the_global_batch(language):
    _, split, *_ = language
    plan = BatchPlan(split, Batching(6, 3, seed=2))
    rows, lengths = np.asarray(split["rows"]), np.asarray(split["length"])
    micro_batches = list(plan)
    for step, batch in enumerate(plan.global_batches()):
        for micro in micro_batches[3 * step : 3 * step + 3]:
            assert (micro.rows, micro.tokens) == (rows[batch].sum(), lengths[batch].sum())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_follows_its_plan_and_leaves_the_global_generator_alone(classification, workers):
    task, split, _, pad_id = classification
    batches = make_loader(split, task, pad_id, Batching(6, 2, seed=3), workers=workers)
    state = torch.get_rng_state()
    for epoch in (0, 1):
        batches.sampler.set_epoch(epoch)
        assert len(batches) == len(list(batches))
        for micro, batch in zip(batches.sampler, batches, strict=True):
            ids = [split["input_ids"][index] for index in micro.indices]
            assert [
                row[mask.bool()].tolist()
                for row, mask in zip(
                    batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True
                )
            ] == ids
            assert (batch.rows, batch.tokens) == (micro.rows, micro.tokens)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("width", [-1, 3])  # lists of any length, or of one that the type fixes
def test_cached_outputs_travel_with_their_examples(language, width, tmp_path):
    task, split, _, pad_id = language
    rows = [
        [[float(place), float(row), -0.5] for row in range(count)]
        for place, count in enumerate(split["rows"])
    ]
    assert len({len(each) for each in rows}) > 1
    outputs = pa.table({"teacher_logits": pa.array(rows, pa.list_(pa.list_(pa.float32(), width)))})
    with pa.ipc.new_stream(tmp_path / "outputs.arrow", outputs.schema) as stream:
        stream.write_table(outputs, max_chunksize=4)
    cached = concatenate_datasets(
        [split, Dataset.from_file(str(tmp_path / "outputs.arrow"))], axis=1
    )
    for some in (cached, cached.select([5, 3, 8, 0])):
        batches = make_loader(some, task, pad_id, Batching(3, seed=1))
        for micro, batch in zip(batches.plan, batches, strict=True):
            assert batch.teacher.dtype == torch.float32
            assert batch.teacher.tolist() == [
                row for index in micro.indices for row in some["teacher_logits"][index]
            ]
            assert len(batch.teacher) == len(batch.labels)
    assert all(batch.teacher is None for batch in make_loader(split, task, pad_id, Batching(3)))


# ---- padding


def test_grouping_by_length_wastes_little_on_news():
    task, data = SingleLabelClassification(max_length=128), Data(source="distill.corpora.bbc_news")
    try:
        raw, task = load(data, task, seed=0)
    except UserError:
        pytest.skip("the extra `demo` is not installed")
    raw = DatasetDict(train=raw["train"])
    split = encode(raw, task, train_tokenizer(raw["train"]["text"][:200], 5000), data)["train"]
    assert BatchPlan(split, Batching(32, 1, seed=0)).padding_share() < 0.05


def test_grouping_by_length_wastes_little_on_texts_of_any_length():
    split = split_of(2000, longest=128)
    assert BatchPlan(split, Batching(32, 1, seed=0)).padding_share() < 0.05
    assert BatchPlan(split, Batching(32, 1, seed=0, group_by_length=False)).padding_share() > 0.3
    assert BatchPlan(split, Batching(1, 1, seed=0)).padding_share() == 0


def test_the_share_of_padding_is_logged_for_training(classification, caplog):
    task, split, _, pad_id = classification
    with caplog.at_level(logging.INFO, logger="distill"):
        make_loader(split, task, pad_id, Batching(6))  # nothing is logged for measuring
        batches = make_loader(split, task, pad_id, Batching(6, 2, seed=3))
    masks = [batch.inputs["attention_mask"] for batch in batches]
    share = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert batches.plan.padding_share() == pytest.approx(share)
    assert caplog.messages == [f"{100 * share:.1f} % of the tokens of an epoch are padding"]


def add_padding(batch, more: int, pad_id: int, task):
    """The same batch with more columns of padding, and positions in the wider logits."""
    width = batch.inputs["input_ids"].shape[1]
    inputs = {
        name: torch.nn.functional.pad(tensor, (0, more), value=pad_id if name == "input_ids" else 0)
        for name, tensor in batch.inputs.items()
    }
    index = (
        None
        if batch.positions is None
        else batch.positions // width * (width + more) + batch.positions % width
    )
    return batch._replace(inputs=inputs, positions=index)


def test_padding_changes_no_loss(problem):
    task, split, model, pad_id = problem
    batch = next(iter(make_loader(split, task, pad_id, Batching(7, seed=1))))
    with torch.inference_mode():
        tight, wide = (
            task.label_loss(task.select_rows(logits(model, each.inputs), each), each.labels)
            for each in (batch, add_padding(batch, 9, pad_id, task))
        )
    assert tight.abs().sum() > 0
    torch.testing.assert_close(tight, wide, rtol=1e-5, atol=1e-5)


def test_neighbours_change_no_loss(problem):
    task, split, model, pad_id = problem
    together, alone = (_row_losses(task, split, model, pad_id, size) for size in (len(split), 1))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def _row_losses(task, split, model, pad_id, batch_size):
    """Summed over the rows of each example, in the order of the split."""
    batches = make_loader(split, task, pad_id, Batching(batch_size))
    values = torch.zeros(len(split))
    with torch.inference_mode():
        for micro, batch in zip(batches.sampler, batches, strict=True):
            rows = task.label_loss(
                task.select_rows(logits(model, batch.inputs), batch), batch.labels
            )
            values[micro.indices] = torch.zeros(len(micro.indices)).index_add(
                0, batch.example, rows
            )
    return values


# ---- normalisers


def _loss_and_gradient(task, model, batches):
    """Of an optimizer step: sums of micro-batches, each divided by the rows of the global batch."""
    model = copy.deepcopy(model)
    total = torch.zeros(())
    for batch in batches:
        rows = task.select_rows(logits(model, batch.inputs), batch)
        part = losses.mean_over(
            losses.distillation(task.label_loss(rows, batch.labels), rows.square().mean(-1), 0.3),
            batch.rows,
        )
        part.backward()
        total = total + part.detach()
    return total, torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_the_micro_batches_of_a_step_sum_to_the_loss_of_the_whole_batch(problem, accumulate):
    task, split, model, pad_id = problem
    full, parts = (
        list(make_loader(split, task, pad_id, Batching(7, count, seed=1)))
        for count in (1, accumulate)
    )
    rows = [len(batch.labels) for batch in parts[:accumulate]]
    assert sum(rows) == len(full[0].labels)
    assert len(set(rows)) > 1 or (
        task.uses_labels and accumulate == 7
    )  # so that a mean of their means would be another
    one, one_gradient = _loss_and_gradient(task, model, full[:1])
    several, several_gradient = _loss_and_gradient(task, model, parts[:accumulate])
    torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one_gradient, several_gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens_not_its_texts(language):
    task, split, model, pad_id = language
    batch = next(iter(make_loader(split, task, pad_id, Batching(len(split)))))
    with torch.inference_mode():
        rows = task.label_loss(task.select_rows(logits(model, batch.inputs), batch), batch.labels)
    assert batch.rows == len(rows) == sum(split["rows"])
    assert losses.mean_over(rows, batch.rows) == pytest.approx(float(rows.mean()), rel=1e-6)


def test_the_loss_is_that_of_transformers(language):
    """transformers shifts labels itself: on a single window both means are equal."""
    task, split, model, pad_id = language
    batch = next(iter(make_loader(split, task, pad_id, Batching(1))))
    labels = torch.tensor(
        [
            split[next(iter(make_loader(split, task, pad_id, Batching(1)).sampler)).indices[0]][
                "labels"
            ]
        ]
    )
    with torch.inference_mode():
        ours = losses.mean_over(
            task.label_loss(task.select_rows(logits(model, batch.inputs), batch), batch.labels),
            batch.rows,
        )
        theirs = model(**batch.inputs, labels=labels).loss
    torch.testing.assert_close(ours, theirs)


def test_a_prompt_adds_nothing_to_the_loss(language):
    """Gradients reach its tokens through attention only: logits that are parameters get none."""
    task = language[0]
    tokens = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "size": 2}
    batch = task.collate([tokens], pad_id=0)
    values = torch.randn(1, 4, 20, requires_grad=True)
    task.label_loss(task.select_rows(values, batch), batch.labels).sum().backward()
    assert values.grad.abs().sum(-1)[0].bool().tolist() == [False, True, True, False]


def test_the_number_of_windows_does_not_change_what_is_counted():
    tokenizer = train_tokenizer(texts_of(50), 300, LANGUAGE_TOKENS)
    raw = DatasetDict(train=Dataset.from_dict({"text": texts_of(21)}))
    totals = set()
    for max_length in (5, 24, 200):
        split = encode(raw, CausalLanguageModelling(max_length), tokenizer, Data(source="none"))[
            "train"
        ]
        totals.add((sum(split["rows"]), sum(split["size"])))
    assert totals == {
        (
            sum(map(len, tokenizer(texts_of(21))["input_ids"])),
            sum(len(text.encode()) for text in texts_of(21)),
        )
    }


def test_every_generated_text_is_in_a_batch():
    """From the source to the batches."""
    task, data = SingleLabelClassification(), Data(source="distill.corpora.generated")
    raw, task = load(data, task, seed=0)
    tokenizer = train_tokenizer(raw["train"]["text"][:], 400)
    splits = encode(raw, task, tokenizer, data)
    for name, size in generated_texts.GENERATED.items():
        seen = [
            tuple(row[row != tokenizer.pad_token_id].tolist())
            for batch in make_loader(splits[name], task, tokenizer.pad_token_id, Batching(32))
            for row in batch.inputs["input_ids"]
        ]
        assert sorted(seen) == sorted(map(tuple, tokenizer(raw[name]["text"][:])["input_ids"]))
        assert len(seen) == size
