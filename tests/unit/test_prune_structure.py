"""PruneNeurons, PruneHeads and PruneLayers in training: on schedule, permanent, optimizer state
kept.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

import distill
from distill.callbacks.prune_layers import PruneLayers
from distill.callbacks.prune_structure import PruneHeads, PruneNeurons
from distill.compress import structure, widths
from distill.errors import UserError
from distill.models import blocks
from distill.module import Distillation
from distill.recipe import config
from distill.training import loop
from tests.grids import sampled
from tests.worlds import LANGUAGE, trainer, world

STEPS = 12
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = LANGUAGE | {
    "teacher": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
        "outputs": "online",
    }
}
WORLDS = {"bert": {}, "gpt2": LANGUAGE, "llama": LLAMA}


@pytest.fixture(scope="module", params=WORLDS)
def any_world(request, _module_store):
    return prepared(request.param)


@pytest.fixture(scope="module")
def bert(_module_store):
    return prepared("bert")


def prepared(name):
    made = world(**WORLDS[name])
    made.examples["few"] = made.examples["train"].select(range(64))
    return made


def student_of(made, seed=1):
    still = {"gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}, "llama": {}}
    return made.model(
        "student", seed=seed, **still.get(made.run.teacher.config["model_type"], STILL)
    )


def module_of(made, seed=1, **loss):
    settings = config.Optimizer(lr=2e-3, weight_decay=0.1, schedule="constant")
    return Distillation(
        made.task,
        student_of(made, seed),
        made.model(),
        config.Loss(**({"alpha": 0.5} | loss)),
        settings,
        STEPS,
    )


class Watch(L.Callback):
    """What there is after each optimizer step."""

    def __init__(self, look):
        self.look, self.seen = look, {}

    def on_train_batch_end(self, trainer, module, *_):
        self.seen[trainer.global_step] = self.look(module)


class Save(L.Callback):
    """A checkpoint after some steps."""

    def __init__(self, folder, *steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Batches:
    """The batches of three epochs, or what is left of them, as one; it does not say how many."""

    def __init__(self, made, seed, first=0):
        loader, self.batches = made.loader("few", seed=seed), []
        for epoch in range(3):
            loader.plan.set_epoch(epoch)
            self.batches += list(loader)
        self.batches = self.batches[first:]

    def __iter__(self):
        return iter(self.batches)


def trained(made, module, *callbacks, resume=None, steps=STEPS, **options):
    """Train as `fit` does, with callbacks alone."""
    with loop.silence_lightning():
        driver = trainer(steps, *callbacks, max_epochs=1, limit_val_batches=0, **options)
        first = torch.load(resume, weights_only=True)["global_step"] if resume else 0
        driver.fit(
            module, Batches(made, driver.global_rank, first), ckpt_path=resume, weights_only=True
        )
    return driver


def counts(module, kind="neurons"):
    return [
        getattr(structure, kind)(module.student, block).count for block in blocks(module.student)
    ]


def zeros(module, kind="neurons"):
    """Groups of each block of which every slice is zero."""
    found = []
    for groups in (
        getattr(structure, kind)(module.student, block) for block in blocks(module.student)
    ):
        each = [
            part.parameter.detach().movedim(part.dim, 0).reshape(groups.count, -1).eq(0).all(1)
            for part in groups.slices
        ]
        found.append(torch.stack(each).all(0))
    return found


RAMP = {"start": 2, "end": 8, "every": 2}


# ---- on schedule


NEURONS = itertools.product(WORLDS, ["activation", "magnitude", "gradient"], [True, False])


@pytest.mark.parametrize(
    ("any_world", "score", "equal"),
    sampled(NEURONS, every=5, always=[("llama", "gradient", False)], rest="slow"),
    indirect=["any_world"],
)
def test_neurons_are_masked_then_removed(any_world, score, equal):
    module = module_of(any_world)
    width = counts(module)[0]
    watch = Watch(lambda module: (counts(module), zeros(module)))
    trained(any_world, module, PruneNeurons(0.5, score, equal, shape="linear", **RAMP), watch)
    gone = 0
    for step, share in {1: 0, 3: 0, 4: 1 / 3, 5: 1 / 3, 6: 2 / 3, 7: 2 / 3}.items():
        there, masked = watch.seen[step]
        assert there == [width] * len(there)
        expected = (
            [round(share * 0.5 * width)] * len(there) if equal else round(share * 0.5 * sum(there))
        )
        assert (
            [int(mask.sum()) for mask in masked] if equal else int(torch.cat(masked).sum())
        ) == expected
        now = torch.cat(masked)
        assert not (gone & ~now).any()
        gone = now
    for step in (8, 12):
        there, masked = watch.seen[step]
        assert (
            there == [width // 2] * len(there) if equal else sum(there) == len(there) * width // 2
        )
        assert not torch.cat(masked).any()
    assert (widths.update_config(module.student) == {}) == (len(set(counts(module))) == 1)


@pytest.mark.parametrize("score", ["gradient", "magnitude"])
@pytest.mark.parametrize("equal", [True, False])
def test_heads_are_masked_then_removed(score, equal):
    made = prepared("llama")
    module, watch = (
        module_of(made),
        Watch(lambda module: (counts(module, "heads"), zeros(module, "heads"))),
    )
    trained(made, module, PruneHeads(0.5, score, equal, shape="linear", **RAMP), watch)
    assert watch.seen[7][0] == [4, 4, 4]
    assert sum(int(mask.sum()) for mask in watch.seen[7][1]) == (3 if equal else 4)
    assert sum(watch.seen[8][0]) == 6
    if equal:
        assert watch.seen[8][0] == [2, 2, 2]
        described = module.student.config
        assert (
            described.num_attention_heads,
            described.num_key_value_heads,
            described.head_dim,
        ) == (4, 2, 4)
        assert not described.to_dict().get("compression")


def test_heads_of_bert_go_into_the_record(bert):
    module = module_of(bert)
    trained(bert, module, PruneHeads(0.5, start=2, shape="one_shot"))
    assert counts(module, "heads") == [1, 1, 1]
    shapes = module.student.config.compression["shapes"]
    assert shapes["bert.encoder.layer.1.attention.self.query"] == [16, 8]
    assert shapes["bert.encoder.layer.1.attention.output.dense"] == [8, 16]
    assert len(shapes) == 12


@pytest.mark.parametrize(
    ("kind", "callback"),
    [
        ("neurons", PruneNeurons(0.5, stepwise=True, **RAMP)),
        ("heads", PruneHeads(0.5, stepwise=True, **RAMP)),
    ],
)
def test_stepwise_they_are_removed_at_every_change(kind, callback):
    made = prepared("llama")
    module, watch = (
        module_of(made),
        Watch(lambda module: (counts(module, kind), zeros(module, kind))),
    )
    whole = counts(module, kind)[0]
    trained(made, module, callback, watch)
    widths = [there[0] for there, _ in watch.seen.values()]
    assert widths == sorted(widths, reverse=True)
    assert widths[3] == whole - round(0.5 * (1 - (2 / 3) ** 3) * whole)
    assert widths[7] == widths[-1] == whole // 2
    assert not any(mask.any() for _, masked in watch.seen.values() for mask in masked)


def test_one_shot_removes_the_least_active(bert):
    module, seen = module_of(bert), {}
    module.settings.lr = 1e-9
    callback = PruneNeurons(0.25, start=4, shape="one_shot")
    before = {name: tensor.clone() for name, tensor in module.student.state_dict().items()}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 3:
                seen["score"] = [site.score.clone() for site in callback._states]

    trained(bert, module, callback, Look(), steps=4)
    for place, score in enumerate(seen["score"]):
        first = before[f"bert.encoder.layer.{place}.intermediate.dense.bias"]
        left = module.student.state_dict()[f"bert.encoder.layer.{place}.intermediate.dense.bias"]
        top = score.argsort()[-20:]  # 24 stay; the fourth batch may change the order of a few
        assert all((first[neuron] - left).abs().min() < 1e-6 for neuron in top)
        assert len(left) == 24


def test_a_removal_in_the_last_step_is_that_of_no_repair(bert):
    module = module_of(bert)
    trained(
        bert, module, PruneNeurons(0.5, start=1.0, end=1.0), PruneHeads(0.5, start=1.0, end=1.0)
    )
    assert counts(module) == [16, 16, 16]
    assert counts(module, "heads") == [1, 1, 1]


def test_nothing_asked_changes_nothing(bert):
    ends = []
    for callbacks in (
        [],
        [PruneNeurons(0.0, **RAMP), PruneHeads(0.0, **RAMP), PruneLayers(amount=0.0, start=4)],
    ):
        module = module_of(bert)
        trained(bert, module, *callbacks)
        ends.append(torch.nn.utils.parameters_to_vector(module.student.parameters()))
    assert torch.equal(*ends)


# ---- layers


@pytest.mark.parametrize("how", [{"layers": [1]}, {"amount": 1 / 3}])
def test_layers_are_removed(any_world, how):
    module = module_of(any_world)
    started = list(blocks(module.student))
    watch = Watch(lambda module: list(blocks(module.student)))
    trained(any_world, module, PruneLayers(**how, start=4), watch)
    assert watch.seen[3] == started
    assert len(watch.seen[4]) == module.student.config.num_hidden_layers == 2
    if "layers" in how:
        assert watch.seen[4] == [started[0], started[2]]


def test_the_layer_that_turns_its_input_least_goes(bert):
    module = module_of(bert)
    module.settings.lr = 1e-9
    idle = blocks(module.student)[1]
    with torch.no_grad():
        for layer in (idle.attention.output.dense, idle.output.dense):
            layer.weight.zero_()
            layer.bias.zero_()
        for norm in (
            *(block.output.LayerNorm for block in blocks(module.student)),
            idle.attention.output.LayerNorm,
        ):
            norm.weight.fill_(1)  # then a norm after a norm does nothing
            norm.bias.zero_()
    trained(bert, module, PruneLayers(amount=0.34, start=3), steps=4)
    assert len(blocks(module.student)) == 2
    assert idle not in list(blocks(module.student))


def test_neurons_heads_and_layers_go_in_one_run(bert):
    module = module_of(bert)
    trained(
        bert,
        module,
        PruneNeurons(0.5, equal=False, **RAMP),
        PruneLayers(layers=[0], start=5),
        PruneHeads(0.5, **RAMP),
    )
    assert len(blocks(module.student)) == 2
    assert sum(counts(module)) == 32
    assert counts(module, "heads") == [1, 1]
    assert all(
        ".layer.0." in name or ".layer.1." in name
        for name in module.student.config.compression["shapes"]
    )


# ---- what a checkpoint holds

RESUMED = {
    "neurons": ("bert", lambda: [PruneNeurons(0.5, start=2, end=6, every=1)]),
    "neurons, unequal": (
        "bert",
        lambda: [PruneNeurons(0.5, "gradient", equal=False, start=2, end=6, every=1)],
    ),
    "neurons, stepwise": (
        "gpt2",
        lambda: [PruneNeurons(0.5, "gradient", stepwise=True, start=2, end=6, every=3)],
    ),
    "heads": ("bert", lambda: [PruneHeads(0.5, start=2, end=6, every=1)]),
    "heads, shared keys": (
        "llama",
        lambda: [PruneHeads(0.5, equal=False, start=2, end=6, every=3)],
    ),
    "layers": ("llama", lambda: [PruneLayers(amount=0.34, start=6)]),
    "all": (
        "bert",
        lambda: [
            PruneNeurons(0.5, start=2, end=7, every=2),
            PruneLayers([0], start=3),
            PruneHeads(0.5, start=2, end=6, every=1),
        ],
    ),
}


@pytest.mark.parametrize("row", RESUMED)
def test_resumed_before_or_after_the_removal_it_ends_with_the_same_bytes(row, tmp_path):
    name, callbacks = RESUMED[row]
    made = prepared(name)
    trained(made, module_of(made), *callbacks(), Save(tmp_path, 4, 8, STEPS))
    ends = torch.load(tmp_path / f"{STEPS}.ckpt", weights_only=True)
    for step in (4, 8):
        module, folder = module_of(made, seed=7), tmp_path / f"from{step}"
        trained(made, module, *callbacks(), Save(folder, STEPS), resume=tmp_path / f"{step}.ckpt")
        again = torch.load(folder / f"{STEPS}.ckpt", weights_only=True)
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_same(again[key], ends[key])
        for key in (key for key in ends["callbacks"] if key.startswith("Prune")):
            assert_same(again["callbacks"][key], ends["callbacks"][key])
        assert json.loads(again["student_config"]) == json.loads(ends["student_config"])
    assert any(key.startswith("Prune") for key in ends["callbacks"])


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def test_the_optimizer_lists_what_the_student_has(bert):
    module = module_of(bert)
    trainer = trained(
        bert, module, PruneNeurons(0.5, **RAMP), PruneHeads(0.5, **RAMP), PruneLayers([1], start=3)
    )
    optimizer = trainer.optimizers[0]
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert (
        {id(parameter) for parameter in listed}
        == {id(parameter) for parameter in module.parameters()}
        == {id(p) for p in optimizer.state}
    )
    assert all(
        optimizer.state[parameter]["exp_avg"].shape == parameter.shape for parameter in listed
    )
    assert {int(optimizer.state[parameter]["step"]) for parameter in listed} == {STEPS}


def test_a_loss_term_goes_on_after_a_removal(bert):
    terms = {"hidden": {"_target_": "distill.terms.HiddenStates", "weight": 1.0, "layers": {0: 1}}}
    module = module_of(bert, terms=terms)
    values = Watch(lambda module: float(module.last_step_losses()["train/hidden"]))
    trained(bert, module, PruneLayers([1], start=3), PruneNeurons(0.5, **RAMP), values)
    assert all(value > 0 for value in values.seen.values())


def test_validation_does_not_decide(bert):
    callback = PruneNeurons(0.5, start=1.0, end=1.0)
    module = module_of(bert)

    class Validate(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            before = [site.score.clone() for site in callback._states]
            module.student.eval()
            seen = {name: value.clone() for name, value in callback._observer.values.items()}
            module.parts(next(iter(bert.loader("validation"))))
            module.student.train()
            assert_same(callback._observer.values, seen)
            assert len(seen) == 3  # this step's training batch alone
            assert_same(before, [site.score for site in callback._states])

    trained(bert, module, Validate(), callback, steps=2)


# ---- two processes


@pytest.mark.slow
def test_training_goes_on_in_two_processes(tmp_path):
    """Both ranks prune the same structures and end with the same weights."""
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\nfrom tests.unit.test_prune_structure import "
        "one_of_two\none_of_two(sys.argv[1])\n"
    )
    root = Path(distill.__file__).parent.parent
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))
    }
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=inherited | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(one["weights"], other["weights"])
    assert one["shapes"] == other["shapes"]
    assert one["learned"] != 0 and one["examples"] != other["examples"]


def one_of_two(folder):
    made = prepared("bert")
    module = module_of(made)
    callbacks = [
        PruneNeurons(0.5, equal=False, **RAMP),
        PruneHeads(0.5, **RAMP),
        PruneLayers([1], start=5),
    ]
    watch, seen = (
        Watch(
            lambda module: (
                torch.nn.utils.parameters_to_vector(module.student.parameters()).detach().clone()
            )
        ),
        [],
    )

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append(int(batch.inputs["input_ids"].sum()))

    trainer = trained(made, module, *callbacks, watch, Seen(), devices=2, strategy="ddp")
    assert len(blocks(module.student)) == 2
    torch.save(
        {
            "weights": dict(module.student.state_dict()),
            "shapes": module.student.config.compression,
            "learned": float((watch.seen[STEPS] - watch.seen[8]).abs().max()),
            "examples": seen,
        },
        f"{folder}/rank{trainer.global_rank}.pt",
    )


# ---- refusals


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: PruneNeurons(1.0),
            "PruneNeurons: amount is 1.0, but it must lie in [0, 1): 0.5 removes half",
        ),
        (lambda: PruneHeads(1), "PruneHeads: amount is 1, but it must lie in [0, 1)"),
        (lambda: PruneNeurons(-0.1), "amount is -0.1, but"),
        (lambda: PruneNeurons("half"), "amount is half, but"),
        (
            lambda: PruneNeurons(0.5, "wanda"),
            "score is wanda, but it must be one of activation, magnitude, gradient",
        ),
        (
            lambda: PruneHeads(0.5, "activation"),
            "score is activation, but it must be one of gradient, magnitude",
        ),
        (
            lambda: PruneNeurons(0.5, start=0.5, end=0.2),
            "PruneNeurons: end is 0.2, but start is 0.5",
        ),
        (lambda: PruneLayers(), "PruneLayers: layers is None and amount is None, but exactly one"),
        (lambda: PruneLayers([0], 0.5), "layers is [0] and amount is 0.5, but exactly one"),
        (lambda: PruneLayers(amount=1.0), "PruneLayers: amount is 1.0, but it must lie in [0, 1)"),
        (lambda: PruneLayers(0), "layers is 0, but it must be a list"),
    ],
)
def test_arguments_that_cannot_be_are_refused(build, sentence):
    with pytest.raises(UserError) as refused:
        build()
    assert sentence in str(refused.value)


RELATIONS = {
    "relations": {
        "_target_": "distill.terms.AttentionRelations",
        "weight": 1.0,
        "student_layer": 1,
        "teacher_layer": 2,
        "heads": 2,
    }
}
HIDDEN = {
    "hidden": {"_target_": "distill.terms.HiddenStates", "weight": 1.0, "layers": {-1: -1, 2: 2}}
}


@pytest.mark.parametrize(
    ("callback", "terms", "sentence"),
    [
        (
            lambda: PruneHeads(0.8),
            {},
            "PruneHeads: amount is 0.8, but of the heads that removes all 2 of a block: take a "
            "smaller amount",
        ),
        (
            lambda: PruneHeads(0.8, equal=False),
            {},
            "of the heads that removes 5 of 6, and 3 leave one to each block",
        ),
        (lambda: PruneNeurons(0.99), {}, "of the neurons that removes all 32 of a block"),
        (
            lambda: PruneHeads(0.5),
            RELATIONS,
            "PruneHeads: loss.terms.relations compares",
        ),
        (
            lambda: PruneLayers([1]),
            RELATIONS,
            "PruneLayers: loss.terms.relations names layer 1 of the student, but layers from 1 on",
        ),
        (lambda: PruneLayers([1]), HIDDEN, "loss.terms.hidden names layer 2"),
        (
            lambda: PruneLayers(amount=0.5),
            HIDDEN,
            "loss.terms.hidden names layer 2 of the student, but layers from 0 on",
        ),
        (
            lambda: PruneLayers([3]),
            {},
            "layers has 3, but the student has 3 layers: name layers from 0 to 2",
        ),
        (
            lambda: PruneLayers([0, 1, 2]),
            {},
            "layers is [0, 1, 2], but that removes all 3 layers of the student",
        ),
        (lambda: PruneLayers(amount=0.9), {}, "amount is 0.9, but that removes all 3 layers"),
        (
            lambda: PruneNeurons(0.5, start=0, shape="one_shot"),
            {},
            "it starts at step 0 of 12, but",
        ),
        (
            lambda: PruneLayers(amount=0.4, start=0),
            {},
            "it starts at step 0 of 12, but",
        ),
        (
            lambda: PruneNeurons(0.5, start="20 steps", end="30 steps"),
            {},
            "PruneNeurons: the schedule ends at step 30, but the training has 12",
        ),
    ],
)
def test_what_does_not_fit_the_student_is_refused_before_training(bert, callback, terms, sentence):
    watch = Watch(lambda module: None)
    with pytest.raises(UserError) as refused:
        trained(bert, module_of(bert, terms=terms), callback(), watch)
    assert sentence in str(refused.value)
    assert not watch.seen


def test_scaling_by_the_place_of_a_layer_is_refused():
    made = prepared("gpt2")
    module = module_of(made)
    module.student.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(
        UserError,
        match="PruneLayers: the layers to keep are .* of a gpt2, but with its settings",
    ):
        trained(made, module, PruneLayers([0]))


def test_two_of_a_kind_are_refused(bert):
    first, second = PruneNeurons(0.2), PruneNeurons(0.3)
    first.name, second.name = "one", "other"
    with pytest.raises(UserError, match="PruneNeurons: there are two of these callbacks"):
        trained(bert, module_of(bert), first, second)


def test_a_student_that_is_factorized_already_is_refused(bert):
    module = module_of(bert)
    module.student.config.compression = {"low_rank": {"bert.encoder.layer.0.intermediate.dense": 4}}
    with pytest.raises(UserError, match="the student has low_rank in config.compression, but"):
        trained(bert, module, PruneNeurons(0.2))
