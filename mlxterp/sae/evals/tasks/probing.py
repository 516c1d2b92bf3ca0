"""Sparse probing: how well a few features say what a token or a text is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.evals.tasks.builtin_sets import builtin_sets
from mlxterp.sae.evals.tasks.labelled import Examples, LabelledSet, read_examples
from mlxterp.sae.evals.tasks.logistic import Quality, fit_probe, quality
from mlxterp.sae.evals.tasks.random_coder import random_coder
from mlxterp.sae.evals.tasks.result import TaskResult, Values
from mlxterp.sae.evals.tasks.splits import Split, overlap, split
from mlxterp.sae.source import ActivationSource

KS = (1, 2, 5)
SEEDS = 5
SHUFFLES, SHUFFLES_OF_ALL = 10, 3  # of the labels, under each seed
SETS = ("keyword", "string", "comment", "definition", "capital", "digit", "prose")
FULL = "all neurons"
# The first is what a figure stands beside: chance.
CONTROLS = ("shuffled labels", "random features", "neurons")
MEASURES = ("accuracy", "f1", "auc")


def sparse_probing(
    coder: SparseCoder,
    source: ActivationSource,
    sets: Sequence[LabelledSet] | None = None,
    *,
    ks: Sequence[int] = KS,
    seeds: int = SEEDS,
    max_examples: int = 2000,
    C: float = 1.0,
) -> TaskResult:
    """How well `k` features tell a class from all others, on documents that were held out.

    Of each part of a labelled set (by default the two-class ones of `builtin_sets`) the k features
    with the largest

        |mean of z_i where the label is true - mean of z_i elsewhere|

    on the part that is trained on go into a logistic regression (`fit_probe`); of a text, codes are
    averaged over its tokens. Its accuracy, F1 and area under the ROC curve on the other part are
    reported, where half of the examples are true: saying always the same is right on 0.5.

    Beside it stand, under the same seeds: `shuffled labels`, a probe trained on labels in random
    order; `random features`, k of as many random directions that fire as often; `neurons`, k
    columns of the activations themselves, chosen alike; and, as a figure of its own, a probe on all
    of them. Features are worth something where they are above both of the latter two controls.

    Works for all coders: of a transcoder what it reads is probed. A part with too few examples is
    left out, with the reason. Raises `ValueError` for bad arguments.

    References: Gurnee et al. 2023, arXiv 2305.01610 (selection by means); Karvonen et al. 2025,
    arXiv 2503.09532 (SAEBench; k of 1, 2 and 5). Unlike the latter's the columns are standardised
    before the regression, so that its penalty means the same for all, and the full probe is not
    stopped on what it is tested on.
    """
    if not ks or min(ks) < 1 or max(ks) > min(coder.n_features, coder.d_in):
        most = min(coder.n_features, coder.d_in)
        raise ValueError(f"ks must be in [1, {most}], got {list(ks)}.")
    check_seeds(seeds)
    details, left_out = {}, {}
    for labelled in builtin_sets(SETS) if sets is None else sets:
        try:
            examples = read_examples(labelled, source, coder.reads, max_examples=max_examples)
            details |= probe_examples(coder, examples, ks=ks, seeds=seeds, C=C)
        except ValueError as error:
            left_out[labelled.name] = str(error)
    settings = {"ks": list(ks), "seeds": seeds, "max_examples": max_examples, "C": C,
                "sets": [*details]}  # fmt: skip
    return TaskResult("sparse probing", means(details), details, left_out, settings)


def check_seeds(seeds: int) -> None:
    """Raise `ValueError` for less than one seed."""
    if seeds < 1:
        raise ValueError(f"seeds must be >= 1, got {seeds}.")


def means(details: Mapping[str, Mapping[str, Values]]) -> dict[str, Values]:
    """The mean of every figure over the parts that have it, under each seed."""
    names = dict.fromkeys(name for figures in details.values() for name in figures)
    return {
        name: _mean([figures[name] for figures in details.values() if name in figures])
        for name in names
    }


def _mean(several: Sequence[Values]) -> Values:
    controls = [c for c in several[0].controls if all(c in values.controls for values in several)]
    return Values(
        tuple(np.mean([values.values for values in several], axis=0).tolist()),
        {c: tuple(np.mean([v.controls[c] for v in several], axis=0).tolist()) for c in controls},
        float(np.mean([values.overlap for values in several])),
    )


def probe_examples(
    coder: SparseCoder,
    examples: Examples,
    *,
    ks: Sequence[int] = KS,
    seeds: int = SEEDS,
    C: float = 1.0,
) -> dict[str, dict[str, Values]]:
    """The figures of each class of a set that is looked for; see `sparse_probing`."""
    raw, codes = examples.raw(), examples.codes(coder)
    name, several = examples.name, len(examples.targets) > 1
    wanted = {
        f"{name}: {examples.classes[t]}" if several else name: examples.labels == t
        for t in examples.targets
    }
    found: dict[str, dict[str, list[Quality]]] = {part: {} for part in wanted}
    shares = []
    for seed in range(seeds):
        random = examples.codes(random_coder(coder, examples.activations, seed))
        for part, y in wanted.items():
            parts = split(y, examples.groups, seed)
            shares.append(overlap(len(parts.train), len(parts.test)))
            for which, one in _qualities(raw, codes, random, y, parts, ks, C, seed).items():
                found[part].setdefault(which, []).append(one)
    share = float(np.mean(shares))
    return {part: _figures(of, ks, share) for part, of in found.items()}


def _qualities(
    raw: np.ndarray,
    codes: np.ndarray,
    random: np.ndarray,
    y: np.ndarray,
    parts: Split,
    ks: Sequence[int],
    C: float,
    seed: int,
) -> dict[str, Quality]:
    rng, true = np.random.default_rng([11, seed]), y[parts.train][None]
    shuffled = np.stack([rng.permutation(true[0]) for _ in range(SHUFFLES)])
    found = {}
    for name, x, labels in (
        ("", codes, true), (CONTROLS[0], codes, shuffled), (CONTROLS[1], random, true),
        (CONTROLS[2], raw, true),
    ):  # fmt: skip
        probed = _Probed(x[parts.train], x[parts.test], labels, y[parts.test], C)
        found |= {f"{k}, {name}": probed.sparsely(k) for k in ks}
    whole = [_Probed(raw[parts.train], raw[parts.test], labels, y[parts.test], C)
             for labels in (true, shuffled[:SHUFFLES_OF_ALL])]  # fmt: skip
    return found | {FULL: whole[0].fully(), f"{FULL}, {CONTROLS[0]}": whole[1].fully()}


class _Probed:
    """Probes of some columns, trained on each of several `labels [m, n_train]`: means over these of
    what they are worth."""

    def __init__(
        self, train: np.ndarray, test: np.ndarray, labels: np.ndarray, y: np.ndarray, C: float
    ):
        self._train, self._test, self._labels, self._y, self._C = train, test, labels, y, C
        self._ranked = rank(train, labels)

    def sparsely(self, k: int) -> Quality:
        """Of the k columns whose means are furthest apart."""
        return self._mean([ranked[:k] for ranked in self._ranked])

    def fully(self) -> Quality:
        """Of all columns."""
        return self._mean([slice(None)] * len(self._labels))

    def _mean(self, columns: Sequence[np.ndarray | slice]) -> Quality:
        found = []
        for labels, some in zip(self._labels, columns, strict=True):
            probe = fit_probe(self._train[:, some], labels, C=self._C)
            found.append(astuple(quality(probe.decide(self._test[:, some]), self._y)))
        return Quality(*np.mean(found, axis=0).tolist())


def rank(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Columns of `x` `[n, d]` by how far apart their means are where a label is true and where not,
    for each of several `labels` `[m, n]`."""
    yes = labels.sum(axis=1, keepdims=True)
    weights = np.where(labels, 1 / yes, -1 / (labels.shape[1] - yes))
    return np.argsort(-np.abs(weights.astype(np.float32) @ x), axis=1, kind="stable")


def _figures(
    found: Mapping[str, list[Quality]], ks: Sequence[int], share: float
) -> dict[str, Values]:
    def values(name: str, measure: str) -> tuple[float, ...]:
        return tuple(getattr(one, measure) for one in found[name])

    figures = {}
    for measure in MEASURES:
        for k in ks:
            controls = {c: values(f"{k}, {c}", measure) for c in CONTROLS}
            figures[f"{measure}, k = {k}"] = Values(values(f"{k}, ", measure), controls, share)
        full = {CONTROLS[0]: values(f"{FULL}, {CONTROLS[0]}", measure)}
        figures[f"{measure}, {FULL}"] = Values(values(FULL, measure), full, share)
    return figures
