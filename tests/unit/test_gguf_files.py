"""Models in one GGUF file."""

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill import models
from distill.errors import UserError

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
LAYERS, HEADS, KEYS, WIDTH = 2, 4, 2, 64
TOKENS = ["<|end|>", *sorted(ByteLevel.alphabet()), "th"]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A random Llama, and its file."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).float().eval()
    file = tmp_path / "tiny.gguf"
    _write(model, file)
    return model, file


def _write(model, file, prefix=""):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_feed_forward_length(96)
    writer.add_context_length(64)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        heads = HEADS if "q_proj" in name else KEYS if "k_proj" in name else None
        if heads is not None:  # llama.cpp rotates neighbouring values, not halves
            halves = weight.reshape(heads, 2, -1, WIDTH)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        tensor = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(prefix + tensor, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_becomes_a_folder_with_the_same_model_and_its_tokenizer(written):
    model, file = written
    folder = models.resolve_path(str(file), "teacher.model")
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(converted(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the", add_special_tokens=False).tokens() == ["th", "e"]
    assert models.resolve_path(str(file), "teacher.model") == folder


def test_weights_that_the_file_lacks_are_not_drawn_at_random(written):
    model, file = written
    _write(model, file, prefix="unknown.")
    with pytest.raises(UserError, match="tiny.gguf, but .*lacks"):
        models.resolve_path(str(file), "teacher.model")


def test_a_damaged_file_is_one_sentence(written):
    _, file = written
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="teacher.model is .*tiny.gguf, but"):
        models.resolve_path(str(file), "teacher.model")


def test_a_package_that_is_missing_is_named(written, monkeypatch):
    _, file = written
    monkeypatch.setattr("distill.models.gguf_files.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'distill\[gguf\]'"):
        models.resolve_path(str(file), "teacher.model")
