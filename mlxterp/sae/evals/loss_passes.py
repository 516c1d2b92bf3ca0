"""The passes in which a language model's loss is found with sites replaced, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.evals.measuring import group_numbers
from mlxterp.sae.evals.model_loss import Ablation, ModelLoss
from mlxterp.sae.evals.noise import SURE, Score, redraw, spread_of
from mlxterp.sae.evals.replacing import ABLATIONS, Block, Donors, Replacement, Replacing, blocks
from mlxterp.sae.source import ActivationSource

LEAST_GAP = 0.01  # nats that an ablation must cost
GUESSING = 0.98  # of the loss of a uniform guess

CLEAN, SPLICED, DIVERGED = 0, 1, 2  # columns of what is drawn; two of each ablation follow

Draws = dict[str, np.ndarray]
Formula = Callable[[np.ndarray], np.ndarray]


def losses_of(
    coders: Sequence[SparseCoder],
    source: ActivationSource,
    corpus: Corpus,
    donors: Donors,
    max_tokens: int | None,
    seed: int,
    verbose: bool = False,
) -> list[tuple[ModelLoss, Draws]]:
    """The report on each of some coders over the first contexts of a corpus, which is in random
    order. What they have in common, the clean model and ablations of the same sites, is run once.
    """
    parts = [_parts(coder) for coder in coders]
    replacements = dict.fromkeys(
        f for i, sites in enumerate(parts) for s in sites for f in _all(i, s)
    )
    replacing = Replacing(coders, source, donors, seed)
    n_vocabulary, parts_of = blocks(source, corpus)
    shown = tqdm(parts_of, desc="loss", unit="pass", disable=not verbose)
    sums = _sums(replacing, [*replacements], corpus, shown, max_tokens)
    found = []
    for i, sites in enumerate(parts):
        (whole, draws), *alone = (_report(sums, i, names, n_vocabulary) for names in sites)
        by_site = {name: one for (name,), (one, _) in zip(sites[1:], alone, strict=True)}
        found.append((replace(whole, by_site=by_site), draws))
    return found


def _parts(coder: SparseCoder) -> list[tuple[str, ...]]:
    """The sites that are replaced together: all, and each alone where there are several."""
    sites = coder.writes.names
    return [sites, *((name,) for name in sites if len(sites) > 1)]


def _all(coder: int, sites: tuple[str, ...]) -> list[Replacement]:
    ablated = [Replacement(sites, ablation=how) for how in ABLATIONS]
    return [Replacement(sites), Replacement(sites, coder=coder), *ablated]


def _sums(
    replacing: Replacing,
    replacements: Sequence[Replacement],
    corpus: Corpus,
    parts: Iterable[Block],
    max_tokens: int | None,
) -> dict[Replacement, np.ndarray]:
    """Tokens, summed losses and divergences of each replacement, by group, `[n_groups, 3]`; groups
    without tokens are left out."""
    groups = group_numbers(corpus)
    sums = np.zeros((len(replacements), int(groups.max()) + 1, 3))
    for part, tokens, counts in parts:
        of_group = groups[part][:, 1:]
        predicted = of_group >= 0
        for i, outcome in enumerate(replacing.outcomes(replacements, tokens, counts)):
            values = np.stack([np.ones_like(outcome.loss), outcome.loss, outcome.kl], axis=-1)
            np.add.at(sums[i], of_group[predicted], values[predicted])
        if max_tokens is not None and sums[0, :, 0].sum() >= max_tokens:
            break
    known = sums[0, :, 0] > 0
    if not known.any():
        raise ValueError("The loss needs at least one token that another one predicts.")
    return dict(zip(replacements, sums[:, known], strict=True))


def _report(
    sums: Mapping[Replacement, np.ndarray], coder: int, sites: tuple[str, ...], n_vocabulary: int
) -> tuple[ModelLoss, Draws]:
    clean, spliced, *ablated = (sums[replacement] for replacement in _all(coder, sites))
    n_groups = len(clean)
    every = np.concatenate([clean[:, :2], spliced[:, 1:], *(x[:, 1:] for x in ablated)], axis=1)
    draws = redraw(every, lambda totals: totals[:, 1:] / totals[:, :1])
    values = every[:, 1:].sum(axis=0) / every[:, 0].sum()

    def score(formula: Formula) -> Score:
        return Score(float(formula(values[None])[0]), spread_of(formula(draws), n_groups))

    guess = math.log(n_vocabulary)
    untrained = ""
    if values[0] > GUESSING * guess:
        untrained = (
            f"the model predicts no better than a uniform guess ({values[0]:.2f} nats; a guess "
            f"among {n_vocabulary:,} tokens has {guess:.2f})"
        )
    ablations = {}
    for i, how in enumerate(ABLATIONS):
        loss, kl = 3 + 2 * i, 4 + 2 * i
        gaps = score(lambda x, at=loss: x[:, at] - x[:, CLEAN]), score(lambda x, at=kl: x[:, at])
        shares = (
            lambda x, at=loss: (x[:, at] - x[:, SPLICED]) / (x[:, at] - x[:, CLEAN]),
            lambda x, at=kl: (x[:, at] - x[:, DIVERGED]) / x[:, at],
        )
        recovered = [
            Score(None, reason=reason) if reason else score(share)
            for share, reason in zip(
                shares, (untrained or _too_small(how, gap) for gap in gaps), strict=True
            )
        ]
        ablations[how] = Ablation(score(lambda x, at=loss: x[:, at]), gaps[1], *recovered)
    report = ModelLoss(
        clean=score(lambda x: x[:, CLEAN]),
        spliced=score(lambda x: x[:, SPLICED]),
        difference=score(lambda x: x[:, SPLICED] - x[:, CLEAN]),
        kl=score(lambda x: x[:, DIVERGED]),
        ablations=ablations,
        n_tokens=int(every[:, 0].sum()),
    )
    difference = draws[:, SPLICED] - draws[:, CLEAN]
    return report, {"difference": difference, "kl": draws[:, DIVERGED]}


def _too_small(how: str, gap: Score) -> str:
    """Why a share of what an ablation costs would say nothing; empty where it does."""
    if float(gap) >= max(LEAST_GAP, SURE * (gap.spread or 0)):
        return ""
    spread = "" if gap.spread is None else f" ± {gap.spread:.4f}"
    return f"ablation ({how}) costs {float(gap):+.4f}{spread} nats, too little to divide by"
