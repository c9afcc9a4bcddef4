"""Over any number of ranks an epoch has every example once, in one order, and can be resumed."""

import math
import threading
import time
from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset

from distill.data import Batching, BatchPlan, is_dummy_batch, make_loader, prefetch
from distill.errors import UserError
from distill.tasks import CausalLanguageModelling, SingleLabelClassification
from tests.grids import sampled

# examples, batch size, micro-batches
SIZES = [
    (1, 8, 1),
    (7, 8, 3),
    (8, 8, 8),
    (21, 8, 1),
    (21, 8, 3),
    (50, 7, 2),
    (17, 16, 2),
    (100, 500, 3),
    (33, 4, 4),
]
WORLDS = (1, 2, 3, 5)
SEEDS = ((0, True), (3, False))


def split_of(count):
    generator = np.random.default_rng(count)
    lengths = generator.integers(1, 40, count)
    ids = [generator.integers(1, 50, length).tolist() for length in lengths]
    ones = [1] * count
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [0] * count, "size": ones, "length": lengths, "rows": ones}
    )


def plans(size, world, seed, grouped):
    count, batch, accumulate = size
    return [
        BatchPlan(split_of(count), Batching(batch, accumulate, seed, grouped, rank, world))
        for rank in range(world)
    ]


def loader_of(count, batch=8, accumulate=1, seed=0, workers=0, rank=0, world=1):
    task = SingleLabelClassification()
    task.names = ("a", "b")
    return make_loader(
        split_of(count),
        task,
        0,
        Batching(batch, accumulate, seed, rank=rank, world=world),
        workers,
    )


# ---- the ranks


@pytest.mark.parametrize(("size", "world"), sampled(product(SIZES, WORLDS), every=3, rest="slow"))
def test_every_example_comes_once_per_epoch_over_the_ranks(size, world):
    for (seed, grouped), epoch in product((*SEEDS, (None, True), (None, False)), (0, 1)):
        shares = plans(size, world, seed, grouped)
        for plan in shares:
            plan.set_epoch(epoch)
        handed_out = [list(plan) for plan in shares]
        seen = sorted(
            index
            for share in handed_out
            for micro in share
            if not is_dummy_batch(micro)
            for index in micro.indices
        )
        assert seen == list(range(size[0]))
        assert (
            {len(share) for share in handed_out}
            == {len(plan) for plan in shares}
            == {len(shares[0])}
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("seed", "grouped"), SEEDS)
def test_the_order_is_the_same_for_every_number_of_ranks(size, seed, grouped):
    alone = list(plans(size, 1, seed, grouped)[0])
    for world in WORLDS[1:]:
        for turn, complete in zip(
            zip(*plans(size, world, seed, grouped), strict=True), alone, strict=True
        ):
            busy = [micro for micro in turn if not is_dummy_batch(micro)]
            assert [micro.indices for micro in busy] == [
                complete.indices[rank::world] for rank in range(len(busy))
            ]
            assert {(micro.rows, micro.tokens) for micro in busy} == {
                (complete.rows, complete.tokens)
            }


@pytest.mark.parametrize("size", SIZES)
def test_without_a_seed_ranks_take_the_batches_of_one_process_in_turn(size):
    count, batch, _ = size
    alone = list(BatchPlan(split_of(count), Batching(batch)))
    for world in WORLDS:
        shares = [
            list(BatchPlan(split_of(count), Batching(batch, rank=rank, world=world)))
            for rank in range(world)
        ]
        dealt = [micro for turn in zip(*shares, strict=True) for micro in turn]
        assert dealt[: len(alone)] == alone
        assert all(is_dummy_batch(micro) for micro in dealt[len(alone) :])


def test_a_dummy_batch_is_one_example_that_adds_zero():
    shares = plans((17, 16, 1), 2, 0, True)
    last = list(shares[1])[-1]
    assert is_dummy_batch(last) and len(last.indices) == 1 and last.rows == last.tokens == math.inf
    assert [is_dummy_batch(batch) for batch in loader_of(17, 16, rank=1, world=2)] == [False, True]
    assert torch.tensor(3.5) / loader_of(17, 16, rank=1, world=2).dataset[last].rows == 0


def test_the_share_of_padding_is_of_all_ranks():
    """More ranks have smaller batches, which need less padding."""
    shares_by_world = {
        world: {plan.padding_share() for plan in plans((100, 16, 1), world, 0, False)}
        for world in (1, 2, 4)
    }
    assert all(len(shares) == 1 for shares in shares_by_world.values())
    one, two, four = (min(shares) for shares in shares_by_world.values())
    assert one > two > four > 0


# ---- the place


@pytest.mark.parametrize("size", [(21, 8, 1), (21, 8, 3), (17, 16, 2)])
@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_resumes_from_any_position(size, world):
    for plan in plans(size, world, 5, True):
        for epoch in (0, 2):
            plan.set_epoch(epoch)
            plan.start = 0
            complete = list(plan)
            for start in range(len(complete) + 1):
                plan.start = start
                assert list(plan) == list(plan) == complete[start:]
            assert len(plan) == len(complete)


def ids(batches):
    return [batch.inputs["input_ids"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_a_loader_resumes_where_its_state_was_saved(workers, stop):
    """From the start, the middle and the end of six micro-batches; later epochs are complete."""
    size = {"count": 43, "batch": 16, "accumulate": 2, "workers": workers}
    complete = []
    for epoch in (0, 1, 2):
        reference = loader_of(**size)
        reference.plan.set_epoch(epoch)
        complete.append(ids(reference))
    assert {len(epoch) for epoch in complete} == {6}
    interrupted = loader_of(**size)
    for place, _ in enumerate(interrupted, 1):
        if place == stop:
            break
    state = interrupted.state_dict() if stop else loader_of(**size).state_dict()
    assert state["position"] == stop
    resumed = loader_of(**size)
    resumed.load_state_dict(state)
    assert resumed.state_dict() in (
        state,
        state | {"epoch": 1, "position": 0},
    )  # the edge of an epoch is the next one's start
    rest = complete[0][stop:] or complete[1]
    assert ids(resumed) == rest
    for epoch in range(resumed.plan.epoch + 1, 3):
        resumed.plan.set_epoch(epoch)
        assert ids(resumed) == complete[epoch]


def test_an_iterator_keeps_the_position_that_it_was_made_for():
    """Lightning may set the epoch, and workers may iterate twice, before the first batch."""
    plan = BatchPlan(split_of(40), Batching(8, seed=0))
    expected = list(plan)[2:]
    plan.start = 2
    first, second = iter(plan), iter(plan)
    plan.start, plan.epoch = 0, 7
    assert list(first) == list(second) == expected


def test_a_state_fits_any_number_of_ranks():
    state = None
    for world in (1, 2, 3):
        shares = [loader_of(43, 16, 2, rank=rank, world=world) for rank in range(world)]
        states = []
        for share in shares:
            batches = iter(share)
            for _ in range(3):
                next(batches)
            states.append(share.state_dict())
        assert states == [states[0]] * world
        assert state in (None, states[0])
        state = states[0]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"count": 44}, "training examples"),
        ({"batch": 8}, "data.batch_size"),
        ({"accumulate": 3}, "trainer.accumulate"),
    ],
)
def test_a_state_of_other_examples_or_batches_is_refused(other, named):
    size = {"count": 43, "batch": 16, "accumulate": 2}
    with pytest.raises(UserError, match=named):
        loader_of(**size | other).load_state_dict(loader_of(**size).state_dict())


# ---- collation, ahead of the step


def collated_with_lists(examples, pad_id, length):
    """Input ids and mask, written token by token."""
    ids = [row["input_ids"] + [pad_id] * (length - len(row["input_ids"])) for row in examples]
    mask = [[int(place < len(row["input_ids"])) for place in range(length)] for row in examples]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("multiple", [None, 1, 8, 64])
def test_collation_from_arrays_has_every_token_and_the_padding_that_is_asked_for(multiple):
    task, split = SingleLabelClassification(40), split_of(30)
    batching = Batching(8, seed=0, multiple=multiple)
    loader = make_loader(split, task, 9, batching)
    for micro, batch in zip(loader.plan, loader, strict=True):
        examples = [split[index] for index in micro.indices]
        longest = max(len(row["input_ids"]) for row in examples)
        length = longest if multiple is None else min(-(-longest // multiple) * multiple, 40)
        ids, mask = collated_with_lists(examples, 9, length)
        for name, expected in (("input_ids", ids), ("attention_mask", mask)):
            assert batch.inputs[name].dtype == torch.int64
            assert torch.equal(batch.inputs[name], expected)
        assert batch.padded == (not mask.all())


def windows_of(count):
    generator = np.random.default_rng(count)
    lengths = generator.integers(2, 20, count).tolist()
    ids = [generator.integers(1, 50, length).tolist() for length in lengths]
    labels = [[-100, *(token if token % 3 else -100 for token in row[1:])] for row in ids]
    rows = [sum(label != -100 for label in row) for row in labels]
    columns = {"input_ids": ids, "labels": labels, "size": rows, "length": lengths, "rows": rows}
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("multiple", [None, 7, 32])
def test_each_row_of_a_language_model_is_the_position_before_its_label(multiple):
    split = windows_of(30)
    loader = make_loader(
        split, CausalLanguageModelling(24), 0, Batching(8, seed=0, multiple=multiple)
    )
    for micro, batch in zip(loader.plan, loader, strict=True):
        length = batch.inputs["input_ids"].shape[1]
        expected = [
            (row * length + place - 1, label, row)
            for row, index in enumerate(micro.indices)
            for place, label in enumerate(split[index]["labels"])
            if label != -100
        ]
        columns = (batch.positions, batch.labels, batch.example)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


def test_items_are_made_before_they_are_needed_and_only_a_few():
    made, before = [], threading.active_count()

    def items():
        for number in range(100):
            made.append(number)
            yield number

    ahead = prefetch(items(), ahead=2)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 3 <= len(made) <= 5
    ahead.close()
    ended = len(made)
    time.sleep(0.05)
    assert len(made) == ended
    assert threading.active_count() == before


def test_an_error_in_the_thread_is_raised_at_its_place():
    def items():
        yield 1
        raise UserError("the second item is broken")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(UserError, match="the second item is broken"):
        next(ahead)
