"""Checks that an export format supports a recipe, its techniques and its tensors.

All of them read the table in :mod:`distill.recipe.formats`. Only
:func:`techniques_of`, which builds callbacks, imports torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

from packaging.version import Version

from distill.errors import UserError
from distill.recipe import targets
from distill.recipe.formats import DTYPES, FORMATS, RUNTIMES, Format, WeightSupport

__all__ = [
    "DTYPES",
    "FORMATS",
    "RUNTIMES",
    "Format",
    "QuantizedLayers",
    "check_embedding",
    "check_export",
    "check_techniques",
    "check_tensor",
    "installed_version",
    "resolve_quantize",
    "techniques_of",
]

_OTHER_FORMATS = "set export.format=packed or dense"
_SUPPORTED = {"method": "linear", "bits": "8", "symmetric": "true", "group": "row"}


class _Grid(Protocol):
    """The fields that `QuantSpec` and :class:`QuantizedLayers` share."""

    @property
    def method(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def group(self) -> int | None: ...


@runtime_checkable
class _Technique(Protocol):
    """A callback that declares what it quantizes, as `distill.callbacks.Compression` does."""

    def quantization(self) -> "QuantizedLayers | None": ...


@dataclass(frozen=True)
class QuantizedLayers:
    """What a technique quantizes, as declared before the student is built.

    Args:
        key: the technique's key in the recipe, ``callbacks.<name>``.
        method: ``linear``, ``codebook`` or ``nf4``.
        bits: bits per weight, 2 to 8.
        symmetric: whether linear quantization is symmetric around 0.
        group: number of inputs that share a scale; 0: a row, -1: the tensor, None: the default.
        activations: quantization of the inputs of linear layers: None, ``dynamic`` or ``static``.
        restricted: whether the user named the layers, which may then all be embeddings.
    """

    key: str
    method: str = "linear"
    bits: int = 8
    symmetric: bool = True
    group: int | None = None
    activations: str | None = None
    restricted: bool = False


def resolve_quantize(format: str, quantize: str | None) -> str | None:
    """`export.quantize` for a runtime, with ``int8`` replaced by the runtime's default mode."""
    return FORMATS[format].quantize[0] if quantize == "int8" else quantize


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_export(format: str | None, dtype: str, quantize: str | None, bits: int) -> None:
    """Check the keys of the recipe's section `export` together, and the installed packages.

    Raises:
        UserError: if the format does not support the other values, or a package is missing.
    """
    if quantize is None and bits != 8:
        raise UserError(
            f"export.bits is {bits}, but nothing is quantized after training: "
            "set export.quantize too, or leave export.bits out"
        )
    if format is None:
        return
    chosen = FORMATS[format]
    _check_installed(chosen)
    if dtype not in ("auto", *chosen.dtypes):
        rule = f"{chosen.label} supports {' and '.join(chosen.dtypes)} only"
        raise UserError(f"export.dtype is {dtype}, but {rule}: set export.dtype=float32")
    choices = (*(["int8"] if chosen.runtime else []), *chosen.quantize)
    if quantize is not None and quantize not in choices:
        rule = f"{chosen.label} supports {', '.join(choices)} only"
        raise UserError(f"export.quantize is {quantize}, but {rule}: choose one of them")
    if bits not in chosen.bits:
        rule = f"{chosen.label} supports {_bits(chosen.bits)} weights only"
        way_out = "set export.bits=8, or export.format=packed"
        raise UserError(f"export.bits is {bits}, but {rule}: {way_out}")


def check_techniques(
    format: str | None, quantize: str | None, techniques: Iterable[QuantizedLayers]
) -> None:
    """Check what a run quantizes in training against the format of its export.

    Args:
        format: `export.format`.
        quantize: `export.quantize`.
        techniques: what the run's techniques declare.

    Raises:
        UserError: if the format does not support it.
    """
    if format is None:
        return
    chosen, techniques = FORMATS[format], list(techniques)
    if quantize is not None and techniques and not chosen.runtime:
        raise UserError(
            f"export.quantize is {quantize}, but {techniques[0].key} quantizes in training: "
            "leave one of them out"
        )
    if chosen.needs_quantization and quantize is None and not techniques:
        raise UserError(
            f"export.format is {format}, but nothing is quantized: "
            "add a callback distill.callbacks.Quantize, or set export.quantize=weights"
        )
    for technique in techniques:
        _check_activations(chosen, quantize, technique)
        _check_weights(chosen, quantize, technique)


def check_tensor(
    format: str, quantize: str | None, name: str, grid: _Grid, activations: str | None = None
) -> None:
    """Check the quantized weight of a linear layer against a format.

    Args:
        format: `export.format`.
        quantize: `export.quantize`.
        name: name of the tensor in the state dict.
        grid: how it is quantized, such as a `QuantSpec`.
        activations: quantization of the layer's inputs: None, ``dynamic`` or ``static``.

    Raises:
        UserError: if the format does not support it.
    """
    chosen = FORMATS[format]
    if _computes_in_integers(chosen, quantize, activations):
        _raise_unsupported_tensor(name, _unsupported(chosen, chosen.linear, grid))


def check_embedding(format: str, name: str, grid: _Grid) -> None:
    """Check the quantized weight of an embedding that no linear layer shares against a format.

    Args:
        format: `export.format`.
        name: name of the tensor in the state dict.
        grid: how it is quantized, such as a `QuantSpec`.

    Raises:
        UserError: if the format does not support it.
    """
    chosen = FORMATS[format]
    _raise_unsupported_tensor(name, _unsupported(chosen, chosen.embedding, grid))


def techniques_of(callbacks: Mapping[str, Any]) -> list[QuantizedLayers]:
    """What the callbacks of a recipe quantize in training. Imports their classes and torch.

    Args:
        callbacks: the recipe's section `callbacks`.

    Raises:
        UserError: if a callback cannot be built.
    """
    from lightning.pytorch.callbacks import Callback

    built = {
        name: targets.instantiate(f"callbacks.{name}", spec, Callback)
        for name, spec in callbacks.items()
    }
    return [
        replace(layers, key=f"callbacks.{name}")
        for name, callback in built.items()
        if isinstance(callback, _Technique) and (layers := callback.quantization()) is not None
    ]


def _check_installed(format: Format) -> None:
    for package, oldest in format.packages.items():
        version, extra = installed_version(package), f"'distill[{format.name}]'"
        if version is None:
            raise UserError(
                f"export.format is {format.name}, but {package} is not installed: "
                f"pip install {extra}"
            )
        if Version(version) < Version(oldest):
            raise UserError(
                f"export.format is {format.name}, but {package} is {version}, and {oldest} is the "
                f"oldest version supported: pip install --upgrade {extra}"
            )


def _check_activations(format: Format, quantize: str | None, technique: QuantizedLayers) -> None:
    activations = technique.activations
    if activations is None or activations in format.activations:
        return
    if not _computes_in_integers(format, quantize, activations):
        return
    modes = " and ".join(format.activations)
    other = "leave export.quantize out" if format.float_fallback else _OTHER_FORMATS
    raise UserError(
        f"{technique.key}.activations is {activations}, but {format.label} supports "
        f"{modes} activation quantization only: set {technique.key}.activations={modes}, or {other}"
    )


def _check_weights(format: Format, quantize: str | None, technique: QuantizedLayers) -> None:
    """Check weights; layers that the user named may all be linear, or all embeddings."""
    integers = _computes_in_integers(format, quantize, technique.activations)
    linear = _unsupported(format, format.linear, technique) if integers else None
    embedding = _unsupported(format, format.embedding, technique)
    if technique.restricted and None in (linear, embedding):
        return
    problem = linear or embedding
    if problem is not None:
        field, value, rule = problem
        way_out = f"{_OTHER_FORMATS}, or {technique.key}.{field}={_SUPPORTED[field]}"
        if embedding is None:
            way_out += f", or name embeddings only in {technique.key}.layers"
        raise UserError(f"{technique.key}.{field} is {value}, but {rule}: {way_out}")


def _computes_in_integers(format: Format, quantize: str | None, activations: str | None) -> bool:
    """Whether linear layers with quantized weights are stored as integers."""
    return not format.float_fallback or quantize is not None or activations in format.activations


def _unsupported(
    format: Format, support: WeightSupport, grid: _Grid
) -> tuple[str, str, str] | None:
    """(field, value, rule) of what is not supported; None where everything is."""
    if grid.method not in support.methods:
        rule = f"{format.label} supports {' and '.join(support.methods)} quantization only"
        return "method", grid.method, rule
    if grid.bits not in support.bits:
        return "bits", str(grid.bits), f"{format.label} supports {_bits(support.bits)} weights only"
    if grid.method == "linear" and not grid.symmetric and not support.affine:
        return "symmetric", "false", f"{format.label} supports symmetric weights only"
    if (grid.group or 0) > 0 and not support.groups:
        return "group", str(grid.group), f"{format.label} supports a scale per row or tensor only"
    return None


def _raise_unsupported_tensor(name: str, problem: tuple[str, str, str] | None) -> None:
    if problem is not None:
        field, value, rule = problem
        raise UserError(f"{field} of {name} is {value}, but {rule}: {_OTHER_FORMATS}")


def _bits(bits: tuple[int, ...]) -> str:
    return f"{bits[0]}-bit" if len(bits) == 1 else f"{bits[0]}- to {bits[-1]}-bit"
