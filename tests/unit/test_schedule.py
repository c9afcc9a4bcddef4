"""When techniques act, what they see of the training, and what is refused before it."""

from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn

from distill.callbacks.compression import Compression
from distill.compress.groups import parse_group
from distill.compress.observe import Observer
from distill.compress.schedule import SHAPES, Schedule, parse_duration
from distill.errors import UserError
from distill.module import Distillation
from distill.recipe import config
from distill.training import loop
from tests.worlds import trainer, world

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
TOTAL = 40


@pytest.fixture(scope="module")
def small(_module_store):
    return world()


# ---- Schedule


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 1.0),
        (0.1, 0.6),
        (0.5, 0.5),
        (1.0, 1.0),
        ("3 steps", "17 steps"),
        (0.25, "30 steps"),
        ("5 steps", 1.0),
        (0, "2 steps"),
        (0, "1 step"),
    ],
)
def test_both_ends_are_hit_exactly_and_the_way_is_monotone(shape, start, end):
    schedule = Schedule(start, end, shape)
    schedule.check(TOTAL)
    first, last = schedule.first(TOTAL), schedule.last(TOTAL)
    values = [schedule.at(step, TOTAL) for step in range(TOTAL + 1)]
    assert all(value == 0.0 for value in values[:first])
    assert all(value == 1.0 for value in values[last:])
    assert values[first] == (1.0 if last == first else 0.0)
    assert all(earlier <= later for earlier, later in pairwise(values))
    assert all(0 < value < 1 for value in values[first + 1 : last])


@pytest.mark.parametrize("shape", SHAPES)
def test_shares_are_steps_of_the_training(shape):
    by_share, by_step = Schedule(0.1, 0.6, shape), Schedule("10 steps", "60 steps", shape)
    assert [by_share.at(step, 100) for step in range(101)] == [
        by_step.at(step, 100) for step in range(101)
    ]
    assert [by_share.first(30), by_share.last(30)] == [3, 3 if shape == "one_shot" else 18]


def test_cubic_is_ahead_of_linear_and_slows_down():
    cubic, linear = (Schedule(0, 1.0, shape) for shape in ("cubic", "linear"))
    assert all(cubic.at(step, TOTAL) > linear.at(step, TOTAL) for step in range(1, TOTAL))
    gains = [cubic.at(step + 1, TOTAL) - cubic.at(step, TOTAL) for step in range(TOTAL)]
    assert gains == sorted(gains, reverse=True)
    assert cubic.at(TOTAL // 2, TOTAL) == 1 - 0.5**3


@pytest.mark.parametrize(
    ("start", "end"), [(0, 0.6), (0.3, 0.6), (1.0, 0.6), ("25 steps", "10 steps")]
)
def test_one_shot_does_all_at_its_start_whatever_its_end(start, end):
    schedule = Schedule(start, end, "one_shot")
    schedule.check(TOTAL)
    first = schedule.first(TOTAL)
    assert [schedule.at(step, TOTAL) for step in range(TOTAL + 1)] == [0.0] * first + [1.0] * (
        TOTAL + 1 - first
    )


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        ((-0.1, 0.5), "start", "-0.1"),
        ((0.1, 2.5), "end", "2.5"),
        (("soon", 0.5), "start", "soon"),
        (("-1 steps", 0.5), "start", "-1 steps"),
        (("0.5 steps", 0.5), "start", "0.5 steps"),
        ((float("nan"), 0.5), "start", "nan"),
        ((0, float("inf")), "end", "inf"),
        ((None, 0.5), "start", "None"),
        ((0.6, 0.5), "end", "0.5"),
        (("30 steps", "20 steps"), "end", "20 steps"),
        ((0.1, 0.5, "square"), "shape", "square"),
    ],
)
def test_what_is_no_schedule_is_refused(arguments, key, value):
    with pytest.raises(UserError, match=f"^{key} is {value}, but .*: "):
        Schedule(*arguments)


def test_a_number_above_one_is_taken_as_steps_with_a_warning(caplog):
    assert parse_duration("start", 500) == parse_duration("start", "500 steps")
    assert caplog.messages == [
        "start is 500, which is taken as optimizer steps for now: write start: 500 steps"
    ]
    assert Schedule(2, 9, "linear").at(3, TOTAL) == 1 / 7


def test_one_is_the_end_of_the_training_and_one_step_is_a_step():
    assert parse_duration("end", 1).steps(TOTAL) == parse_duration("end", 1.0).steps(TOTAL) == TOTAL
    assert parse_duration("end", "1 step").steps(TOTAL) == 1


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (Schedule(0.1, "50 steps"), 50),
        (Schedule("50 steps", 0, "one_shot"), 50),
        (Schedule(0.9, "20 steps"), 20),
    ],
)
def test_a_schedule_that_does_not_fit_the_training_is_refused(schedule, last):
    with pytest.raises(UserError, match=f"^the schedule .*ends at step {last}[:,]"):
        schedule.check(TOTAL)


@pytest.mark.parametrize(
    ("group", "number"), [("row", 0), ("tensor", -1), (64, 64), (None, None), (0, 0), (-1, -1)]
)
def test_a_group_is_written_in_words(group, number, caplog):
    assert parse_group(group) == number
    words = {0: ["write group: row"], -1: ["write group: tensor"]}.get(group, [])
    assert len(caplog.messages) == len(words) and all(word in caplog.text for word in words)


@pytest.mark.parametrize("group", [-2, "column", 0.5])
def test_a_group_that_is_none_is_refused(group):
    with pytest.raises(UserError, match=f"^group is {group}, but .*: "):
        parse_group(group)


# ---- Observer


class Inside(nn.Module):
    """Two linear layers, one on every token and one on the first, called as transformers does."""

    def __init__(self):
        super().__init__()
        self.every, self.first = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, states_BLD, attention_mask=None):
        return self.first(self.every(states_BLD)[:, 0])


def square_sums(input_ND):
    return input_ND.square().sum(0)


def watched(measure=square_sums, **options):
    torch.manual_seed(0)
    model = Inside()
    return model, Observer(model, dict(model.named_children()), measure, **options)


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_an_observer_sees_no_padding():
    states_BLD, mask_BL = drawn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model, observer = watched()
    model(states_BLD, attention_mask=mask_BL)
    torch.testing.assert_close(observer.values["every"], square_sums(states_BLD[mask_BL.bool()]))
    other = states_BLD.clone()
    other[0, 3:] = 1e6
    again, second = watched()
    again(other, attention_mask=mask_BL)
    assert torch.equal(observer.values["every"], second.values["every"])


def test_without_a_mask_and_without_a_length_all_is_seen():
    states_BLD = drawn(2, 5, 3)
    model, observer = watched()
    model(states_BLD)
    torch.testing.assert_close(observer.values["every"], square_sums(states_BLD.flatten(0, 1)))
    torch.testing.assert_close(observer.values["first"], square_sums(model.every(states_BLD)[:, 0]))


def test_the_mask_of_one_batch_is_not_that_of_the_next():
    states_BLD = drawn(2, 5, 3)
    model, observer = watched(lambda input_ND: torch.tensor(len(input_ND)))
    model(states_BLD, attention_mask=torch.eye(2, 5))
    assert observer.values["every"] == 2
    model(states_BLD)
    assert observer.values["every"] == 2 + 10


def test_batches_are_merged():
    first, second = drawn(2, 5, 3), drawn(4, 2, 3, seed=2)
    for merge, measure in (
        (torch.add, square_sums),
        (torch.maximum, lambda input_ND: input_ND.amax(0)),
    ):
        model, observer = watched(measure, merge=merge)
        model(first)
        model(second)
        torch.testing.assert_close(
            observer.values["every"],
            measure(torch.cat([first.flatten(0, 1), second.flatten(0, 1)])),
        )


def test_validation_is_not_looked_at():
    model, observer = watched()
    model.eval()(drawn(2, 5, 3))
    assert observer.values == {}


def test_looking_leaves_no_trace():
    """Outputs and gradients are the same, and nothing is observed after `remove`."""
    model, observer = watched()
    looked = model(drawn(2, 5, 3))
    assert not any(value.requires_grad for value in observer.values.values())
    gathered = {name: value.clone() for name, value in observer.values.items()}
    observer.remove()
    assert torch.equal(model(drawn(2, 5, 3)), looked)
    assert all(torch.equal(observer.values[name], value) for name, value in gathered.items())


def test_statistics_are_float32_under_mixed_precision():
    model, observer = watched()
    model(drawn(2, 5, 3).bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        model(drawn(2, 5, 3).bfloat16())
    assert all(value.dtype == torch.float32 for value in observer.values.values())


# ---- Compression


class Noted(Compression):
    """Writes down when it is called, in optimizer steps."""

    stage = "sparsity"

    def __init__(self, start=0.0, end=1.0, shape="linear", every=1):
        super().__init__(start, end, shape, every)
        self.calls = []

    def prepare(self, module):
        self.calls.append(("prepare", module.trainer.global_step))

    def change(self, module, amount):
        self.calls.append(("change", module.trainer.global_step, amount))

    def after_step(self, module):
        self.calls.append(("after_step", module.trainer.global_step))

    def changes(self):
        return [call[1:] for call in self.calls if call[0] == "change"]


class Stop(L.Callback):
    """Ends the training early, as a kill would, but with a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


def trained(made, callback, steps=6, accumulate=1, resume=None, until=None, folder=None):
    module = Distillation(
        made.task,
        made.model("student", seed=1),
        made.model(),
        config.Loss(),
        config.Optimizer(lr=1e-3),
        steps,
    )
    loader = made.loader(seed=0, accumulate=accumulate)
    driver = trainer(steps, callback, Stop(until), accumulate_grad_batches=accumulate)
    with loop.silence_lightning():
        driver.fit(module, loader, ckpt_path=resume)
    if folder is not None:
        driver.save_checkpoint(folder / "last.ckpt")
    return callback


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_technique_acts_once_per_optimizer_step(small, accumulate):
    callback = trained(small, Noted(), accumulate=accumulate)
    assert callback.calls[0] == ("prepare", 0)
    assert [step for what, step, *_ in callback.calls if what == "after_step"] == [1, 2, 3, 4, 5, 6]
    assert callback.changes() == [(step, step / 6) for step in range(1, 7)]
    assert callback.calls.index(("after_step", 3)) < callback.calls.index(("change", 3, 0.5))


def test_a_technique_acts_every_so_many_steps_from_its_start_and_at_its_end(small):
    assert [
        step
        for step, _ in trained(
            small, Noted(start="2 steps", end="9 steps", every=3), steps=10
        ).changes()
    ] == [5, 8, 9]


def test_what_starts_with_the_training_acts_before_its_first_step(small):
    assert trained(small, Noted(start=0.0, shape="one_shot")).changes() == [(0, 1.0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_starts_at_the_end_acts_after_the_last_step(small, shape):
    assert trained(small, Noted(start=1.0, end=1.0, shape=shape, every=4)).changes() == [(6, 1.0)]


def test_a_resumed_technique_goes_on_where_it_was(small, tmp_path):
    options = {"start": 0.25, "end": "11 steps", "every": 2}
    uninterrupted = trained(small, Noted(**options), steps=12)
    first = trained(small, Noted(**options), steps=12, until=6, folder=tmp_path)
    second = trained(small, Noted(**options), steps=12, resume=str(tmp_path / "last.ckpt"))
    assert second.calls[0] == ("prepare", 0)  # after the weights, before the step counter
    assert first.calls + second.calls[1:] == uninterrupted.calls
    assert len(first.changes()) == 1


def test_a_schedule_that_ends_after_the_training_is_refused_before_its_first_step(small):
    callback = Noted(start=0.0, end="7 steps")
    with pytest.raises(UserError, match="^Noted: the schedule ends at step 7, .* 6"):
        trained(small, callback)
    assert callback.calls == []


@pytest.mark.parametrize("every", [0, -1, 0.5])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(UserError, match=f"^Noted: every is {every}, but .*: "):
        Noted(every=every)
