"""Why a head looks where it looks: what makes up the score of a query and a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.circuits.attention.score_changes import ScoreChanges
from mlxterp.sae.circuits.attention.score_pairs import Against, QKAttribution
from mlxterp.sae.circuits.attention.score_sources import AttentionScore, visible_keys
from mlxterp.sae.circuits.given import fitting, freezable, place, read_by, token_ids, whole
from mlxterp.sae.circuits.graph.replacement import Replacement
from mlxterp.sae.circuits.nodes import FeatureLabels
from mlxterp.sae.forward_order import precedes
from mlxterp.sae.source import ActivationSource, FreezableSource
from mlxterp.sites import Site


def find_qk_attribution(
    model: ActivationSource | None,
    coders: Mapping[int, BaseSAE] | BaseSAE,
    prompt: str | Sequence[int],
    layer: int,
    head: int,
    query: int = -1,
    key: int | None = None,
    *,
    against: Against = "mean",
    feature_labels: FeatureLabels | None = None,
) -> QKAttribution:
    """Why a head of a layer looks from a `query` position at a `key`, by pairs of sources.

        score = scale q . k = sum over sources i, j of scale q_i . k_j,   q = sum of q_i, k of k_j

    The query and the key are what the head really compares, after norms and rotary embeddings.
    With attention patterns, norm scales and MLPs held, both are sums of what sources write into the
    stream: features of `coders` that fire, the coders' errors, and embeddings. Of an SAE of the
    stream that the layer reads, that are its features at the query and at the key; of transcoders,
    or a cross-layer transcoder, all features before, at any position, through the values of heads.
    `coders` are given by layer; those that the attention is not computed from are left out.

    `key=None` takes the one that gets most attention. The key is set `against` the mean of those
    that the query sees, which is what the softmax heeds, another one, or none (None).

    Raises `ValueError` for coders that do not fit the model or come too late, for a layer without
    softmax attention, a head or positions that there are not, a key that the query does not see,
    and where scores are no such sums: latent attention keeps a part of them in its mask.

    Reference: Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions".
    """
    given = _given(coders)
    source = freezable(fitting(model, given))
    score = _score(source, given, token_ids(source, prompt), layer, head, query, key, against)
    found, *numbers = score.attribution()
    found = replace(found, origin=ScoreChanges(score, *numbers))
    return found if feature_labels is None else found.with_labels(feature_labels)


def _given(coders: Mapping[int, BaseSAE] | BaseSAE) -> dict[int, BaseSAE]:
    """Coders by layer, in order."""
    if isinstance(coders, BaseSAE):
        return {Site.from_string(coders.writes.names[0]).layer or 0: coders}
    if not isinstance(coders, Mapping) or not coders:
        raise ValueError(f"coders must be a coder or {{layer: coder}}, got {coders!r}.")
    return {layer: coders[layer] for layer in sorted(coders)}


def _score(
    source: FreezableSource, coders: Mapping[int, BaseSAE], ids: Sequence[int], layer: int,
    head: int, query: int, key: int | None, against: Against,
) -> AttentionScore:  # fmt: skip
    """Look everything up."""
    attention = source.attention(mx.array([[*ids]]), whole("layer", layer))
    layer = next(iter(attention))
    call, n = attention[layer], len(ids)
    head, query = place("head", head, call.q.shape[1]), place("query", query, n)
    seen = np.flatnonzero(visible_keys(call, head, query))
    key = int(mx.argmax(call.pattern[0, head, query])) if key is None else key
    key = _seen("key", key, n, query, seen)
    weights = np.eye(n, dtype=np.float32)[key]
    if against is not None and len(seen) == 1:
        raise ValueError(
            f"The query at {query} sees one key only, which gets all of its attention: with "
            "against=None its score can be taken apart."
        )
    if against == "mean":
        weights[seen] -= 1 / len(seen)
    elif isinstance(against, str):
        raise ValueError(f"against must be 'mean', a position or None, got {against!r}.")
    elif against is not None:
        against = _seen("against", against, n, query, seen)
        weights[against] -= 1
        if against == key:
            raise ValueError(f"against must be another position than the key, got {key}.")
    before = _before(source, coders, layer)
    replacement = Replacement(source, [*before.values()], ids)
    return AttentionScore(replacement, layer, head, query, key, against, mx.array(weights))


def _seen(name: str, value: Any, count: int, query: int, seen: np.ndarray) -> int:
    """A position that the query sees."""
    position = place(name, value, count)
    if position not in seen:
        raise ValueError(
            f"{name} must be a position that the query at {query} sees, of {seen.min()} to "
            f"{seen.max()}, got {value}."
        )
    return position


def _before(
    source: ActivationSource, coders: Mapping[int, BaseSAE], layer: int
) -> dict[int, BaseSAE]:
    """The coders that write what the attention of a layer is computed from."""
    attention = source.site(layer, "attn")
    earlier = cache(lambda name: precedes(source, name, attention))
    found = {}
    for at, coder in coders.items():
        writes = [b for b in coder.blocks if any(map(earlier, coder.writes.names[b.sites]))]
        reads = [name for block in writes for name in read_by(coder, block)]
        late = [name for name in reads if precedes(source, attention, name)]
        if late:
            raise ValueError(
                f"The coder of layer {at} reads {late[0]}, which comes after the attention of "
                f"layer {layer}: its features are no causes of where a head there looks."
            )
        if writes:
            found[at] = coder
    if not found:
        raise ValueError(
            f"coders must write what the attention of layer {layer} is computed from, such as "
            f"{source.site(layer, 'resid_pre')}; those given write "
            f"{', '.join(name for coder in coders.values() for name in coder.writes.names)}."
        )
    return found
