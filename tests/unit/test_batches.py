"""Over any number of ranks an epoch has every example once, in one order, and can be resumed."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset

from distill.data import Batching, BatchPlan, is_dummy_batch, make_loader
from distill.errors import UserError
from distill.tasks import SingleLabelClassification

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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("world", WORLDS)
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
