"""YAML files of recipes, which may come from somebody else, as plain values."""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from yaml.nodes import MappingNode, Node, SequenceNode

from distill.errors import UserError

__all__ = ["load_mapping"]

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000  # of a recipe, with each use of an alias counted


def load_mapping(file: Path) -> DictConfig:
    """Parse a YAML file of keys.

    Aliases that refer to each other could stand for more values than fit into memory: they are
    counted before anything is built.

    Raises:
        UserError: if it is none, or too large.
    """
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, and {MOST_BYTES:,} are the most")
        _check_values(yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
        recipe = OmegaConf.load(file)
    except RecursionError:
        raise _unreadable(file, "its values are nested too deeply") from None
    except Exception as error:
        raise _unreadable(file, " ".join(str(error).split())) from error
    if not isinstance(recipe, DictConfig):
        raise UserError(
            f"recipe {file} holds {type(recipe).__name__}, but it must be a YAML file of keys: "
            "write them as key: value, one per line"
        )
    return recipe


def _unreadable(file: Path, reason: str) -> UserError:
    return UserError(
        f"recipe {file} cannot be read ({reason}), but it must be a YAML file of keys: correct it"
    )


def _check_values(root: Node | None) -> None:
    if root is not None and _count(root, {}) > MOST_VALUES:
        raise ValueError(f"with its aliases it has more than {MOST_VALUES:,} values")


def _count(node: Node, known: dict[int, int | None]) -> int:
    """The values of a node, with each use of an alias; `known` has those of earlier nodes."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError("an alias contains itself")
        return count
    known[id(node)] = None
    parts: list[Node] = []
    if isinstance(node, SequenceNode):
        parts = node.value
    elif isinstance(node, MappingNode):
        parts = [part for pair in node.value for part in pair]
    known[id(node)] = total = 1 + sum(_count(part, known) for part in parts)
    return total
