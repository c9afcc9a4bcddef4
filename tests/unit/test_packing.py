"""Packed weights are restored bit for bit, have the computed size, and damage is detected."""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from distill import isolated, models, packing
from distill.compress import quantizer
from distill.errors import RunFailed, UserError
from distill.packing import packed
from distill.packing.file_header import sort_metadata
from distill.recipe import config
from distill.remote_code import container, modeling
from distill.remote_code.modeling import CompressionConfig
from distill.tasks import CausalLanguageModelling, MultiLabelClassification
from tests.unit import tiny_runs
from tests.unit.tiny_runs import classifier, made, quantized

SPECS = [
    *(
        quantizer.QuantSpec("linear", bits, symmetric, group)
        for bits, symmetric, group in product(range(2, 9), (True, False), (-1, 0, 7))
    ),
    *(quantizer.QuantSpec("codebook", bits, group=-1) for bits in (2, 3, 4)),
    quantizer.QuantSpec("nf4", 4, group=7),
]
# what a removed neuron or head, a factorised layer, rounded inputs leave in the record
RESHAPED = {
    "shapes": {
        "shapes": {
            "distilbert.transformer.layer.0.ffn.lin1": [16, 20],
            "distilbert.transformer.layer.0.ffn.lin2": [20, 16],
        }
    },
    "low_rank": {"low_rank": {"distilbert.transformer.layer.0.ffn.lin1": 3, "pre_classifier": 2}},
    "dynamic": {
        "activations": {"distilbert.transformer.layer.0.ffn.lin2": {"bits": 8, "range": None}}
    },
    "static": {
        "activations": {
            "distilbert.transformer.layer.0.ffn.lin2": {"bits": 8, "range": [-1.5, 2.5]}
        }
    },
}


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)


def spread(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def name_of(spec):
    return f"{spec.method}-{spec.bits}-{'sym' if spec.symmetric else 'aff'}-{spec.group}"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1003])
def test_codes_take_their_bits_and_no_more(bits, count):
    codes_N = torch.randint(
        0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    stored = container.pack_bits(codes_N, bits)
    assert len(stored) == math.ceil(count * bits / 8)
    assert torch.equal(container.unpack_bits(stored, bits, count), codes_N)
    number = int.from_bytes(
        bytes(stored.tolist()), "little"
    )  # the documented order, in other words
    assert [
        (number >> (place * bits)) & (2**bits - 1) for place in range(count)
    ] == codes_N.tolist()


@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_quantized_weights_come_back_bit_for_bit(spec, turned, sparse):
    weight_OI = spread(13, 21)
    if sparse:
        weight_OI[torch.rand(13, 21, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
    weight_OI = quantizer.fake_quantize_weight(weight_OI, spec, sparse)
    weight = weight_OI.T.contiguous() if turned else weight_OI
    record = {"weights": {"w": spec.as_dict()}, "sparse": ["w"] if sparse else []}
    tensors, metadata = packed.pack(
        {"w": weight},
        CompressionConfig.from_json(record),
        {"w"} if turned else set(),
        torch.float32,
    )
    assert torch.equal(container.unpack(tensors, metadata)["w"], weight)
    stored = packed.pack_tensor(weight_OI, spec.as_dict(), sparse, torch.float32)
    groups = {-1: 1, 0: 13}.get(spec.group, 13 * 21 // max(spec.group, 1))
    kept, mask = (
        (int((weight != 0).sum()), math.ceil(13 * 21 / 8)) if "mask" in stored else (13 * 21, 0)
    )
    grid = {
        "linear": 2 * groups + (0 if spec.symmetric else groups),
        "nf4": 2 * groups,
        "codebook": 2 * 2**spec.bits,
    }[spec.method]
    assert size(stored) == math.ceil(kept * spec.bits / 8) + mask + grid
    assert size(tensors) <= size(stored)
    assert ("mask" in stored) == (
        sparse and (spec.method == "codebook" or kept * spec.bits + 13 * 21 < 13 * 21 * spec.bits)
    )


def size(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_pruned_weights_are_stored_without_their_zeros(dtype, share):
    weight = spread(33, 17).to(dtype)
    weight.flatten()[: round(share * weight.numel())] = 0
    tensors, metadata = packed.pack({"w": weight}, CompressionConfig(sparse=["w"]), set(), dtype)
    assert torch.equal(container.unpack(tensors, metadata)["w"], weight)
    stored = packed.pack_tensor(weight, None, True, dtype)
    kept, mask = int((weight != 0).sum()) * weight.element_size(), math.ceil(weight.numel() / 8)
    assert (weight.nbytes if stored is None else size(stored)) == min(kept + mask, weight.nbytes)
    assert size(tensors) <= min(kept + mask, weight.nbytes)


def test_bytes_are_deflated_only_where_that_makes_them_fewer():
    part = torch.zeros(1000, dtype=torch.uint8)
    assert len(container.deflate(part)) < 30
    assert torch.equal(container.inflate(container.deflate(part)), part)
    noise = torch.randint(
        0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert packed.deflated({"codes": noise, "mask": part}).keys() == {"mask"}


def test_other_tensors_are_stored_as_they_are():
    weights = {
        "bias": spread(5),
        "scalar": torch.tensor(2.5),
        "ids": torch.arange(7),
        "empty": torch.zeros(0, 3),
        "void": torch.zeros(0, 3),
    }
    tensors, metadata = packed.pack(weights, CompressionConfig(), set(), torch.float32)
    unpacked = container.unpack(tensors, metadata)
    assert unpacked.keys() == weights.keys()
    assert all(
        torch.equal(unpacked[name], weight) and unpacked[name].dtype == weight.dtype
        for name, weight in weights.items()
    )


def test_tied_tensors_are_stored_once_whichever_name_is_in_the_record():
    spec = quantizer.QuantSpec(bits=4)
    weight = quantizer.fake_quantize_weight(spread(8, 6), spec)
    for name in ("embedding", "head"):
        tensors, _ = packed.pack(
            {"embedding": weight, "head": weight},
            CompressionConfig(weights={name: spec.as_dict()}),
            set(),
            torch.float32,
        )
        assert set(tensors) == {"embedding:codes", "embedding:scale"}


def test_weights_that_are_on_no_grid_are_refused():
    record = {"weights": {"w": quantizer.QuantSpec(bits=4).as_dict()}}
    with pytest.raises(
        RunFailed, match=r"^w unpacks to weights that differ by up to 0\.\d+, but"
    ) as error:
        packed.pack({"w": spread(8, 6)}, CompressionConfig.from_json(record), set(), torch.float32)
    assert "\n" not in str(error.value)


def shipped(tmp_path, ready, **settings):
    """The folder that ships, and the student in this process."""
    run, *rest = ready
    target = tmp_path / "shipped"
    target.mkdir()
    spec = tiny_runs.spec_of((replace(run, export=config.Export(**settings)), *rest))
    packing.write_artefact(spec, rest[-1] / "student", target)
    return target


def answers(model, tokenizer):
    inputs = tokenizer(tiny_runs.TEXTS[:3], return_tensors="pt", padding=True)
    with torch.inference_mode():
        return models.logits(model, dict(inputs))


def plainly(folder, task, **options):
    """With transformers alone, and nothing amiss."""
    options |= (
        {"trust_remote_code": True}
        if "auto_map" in json.loads((folder / "config.json").read_text())
        else {}
    )
    auto = getattr(transformers, task.auto_class)
    model, info = auto.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not any(info.values()), info
    return model.eval()


KINDS = {
    "distilbert": classifier("no", "perhaps", "yes"),
    "bert": classifier("a", "b", kind=MultiLabelClassification),
}
KINDS |= {"gpt2": CausalLanguageModelling(max_length=16)}


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize(
    "spec",
    [
        quantizer.QuantSpec(bits=8),
        quantizer.QuantSpec(bits=3, symmetric=False, group=8),
        quantizer.QuantSpec("codebook", 4, group=-1),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("sparse", [0.0, 0.5])
def test_a_packed_student_is_the_same_student(tmp_path, in_process, model_type, spec, sparse):
    ready = made(tmp_path, KINDS[model_type], model_type)
    _, task, _, tokenizer, folder = ready
    student = quantized(folder, task, tokenizer, sparse=sparse, **spec.as_dict())
    target = shipped(tmp_path, ready, format="packed")
    expected = student.state_dict()
    for loaded in (
        plainly(target, task),
        models.load(str(target), None, task, "student", tokenizer, strict=True),
    ):
        assert type(loaded).__name__ == type(student).__name__
        assert loaded.state_dict().keys() == expected.keys()
        assert all(
            torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items()
        )
        assert torch.equal(answers(loaded, tokenizer), answers(student.eval(), tokenizer))


def test_a_packed_folder_runs_in_the_type_that_is_asked_for(tmp_path, in_process):
    ready = made(tmp_path, KINDS["distilbert"], "distilbert")
    quantized(ready[4], ready[1], ready[3], bits=4)
    target = shipped(tmp_path, ready, format="packed", dtype="bfloat16")
    assert plainly(target, ready[1]).dtype == torch.float32
    assert plainly(target, ready[1], dtype=torch.bfloat16).dtype == torch.bfloat16
    stored = load_file(target / container.FILE)
    assert stored["classifier.bias"].dtype == torch.bfloat16


def test_an_unpacked_student_is_saved_as_an_ordinary_one(tmp_path, in_process):
    ready = made(tmp_path, KINDS["distilbert"], "distilbert")
    student = quantized(ready[4], ready[1], ready[3], bits=4).eval()
    plainly(shipped(tmp_path, ready, format="packed"), ready[1]).save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    assert torch.equal(answers(again, ready[3]), answers(student, ready[3]))


def test_a_language_model_keeps_how_it_generates(tmp_path, in_process):
    ready = made(tmp_path, KINDS["gpt2"], "gpt2")
    _, task, _, tokenizer, folder = ready
    student = quantized(folder, task, tokenizer, bits=8)
    student.generation_config.repetition_penalty = 1.5
    models.save(student, tokenizer, folder / "student")
    loaded = plainly(shipped(tmp_path, ready, format="packed"), task)
    assert loaded.generation_config.repetition_penalty == 1.5
    inputs = tokenizer(["a cat"], return_tensors="pt")
    ids = [
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
        for model in (loaded, student.eval())
    ]
    assert torch.equal(*ids)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.parametrize("form", RESHAPED)
@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_student_of_another_form_loads_with_the_code_beside_it(
    tmp_path, in_process, form, format
):
    ready = made(tmp_path, KINDS["distilbert"], "distilbert")
    student = reshaped(ready, RESHAPED[form])
    folder, task, tokenizer = ready[4] / "student", ready[1], ready[3]
    target = shipped(tmp_path, ready, format=format)
    for each in (folder, target):
        settings = json.loads((each / "config.json").read_text())
        assert settings["auto_map"] == {
            "AutoModelForSequenceClassification": "container.CompressedModel"
        }
        assert settings["architectures"] == ["DistilBertForSequenceClassification"]
        for loaded in (
            plainly(each, task),
            models.load(str(each), None, task, "student", tokenizer, strict=True),
        ):
            assert torch.equal(answers(loaded, tokenizer), answers(student, tokenizer))
    serve = transformers.pipeline(task.pipeline, model=str(target), trust_remote_code=True)
    assert serve("a cat")[0]["label"] in task.names


def reshaped(ready, record):
    """The student of a run folder in another form, with weights of its own."""
    _, task, _, tokenizer, folder = ready
    student = models.load(str(folder / "student"), None, task, "student", tokenizer, strict=True)
    modeling.build_compressed_layers(student, CompressionConfig.from_json(record))
    torch.manual_seed(1)
    for module in student.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias) if module.bias is not None else None
    student.config.compression = record
    models.save(student, tokenizer, folder / "student")
    return student


def test_a_student_of_another_form_does_not_load_as_a_plain_one(tmp_path):
    ready = made(tmp_path, KINDS["distilbert"], "distilbert")
    reshaped(ready, RESHAPED["shapes"])
    with pytest.raises((RuntimeError, ValueError)):
        transformers.AutoModelForSequenceClassification.from_pretrained(
            ready[4] / "student", trust_remote_code=False
        )


def test_a_compressed_student_of_another_task_is_refused(tmp_path):
    ready = made(tmp_path, KINDS["bert"])
    quantized(ready[4], ready[1], ready[3], bits=4)
    target = shipped(tmp_path, ready, format="packed")
    with pytest.raises(
        UserError,
        match="it is compressed as a BertForSequenceClassification, and the task needs a "
        "BertLMHeadModel",
    ):
        models.load(str(target), None, KINDS["gpt2"], "student", strict=True)


@pytest.mark.parametrize("spec", [None, {"bits": 4}])
def test_a_plain_student_stays_plain(tmp_path, spec):
    ready = made(tmp_path, KINDS["bert"])
    if spec:
        quantized(ready[4], ready[1], ready[3], sparse=0.5, **spec)
    target = shipped(tmp_path, ready, format="dense")
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "auto_map" not in json.loads((target / "config.json").read_text())


def test_weights_in_half_the_bits_are_no_longer_called_quantized(tmp_path):
    ready = made(tmp_path, KINDS["bert"])
    quantized(ready[4], ready[1], ready[3], sparse=0.5, bits=8)
    compression = json.loads(
        (shipped(tmp_path, ready, dtype="bfloat16") / "config.json").read_text()
    )["compression"]
    assert "weights" not in compression
    assert "sparse" in compression


@pytest.mark.parametrize(("form", "code"), [(None, False), ("low_rank", True)])
def test_to_dense_gives_a_folder_of_ordinary_weights(tmp_path, in_process, form, code):
    ready = made(tmp_path, KINDS["distilbert"], "distilbert")
    student = (
        reshaped(ready, RESHAPED[form]) if form else quantized(ready[4], ready[1], ready[3], bits=4)
    )
    target = shipped(tmp_path, ready, format="packed")
    dense = packed.to_dense(target, tmp_path / "dense")
    assert (dense / "model.safetensors").is_file()
    assert not (dense / container.FILE).exists()
    assert ("auto_map" in json.loads((dense / "config.json").read_text())) == code
    assert torch.equal(
        answers(plainly(dense, ready[1]), ready[3]), answers(student.eval(), ready[3])
    )


def test_to_dense_refuses_what_is_not_there_and_what_is(tmp_path):
    with pytest.raises(UserError, match=r"there is no packed\.safetensors in it"):
        packed.to_dense(tmp_path, tmp_path / "dense")
    (tmp_path / container.FILE).touch()
    with pytest.raises(UserError, match="that exists"):
        packed.to_dense(tmp_path, tmp_path)


def changed_code(tensors, metadata):
    name = next(name for name in tensors if name.endswith(":codes"))
    tensors[name][0] ^= 1


def changed_spec(tensors, metadata):
    metadata["packed"] = metadata["packed"].replace('"bits": 4', '"bits": 5')


def no_scale(tensors, metadata):
    del tensors[next(name for name in tensors if name.endswith(":scale"))]


def newer(tensors, metadata):
    metadata["version"] = "2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_code, "is damaged, its bytes are not those that were written"),
        (changed_spec, "is damaged"),
        (no_scale, "is damaged"),
        (newer, "has the layout 2, but this code reads 1"),
        (lambda tensors, metadata: metadata.clear(), "has the layout None"),
    ],
    ids=["code", "bits", "no scale", "newer", "no metadata"],
)
def test_a_changed_container_is_refused(tmp_path, change, message):
    _, task, _, tokenizer, _ = ready = made(tmp_path, KINDS["distilbert"], "distilbert")
    quantized(ready[4], task, tokenizer, bits=4)
    target = shipped(tmp_path, ready, format="packed")
    with container.safe_open(target / container.FILE, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(target / container.FILE)
    change(tensors, metadata)
    save_file(tensors, target / container.FILE, metadata)
    with pytest.raises(UserError, match=message) as error:
        models.load(str(target), None, task, "student", tokenizer, strict=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("left", [0, 9, 5000])
def test_a_truncated_container_is_refused(tmp_path, left):
    _, task, _, tokenizer, _ = ready = made(tmp_path, KINDS["distilbert"], "distilbert")
    quantized(ready[4], task, tokenizer, bits=4)
    file = shipped(tmp_path, ready, format="packed") / container.FILE
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match="damaged") as error:
        models.load(str(file.parent), None, task, "student", tokenizer, strict=True)
    assert "\n" not in str(error.value)


def test_a_container_without_a_tensor_of_the_model_is_refused(tmp_path):
    _, task, _, tokenizer, _ = ready = made(tmp_path, KINDS["distilbert"], "distilbert")
    quantized(ready[4], task, tokenizer, bits=4)
    file = shipped(tmp_path, ready, format="packed") / container.FILE
    weights = {name: tensor for name, tensor in container.read(file).items() if "lin1" not in name}
    save_file(
        *packed.pack(weights, CompressionConfig(), set(), torch.float32)[:1],
        file,
        packed.pack(weights, CompressionConfig(), set(), torch.float32)[1],
    )
    with pytest.raises(UserError, match=r"ffn\.lin1\.\w+, one of 2 missing tensors"):
        models.load(str(file.parent), None, task, "student", tokenizer, strict=True)


def test_the_order_of_metadata_is_that_of_their_names(tmp_path):
    tensors = {"w": torch.arange(6.0), "ü": torch.ones(2, 3)}
    metadata = {
        name: json.dumps({"é": [name]}) for name in ("packed", "digest", "version", "format")
    }
    contents = set()
    for number in range(8):  # the library draws an order for each file
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, file, metadata)
        sort_metadata(file)
        contents.add(file.read_bytes())
        with safe_open(file, "pt") as stored:
            assert stored.metadata() == metadata
            assert all(stored.get_tensor(name).equal(tensors[name]) for name in tensors)
    assert len(contents) == 1
