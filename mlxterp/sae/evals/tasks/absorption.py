"""Feature absorption: a feature that should fire for a letter and is silent, as others speak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder, check_sized
from mlxterp.sae.evals.tasks.labelled import LabelledSet, read_examples
from mlxterp.sae.evals.tasks.logistic import fit_probe, quality
from mlxterp.sae.evals.tasks.probing import SEEDS, check_seeds, means
from mlxterp.sae.evals.tasks.random_coder import random_coder
from mlxterp.sae.evals.tasks.result import TaskResult, Values
from mlxterp.sae.evals.tasks.words import read_words
from mlxterp.sae.source import ActivationSource

TESTED = 0.25
LEAST_F1 = 0.6  # of a probe of the activation, for its letter to count
LEAST_WORDS = 8  # that are tested, of a letter
LEAST_SHARE = 0.5  # of the letters that must count
MOST_SPLIT, GAIN = 10, 0.03
ABSORBED, ABSORBERS = 0.4, 3
COSINE_OF_ONE, COSINE_OF_SEVERAL = 0.025, 0.1
RANDOM = "random features"


@dataclass(frozen=True)
class Absorbed:
    """What was found of one label: `full` and `fraction` are means over the `n` examples that the
    probe finds; `splits` is the number of features that stand for the label, `probe_f1` and
    `features_f1` what the probe of the activation and that of these features are worth."""

    full: float
    fraction: float
    splits: int
    probe_f1: float
    features_f1: float
    n: int


def absorption(
    coder: SparseCoder,
    source: ActivationSource,
    words: Sequence[str] | LabelledSet | None = None,
    *,
    seeds: int = SEEDS,
    max_words: int = 4000,
) -> TaskResult:
    """How often the features of a word's first letter are silent because others take their place.

    The words are those of the vocabulary, or given ones, of one token each; see `read_words`. In
    their place may stand a labelled set of tokens, whose classes are then what letters are here:
    a small model knows more of the kind of a token than of its spelling.

    For every letter, on three quarters of the words: a logistic regression of the activation is the
    probe, with direction p; the features that stand for the letter are those whose mean is most
    above that on other words, one after another while the F1 of a regression on them grows by more
    than .03. Of the other words those with the letter that the probe finds are looked at, with
    `a_i = z_i * (W_dec[i] @ p)` and `total = (x - b_dec) @ p`:

        full      1 where all the letter's features are 0, total > 0, and the feature with the
                  largest a_i has a cosine with p of at least .025 and a_i >= .4 * total
        fraction  0 where M, the sum of a_i over the letter's features, is at least total; else, of
                  up to three other features with a cosine of at least .1, the sum S of the largest
                  a_i (0 below .4 * total): 1 where M <= 0 and S > 0, and otherwise
                  min(S, total - M) / (min(S, total - M) + M)

    Reported are means over letters; beside them `random features`, what random directions of the
    same number and rates have. A low value can also mean that no feature knows the letter: read it
    with the F1 of the letter's features, beside that of the probe.

    Letters with few words, or whose probe has an F1 of .6 or less, are left out. Raises
    `ValueError` where more than half are weak: then the model does not know how words are spelled
    at this site, and there is nothing to be absorbed. Raises it also for a coder that does not
    write what it reads.

    References: Chanin et al. 2024, arXiv 2409.14507; Karvonen et al. 2025, arXiv 2503.09532. These
    choose features by an L1-penalised probe, and measure x from the origin, not from b_dec.
    """
    check_reads_what_it_writes(coder, "Absorption")
    check_seeds(seeds)
    if isinstance(words, LabelledSet):
        if not words.of_tokens:
            raise ValueError(f"Absorption needs labels of tokens, got {words}.")
        examples = read_examples(words, source, coder.reads, max_examples=max_words)
        names = np.array([str(name) for name in examples.classes])
        x, labels, groups = examples.activations, names[examples.labels], examples.groups
    else:
        found = read_words(source, coder.reads, words, max_words=max_words)
        x, labels, groups = found.activations, found.letters, found.groups
    return absorption_of(coder, x, labels, groups, seeds=seeds)


def check_reads_what_it_writes(coder: SparseCoder, what: str) -> None:
    """Raise `ValueError` for a coder of which codes and directions are not of the same place."""
    if coder.reads != coder.writes or len(coder.blocks) > 1:
        raise ValueError(
            f"{what} needs a coder that writes what it reads; this one reads {coder.reads} and "
            f"writes {coder.writes}."
        )
    check_sized(coder, what)


def absorption_of(
    coder: SparseCoder,
    activations: mx.array,
    letters: np.ndarray,
    groups: np.ndarray,
    *,
    seeds: int = SEEDS,
) -> TaskResult:
    """`absorption` of words whose activations `[n, d_in]` are known; of equal `groups` `[n]` are
    those that must be on one side of the split."""
    x, z = np.array(activations), _codes(coder, activations)
    directions, origin = _decoder(coder), np.array(coder.b_dec, np.float64)
    details: dict[str, dict[str, list[tuple[float, float]]]] = {}
    left_out: dict[str, str] = {}
    for seed in range(seeds):
        train, test = _parts(groups, seed)
        random = random_coder(coder, activations, seed)
        others = _codes(random, activations), _decoder(random)
        for letter in np.unique(letters).tolist():
            y = letters == letter
            if y[test].sum() < LEAST_WORDS:
                left_out.setdefault(letter, f"{y.sum()} words, of which too few are tested")
                continue
            probe = fit_probe(x[train], y[train], balanced=True)
            f1 = quality(probe.decide(x[test]), y[test]).f1
            if f1 <= LEAST_F1:
                left_out[letter] = f"the probe's F1 is {f1:.2f}"
                continue
            hits = test[y[test] & (probe.decide(x[test]) > 0)]
            p = probe.weights / np.linalg.norm(probe.weights)
            totals = (x[hits] - origin) @ p
            pairs = [
                absorbed(codes, rows, p, totals, y, train, test, hits, f1)
                for codes, rows in ((z, directions), others)
            ]
            _note(details.setdefault(letter, {}), *pairs)
    _check_enough(details, left_out)
    figures = {
        letter: {name: Values(*_columns(name, values)) for name, values in of.items()}
        for letter, of in details.items()
        if len(next(iter(of.values()))) == seeds
    }
    if not figures:
        raise ValueError("No letter's probe is good enough under all seeds.")
    settings = {"seeds": seeds, "n_words": len(letters), "letters": [*figures]}
    return TaskResult("absorption", means(figures), figures, left_out, settings)


def absorbed(
    z: np.ndarray,
    directions: np.ndarray,
    p: np.ndarray,
    totals: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    hits: np.ndarray,
    probe_f1: float = 1.0,
) -> Absorbed:
    """Absorption of one label `y` `[n]`: see `absorption`.

    `z` `[n, n_features]`, decoder rows `directions` `[n_features, d]`, `p` `[d]` of norm 1;
    `train`, `test` and `hits` are numbers of examples, `totals` `[n_hits]` what the probe sees of
    the last.
    """
    main, f1 = standing_for(z, y, train, test)
    along = directions @ p
    norms = np.linalg.norm(directions, axis=1)
    cosines = np.divide(along, norms, np.zeros_like(along), where=norms > 0)
    parts = z[hits].astype(np.float64) * along
    top = parts.argmax(axis=1)
    largest = np.take_along_axis(parts, top[:, None], axis=1)[:, 0]
    full = (z[hits][:, main] == 0).all(axis=1) & (totals > 0) & (cosines[top] >= COSINE_OF_ONE)
    full &= largest >= ABSORBED * totals
    of_main = parts[:, main].sum(axis=1)
    may = cosines >= COSINE_OF_SEVERAL
    may[main] = False
    rest = np.where(may, parts, 0.0)
    n = min(ABSORBERS, rest.shape[1])
    others = np.maximum(np.partition(rest, -n, axis=1)[:, -n:], 0).sum(axis=1)
    return Absorbed(
        full=float(full.mean()) if len(hits) else float("nan"),
        fraction=float(_fractions(totals, of_main, others).mean()) if len(hits) else float("nan"),
        splits=len(main),
        probe_f1=probe_f1,
        features_f1=f1,
        n=len(hits),
    )


def _fractions(totals: np.ndarray, of_main: np.ndarray, others: np.ndarray) -> np.ndarray:
    others = np.where((totals > 0) & (others >= ABSORBED * totals), others, 0.0)
    missing = np.maximum(np.minimum(others, totals - of_main), 0.0)
    whole = missing + np.maximum(of_main, 0.0)
    return np.divide(missing, whole, np.zeros_like(totals), where=whole > 0)


def standing_for(
    z: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray
) -> tuple[list[int], float]:
    """The features that stand for a label, and the F1 of a regression on them on what is tested."""
    of_label, of_rest = z[train][y[train]], z[train][~y[train]]
    above = of_label.mean(axis=0, dtype=np.float64) - of_rest.mean(axis=0, dtype=np.float64)
    ranked = np.argsort(-above, kind="stable")[:MOST_SPLIT].tolist()
    main, best, tested = ranked[:1], -np.inf, 0.0
    for k in range(1, len(ranked) + 1):
        chosen = ranked[:k]
        probe = fit_probe(z[train][:, chosen], y[train], balanced=True)
        f1 = quality(probe.decide(z[train][:, chosen]), y[train]).f1
        if f1 <= best + GAIN:
            break
        main, best = chosen, f1
        tested = quality(probe.decide(z[test][:, chosen]), y[test]).f1
    return main, tested


FIGURES = {
    "absorption fraction": "fraction",
    "full absorption": "full",
    "features for a letter": "splits",
    "F1 of the letter's features": "features_f1",
}
PROBE = "F1 of the probe"


def _note(found: dict[str, list[tuple[float, float]]], own: Absorbed, random: Absorbed) -> None:
    for name, attribute in FIGURES.items():
        pair = (float(getattr(own, attribute)), float(getattr(random, attribute)))
        found.setdefault(name, []).append(pair)
    found.setdefault(PROBE, []).append((own.probe_f1, own.probe_f1))


def _columns(name: str, pairs: list[tuple[float, float]]) -> tuple:
    own, random = zip(*pairs, strict=True)
    return own, {} if name == PROBE else {RANDOM: random}, TESTED / (1 - TESTED)


def _check_enough(details: dict, left_out: dict[str, str]) -> None:
    weak = sorted(letter for letter, why in left_out.items() if "F1" in why)
    n = len(set(details) | set(weak))
    if len(set(details) - set(weak)) < max(1.0, LEAST_SHARE * n):
        raise ValueError(
            "The model hardly knows these labels at this site: a probe of the activation has an F1 "
            f"above {LEAST_F1} for {len(set(details) - set(weak))} of {n}, and half are needed. A "
            "first letter is known by larger models only; a labelled set may be asked for instead."
        )


def _parts(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The words that are trained on and those that are tested on, spellings of one together."""
    _, groups = np.unique(groups, return_inverse=True)
    n = int(groups.max()) + 1
    tested = np.zeros(n, bool)
    tested[np.random.default_rng([13, seed]).permutation(n)[: round(TESTED * n)]] = True
    return np.flatnonzero(~tested[groups]), np.flatnonzero(tested[groups])


def _codes(coder: SparseCoder, x: mx.array) -> np.ndarray:
    parts = [np.array(coder.encode(x[i : i + 1024]).astype(mx.float32))
             for i in range(0, len(x), 1024)]  # fmt: skip
    return np.concatenate(parts)


def _decoder(coder: SparseCoder) -> np.ndarray:
    return np.array(coder.W_dec.astype(mx.float32), np.float64)
