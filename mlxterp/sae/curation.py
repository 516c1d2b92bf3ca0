"""Which documents to harvest: no duplicates, no boilerplate, and as diverse as can be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from mlxterp.sae.cleaning import (
    REASONS,
    Ledger,
    deduplicated,
    read_documents,
    without_boilerplate,
)
from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.diversity import (
    Objective,
    Pieces,
    axes,
    by_activations,
    by_loss,
    choose,
    clusters,
    variance,
)
from mlxterp.sae.documents import Document
from mlxterp.sae.source import ActivationSource

__all__ = ["REASONS", "CurationReport", "DiversityMetric", "curate"]

DiversityMetric = Literal["activation_variance", "kmeans", "loss"]
GROUPS = {"activation_variance": "axes", "kmeans": "clusters", "loss": "loss quantiles"}
RIDGE = 0.1  # of the mean variance along an axis


@dataclass(frozen=True)
class CurationReport:
    """What was kept and what was dropped and why, in documents and in tokens.

    What is seen is what is kept and what is dropped, added up; a document is dropped where all of
    it is. `covered` is `exp(entropy)` of how the tokens chosen spread over `n_groups` (principal
    axes by their variance, clusters, loss quantiles), the number of groups that an even spread
    would take; `covered_at_random` is that of as many tokens drawn from the same candidates.
    """

    diversity_metric: str
    documents_seen: int
    documents_kept: int
    documents_dropped: dict[str, int]
    tokens_seen: int
    tokens_kept: int
    tokens_dropped: dict[str, int]
    covered: float
    covered_at_random: float
    n_groups: int

    def to_dict(self) -> dict[str, Any]:
        """All figures, as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        dropped = "".join(
            f"\n  {reason.replace('_', ' ')}: {tokens:,} tokens, {documents:,} whole documents"
            for reason, tokens in self.tokens_dropped.items()
            if (documents := self.documents_dropped[reason]) or tokens
        )
        return (
            f"{self.tokens_kept:,} of {self.tokens_seen:,} tokens kept, from "
            f"{self.documents_kept:,} of {self.documents_seen:,} documents; dropped:"
            f"{dropped or ' none'}\n"
            f"spread evenly over {self.covered:.1f} of {self.n_groups} "
            f"{GROUPS[self.diversity_metric]}; at random {self.covered_at_random:.1f}"
        )


def curate(
    source: ActivationSource,
    documents: Iterable[Document],
    columns: Columns,
    *,
    context: int,
    max_tokens: int | None,
    diversity_metric: DiversityMetric = "loss",
    min_activation_norm: float = 0.0,
    deduplicate: bool = True,
    pool: float = 4,
    seed: int = 0,
    verbose: bool = False,
) -> tuple[Corpus, CurationReport]:
    """The `max_tokens` most diverse tokens of the first `pool * max_tokens`; `None`: all.

    With `deduplicate` whole documents that are duplicates or boilerplate, and common lines, go
    first, see `deduplicated` and `without_boilerplate`. The rest is cut into pieces of up to a
    context each. Activations shorter than `min_activation_norm` times the median norm, outliers
    and those that are not finite do not count, and pieces of which fewer than half count are
    dropped. Of what remains, pieces are chosen one by one, each time the one whose tokens add
    most to

        F = sum_j g(E_j),  E_j = sum over the tokens chosen of phi_j(token)

    per token and to first order, among random candidates (arXiv 1409.7938). `g` is concave, so
    that what is covered already adds little: F is submodular.

    - `"activation_variance"`: `log det(I + S / ridge)` of the covariance `S`, with only the
      diagonal of `S` in the principal axes of the pool, which bounds it from above (Hadamard):
      `phi_j` is the square along axis j, `g = log(1 + E / (n ridge))` with `n` the tokens wanted
      and a ridge of a tenth of the mean variance along an axis. Axes beyond 256 count as one.
    - `"kmeans"`: `phi` is the cluster of a token (k-means over a sample), `g = sqrt`, so that
      clusters fill evenly (SemDeDup and D4 thin out dense ones, arXiv 2303.09540, 2308.12284).
    - `"loss"`: `phi` is which of 20 quantiles the model's mean loss on the piece is in, `g = sqrt`.
      The lowest and highest twentieths are dropped: repetition that the model predicts by
      copying, and noise that it cannot predict; the middle trains best (arXiv 2309.04564).

    Chosen pieces that follow one another are joined again, and those of a document stay one
    document. Activations are looked at one forward pass at a time. Raises `ValueError` for
    arguments out of range and where nothing is left, `ImportError` where `deduplicate` lacks
    datasketch.
    """
    _check(diversity_metric, max_tokens, min_activation_norm, pool)
    rng = np.random.default_rng(seed)
    ledger = Ledger()
    limit = math.inf if max_tokens is None else pool * max_tokens
    read, bos_id = read_documents(source, documents, limit, ledger)
    if deduplicate:
        read = without_boilerplate(source, deduplicated(read, ledger), ledger)
    _check_left(read, ledger)
    pieces = _cut([ids for _, ids in read], context - (bos_id is not None))
    everything = Corpus.pack(pieces.ids, context, bos_id, source.special_token_ids)
    budget = int(pieces.sizes.sum()) if max_tokens is None else max_tokens
    reasons = np.full(len(pieces.sizes), "not_needed", dtype="<U16")
    objective = None
    if diversity_metric == "loss":
        objective, extreme = by_loss(source, everything, pieces.sizes, verbose)
        reasons[extreme] = "extreme_loss"
    if objective is None or min_activation_norm:
        make_phi = clusters(rng) if diversity_metric == "kmeans" else axes
        features, counts = by_activations(
            source, everything, columns, make_phi, min_activation_norm, len(reasons), verbose
        )
        reasons[2 * counts < pieces.sizes] = "low_norm"
        if objective is None:
            log = diversity_metric == "activation_variance"
            ridge = RIDGE * budget * variance(features, counts)
            objective = Objective(features, *((ridge, 1.0) if log else (float(context), 0.5)))
    left = np.flatnonzero(reasons == "not_needed")
    chosen = left[choose(objective.take(left), pieces.sizes[left], budget, rng)]
    drawn = _random(pieces.sizes[left], budget, rng)
    excess = max(0, int(pieces.sizes[chosen].sum()) - budget)
    _note(pieces, chosen, excess, reasons, ledger)
    _check_left(chosen, ledger)
    report = CurationReport(
        diversity_metric=diversity_metric,
        documents_seen=ledger.documents_seen,
        documents_kept=ledger.documents_seen - sum(ledger.documents.values()),
        documents_dropped=ledger.documents,
        tokens_seen=ledger.tokens_seen,
        tokens_kept=ledger.tokens_seen - sum(ledger.tokens.values()),
        tokens_dropped=ledger.tokens,
        covered=_spread(objective.features[chosen]),
        covered_at_random=_spread(objective.features[left[drawn]]),
        n_groups=objective.features.shape[1],
    )
    return _joined(pieces, chosen, excess, everything), report


def _check(metric: Any, max_tokens: Any, min_activation_norm: Any, pool: Any) -> None:
    whole = isinstance(max_tokens, (int, np.integer)) and not isinstance(max_tokens, bool)
    enough = max_tokens is None or (whole and max_tokens >= 1)
    choices = get_args(DiversityMetric)
    checks = {
        "diversity_metric": (metric, f"one of {choices}", metric in choices),
        "max_tokens": (max_tokens, "None or a whole number >= 1", enough),
        "min_activation_norm": (
            min_activation_norm, "in [0, 1), a share of the median norm",
            _is_number(min_activation_norm) and 0 <= min_activation_norm < 1,
        ),
        "pool": (pool, "a number >= 1", _is_number(pool) and pool >= 1),
    }  # fmt: skip
    for field, (value, allowed, holds) in checks.items():
        if not holds:
            raise ValueError(f"{field} must be {allowed}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_left(left: Any, ledger: Ledger) -> None:
    if not len(left):
        dropped = {reason: n for reason, n in ledger.documents.items() if n}
        raise ValueError(f"Curation leaves no document of {ledger.documents_seen}: {dropped}.")


def _cut(bodies: list[np.ndarray], room: int) -> Pieces:
    """Each document in as few parts of equal length as have room."""
    if room < 1:
        raise ValueError(f"context must have room for a token, got {room} beside the first one.")
    parts = [np.array_split(body, math.ceil(len(body) / room)) for body in bodies]
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    ids = [piece for part in parts for piece in part]
    return Pieces(ids, owners, np.array([len(piece) for piece in ids]))


def _random(sizes: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(len(sizes))
    return order[: 1 + np.searchsorted(sizes[order].cumsum(), budget)]


def _spread(features: np.ndarray) -> float:
    """`exp(entropy)` of the shares of the groups, 0 where all are empty."""
    total = features.sum(axis=0, dtype=np.float64)
    if not total.any():
        return 0.0
    shares = total[total > 0] / total.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _note(
    pieces: Pieces, chosen: np.ndarray, excess: int, reasons: np.ndarray, ledger: Ledger
) -> None:
    """Count the pieces that are not chosen; a document goes for its last piece's reason."""
    if excess:
        ledger.drop("not_needed", excess, 0)
    kept = set(pieces.owners[chosen].tolist())
    whole: dict[int, str] = {}
    for i in np.setdiff1d(np.arange(len(pieces.ids)), chosen):
        reason, owner = str(reasons[i]), int(pieces.owners[i])
        ledger.drop(reason, int(pieces.sizes[i]), 0)
        # Of several reasons, that it was not needed is the one that kept it longest.
        if owner not in kept and whole.get(owner) != "not_needed":
            whole[owner] = reason
    for reason in whole.values():
        ledger.drop(reason, 0)


def _joined(pieces: Pieces, chosen: np.ndarray, excess: int, whole: Corpus) -> Corpus:
    """The chosen pieces in their order, the last chosen cut; a document's are one document."""
    runs: list[list[np.ndarray]] = []
    owners: list[int] = []
    before = -2
    for i in sorted(chosen.tolist()):
        cut = i == chosen[-1] and excess > 0
        ids = pieces.ids[i][: len(pieces.ids[i]) - excess] if cut else pieces.ids[i]
        if i == before + 1 and owners[-1] == pieces.owners[i]:
            runs[-1].append(ids)
        else:
            runs.append([ids])
            owners.append(int(pieces.owners[i]))
        before = -2 if cut else i
    packed = Corpus.pack(map(np.concatenate, runs), whole.context, whole.bos_id, whole.special)
    _, numbers = np.unique(owners, return_inverse=True)
    found = np.where(packed.owners < 0, -1, numbers[packed.owners]).astype(np.int32)
    return replace(packed, owners=found)
