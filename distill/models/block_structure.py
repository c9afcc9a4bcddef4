"""Attention and feed-forward network of a transformer block, by what depends on what.

A block is run again and again on the same input, while one output of a linear layer is changed, and
the inputs of all linear layers are compared. No name of a module decides anything. The terms are
those of `block_probe.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from distill.models.block_probe import BlockProbe, output_states
from distill.remote_code.modeling import LINEAR, in_out_features

_SAMPLES = 9  # rows of a layer that are tried, besides those at the borders


@dataclass(frozen=True)
class Attention:
    """Self-attention of a block; names are relative to the block.

    A fused layer has the rows of query, key and value one after the other (`concatenated`), or
    those of each key head together (`interleaved`).
    """

    query: str
    key: str
    value: str
    fused: str  # "", "concatenated" or "interleaved"
    extra: tuple[str, ...]  # layers with rows by head that do not read the tokens (DeBERTa)
    output: str
    head_width: int
    shared: int  # query heads of one key and value head
    counts: tuple[tuple[str, str, int], ...] = ()
    """Attributes that the forward reads: submodule, attribute, its value for each key head."""


@dataclass(frozen=True)
class FeedForward:
    """Feed-forward network of a block; names are relative to the block."""

    inputs: tuple[str, ...]
    fused: str  # "", "halves" (gates, then values) or "pairs" (of gate and value)
    output: str


def examine_block(probe: BlockProbe) -> tuple[Attention | None, FeedForward | None]:
    """Attention and feed-forward network of a block; None where they have another structure."""
    producers: dict[str, list[str]] = {}
    for name in probe.order:
        consumer = probe.consumer(name)
        if consumer is not None:
            producers.setdefault(consumer, []).append(name)
    touched, elsewhere = probe.reached()
    attention, networks = None, []
    for output, names in producers.items():
        inside = [name for name in names if name in touched]
        if output in elsewhere and inside and not set(inside) & elsewhere:
            attention = attention or _attention(probe, output, inside, names)
        elif network := _feed_forward(probe, output, names):
            networks.append(network)
    return attention, networks[0] if len(networks) == 1 else None


def _rows(probe: BlockProbe, name: str) -> int:
    return in_out_features(probe.modules[name])[1]


def _sample(rows: int, *borders: int) -> list[int]:
    """Rows to try: spread over all of them, and on both sides of borders."""
    spread = {round(index * (rows - 1) / (_SAMPLES - 1)) for index in range(_SAMPLES)}
    near = {row for border in (0, *borders, rows) for row in (border - 1, border, border + 1)}
    return sorted(row for row in spread | near if 0 <= row < rows)


def _feed_forward(probe: BlockProbe, output: str, names: list[str]) -> FeedForward | None:
    width = in_out_features(probe.modules[output])[0]
    layouts: dict[str, Callable[[int], int]] = {"": lambda row: row}
    if len(names) == 1 and _rows(probe, names[0]) == 2 * width:
        layouts = {"halves": lambda row: row % width, "pairs": lambda row: row // 2}
    elif any(_rows(probe, name) != width for name in names):
        return None
    for fused, column in layouts.items():
        tried = ((name, row) for name in names for row in _sample(_rows(probe, name), width))
        if all(probe.columns(name, row, output) == {column(row)} for name, row in tried):
            return FeedForward(tuple(names), fused, output)
    return None


def _attention(
    probe: BlockProbe, output: str, inside: list[str], names: list[str]
) -> Attention | None:
    extra = tuple(name for name in names if name not in inside)
    if len(inside) == 3:
        parts = _separate(probe, output, inside)
    else:
        parts = _fused(probe, output, inside[0]) if len(inside) == 1 else None
    if parts is None:
        return None
    roles, fused, head_width, shared = parts
    width = in_out_features(probe.modules[output])[0]
    if width % (head_width * shared):
        return None
    for name in extra:
        for row in _sample(_rows(probe, name)):
            group = row * (width // head_width // shared) // _rows(probe, name)
            if not probe.columns(name, row, output) <= _group(group, head_width * shared):
                return None
    attention = Attention(*roles, fused, extra, output, head_width, shared)
    return replace(attention, counts=_counts(probe, attention, width))


def _group(group: int, size: int) -> set[int]:
    return set(range(group * size, (group + 1) * size))


_Layout = tuple[tuple[str, str, str], str, int, int]


def _separate(probe: BlockProbe, output: str, names: list[str]) -> _Layout | None:
    """Three layers: the query does not mix tokens, and a value's row reaches fewer columns."""
    queries = [name for name in names if not probe.mixes(name, 0, output)]
    if len(queries) != 1:
        return None
    query = queries[0]
    value, key = sorted(
        (name for name in names if name != query),
        key=lambda name: len(probe.columns(name, 0, output)),
    )
    rows = {name: _rows(probe, name) for name in names}
    head_width = len(probe.columns(query, 0, output))
    if rows[key] != rows[value] or rows[query] % rows[key] or rows[key] % head_width:
        return None
    shared = rows[query] // rows[key]
    for name, size in ((query, shared * head_width), (key, head_width), (value, head_width)):
        for row in _sample(rows[name], size):
            columns = probe.columns(name, row, output)
            if not columns <= _group(row // size, shared * head_width):
                return None
    return (query, key, value), "", head_width, shared


def _fused(probe: BlockProbe, output: str, name: str) -> _Layout | None:
    """One layer: the order of its rows in which each has the effect of its role."""
    rows, width = _rows(probe, name), in_out_features(probe.modules[output])[0]
    head_width = len(probe.columns(name, 0, output))
    heads = width // head_width
    key_rows = (rows - width) // 2
    if rows <= width or key_rows % head_width or heads % (key_rows // head_width):
        return None
    shared = heads // (key_rows // head_width)
    borders = (width, width + key_rows, shared * head_width, (shared + 1) * head_width)
    for fused in ("concatenated", "interleaved"):
        if all(
            _has_role(probe, output, name, row, (fused, head_width, shared, width))
            for row in _sample(rows, *borders)
        ):
            return (name, name, name), fused, head_width, shared
    return None


def _has_role(
    probe: BlockProbe, output: str, name: str, row: int, layout: tuple[str, int, int, int]
) -> bool:
    fused, head_width, shared, width = layout
    group_width = shared * head_width
    sizes = (group_width, head_width, head_width)
    if fused == "concatenated":
        groups = width // group_width
        starts = (0, width, width + groups * head_width)
        role = max(index for index in range(3) if row >= starts[index])
        group = (row - starts[role]) // sizes[role]
    else:
        group, within = divmod(row, sum(sizes))
        role = 0 if within < group_width else 1 if within < group_width + head_width else 2
    columns = probe.columns(name, row, output)
    expected = (head_width, group_width, shared)[role]
    mixed = probe.mixes(name, row, output)
    return (
        columns <= _group(group, group_width) and len(columns) == expected and mixed is (role > 0)
    )


def _counts(
    probe: BlockProbe, attention: Attention, width: int
) -> tuple[tuple[str, str, int], ...]:
    """Attributes with numbers of heads or widths that the forward reads."""
    parent = attention.output.rpartition(".")[0]
    while parent and not all(
        name.startswith(f"{parent}.") for name in (attention.query, attention.key, attention.value)
    ):
        parent = parent.rpartition(".")[0]
    groups = width // attention.head_width // attention.shared
    values = {width, width // attention.head_width, groups, groups * attention.head_width}
    counts = []
    for name, module in probe.modules.items():
        if isinstance(module, LINEAR) or not (name == parent or name.startswith(f"{parent}.")):
            continue
        for attribute, value in list(vars(module).items()):
            is_width = "dim" in attribute or "size" in attribute
            if not is_width and ("head" not in attribute or "groups" in attribute):
                continue
            constant = is_width and value == attention.head_width
            counted = type(value) is int and value in values and value % groups == 0
            if counted and not constant and _is_read(probe, module, attribute):
                counts.append((name, attribute, value // groups))
    return tuple(counts)


def _is_read(probe: BlockProbe, module: nn.Module, attribute: str) -> bool:
    """Whether the forward depends on an attribute of a module."""
    value = getattr(module, attribute)
    setattr(module, attribute, 2 * value)
    try:
        probe.run()
        return not torch.equal(output_states(probe.output), probe.base_output)
    except Exception:  # noqa: BLE001 - a view of the wrong size, for example
        return True
    finally:
        setattr(module, attribute, value)
