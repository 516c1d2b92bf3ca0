"""Targeted probe perturbation: whether removing features of a class harms its probe alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.evals.tasks.absorption import check_reads_what_it_writes
from mlxterp.sae.evals.tasks.builtin_sets import builtin_sets
from mlxterp.sae.evals.tasks.labelled import Examples, LabelledSet, read_examples
from mlxterp.sae.evals.tasks.logistic import Probe, fit_probe, quality
from mlxterp.sae.evals.tasks.probing import SEEDS, check_seeds
from mlxterp.sae.evals.tasks.random_coder import random_coder
from mlxterp.sae.evals.tasks.result import TaskResult, Values
from mlxterp.sae.evals.tasks.splits import Split, overlap, split
from mlxterp.sae.source import ActivationSource

NS = (2, 5, 10, 20, 50)
LEAST_CLASSES = 3
NAMES = ("TPP", "intended", "unintended")
ANY, RANDOM = "features at random", "random features"


def probe_perturbation(
    coder: SparseCoder,
    source: ActivationSource,
    labelled: LabelledSet | None = None,
    *,
    ns: Sequence[int] = NS,
    seeds: int = SEEDS,
    max_examples: int = 2000,
) -> TaskResult:
    """What removing `n` features of a class costs the class's probe, less what it costs the others.

    Of a set of three classes or more (by default what kind of thing a token of Python is) every
    class has a logistic regression of the activation, with weights w. Its features are the n with
    the largest positive

        (mean of z_i in the class - mean of z_i elsewhere) * (W_dec[i] @ w)

    on what is trained on. They are taken out with the coder's error kept, `x - sum z_i * W_dec[i]`,
    and the score is the mean over classes of the accuracy that the class's own probe loses
    (`intended`), less the mean of what the other probes lose (`unintended`), on examples that were
    held out, half of which are of the probe's class.

    **Do not rank coders by it.** An audit (arXiv 2605.18229) reports that the score falls as
    training goes on, and that models with random weights have better ones. Beside it stand what n
    `features at random` do, of those that fire, and what the same choice does among as many
    `random features`, which are directions that were not learned: often not much less.

    A class of too few examples is left out, with the reason. Raises `ValueError` for fewer than
    three, and for a coder that does not write what it reads.

    Reference: Karvonen et al. 2024, arXiv 2411.18895; 2025, arXiv 2503.09532.
    """
    check_reads_what_it_writes(coder, "Probe perturbation")
    check_seeds(seeds)
    if not ns or min(ns) < 1 or max(ns) > coder.n_features:
        raise ValueError(f"ns must be in [1, {coder.n_features}], got {list(ns)}.")
    labelled = builtin_sets(["kind"])[0] if labelled is None else labelled
    examples = read_examples(labelled, source, coder.reads, max_examples=max_examples)
    return perturbation_of(coder, examples, ns=ns, seeds=seeds)


def perturbation_of(
    coder: SparseCoder, examples: Examples, *, ns: Sequence[int] = NS, seeds: int = SEEDS
) -> TaskResult:
    """`probe_perturbation` of examples that were read."""
    x, own = examples.raw().astype(np.float64), _Coded.of(coder, examples)
    parts, left_out = _parts(examples, seeds)
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        random = _Coded.of(random_coder(coder, examples.activations, seed), examples)
        tested = [_Tested.of(x, examples.labels == c, of[seed]) for c, of in parts.items()]
        rng = np.random.default_rng([17, seed])
        for kind, coded, order in (
            ("", own, [_ranked(own, one) for one in tested]),
            (ANY, own, [rng.permutation(own.firing) for _ in tested]),
            (RANDOM, random, [_ranked(random, one) for one in tested]),
        ):
            for n in ns:
                drops = _drops(x, coded, [features[:n] for features in order], tested)
                for name, value in _scores(drops, n).items():
                    scores.setdefault(name, {}).setdefault(kind, []).append(value)
    share = float(
        np.mean([overlap(len(p.train), len(p.test)) for of in parts.values() for p in of])
    )
    figures = {}
    for name in (f"{name}, n = {n}" for name in NAMES for n in ns):
        controls = {kind: tuple(scores[name][kind]) for kind in (ANY, RANDOM)}
        figures[name] = Values(tuple(scores[name][""]), controls, share)
    classes = [str(examples.classes[c]) for c in parts]
    settings = {"ns": list(ns), "seeds": seeds, "set": examples.name, "classes": classes,
                "n_examples": len(examples)}  # fmt: skip
    return TaskResult("probe perturbation", figures, left_out=left_out, settings=settings)


def _parts(examples: Examples, seeds: int) -> tuple[dict[int, list[Split]], dict[str, str]]:
    """The splits of each class under all seeds, and why there are none of others."""
    parts, left_out = {}, {}
    for c, name in enumerate(examples.classes):
        try:
            parts[c] = [split(examples.labels == c, examples.groups, s) for s in range(seeds)]
        except ValueError as error:
            left_out[str(name)] = str(error)
    if len(parts) < LEAST_CLASSES:
        raise ValueError(
            f"Probe perturbation needs {LEAST_CLASSES} classes or more, as what harms the probe of "
            f"one of two harms that of the other; got {[examples.classes[c] for c in parts]}"
            + "".join(f"; {name!r} is left out: {why}" for name, why in left_out.items())
        )
    return parts, left_out


class _Coded(NamedTuple):
    """Codes `[n, n_features]` and decoder rows `[n_features, d]`."""

    z: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, coder: SparseCoder, examples: Examples) -> _Coded:
        rows = np.array(coder.W_dec.astype(mx.float32), np.float64)
        return cls(examples.codes(coder), rows)

    @property
    def firing(self) -> np.ndarray:
        """The features that are not silent on all examples."""
        return np.flatnonzero((self.z != 0).any(axis=0))


class _Tested(NamedTuple):
    """A class: which examples `y` `[n]` are of it, their split, and its probe."""

    y: np.ndarray
    part: Split
    probe: Probe

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, part: Split) -> _Tested:
        return cls(y, part, fit_probe(x[part.train], y[part.train]))

    def accuracy(self, x: np.ndarray) -> float:
        """Of the probe, on the activations `x` `[n_test, d]` of what is tested."""
        return quality(self.probe.decide(x), self.y[self.part.test]).accuracy


def _ranked(coded: _Coded, tested: _Tested) -> np.ndarray:
    """The features whose removal speaks against a class, the strongest first."""
    z, y = coded.z[tested.part.train], tested.y[tested.part.train]
    apart = z[y].mean(axis=0, dtype=np.float64) - z[~y].mean(axis=0, dtype=np.float64)
    effects = apart * (coded.rows @ tested.probe.weights)
    order = np.argsort(-effects, kind="stable")
    return order[effects[order] > 0]


def _drops(
    x: np.ndarray, coded: _Coded, chosen: Sequence[np.ndarray], classes: Sequence[_Tested]
) -> np.ndarray:
    """What removing features of each class (rows) costs the accuracy of each probe (columns)."""
    drops = np.zeros((len(chosen), len(classes)))
    for j, tested in enumerate(classes):
        there, z = x[tested.part.test], coded.z[tested.part.test].astype(np.float64)
        before = tested.accuracy(there)
        for i, features in enumerate(chosen):
            removed = z[:, features] @ coded.rows[features]
            drops[i, j] = before - tested.accuracy(there - removed)
    return drops


def _scores(drops: np.ndarray, n: int) -> dict[str, float]:
    own = np.eye(len(drops), dtype=bool)
    intended, unintended = float(drops[own].mean()), float(drops[~own].mean())
    values = (intended - unintended, intended, unintended)
    return {f"{name}, n = {n}": value for name, value in zip(NAMES, values, strict=True)}
