"""What belongs to a model travels with it, through layers, training tools and every format."""

import copy
import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from distill import models, packing, student
from distill.compress import tokenizer_trim
from distill.models.generation_settings import stop_tokens
from distill.packing import ExportSpec
from distill.recipe import config
from tests.worlds import LLAMA, world

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
SAMPLING = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
}
FORMATS = [
    {"format": "dense"},
    {"format": "dense", "dtype": "bfloat16"},
    {"format": "packed"},
    {"format": "packed", "quantize": "weights", "bits": 4},
    {"format": "torchao", "quantize": "weights"},
    {"format": "onnx"},
    {"format": "openvino"},
    {"format": "executorch"},
]


@pytest.fixture(scope="module")
def made(_module_store):
    """A language model with settings of its own, as those of the Hub have them."""
    made = world(**LLAMA)
    tokenizer = made.tokenizer
    tokenizer.add_tokens(["<user>", "<tool>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side, tokenizer.model_max_length = "left", 777
    return made


@pytest.fixture(scope="module")
def teacher(made):
    teacher = made.model(vocab_size=len(made.tokenizer))
    stops = [made.tokenizer.eos_token_id, made.tokenizer.convert_tokens_to_ids("<user>")]
    teacher.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=0, **SAMPLING)
    return teacher


@pytest.fixture(scope="module")
def trained(made, teacher, tmp_path_factory):
    """The folder of a student of two of its layers, whose tokenizer has encoded the data."""
    folder = tmp_path_factory.mktemp("run") / "student"
    built, _ = student.build_student(config.Student(layers=[0, 2]), made.prepared, teacher)
    made.tokenizer(["some text"], truncation=True, max_length=3, padding="max_length")
    models.save(built, made.tokenizer, folder)
    return folder


def check_settings(folder, made, teacher):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert {"<user>", "<tool>"} <= {*tokenizer.all_special_tokens} | {*tokenizer.get_added_vocab()}
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 777)
    settings = GenerationConfig.from_pretrained(folder).to_dict()
    expected = teacher.generation_config.to_dict()
    assert {key: settings[key] for key in (*SAMPLING, "eos_token_id", "pad_token_id")} == {
        key: expected[key] for key in (*SAMPLING, "eos_token_id", "pad_token_id")
    }


def test_a_student_of_layers_has_the_settings_of_its_teacher(made, teacher, trained):
    check_settings(trained, made, teacher)
    saved = json.loads((trained / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None


@pytest.mark.parametrize(
    "settings", FORMATS, ids=lambda settings: "-".join(map(str, settings.values()))
)
def test_every_format_holds_the_settings(made, teacher, trained, settings, tmp_path):
    format = settings["format"]
    if format != "dense" and format != "packed":
        pytest.importorskip("onnx" if format == "openvino" else format)
        pytest.importorskip(format)
    spec = ExportSpec(
        config.Export(**settings),
        made.run.data,
        made.task,
        models.load_tokenizer(str(trained)),
        made.raw["train"],
    )
    packing.write_artefact(spec, trained, tmp_path)
    check_settings(tmp_path, made, teacher)
    content = json.loads((tmp_path / "config.json").read_text())
    if "stop_token_ids" in content:
        assert content["stop_token_ids"] == teacher.generation_config.eos_token_id


def test_a_student_from_a_config_has_the_settings_of_its_teacher(made, teacher, tmp_path):
    spec = config.Student(config=made.run.teacher.config | {"num_hidden_layers": 1})
    built, _ = student.build_student(spec, made.prepared, teacher)
    models.save(built, made.tokenizer, tmp_path)
    check_settings(tmp_path, made, teacher)


def test_a_teacher_without_settings_of_its_own_gives_none(made):
    spec = config.Student(config=made.run.teacher.config | {"num_hidden_layers": 1})
    built, _ = student.build_student(spec, made.prepared, made.model())
    assert built.generation_config.to_dict()["_from_model_config"]


def test_models_that_differ_in_their_settings_only_are_stored_apart(made, teacher):
    other = copy.deepcopy(teacher)
    other.generation_config.eos_token_id = [3]
    assert models.fingerprint(other) == models.fingerprint(teacher)
    assert models.generation_identity(other) != models.generation_identity(teacher)
    assert models.generation_identity(made.model()) == {}


def test_settings_of_sampling_that_a_config_turns_off_are_kept(made, teacher, tmp_path):
    """Published configs have a temperature without sampling; they are saved as they were loaded."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    odd = made.model(vocab_size=len(made.tokenizer))
    odd.generation_config = GenerationConfig.from_pretrained(tmp_path)
    built, _ = student.build_student(config.Student(layers=[1]), made.prepared, odd)
    models.save(built, made.tokenizer, tmp_path / "student")
    saved = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6


# ---- ids


def test_trimming_renumbers_all_ids_of_the_generation_config(made, teacher):
    model = made.model(vocab_size=len(made.tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=[1, 9],
        bos_token_id=5,
        pad_token_id=0,
        forced_bos_token_id=7,
        suppress_tokens=[2, 9],
        bad_words_ids=[[5, 9], [3]],
        top_k=5,
    )
    tokenizer_trim.trim_embeddings(model, [0, 1, 5, 9])
    settings = model.generation_config
    assert settings.eos_token_id == [1, 3]
    assert (settings.bos_token_id, settings.pad_token_id) == (2, 0)
    assert settings.forced_bos_token_id is None
    assert settings.suppress_tokens == [3]
    assert settings.bad_words_ids[0] == [2, 3]
    assert settings.top_k == 5


@pytest.mark.parametrize(("eos", "stops"), [(4, [4]), ([4, 7], [4, 7]), (None, [1])])
def test_generation_stops_at_all_tokens_of_the_model_or_at_that_of_the_tokenizer(made, eos, stops):
    model = made.model(vocab_size=len(made.tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=eos)
    assert made.tokenizer.eos_token_id == 1
    assert stop_tokens(model, made.tokenizer) == stops


# ---- tokenizers and labels


def test_a_tokenizer_is_saved_as_it_was_loaded(made, tmp_path):
    made.tokenizer.save_pretrained(tmp_path / "plain")
    for name, truncation in (("plain", None), ("truncating", 5)):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation() if truncation is None else backend.enable_truncation(truncation)
        tokenizer.save_pretrained(tmp_path / name)
        loaded = models.load_tokenizer(str(tmp_path / name))
        loaded(["a long text of words"], truncation=True, max_length=2, padding="max_length")
        models.save_tokenizer(loaded, tmp_path / "again")
        before, after = (
            json.loads((tmp_path / folder / "tokenizer.json").read_text())
            for folder in (name, "again")
        )
        assert before == after


@pytest.mark.parametrize("settings", FORMATS[:5:2], ids=lambda settings: settings["format"])
def test_classifiers_keep_names_of_labels_and_the_length_of_training(settings, tmp_path):
    made = world()
    if settings["format"] == "torchao":
        pytest.importorskip("torchao")
    model = made.model()
    models.set_labels(model, made.task)
    models.save(model, made.tokenizer, tmp_path / "student")
    spec = ExportSpec(
        config.Export(**settings), made.run.data, made.task, made.tokenizer, made.raw["train"]
    )
    packing.write_artefact(spec, tmp_path / "student", tmp_path / "export")
    content = json.loads((tmp_path / "export" / "config.json").read_text())
    assert tuple(content["id2label"].values()) == made.task.names
    assert AutoTokenizer.from_pretrained(tmp_path / "export").model_max_length == 24
