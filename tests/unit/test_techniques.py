"""What all compression techniques have in common: same state on all ranks, what they declare."""

import re
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from distill import callbacks
from distill.callbacks import Compression, Factorize, PruneWeights, Quantize, TrimVocabulary
from distill.compress.quantizable import activation_layers, default_layers
from distill.errors import RunFailed
from distill.processes import ranks
from distill.recipe import targets
from distill.recipe.capabilities import QuantizedLayers
from distill.remote_code.modeling import CompressionConfig, factorize
from tests.processes import on_ranks

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


class MasksOfRank(Compression):
    """Its masks are those of a given number of ranks."""

    stage = "sparsity"

    def __init__(self, different):
        super().__init__(0, 0, "one_shot", 1)
        self.different = different

    def prepare(self, module):
        pass

    def change(self, module, amount):
        pass

    def rank_synced_state(self):
        return {"mask": torch.tensor([True, ranks.rank() < self.different])}


def failures(folder):
    trainer = SimpleNamespace(global_step=0, max_steps=10)
    MasksOfRank(different=0).on_train_start(trainer, None)
    with pytest.raises(RunFailed) as error:
        MasksOfRank(different=1).on_train_start(trainer, None)
    return str(error.value)


def test_masks_that_differ_between_ranks_end_the_run(tmp_path):
    for message in on_ranks(failures, tmp_path, world=2):
        assert message.startswith("MasksOfRank has 2 different states on 2 ranks, but")


class MyQuantize(Quantize):
    """A technique of a user."""


def test_a_technique_declares_what_it_quantizes():
    technique = MyQuantize(bits=4, group="row", activations="static", layers=["*.dense"])
    technique.name = "mine"
    assert technique.quantization() == QuantizedLayers(
        "callbacks.mine", "linear", 4, False, 0, "static", restricted=True
    )
    assert Quantize().quantization().symmetric and not Quantize().quantization().restricted
    for other in (PruneWeights(sparsity=0.5), Factorize(rank=4), TrimVocabulary()):
        assert other.quantization() is None


def test_a_compression_config_is_stored_as_its_fields_that_are_not_empty():
    compression = CompressionConfig(
        shapes={"a": [2, 3]}, activations={"b": None, "c": [-1.0, 2.0]}, vocabulary=7
    )
    config = BertConfig()
    assert CompressionConfig.from_config(config) == CompressionConfig()
    compression.write_to(config)
    assert config.compression == {
        "shapes": {"a": [2, 3]},
        "activations": {"b": {"bits": 8, "range": None}, "c": {"bits": 8, "range": [-1.0, 2.0]}},
        "vocabulary": 7,
    }
    assert CompressionConfig.from_config(config) == compression
    assert CompressionConfig.from_json(config.compression | {"unknown": 1}) == compression


def test_reading_a_compression_config_does_not_share_its_containers():
    config = BertConfig(compression={"low_rank": {"a": 1}, "sparse": ["b"]})
    compression = CompressionConfig.from_config(config)
    compression.low_rank["c"] = 2
    compression.sparse.append("d")
    assert config.compression == {"low_rank": {"a": 1}, "sparse": ["b"]}


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_output_layer_is_quantized_as_embeddings_only(tied):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    layers = default_layers(model)
    assert ("lm_head" in layers) != tied
    assert "model.embed_tokens" in layers
    assert ("lm_head" in activation_layers(model, layers | {"lm_head": model.lm_head})) != tied


def test_the_factors_of_a_pooler_are_quantized_by_default():
    student = BertForSequenceClassification(BertConfig(**SIZES))
    before = default_layers(student)
    factorize(student, "bert.pooler.dense", 2)
    pooler = {f"bert.pooler.dense.{part}" for part in ("first", "second")}
    assert default_layers(student).keys() == before.keys() - {"bert.pooler.dense"} | pooler


README = Path(callbacks.__file__).with_name("README.md").read_text()


@pytest.mark.parametrize("name", sorted(set(callbacks.__all__) - {"Compression"}))
def test_the_readme_has_all_arguments_of_a_technique(name):
    for argument in signature(getattr(callbacks, name)).parameters:
        assert re.search(rf"^\|.*`{argument}`", README, re.MULTILINE), argument


def test_the_recipe_in_the_readme_is_accepted():
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    for name, spec in recipe["callbacks"].items():
        targets.check_target(f"callbacks.{name}", spec)
