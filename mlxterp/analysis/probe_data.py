"""The examples that a probe learns from and those that it is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mlxterp.analysis.site_rows import Position, rows_at, rows_of_tokens
from mlxterp.analysis.source import Readable
from mlxterp.sites import Site

Place = Position | Literal["each"]


def examples(
    model: Readable, texts: list[Any], labels: list[Any], sites: Sequence[Site], position: Place
) -> tuple[dict[Site, np.ndarray], list[Any], np.ndarray]:
    """The rows of each site, and the label and the number of the text of each row."""
    if position != "each":
        return rows_at(model, texts, sites, position), labels, np.arange(len(texts))
    rows, plain = rows_of_tokens(model, texts, sites)
    named, groups, kept = [], [], []
    for i, (label, words) in enumerate(zip(labels, plain, strict=True)):
        own = label if isinstance(label, (list, tuple, np.ndarray)) else None
        if own is not None and len(own) != len(words):
            raise ValueError(
                f"labels of text {i} must be one for each of its {len(words)} tokens, special ones "
                f"too, got {len(own)}."
            )
        each = list(own) if own is not None else [label if word else None for word in words]
        keep = np.array([one is not None for one in each])
        kept.append(keep)
        named += [one for one in each if one is not None]
        groups += [i] * int(keep.sum())
    joined = {
        site: np.concatenate([row[keep] for row, keep in zip(found, kept, strict=True)])
        for site, found in rows.items()
    }
    return joined, named, np.array(groups)


def classes_of(labels: list[Any]) -> tuple[Any, ...]:
    plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
    try:
        found = list(dict.fromkeys(plain))
    except TypeError:
        raise ValueError(
            "labels must be one for each text; lists, one for each token, are for position='each'."
        ) from None
    if None in found:
        raise ValueError("labels must be no None, which stands for a token that is left out.")
    if len(found) < 2:
        raise ValueError(f"labels must be of two classes or more, got {found}.")
    return tuple(sorted(found, key=lambda label: (str(type(label)), label)))


def numbered(groups: Iterable[Any], n_texts: int) -> np.ndarray:
    """The number `[n_texts]` of the group of each text; raises `ValueError` for another count."""
    given = list(groups)
    if len(given) != n_texts:
        raise ValueError(f"groups must be as many as texts: {len(given)} for {n_texts} texts.")
    order = {group: i for i, group in enumerate(dict.fromkeys(given))}
    return np.array([order[group] for group in given])


def held_out(
    y: np.ndarray, groups: np.ndarray, test_split: float, rng: np.random.Generator
) -> np.ndarray:
    """The numbers of the groups that are held out, of each class alike where they have one."""
    names = np.unique(groups)
    first = {int(g): int(k) for g, k in zip(groups[::-1], y[::-1], strict=True)}
    single = all(first[int(g)] == k for g, k in zip(groups, y, strict=True))
    kinds = np.array([first[int(g)] if single else 0 for g in names])
    held = []
    for kind in np.unique(kinds):
        members = rng.permutation(names[kinds == kind])
        held.append(members[: max(1, round(test_split * len(members)))])
    return np.concatenate(held)


def shuffled(
    y: np.ndarray, groups: np.ndarray, test: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Labels in another order within each part: of texts, where every text has one of its own."""
    _, starts, numbers = np.unique(groups, return_index=True, return_inverse=True)
    of_texts = (y == y[starts][numbers]).all()
    found = y.copy()
    for part in (test, ~test):
        if of_texts:
            texts = np.unique(numbers[part])
            own = np.zeros(len(starts), int)
            own[texts] = rng.permutation(y[starts][texts])
            found[part] = own[numbers[part]]
        else:
            found[part] = rng.permutation(y[part])
    return found
