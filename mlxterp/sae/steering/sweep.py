"""Measure the response to steering at several strengths, beside directions that mean nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.corpus import encoded
from mlxterp.sae.features.logit_effects import decoder_rows, logit_directions, written
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.steering.edits import Edit, Features, feature_strengths, steering_edit
from mlxterp.sae.steering.report import Response, SteeringReport, of_one_model

TOKENS_PER_PASS = 1024
FEATURES_PER_PASS = 256
DIFFERENCE = "difference of means"
LEAST = -1e30  # a log-probability of which the exponential is 0, and differences are finite
Rows = list[list[int]]
Direction = dict[Any, np.ndarray]  # by site


def strength_sweep(
    coder: SparseCoder,
    source: ActivationSource,
    features: Features,
    texts: Sequence[Any],
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0),
    *,
    targets: Sequence[str | int] | None = None,
    n_targets: int = 5,
    n_random: int = 4,
    positive: Sequence[Any] = (),
    negative: Sequence[Any] = (),
    context_length: int = 128,
    seed: int = 0,
    **options: Any,
) -> SteeringReport:
    """What steering with features does to the predictions on texts, at several strengths.

    The `targets` should become likelier: texts of one token or ids, by default the `n_targets`
    tokens that the features' decoder rows promote most. Beside them stand the divergence from the
    plain predictions, the perplexity of the texts, and all the same for `n_random` random
    directions whose norm is that of the change itself, at every position. `positive` and `negative`
    texts give one more direction of that norm: the difference of their mean activations.

    Texts, or lists of token ids, are read up to `context_length` tokens. Padding and special tokens
    are not scored. `options` are those of `steering_edit`. Raises `ValueError` where there is no
    text, strength or target, for a target that is not one token, and for features that write
    several models where no site is named.

    Reference: Wu et al. 2025, arXiv 2501.17148 (difference of means as the baseline).
    """
    if not len(strengths) or len(set(strengths)) < len(strengths):
        raise ValueError(f"strengths must be one or more, each once, got {list(strengths)}.")
    given = [steering_edit(coder, features, s, **options) for s in strengths]
    names = [name for name in coder.writes.names if name in given[0]]
    model, sites = written(coder, source, names)
    edits = [of_one_model(source, edit)[1] for edit in given]
    if targets is None:
        ids = promoted(coder, source, features, n_targets, names)
    else:
        ids = [_token_id(model, target) for target in targets]
    if not ids:
        raise ValueError("targets must be at least one token.")
    directions = _random_directions(model, sites.values(), n_random, seed)
    if len(positive) or len(negative):
        directions[DIFFERENCE] = _difference(
            model, sites.values(), _rows(model, positive, context_length),
            _rows(model, negative, context_length),
        )  # fmt: skip
    (row,) = decoder_rows(coder, [feature_strengths(coder, features)])
    rows = {inner: coder.writes.take(row, (name,)) for name, inner in sites.items()}
    arms = [{}, *edits] + [
        {**edit, **{site: _turned(edit[site], rows[site], along[site]) for site in rows}}
        for along in directions.values()
        for edit in edits
    ]
    plain, *found = _measure(model, _rows(model, texts, context_length), arms)
    responses = [
        _response(name, found[i * len(strengths) :][: len(strengths)], plain, ids)
        for i, name in enumerate(("steered", *directions))
    ]
    return SteeringReport(
        features=feature_strengths(coder, features),
        strengths=tuple(map(float, strengths)),
        targets=tuple(model.to_str_tokens([i])[0] for i in ids),
        n_tokens=plain.n_predicted,
        logprob=float(plain.logprobs[ids].mean()),
        perplexity=plain.perplexity,
        steered=responses[0],
        random=tuple(r for r in responses[1:] if r.name != DIFFERENCE),
        difference=next((r for r in responses[1:] if r.name == DIFFERENCE), None),
    )


def peaked_features(
    coder: SparseCoder,
    source: ActivationSource,
    firing_rates: np.ndarray,
    n: int = 10,
    *,
    token: str | int | None = None,
    rates: tuple[float, float] = (0.001, 0.05),
    site: str | None = None,
) -> list[int]:
    """The features to steer with: those whose effect on one token's logit stands out most.

    That is `(logit - mean) / sd` over the vocabulary, of the token, no special one, that each
    promotes most or of the `token` given, read by the model's final norm and head. Only features
    that fire on a share of the tokens within `rates` are considered; fewer than `n` are found where
    there are not more.
    """
    model, (low, high) = written(coder, source, site)[0], rates
    chosen = None if token is None else _token_id(model, token)
    candidates = np.flatnonzero((firing_rates >= low) & (firing_rates <= high))
    scores = np.zeros(len(candidates))
    for start in range(0, len(candidates), FEATURES_PER_PASS):
        some = candidates[start : start + FEATURES_PER_PASS]
        logits = logit_directions(coder, source, some.tolist(), site)
        mean, sd = logits.mean(axis=1), logits.std(axis=1)
        logits[:, [i for i in model.special_token_ids if i < logits.shape[1]]] = -np.inf
        peaks = logits.max(axis=1) if chosen is None else logits[:, chosen]
        scores[start : start + len(some)] = (peaks - mean) / sd
    return candidates[np.argsort(-scores, kind="stable")[:n]].tolist()


def promoted(
    coder: SparseCoder,
    source: ActivationSource,
    features: Features,
    n: int,
    sites: str | Sequence[str] | None = None,
) -> list[int]:
    """The `n` tokens, special ones left out, that the decoder rows of features promote most, summed
    over the sites and read by the model's final norm and head."""
    (logits,) = logit_directions(coder, source, [feature_strengths(coder, features)], sites)
    special = written(coder, source, sites)[0].special_token_ids
    ids = np.argsort(-logits, kind="stable").tolist()
    return [i for i in ids if i not in special][:n]


def _token_id(model: ActivationSource, target: str | int) -> int:
    if not isinstance(target, str):
        if target < 0:
            raise ValueError(f"A target must be a token id of 0 or more, got {target}.")
        return int(target)
    ids = [i for i in model.encode_batch([target])[0] if i not in model.special_token_ids]
    if len(ids) != 1:
        raise ValueError(
            f"A target must be one token, and {target!r} is {len(ids)}: {model.to_str_tokens(ids)}."
        )
    return ids[0]


def _rows(model: ActivationSource, texts: Sequence[Any], length: int) -> Rows:
    given = [texts] if isinstance(texts, str) else texts
    rows = [[int(i) for i in ids[:length]] for ids in encoded(model, given)]
    if not any(len(row) > 1 for row in rows):
        raise ValueError("texts must hold at least one of two or more tokens.")
    return rows


def _batches(rows: Rows) -> Iterator[Rows]:
    batch: Rows = []
    for row in rows:
        if batch and max(map(len, [*batch, row])) * (len(batch) + 1) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _counts(model: ActivationSource, batch: Rows) -> tuple[mx.array, mx.array]:
    """The padded token ids `[B, S]`, and which of them are no padding and not special."""
    width = max(map(len, batch))
    ids = np.array([row + [-1] * (width - len(row)) for row in batch], np.int32)
    counts = ~np.isin(ids, [-1, *model.special_token_ids])
    return mx.array(np.maximum(ids, 0)), mx.array(counts.tolist())


def _random_directions(
    model: ActivationSource, sites: Collection[Any], n: int, seed: int
) -> dict[str, Direction]:
    rng = np.random.default_rng(seed)
    return {
        f"random {i + 1}": {site: rng.normal(size=model.width(site)) for site in sites}
        for i in range(n)
    }


def _difference(
    model: ActivationSource, sites: Collection[Any], positive: Rows, negative: Rows
) -> Direction:
    means = [_means(model, sites, rows) for rows in (positive, negative)]
    return {site: means[0][site] - means[1][site] for site in sites}


def _means(model: ActivationSource, sites: Collection[Any], rows: Rows) -> Direction:
    """The mean activation at each site over the tokens that count."""
    totals, n = {site: np.zeros(model.width(site)) for site in sites}, 0
    for batch in _batches(rows):
        captured = model.run(batch, capture=[*sites], stop=True)
        counts = _counts(model, batch)[1]
        n += int(np.array(counts).sum())
        for site in sites:
            x = mx.where(counts[..., None], captured[site].astype(mx.float32), 0)
            totals[site] += np.array(x.sum(axis=(0, 1)))
    return {site: total / max(1, n) for site, total in totals.items()}


def _turned(edit: Edit, row: mx.array, direction: np.ndarray) -> Edit:
    """An edit by as much as `edit`, which goes along a decoder row or against it, at every
    position, but along another direction or against that."""
    unit = mx.array(direction / np.linalg.norm(direction), dtype=mx.float32)

    def turned(x: mx.array, context: Any = None) -> mx.array:
        real = x.astype(mx.float32)
        change = edit(x, context).astype(mx.float32) - real
        norm = mx.linalg.norm(change, axis=-1, keepdims=True)
        sign = mx.sign((change * row).sum(axis=-1, keepdims=True))
        return mx.where(norm > 0, (real + sign * norm * unit).astype(x.dtype), x)

    return turned


@dataclass
class _Sums:
    """Sums over tokens of what a pass predicts."""

    logprobs: Any = 0.0  # [vocabulary]
    kl: float = 0.0
    loss: float = 0.0
    n: int = 0
    n_predicted: int = 0

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss / max(1, self.n_predicted)))

    def add(self, logprobs: mx.array, plain: mx.array, tokens: mx.array, counts: mx.array) -> None:
        """Log-probabilities `[B, S, vocabulary]` of this pass and of the plain one."""
        here = counts[..., None]
        total = mx.where(here, logprobs, 0).sum(axis=(0, 1))
        kl = mx.where(here, mx.exp(plain) * (plain - logprobs), 0).sum()
        chosen = mx.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        loss = mx.where(counts[:, 1:], -chosen, 0).sum()
        sums = mx.stack([kl, loss, counts.sum(), counts[:, 1:].sum()])
        mx.eval(total, sums)
        kl, loss, n, n_predicted = np.array(sums, np.float64).tolist()
        self.logprobs = self.logprobs + np.array(total, np.float64)
        self.kl, self.loss = self.kl + kl, self.loss + loss
        self.n, self.n_predicted = self.n + int(n), self.n_predicted + int(n_predicted)

    def per_token(self) -> _Sums:
        n = max(1, self.n)
        return _Sums(self.logprobs / n, self.kl / n, self.loss, self.n, self.n_predicted)


def _measure(model: ActivationSource, rows: Rows, arms: Sequence[Mapping]) -> list[_Sums]:
    """What the model predicts with each of several edits, the first of which is none."""
    sums = [_Sums() for _ in arms]
    for batch in _batches(rows):
        tokens, counts = _counts(model, batch)
        plain = None
        for arm, total in zip(arms, sums, strict=True):
            logits = model.run(batch, edit=arm).output.astype(mx.float32)
            logprobs = mx.maximum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), LEAST)
            plain = logprobs if plain is None else plain
            total.add(logprobs, plain, tokens, counts)
    return [total.per_token() for total in sums]


def _response(name: str, found: Sequence[_Sums], plain: _Sums, ids: Sequence[int]) -> Response:
    changes = np.stack([sums.logprobs - plain.logprobs for sums in found])
    others = np.delete(np.abs(changes), ids, axis=1)
    return Response(
        name=name,
        effects=changes[:, ids].mean(axis=1),
        others=others.mean(axis=1),
        kl=np.array([sums.kl for sums in found]),
        perplexities=np.array([sums.perplexity for sums in found]),
    )
