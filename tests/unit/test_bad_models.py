"""Models that cannot be used: files, weights and configs, each named before anything is trained."""

import json
import math
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from distill import models
from distill.errors import UserError
from distill.models.finite_weights import check_finite
from distill.models.hub import OBJECTS
from distill.prepare import prepare_run
from tests.worlds import LANGUAGE, tiny, world

KEY = "teacher.model"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(_module_store):
    return world()


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.save(made.model(), made.tokenizer, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refusal(act):
    with pytest.raises(UserError) as caught:
        act()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def prepared(folder):
    return lambda: prepare_run(tiny(teacher={"config": None, "model": str(folder)}, tokenizer=None))


# ---- files


class Command:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def as_pickle(file, content):
    file.unlink()
    file.with_name("pytorch_model.bin").write_bytes(content)


def in_shards(file, index):
    file.rename(file.with_name("model-00001-of-00002.safetensors"))
    file.with_name(f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))


def zip_of(file, value):
    file.unlink()
    torch.save(value, file.with_name("pytorch_model.bin"))


WRONG_WEIGHTS = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]), f"{WEIGHTS} is damaged"),
    "half": (lambda file: os.truncate(file, file.stat().st_size // 2), f"{WEIGHTS} is damaged"),
    "empty": (lambda file: file.write_bytes(b""), f"{WEIGHTS} is damaged"),
    "zeros": (lambda file: file.write_bytes(bytes(5000)), f"{WEIGHTS} is damaged"),
    "a page": (lambda file: file.write_bytes(b"<!DOCTYPE html>" * 99), f"{WEIGHTS} is damaged"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), f"{WEIGHTS} is damaged"),
    "a pointer": (
        lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 1\n"),
        "git lfs pull",
    ),
    "none": (lambda file: file.unlink(), f"no {WEIGHTS}"),
    "code": (lambda file: as_pickle(file, pickle.dumps(Command(), 2)), "posix.mkdir"),
    "code in a zip": (lambda file: zip_of(file, {"a": Command()}), "posix.mkdir"),
    "no pickle": (lambda file: as_pickle(file, b"garbage"), "no pickle of tensors"),
    "a missing shard": (
        lambda file: in_shards(file, {"x": "model-00002-of-00002.safetensors"}),
        "model-00002-of-00002.safetensors",
    ),
    "an index without files": (lambda file: in_shards(file, ["x"]), "no weight_map"),
}


@pytest.mark.parametrize(("damage", "words"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS.keys())
def test_weights_that_cannot_be_read_are_named_before_data_are_loaded(
    damage, words, folder, monkeypatch
):
    monkeypatch.chdir(folder)
    damage(folder / WEIGHTS)
    monkeypatch.setattr("distill.data.load", None)  # not reached
    assert words in refusal(prepared(folder))
    assert not (folder / "pwned").exists()


def test_files_that_transformers_does_not_read_may_be_missing_or_damaged(folder):
    # A download of the safetensors alone has the index of the other format too.
    index = {"weight_map": {"x": "pytorch_model-00001-of-00002.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    (folder / "adapter_model.safetensors").write_bytes(b"garbage")
    models.check_weights(str(folder), KEY)
    (folder / "model-00001-of-00001.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    in_shards(folder / WEIGHTS, {"x": "model-00001-of-00001.safetensors"})
    models.check_weights(str(folder), KEY)


NO_OBJECTS = st.one_of(
    st.binary(max_size=20),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5).map(
        lambda value: json.dumps(value).encode()
    ),
)


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(OBJECTS), content=NO_OBJECTS)
def test_json_files_that_hold_no_object_are_named(name, content, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_bytes(content)
    sentence = refusal(
        lambda: (models.check_files(str(folder), KEY), models.load_tokenizer(str(folder), KEY))
    )
    assert sentence.startswith(f"{KEY} is {folder}, but ") and name in sentence


# ---- weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_first_tensor_that_is_not_finite_is_named(value, role, folder, made):
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    sentence = refusal(lambda: models.load(str(folder), None, made.task, role, made.tokenizer))
    assert sentence.startswith(f"{role}.model is {folder}, but 1 of the ")
    assert f"weights in {name} " in sentence


@settings(max_examples=30, deadline=None)
@given(
    positions=st.lists(st.integers(0, 3), max_size=3, unique=True),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_a_model_is_finite_if_all_its_weights_are(positions, value, dtype):
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 3) for _ in range(4))).to(dtype)
    with torch.no_grad():
        for position in positions:
            model[position].bias[1] = value
    if not positions:
        check_finite(model, "m", "teacher")
    else:
        sentence = refusal(lambda: check_finite(model, "m", "teacher"))
        assert f"weights in {min(positions)}.bias" in sentence


def test_largest_numbers_are_finite():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(torch.finfo(torch.float32).max)
    check_finite(model, "m", "teacher")
    check_finite(model.to("meta"), "m", "teacher")


# ---- configs

VALUES = (0, -1, None, "x", 0.5, [], {}, 3, math.nan, math.inf, -5)
CONFIGS = {
    "bert": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
    },
    "llama": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 32,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
    },
}


@pytest.fixture(scope="module")
def worlds(made):
    return {"bert": made, "llama": world(**LANGUAGE)}


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_config_gives_a_model_that_runs_or_a_sentence_that_names_its_key(data, worlds):
    family = data.draw(st.sampled_from(sorted(CONFIGS)))
    key = data.draw(st.sampled_from(sorted(CONFIGS[family])))
    config = {"model_type": family, **CONFIGS[family], key: data.draw(st.sampled_from(VALUES))}
    made = worlds[family]
    try:
        model = models.load(None, config, made.task, "student", made.tokenizer)
        models.check_runs(model, config, made.task, "student", made.tokenizer)
    except UserError as error:
        sentence = str(error)
        assert key in sentence.partition(", but ")[0] or "random model" in sentence
        assert "\n" not in sentence
        return
    ids = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    assert models.logits(model.train(), ids).isfinite().all()


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("bert", "num_attention_heads", 0),
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_hidden_layers", -1),
        ("bert", "max_position_embeddings", 0),
    ],
)
def test_what_a_constructor_or_a_forward_pass_cannot_use_is_found(family, key, value, worlds):
    config = {"model_type": family, **CONFIGS[family], key: value}
    made = worlds[family]

    def build():
        with models.without_weights():
            model = models.load(None, config, made.task, "student", made.tokenizer)
        models.check_runs(model, config, made.task, "student", made.tokenizer)

    assert key in refusal(build).partition(", but ")[0]


def test_finding_out_draws_no_random_numbers(worlds):
    config = {"model_type": "bert", **CONFIGS["bert"]}
    made = worlds["bert"]
    model = models.load(None, config, made.task, "student", made.tokenizer)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    models.check_runs(model, config, made.task, "student", made.tokenizer)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training


@pytest.mark.parametrize("family", ["deberta-v2", "bert", "llama"])
def test_the_sizes_of_a_family_s_own_config_are_accepted(family):
    default = CONFIG_MAPPING[family]().to_dict()
    sizes = {name: value for name, value in default.items() if type(value) is int}
    models.check_config_keys({**sizes, "model_type": family}, "student.config")
    sizes["max_relative_positions"] = -2
    with pytest.raises(UserError, match="max_relative_positions"):
        models.check_config_keys({**sizes, "model_type": family}, "student.config")


@pytest.mark.parametrize("kind", ["torchao", "float8"])
def test_scales_and_values_of_quantized_weights_are_read(kind):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        numbers = model[0].weight.scale
    else:
        numbers = model.to(torch.float8_e4m3fn)[0].weight.data
    check_finite(model, "m", "teacher")
    numbers[0] = math.nan
    assert "0.weight" in refusal(lambda: check_finite(model, "m", "teacher"))
