"""Which examples are trained on and which are tested on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TESTED = 0.25
LEAST = 10  # examples of either label in either part


class Split(NamedTuple):
    """The examples that are trained on and those that are tested on, half of each true."""

    train: np.ndarray
    test: np.ndarray


def overlap(n_train: float, n_test: float) -> float:
    """How many are tested for each that is trained on; see `Values.minus`."""
    return n_test / n_train


def split(y: np.ndarray, groups: np.ndarray, seed: int = 0) -> Split:
    """A split of whole documents: about a quarter of the examples is tested.

    Of the label `y` `[n]` (true or false) that is more frequent in a part so many are left out at
    random that a part has as many of both; always the same answer is right on one half. Raises
    `ValueError` where a part would have fewer than 10 of either.
    """
    rng = np.random.default_rng([7, seed])
    # By the rarer label, which would else be missing from one of the parts.
    rare = y if y.sum() <= len(y) / 2 else ~y
    names, numbers = np.unique(groups, return_inverse=True)
    counts = np.bincount(numbers, rare, len(names))
    order = rng.permutation(len(names))
    before = np.cumsum(counts[order]) - counts[order]
    tested = np.zeros(len(names), bool)
    tested[order] = before < TESTED * counts.sum()
    parts = [_balanced(np.flatnonzero(tested[numbers] == part), y, rng) for part in (False, True)]
    if min(map(len, parts)) < 2 * LEAST:
        raise ValueError(
            f"there are too few examples: {rare.sum()} of the rarer label in {len(names)} "
            f"documents; {LEAST} are needed in each part."
        )
    return Split(*parts)


def _balanced(part: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    yes, no = part[y[part]], part[~y[part]]
    n = min(len(yes), len(no))
    return np.sort(np.concatenate([rng.choice(x, n, replace=False) for x in (yes, no)]))
