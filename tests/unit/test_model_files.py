"""What a name leads to, told from the files of its folder."""

import json

import pytest
from transformers import BertConfig, DebertaV2Config, ViTConfig

from distill import models
from distill.errors import UserError
from distill.models.hub import first_sentences
from distill.tasks import SingleLabelClassification

KEY = "teacher.model"


def folder(root, **files):
    """A folder with JSON files; `__` in a name stands for a folder."""
    for name, content in files.items():
        file = root / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return root


def refusal(path):
    with pytest.raises(UserError) as caught:
        models.check_files(str(path), KEY)
    sentence = str(caught.value)
    assert sentence.startswith(f"{KEY} is {path}, but ")
    assert "\n" not in sentence
    return sentence.partition(", but ")[2]


BERT = {"model_type": "bert"}


def test_the_config_of_a_model_is_returned(tmp_path):
    assert models.check_files(str(folder(tmp_path, config=BERT)), KEY) == BERT


@pytest.mark.parametrize("beside", [{}, {"config": BERT}])
def test_an_adapter_is_named_with_its_base(tmp_path, beside):
    adapter = {"peft_type": "LOHA", "base_model_name_or_path": "org/base", "r": 4}
    sentence = refusal(folder(tmp_path, adapter_config=adapter, **beside))
    assert "LOHA" in sentence and "name org/base" in sentence and "merge_and_unload" in sentence


def test_of_several_checkpoints_the_last_is_offered(tmp_path):
    root = folder(
        tmp_path, **{f"checkpoint-{step}__config": BERT for step in (20, 100, 3)}, trainer_state={}
    )
    for step in (20, 100, 3):
        (root / f"checkpoint-{step}" / "model.safetensors").touch()
    assert f"name {root}/checkpoint-100" in refusal(root)


def test_the_part_of_an_embedder_that_is_a_model_is_offered(tmp_path):
    root = folder(tmp_path, modules=[], **{"0_Transformer__config": BERT, "1_Pooling__x": {}})
    assert f"name {root}/0_Transformer" in refusal(root)


@pytest.mark.parametrize("depth", ["model__", "output__model__"])
def test_a_model_further_down_is_offered(tmp_path, depth):
    root = folder(tmp_path, **{f"{depth}config": BERT})
    assert f"name {root}/{depth.rstrip('_').replace('__', '/')}" in refusal(root)


def test_weights_without_a_config_are_named(tmp_path):
    (tmp_path / "model-q4.gguf").touch()
    assert "model-q4.gguf" in refusal(tmp_path)


@pytest.mark.parametrize("path", ["modeling_own.Own", "org/code--modeling_own.Own"])
def test_an_architecture_of_its_own_code_is_named_with_the_code(tmp_path, path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": path}}
    sentence = refusal(folder(tmp_path, config=config))
    assert "own" in sentence and "(modeling_own.Own)" in sentence


def test_code_beside_a_known_architecture_is_not_needed(tmp_path):
    config = BERT | {"auto_map": {"AutoConfig": "modeling_own.Own"}}
    assert models.check_files(str(folder(tmp_path, config=config)), KEY) == config


def test_an_architecture_that_is_newer_is_named(tmp_path):
    sentence = refusal(folder(tmp_path, config={"model_type": "roberto"}))
    assert "model_type is roberto" in sentence and "did you mean roberta?" in sentence
    assert "mean" not in refusal(folder(tmp_path, config={"model_type": "zzz9"}))


def test_a_config_without_a_type_is_named(tmp_path):
    assert "no model_type" in refusal(folder(tmp_path, config={"hidden_size": 3}))


def test_a_model_without_the_head_is_refused_in_one_sentence(tmp_path):
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    task = SingleLabelClassification()
    task.names = ("a", "b")
    with pytest.raises(UserError, match=r"AutoModelForSequenceClassification of a vit: "):
        models.load(str(tmp_path), None, task)


# ---- keys of configs


def test_keys_that_only_the_code_of_a_family_reads_are_accepted():
    assert "norm_rel_ebd" not in DebertaV2Config().to_dict()
    config = {"norm_rel_ebd": "layer_norm", "position_buckets": 8, "share_att_key": True}
    models.check_config_keys({"model_type": "deberta-v2"} | config, "student.config")
    with pytest.raises(UserError, match="norm_rel_ebd"):
        models.check_config_keys({"model_type": "bert", "norm_rel_ebd": "x"}, "student.config")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("hiden_size", "hidden_size"), ("layers", "num_hidden_layers"), ("heads", "attention_heads")],
)
def test_suggestions_are_by_closeness(key, nearest):
    with pytest.raises(UserError) as caught:
        models.check_config_keys({"model_type": "bert", key: 3}, "student.config")
    suggestions = str(caught.value).partition("did you mean ")[2]
    assert nearest in suggestions
    assert suggestions.count(", ") == 2
    alphabetic = sorted(BertConfig().to_dict())[:3]
    assert not all(name in suggestions for name in alphabetic)


# ---- sentences of libraries

MESSAGE = "The repository x has code.  You can see it at\n/tmp/a.b/c . Set version=1.5! It is " + (
    "long " * 80
)


@pytest.mark.parametrize("length", [30, 60, 90, 300, 1000])
def test_a_message_ends_where_a_sentence_or_a_word_does(length):
    shown, full = first_sentences(MESSAGE, length), " ".join(MESSAGE.split())
    assert len(shown) <= max(length, len("The repository x has code"))
    assert full.startswith(shown.removesuffix(" ..."))
    rest = full.removeprefix(shown.removesuffix(" ..."))
    assert rest[:1] in ("", ".", "!", " ")


def test_a_long_sentence_ends_at_a_word():
    assert first_sentences("word " * 100, 22) == "word word word ..."
