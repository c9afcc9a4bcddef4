"""Held-out examples of the training split, and removal of some of its labels."""

import heapq
import logging

import numpy as np

from distill.data import stratified
from distill.data.columns import CheckedSplit
from distill.data.label_column import LabelColumn
from distill.errors import UserError
from distill.recipe.config import Data

log = logging.getLogger(__name__)

# Fixed, so that runs with different seeds are evaluated on the same held-out splits.
HOLDOUT_SEED = 0
# Raised when the draw changes: a run of another version held out other examples.
HOLDOUT_VERSION = 2


def hold_out(parts: dict[str, CheckedSplit], data: Data) -> dict[str, np.ndarray]:
    """Choose the rows of each split.

    A split that the source lacks is drawn from the labelled training examples, by class where
    labels are names; the last training example of a class is never drawn. The validation split
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
    labelled = parts["train"].labelled_rows()
    if len(labelled) == 0:
        raise UserError(
            f"data.{missing[0]} is null, but no training example of {data.source} has a label, "
            "which a held-out example needs: name another column in data.label, or a split"
        )
    size = max(1, round(data.holdout * len(labelled)))
    validation, test = _draw(parts["train"], labelled, size)
    if len(labelled) <= 2 * size or not len(validation) or not len(test):
        raise UserError(
            f"data.{missing[0]} is null, but {len(labelled)} labelled training examples are too "
            "few to hold some out, because each class keeps one: name a split"
        )
    if len(validation) < size:
        log.warning(
            "%d examples are held out for each split, not %d: each class keeps a training example",
            len(validation),
            size,
        )
    drawn = {"validation": validation, "test": test}
    rows |= {role: drawn[role] for role in missing}
    held_out = np.concatenate([drawn[role] for role in missing])
    return rows | {"train": np.setdiff1d(rows["train"], held_out)}


def _draw(train: CheckedSplit, labelled: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the validation and the test split, sorted."""
    cells = train.cells
    if cells is not None and cells.kind is str:
        _, classes_N = cells.ordered(labelled)
        validation, test = stratified.draw_by_class(classes_N, size, HOLDOUT_SEED)
    elif cells is not None and cells.kind is list:
        names = sorted({name for cell in cells.used(labelled) for name in cell})
        number = {name: index for index, name in enumerate(names)}
        sets = ([number[name] for name in cells[row]] for row in labelled)
        labels = stratified.LabelSets.of(sets, len(names))
        validation, test = stratified.draw_by_labels(labels, size, HOLDOUT_SEED)
    else:
        order = np.random.default_rng(HOLDOUT_SEED).permutation(len(labelled))
        validation, test = np.sort(order[:size]), np.sort(order[-size:])
    return labelled[validation], labelled[test]


def keep_labels(
    train: CheckedSplit, rows: np.ndarray, keep: int, seed: int, data: Data
) -> LabelColumn:
    """The labels of the training split, with all but `keep` of those in `rows` replaced by None.

    The labels to keep are drawn by stratified sampling over the classes; labels that are lists or
    numbers are one stratum.
    """
    if train.cells is None:
        raise UserError(
            f"data.labelled is {keep}, but the examples of {data.source} are used without labels: "
            "leave data.labelled out"
        )
    cells = train.cells
    labelled = rows[cells.present[rows]]
    if keep > len(labelled):
        raise UserError(
            f"data.labelled is {keep}, but only {len(labelled)} training examples have a label: "
            "keep at most these"
        )
    names, members = [""], np.zeros(len(labelled), int)
    if cells.kind is str:
        names, members = cells.ordered(labelled)
    counts = dict(zip(names, np.bincount(members, minlength=len(names)).tolist(), strict=True))
    if keep < len(counts):
        raise UserError(
            f"data.labelled is {keep}, but each of the {len(counts)} classes needs a labelled "
            f"example: keep at least {len(counts)}"
        )
    groups = np.split(
        labelled[np.argsort(members, kind="stable")], np.bincount(members).cumsum()[:-1]
    )
    quotas, generator = largest_remainder(counts, keep), np.random.default_rng(seed)
    chosen = [
        generator.choice(group, quotas[name], replace=False)
        for name, group in zip(names, groups, strict=True)
    ]
    return cells.without(np.setdiff1d(labelled, np.concatenate(chosen)))


def largest_remainder(counts: dict[str, int], total: int) -> dict[str, int]:
    """Divide `total` in proportion to `counts`; each part is at least 1 and at most its count."""
    examples = sum(counts.values())
    exact = {name: total * count / examples for name, count in sorted(counts.items())}
    quota = {name: max(1, int(part)) for name, part in exact.items()}

    def remainder(name: str) -> float:
        return exact[name] - quota[name]

    step = 1 if sum(quota.values()) < total else -1

    def is_open(name: str) -> bool:
        return quota[name] < counts[name] if step > 0 else quota[name] > 1

    # Of equal remainders, the first name counts.
    heap = [(-step * remainder(name), name) for name in exact if is_open(name)]
    heapq.heapify(heap)
    for _ in range(abs(total - sum(quota.values()))):
        _, name = heapq.heappop(heap)
        quota[name] += step
        if is_open(name):
            heapq.heappush(heap, (-step * remainder(name), name))
    return quota
