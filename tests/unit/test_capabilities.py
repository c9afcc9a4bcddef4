"""What each export format supports: the table, and what is refused before there is a student."""

import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest

import distill
from distill.callbacks import Quantize
from distill.errors import UserError
from distill.recipe import capabilities, config
from distill.recipe.capabilities import QuantizedLayers
from distill.training import build_callbacks


def quantizer(**arguments):
    return [QuantizedLayers("callbacks.q", **arguments)]


def check(techniques, format, dtype="float32", quantize=None, bits=8):
    capabilities.check_export(format, dtype, quantize, bits)
    capabilities.check_techniques(format, quantize, techniques)


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(capabilities, "installed_version", lambda package: "9999.1")


@pytest.mark.parametrize(
    ("techniques", "settings", "refused"),
    [
        ([], {"format": "torchao"}, "export.format is torchao, but nothing is quantized"),
        (quantizer(bits=4), {"format": "torchao"}, "callbacks.q.bits is 4"),
        (quantizer(method="codebook"), {"format": "torchao"}, "callbacks.q.method is codebook"),
        (quantizer(activations="static"), {"format": "torchao"}, "q.activations is static"),
        ([], {"format": "torchao", "quantize": "static"}, "export.quantize is static"),
        ([], {"format": "torchao", "quantize": "weights", "bits": 5}, "export.bits is 5"),
        (quantizer(), {"format": "torchao", "dtype": "bfloat16"}, "export.dtype is bfloat16"),
        (
            quantizer(),
            {"format": "packed", "quantize": "weights"},
            "quantize is weights.*callbacks.q ",
        ),
        ([], {"format": "packed", "quantize": "int8"}, "export.quantize is int8"),
        ([], {"format": "packed", "bits": 4}, "export.bits is 4"),
        ([], {"format": "onnx", "dtype": "bfloat16"}, "export.dtype is bfloat16"),
        ([], {"format": "openvino", "dtype": "float16"}, "export.dtype is float16.*bfloat16"),
        ([], {"format": "openvino", "quantize": "dynamic"}, "export.quantize is dynamic.*static"),
        ([], {"format": "onnx", "quantize": "static", "bits": 4}, "export.bits is 4"),
        ([], {"format": "executorch", "quantize": "int8", "bits": 4}, "export.bits is 4"),
        (quantizer(bits=3, method="codebook"), {"format": "onnx"}, "q.method is codebook"),
        (quantizer(method="nf4", restricted=True), {"format": "onnx"}, "q.method is nf4"),
        (quantizer(bits=4), {"format": "onnx"}, "callbacks.q.bits is 4.*onnxruntime.*8-bit"),
        (quantizer(symmetric=False), {"format": "onnx"}, "callbacks.q.symmetric is false"),
        (
            quantizer(group=64),
            {"format": "openvino", "quantize": "int8"},
            "callbacks.q.group is 64",
        ),
        (
            quantizer(symmetric=False, activations="dynamic"),
            {"format": "executorch"},
            "callbacks.q.symmetric is false",
        ),
        (
            quantizer(activations="static"),
            {"format": "executorch", "quantize": "int8"},
            "callbacks.q.activations is static",
        ),
    ],
)
def test_what_a_format_does_not_support_is_refused(all_installed, techniques, settings, refused):
    with pytest.raises(UserError, match=rf"^[\w.]*{refused}.*: "):
        check(techniques, **settings)


@pytest.mark.parametrize(
    ("techniques", "settings"),
    [
        (quantizer(activations="dynamic"), {"format": "torchao"}),
        (quantizer(bits=3, method="codebook"), {"format": "packed"}),
        ([], {"format": "torchao", "quantize": "dynamic"}),
        ([], {"format": "dense"}),
        ([], {"format": None}),
        (quantizer(activations="static"), {"format": "onnx", "quantize": "static"}),
        (quantizer(bits=4, restricted=True), {"format": "onnx"}),
        (quantizer(symmetric=False, restricted=True), {"format": "onnx"}),
        # ExecuTorch stores a linear layer in floats unless its inputs are quantized per token
        (quantizer(symmetric=False, group=64, activations="static"), {"format": "executorch"}),
        (quantizer(bits=4), {"format": "executorch"}),
    ],
)
def test_what_a_format_supports_is_not_refused(all_installed, techniques, settings):
    check(techniques, **settings)


def test_int8_stands_for_a_mode_of_each_runtime():
    modes = {name: capabilities.resolve_quantize(name, "int8") for name in capabilities.RUNTIMES}
    assert modes == {"onnx": "dynamic", "openvino": "static", "executorch": "dynamic"}


EIGHT = QuantizedLayers("q")
FOUR = QuantizedLayers("q", bits=4)
AFFINE = QuantizedLayers("q", symmetric=False)
GROUPED = QuantizedLayers("q", group=8)
CODEBOOK = QuantizedLayers("q", method="codebook", group=-1)


@pytest.mark.parametrize(
    ("format", "refused_by_linear", "refused_by_embedding"),
    [
        ("dense", [], []),
        ("packed", [], []),
        ("torchao", [FOUR, CODEBOOK], [FOUR, CODEBOOK]),
        ("onnx", [FOUR, AFFINE, GROUPED, CODEBOOK], [CODEBOOK]),
        ("openvino", [FOUR, AFFINE, GROUPED, CODEBOOK], [CODEBOOK]),
        ("executorch", [AFFINE, GROUPED, CODEBOOK], [CODEBOOK]),
    ],
)
def test_a_tensor_is_checked_against_the_table(format, refused_by_linear, refused_by_embedding):
    for spec in (EIGHT, FOUR, AFFINE, GROUPED, CODEBOOK):
        with refusal(spec in refused_by_linear, "layer.weight"):
            capabilities.check_tensor(format, None, "layer.weight", spec, "dynamic")
        with refusal(spec in refused_by_embedding, "table.weight"):
            capabilities.check_embedding(format, "table.weight", spec)


def refusal(expected, name):
    return pytest.raises(UserError, match=f"of {name} is ") if expected else nullcontext()


def test_executorch_stores_linear_layers_in_floats_unless_their_inputs_are_quantized():
    capabilities.check_tensor("executorch", None, "layer.weight", GROUPED)
    capabilities.check_tensor("executorch", None, "layer.weight", GROUPED, "static")
    with pytest.raises(UserError, match="^group of layer.weight is 8"):
        capabilities.check_tensor("executorch", "dynamic", "layer.weight", GROUPED)


NEED_PACKAGES = [name for name, format in capabilities.FORMATS.items() if format.packages]


@pytest.mark.parametrize("format", NEED_PACKAGES)
def test_a_missing_or_old_package_is_refused(monkeypatch, format):
    packages = capabilities.FORMATS[format].packages
    installed = dict.fromkeys(packages, "9999.1")
    monkeypatch.setattr(capabilities, "installed_version", lambda package: installed.get(package))
    capabilities.check_export(format, "float32", None, 8)
    for package, oldest in packages.items():
        installed[package] = "0.1"
        with pytest.raises(UserError, match=f"{format}.*{package} is 0.1.*{oldest}.*pip install"):
            capabilities.check_export(format, "float32", None, 8)
        del installed[package]
        with pytest.raises(UserError, match=f"{format}.*{package} is not installed: pip install"):
            capabilities.check_export(format, "float32", None, 8)
        installed[package] = "9999.1"


@pytest.mark.parametrize("format", NEED_PACKAGES)
def test_an_extra_asks_for_what_its_format_needs(format):
    project = tomllib.loads((Path(distill.__file__).parents[1] / "pyproject.toml").read_text())
    requirements = project["project"]["optional-dependencies"][format]
    oldest = dict(each.partition(",")[0].split(">=") for each in requirements)
    assert oldest == capabilities.FORMATS[format].packages


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", "gguf"), ("quantize", "half"), ("bits", 1), ("bits", 9), ("dtype", "int8")],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"^export.{key} is {value}, but"):
        config.Export(**{key: value})


class Rounding(Quantize):
    """A technique of a user."""


def test_techniques_declare_what_they_quantize():
    specs = {
        "mine": {"_target_": f"{__name__}.Rounding", "bits": 4},
        "prune": {"_target_": "distill.callbacks.PruneLayers", "layers": [0]},
        "bar": {"_target_": "lightning.pytorch.callbacks.RichProgressBar"},
    }
    (layers,) = capabilities.techniques_of(specs)
    assert (layers.key, layers.bits, layers.method) == ("callbacks.mine", 4, "linear")
    with pytest.raises(UserError, match="^callbacks.mine.bits is 4"):
        check([layers], "torchao")


def test_a_run_checks_its_techniques_when_they_are_built():
    specs = {"mine": {"_target_": f"{__name__}.Rounding", "bits": 4}}
    build_callbacks(specs, config.Trainer(), config.Export(format="packed"))
    with pytest.raises(UserError, match="^callbacks.mine.bits is 4, but .*torchao"):
        build_callbacks(specs, config.Trainer(), config.Export(format="torchao"))
