"""A stream has every row once an epoch, in an order that a resumed run continues."""

import copy
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from distill.data import Batching, Encoder, make_stream_loader, open_stream
from distill.data.streams import Place
from distill.errors import UserError
from distill.models import train_tokenizer
from distill.processes import ranks
from distill.recipe import config
from distill.tasks import LANGUAGE_TOKENS, CausalLanguageModelling

SIZES = (13, 1, 20, 7, 9)  # rows of the shards
HELD = 4  # rows of each split that is held out
STEPS = 10


def text(shard, row):
    return f"row {row} of shard {shard} " + "word " * (row % 11)


def folder_of(path, suffix="jsonl", sizes=SIZES):
    path.mkdir()
    for shard, size in enumerate(sizes):
        rows = [{"text": text(shard, row), "other": row} for row in range(size)]
        file = path / f"train-{shard:05d}-of-{len(sizes):05d}.{suffix}"
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("stream") / "shards")


def settings(source, **changes):
    defaults = {
        "source": str(source),
        "label": None,
        "validation": None,
        "test": None,
        "streaming": True,
        "stream_buffer": 6,
        "stream_holdout": HELD,
        "batch_size": 6,
    }
    return config.Data(**defaults | changes)


def rows_of(stream, lane, lanes, epochs=1):
    """The texts of a lane, epoch by epoch."""
    texts = [[] for _ in range(epochs)]
    for place, table in stream.blocks(lane, lanes, Place()):
        if place.epoch >= epochs:
            return texts
        texts[place.epoch] += table["text"].to_pylist()
    return texts


ALL = Counter(
    text(shard, row)
    for shard, size in enumerate(SIZES)
    for row in range(size)
    if shard or row >= 2 * HELD  # the first shard has more rows than are held out
)


@pytest.mark.parametrize("lanes", [1, 2, 5, 7])
def test_an_epoch_has_every_row_once_over_all_lanes(shards, lanes):
    stream, splits = open_stream(settings(shards), seed=3)
    read = [rows_of(stream, lane, lanes, epochs=2) for lane in range(lanes)]
    for epoch in range(2):
        assert sum((Counter(each[epoch]) for each in read), Counter()) == ALL
    assert read[0][0] != read[0][1]
    held = [text(0, row) for row in range(2 * HELD)]
    assert [*splits["validation"]["text"], *splits["test"]["text"]] == held
    assert splits["train"]["text"][0] == text(0, 2 * HELD)


def test_other_numbers_of_lanes_read_the_shards_in_the_same_order(shards):
    stream, _ = open_stream(settings(shards), seed=3)
    order = stream.order(0)
    assert sorted(order) == [*range(len(SIZES))] and order != stream.order(1)
    for lanes in (1, 2, 3):
        for lane in range(lanes):
            rows = rows_of(stream, lane, lanes)[0]
            seen = dict.fromkeys(row.split()[4] for row in rows)
            assert [*map(int, seen)] == order[lane::lanes]


def test_rows_are_shuffled_in_their_buffer_by_the_seed(shards):
    def read(seed, **changes):
        return rows_of(open_stream(settings(shards, **changes), seed)[0], 0, 1)[0]

    assert read(0) == read(0) != read(1)
    assert sorted(read(0)) == sorted(read(1))
    in_order = read(0, stream_buffer=1)
    largest = [row for row in in_order if "shard 2" in row]
    assert largest == [text(2, row) for row in range(SIZES[2])]
    buffered = [row for row in read(0) if "shard 2" in row]
    assert buffered != largest and sorted(buffered[:6]) == sorted(largest[:6])


def test_a_place_continues_where_its_block_begins(shards):
    stream, _ = open_stream(settings(shards), seed=3)
    for lane, lanes in ((0, 1), (1, 2), (3, 7)):
        blocks = []
        for place, table in stream.blocks(lane, lanes, Place()):
            blocks.append((place, table["text"].to_pylist()))
            if place.epoch == 2:
                break
        for start, (place, _) in enumerate(blocks):
            resumed = stream.blocks(lane, lanes, place)
            for expected in blocks[start:]:
                place, table = next(resumed)
                assert (place, table["text"].to_pylist()) == expected


# ---- batches


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text(shard, row) for shard in range(3) for row in range(11)]
    return train_tokenizer(texts, 300, LANGUAGE_TOKENS)


def loader_of(source, tokenizer, workers=0, rank=0, world=1, accumulate=1, packing=False):
    spec = settings(source)
    stream, _ = open_stream(spec, seed=0)
    task = CausalLanguageModelling(max_length=12)  # longer texts are several examples
    batching = Batching(6, accumulate, 0, rank=rank, world=world, packing=packing)
    encode = Encoder(task, tokenizer, spec)
    return make_stream_loader(stream, encode, tokenizer.pad_token_id, batching, workers)


def listed(loader, count):
    """The next batches of a loader."""
    batches = islice(loader, count)
    return [(batch.inputs["input_ids"].tolist(), batch.rows, batch.tokens) for batch in batches]


@pytest.mark.parametrize(
    ("workers", "accumulate", "packing"), [(0, 1, False), (0, 3, True), (2, 2, True)]
)
def test_a_resumed_loader_yields_the_batches_that_are_left(
    shards, tokenizer, workers, accumulate, packing
):
    options = {"workers": workers, "accumulate": accumulate, "packing": packing}
    complete = listed(loader_of(shards, tokenizer, **options), STEPS * accumulate)
    for step in (3,) if workers else (1, 7):
        stopped = loader_of(shards, tokenizer, **options)
        batches = iter(stopped)
        for _ in range(step * accumulate):
            next(batches)
        after = stopped.state_dict()
        next(batches)  # a checkpoint at the start of the next step does not count it
        before = stopped.state_dict()
        del batches
        for state in (after, before | {"position": before["position"] - 1}):
            resumed = loader_of(shards, tokenizer, **options)
            resumed.load_state_dict(state)
            left = complete[step * accumulate :]
            assert listed(resumed, len(left)) == left


def test_normalizers_are_those_of_all_micro_batches_of_a_step(shards, tokenizer):
    batches = list(islice(loader_of(shards, tokenizer, accumulate=3), 3 * STEPS))
    for start in range(0, len(batches), 3):
        step = batches[start : start + 3]
        assert {batch.rows for batch in step} == {float(sum(len(b.labels) for b in step))}
        tokens = sum(int(b.inputs["attention_mask"].sum()) for b in step)
        assert {batch.tokens for batch in step} == {float(tokens)}
        assert sum(len(batch.size) for batch in step) == 6


def test_conversations_without_a_reply_are_dropped_and_no_row_is_stored(
    tokenizer, tmp_path, monkeypatch
):
    """The rows of a corpus that does not fit are on no disk of this machine."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    replies = ["", *(f"row {number}" for number in range(1, 12))]
    rows = [
        {"messages": [{"role": "user", "content": "shard"}, {"role": "assistant", "content": text}]}
        for text in replies
    ]
    file = tmp_path / "shards" / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = settings(file.parent, text=["messages"], stream_holdout=1)
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = (
        "{% for each in messages %}<{{ each.role }}>{{ each.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    task = CausalLanguageModelling(max_length=32, learn="assistant", unanswered="drop")
    stream, _ = open_stream(spec, seed=0)
    stream = replace(stream, held_out=(0,))
    encode = Encoder(task, chatting, spec)
    loader = make_stream_loader(stream, encode, chatting.pad_token_id, Batching(11, seed=0))
    batch = next(iter(loader))
    learned = [
        chatting.decode(batch.labels[batch.example == example])
        for example in range(len(replies) - 1)
    ]
    assert sorted(learned) == sorted(filter(None, replies))
    assert not list((tmp_path / "cache").glob("**/*.arrow"))


def on_ranks(world, monkeypatch, function):
    """The results of a function of the rank, in threads whose collectives meet."""
    meeting, slots, local = threading.Barrier(world), [None] * world, threading.local()

    def all_gather(value):
        slots[local.rank] = value
        meeting.wait(60)
        gathered = list(slots)
        meeting.wait(60)
        return gathered

    def call(rank):
        local.rank = rank
        return function(rank)

    with monkeypatch.context() as patch, ThreadPoolExecutor(world) as pool:
        patch.setattr(ranks, "all_gather", all_gather)
        return [*pool.map(call, range(world))]


def test_two_ranks_resume_from_the_state_of_the_first(shards, tokenizer, monkeypatch):
    def complete(rank):
        return listed(loader_of(shards, tokenizer, rank=rank, world=2, accumulate=2), 2 * STEPS)

    def stopped(rank):
        loader = loader_of(shards, tokenizer, rank=rank, world=2, accumulate=2)
        return listed(loader, 6), loader.state_dict()

    batches = on_ranks(2, monkeypatch, complete)
    assert [row[1:] for row in batches[0]] == [row[1:] for row in batches[1]]  # normalizers
    (first, state), (second, other) = on_ranks(2, monkeypatch, stopped)
    assert [first, second] == [each[:6] for each in batches]
    assert state == other  # that of the first is saved

    def resumed(rank):
        loader = loader_of(shards, tokenizer, rank=rank, world=2, accumulate=2)
        loader.load_state_dict(copy.deepcopy(state))
        left = listed(loader, 8)
        return left, loader.state_dict()

    (left, state), (other_left, other) = on_ranks(2, monkeypatch, resumed)
    assert [left, other_left] == [each[6:14] for each in batches]
    assert state == other
    again = on_ranks(2, monkeypatch, resumed)  # the places of the other rank are new ones too
    assert [each[0][:6] for each in again] == [each[14:] for each in batches]


def test_ranks_share_the_examples_of_each_step(shards, tokenizer):
    for world in (2, 3):
        loaders = [loader_of(shards, tokenizer, rank=rank, world=world) for rank in range(world)]
        for batches in islice(zip(*loaders, strict=True), STEPS):
            assert sum(len(batch.size) for batch in batches) == 6


def test_another_number_of_processes_or_workers_is_refused(shards, tokenizer):
    state = loader_of(shards, tokenizer).state_dict()
    for changes, words in (
        ({"world": 2}, "number of processes is 2"),
        ({"workers": 1}, "data.workers is 1"),
        ({"accumulate": 2}, "trainer.accumulate is 2"),
    ):
        with pytest.raises(UserError, match=words):
            loader_of(shards, tokenizer, **changes).load_state_dict(state)


# ---- refusals


def test_parquet_shards_hold_the_same_stream(shards, tmp_path):
    other = folder_of(tmp_path / "parquet", "parquet")
    read = [rows_of(open_stream(settings(each), 0)[0], 0, 2)[0] for each in (shards, other)]
    assert read[0] == read[1]


def test_the_first_rows_may_span_shards(tmp_path):
    source = folder_of(tmp_path / "short", sizes=(3, 2, 9))
    stream, splits = open_stream(settings(source, stream_holdout=3), seed=0)
    assert splits["test"]["text"] == [text(1, 0), text(1, 1), text(2, 0)]
    assert sorted(rows_of(stream, 0, 1)[0]) == sorted(text(2, row) for row in range(1, 9))


def test_named_splits_are_read_and_nothing_is_held_out(shards, tmp_path):
    source = folder_of(tmp_path / "named", sizes=(5, 5))
    (source / "dev.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    spec = settings(source, validation="dev", test=None, stream_holdout=2)
    stream, splits = open_stream(spec, seed=0)
    assert splits["validation"]["text"] == ["one"]
    assert splits["test"]["text"] == [text(0, 0), text(0, 1)]
    assert len(rows_of(stream, 0, 1)[0]) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": "nope"}, "data.train is nope"),
        ({"validation": "nope"}, "data.validation is nope"),
        ({"stream_holdout": 25}, "data.stream_holdout is 25"),
    ],
)
def test_what_a_stream_does_not_have_is_named(shards, changes, words):
    with pytest.raises(UserError, match=words):
        open_stream(settings(shards, **changes), seed=0)


def test_a_lane_without_a_row_is_one_sentence(tmp_path):
    source = folder_of(tmp_path / "tiny", sizes=(9,))
    stream, _ = open_stream(settings(source), seed=0)
    with pytest.raises(UserError, match="reader 1 of 2"):
        rows_of(stream, 1, 2)


def test_other_formats_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("text\none\n")
    with pytest.raises(UserError, match="data.streaming is true"):
        open_stream(settings(tmp_path), seed=0)


LANGUAGE = {"_target_": "distill.tasks.CausalLanguageModelling"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": config.Trainer()}, "trainer.max_steps is null"),
        ({"teacher": config.Teacher(model="x")}, "teacher.outputs is cached"),
        (
            {"teacher": config.Teacher(model="x", outputs="online", finetune=config.Finetune())},
            "teacher.finetune",
        ),
        ({"tokenizer": config.Tokenizer(vocab_size=300)}, "tokenizer.vocab_size is 300"),
        ({"loss": config.Loss(divergence="uld")}, "loss.divergence is uld"),
    ],
)
def test_what_needs_a_first_pass_is_refused_when_the_recipe_is_read(changes, words):
    defaults = {
        "name": "x",
        "task": LANGUAGE,
        "data": settings("x"),
        "teacher": config.Teacher(model="x", outputs="online"),
        "student": config.Student(layers=[0]),
        "trainer": config.Trainer(max_steps=3),
    }
    assert config.Run(**defaults).data.streaming
    with pytest.raises(UserError, match=words):
        config.Run(**defaults | changes)


def test_choices_among_all_examples_are_refused():
    for key, value in (("labelled", 3), ("unlabelled", "more")):
        with pytest.raises(UserError, match=f"data.{key} is {value}"):
            settings("x", **{key: value})


def no_text(content):
    place = content.index(b"row 12 of") + len(b"row 12")
    return content[:place] + b"\xff" + content[place + 1 :]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("shard", [0, 3])
@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], no_text, lambda _: b"PAR1 nothing"],
    ids=["shortened", "no text", "another file"],
)
def test_a_damaged_shard_is_one_sentence_when_it_is_read(damage, shard, suffix, tmp_path):
    folder = folder_of(tmp_path / "shards", suffix, (23, 21, 20, 17))
    file = sorted(folder.iterdir())[shard]
    if suffix == "parquet":  # as plain bytes
        pq.write_table(pq.read_table(file), file, compression="none", use_dictionary=False)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="shards"):
        stream, _ = open_stream(settings(folder), 0)
        rows = 0
        for place, table in stream.blocks(0, 1, Place()):
            rows += len(table)
            if place.epoch:
                break
