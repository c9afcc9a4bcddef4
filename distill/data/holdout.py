"""Held-out examples of the training split, and removal of some of its labels."""

from collections import Counter
from typing import Any

import numpy as np

from distill.data.columns import CheckedSplit
from distill.errors import UserError
from distill.recipe.config import Data

# Fixed, so that runs with different seeds are evaluated on the same held-out splits.
HOLDOUT_SEED = 0


def hold_out(parts: dict[str, CheckedSplit], data: Data) -> dict[str, np.ndarray]:
    """Choose the rows of each split.

    A split that the source lacks is drawn from the labelled training examples. The validation split
    does not depend on whether the test split is drawn, nor the reverse.

    Args:
        parts: The splits of the source by role, with `train`.
        data: Its `holdout` is the share of held-out examples.

    Returns:
        Indices of rows by role; those of a drawn split are rows of the training split.
    """
    rows = {role: part.rows for role, part in parts.items()}
    missing = [role for role in ("validation", "test") if role not in parts]
    if not missing:
        return rows
    order = np.random.default_rng(HOLDOUT_SEED).permutation(parts["train"].labelled_rows())
    size = max(1, round(data.holdout * len(order)))
    if len(order) <= 2 * size:
        raise UserError(
            f"data.{missing[0]} is null, but {len(order)} labelled training examples are too few "
            "to hold some out: name a split"
        )
    drawn = {"validation": order[:size], "test": order[-size:]}
    rows |= {role: np.sort(drawn[role]) for role in missing}
    held_out = np.concatenate([drawn[role] for role in missing])
    return rows | {"train": np.setdiff1d(rows["train"], held_out)}


def keep_labels(
    train: CheckedSplit, rows: np.ndarray, keep: int, seed: int, data: Data
) -> list[Any]:
    """The labels of the training split, with all but `keep` of those in `rows` replaced by None.

    The labels to keep are drawn by stratified sampling over the classes; labels that are lists or
    numbers are one stratum.
    """
    if train.cells is None:
        raise UserError(
            f"data.labelled is {keep}, but the examples of {data.source} are used without labels: "
            "leave data.labelled out"
        )
    labelled = [int(row) for row in rows if train.cells[row] is not None]
    if keep > len(labelled):
        raise UserError(
            f"data.labelled is {keep}, but only {len(labelled)} training examples have a label: "
            "keep at most these"
        )
    cells = (train.cells[row] for row in labelled)
    strata = [cell if isinstance(cell, str) else "" for cell in cells]
    counts = Counter(strata)
    if keep < len(counts):
        raise UserError(
            f"data.labelled is {keep}, but each of the {len(counts)} classes needs a labelled "
            f"example: keep at least {len(counts)}"
        )
    generator, chosen = np.random.default_rng(seed), set()
    for name, quota in largest_remainder(counts, keep).items():
        members = [row for row, stratum in zip(labelled, strata, strict=True) if stratum == name]
        chosen |= set(generator.choice(members, quota, replace=False).tolist())
    removed = set(labelled) - chosen
    return [None if row in removed else cell for row, cell in enumerate(train.cells)]


def largest_remainder(counts: dict[str, int], total: int) -> dict[str, int]:
    """Divide `total` in proportion to `counts`; each part is at least 1 and at most its count."""
    exact = {name: total * count / sum(counts.values()) for name, count in sorted(counts.items())}
    quota = {name: max(1, int(part)) for name, part in exact.items()}

    def remainder(name: str) -> float:
        return exact[name] - quota[name]

    while sum(quota.values()) < total:
        quota[max((name for name in exact if quota[name] < counts[name]), key=remainder)] += 1
    while sum(quota.values()) > total:
        quota[min((name for name in exact if quota[name] > 1), key=remainder)] -= 1
    return quota
