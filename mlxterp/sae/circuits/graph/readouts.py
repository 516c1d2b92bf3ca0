"""Numbers of a model on a prompt that are traced back: logits, and what features read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.behavior.targets import Edits, Token, find_target
from mlxterp.sae.circuits.derivatives import for_each
from mlxterp.sae.circuits.given import read_by
from mlxterp.sae.circuits.graph.replacement import Replacement, Run
from mlxterp.sae.circuits.nodes import Node
from mlxterp.sae.coder import Block, SparseCoder
from mlxterp.sae.source import ActivationSource

MOST_LOGITS = 10
PROBABILITY = 0.95
TARGETS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Targets:
    """Some nodes of a graph that are read together, by their numbers, and how they are read."""

    numbers: np.ndarray
    run: Run


def target_groups(
    replacement: Replacement, outputs: Run, n_logits: int, numbers: Iterable[int]
) -> Iterator[Targets]:
    """Nodes by what they are read from: all logits, which come after the sources and which
    `outputs` reads, if any is among them; and features of one block of a coder."""
    r, wanted = replacement, np.array(sorted(numbers), int)
    if (wanted >= r.n_sources).any():
        yield Targets(np.arange(r.n_sources, r.n_sources + n_logits), outputs)
    features = wanted[wanted < len(r.features)]
    coders, positions, ids = r.features[features].T
    for i, coder in enumerate(r.coders):
        for block in coder.blocks:
            own = (coders == i) & (ids >= block.features.start) & (ids < block.features.stop)
            for some in _parts(np.flatnonzero(own)):
                run = pre_activations(r.source, coder, block, positions[some], ids[some])
                yield Targets(features[some], run)


def _parts(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), TARGETS_AT_ONCE):
        yield numbers[start : start + TARGETS_AT_ONCE]


def level_of(coder: SparseCoder, feature: int) -> str:
    """The level of a feature in a graph: the first site that it writes."""
    block = next(block for block in coder.blocks if feature < block.features.stop)
    return coder.writes.names[block.sites.start]


def find_logits(
    source: ActivationSource,
    ids: Sequence[int],
    targets: Sequence[Token] | Token | None = None,
) -> tuple[Node, ...]:
    """The logits at the last position that a graph explains: those of the `targets`, or as few of
    the likeliest as have `PROBABILITY` together, at most `MOST_LOGITS`.

    Raises `ValueError` for what is no token, no tokens at all, and one that is named twice.
    """
    if targets is None:
        logits = source.run(mx.array([[*ids]])).output[0, -1].astype(mx.float32)
        chances = np.array(mx.softmax(logits, precise=True))
        order = np.argsort(-chances, kind="stable")[:MOST_LOGITS]
        enough = int(np.searchsorted(np.cumsum(chances[order]), PROBABILITY)) + 1
        chosen = order[:enough].tolist()
        labels = source.to_str_tokens(chosen)
        last = len(ids) - 1
        return tuple(
            Node("logit", "", i, last, float(chances[i]), label=text)
            for i, text in zip(chosen, labels, strict=True)
        )
    given = [targets] if isinstance(targets, str | int | np.integer) else list(targets)
    found = tuple(find_target(source, {}, ids, token).node for token in given)
    if not found or len({node.index for node in found}) < len(found):
        raise ValueError(f"targets must be one or more different tokens, got {targets!r}.")
    return found


def logits_above_mean(source: ActivationSource, ids: Sequence[int]) -> Run:
    """Logits at the last position, each less the mean of all."""
    chosen = mx.array(list(ids))

    def run(tokens: mx.array, edits: Edits) -> mx.array:
        logits = source.run(tokens, edit=dict(edits)).output[:, -1].astype(mx.float32)
        return logits[:, chosen] - logits.mean(axis=-1, keepdims=True)

    return run


def with_slopes_of_head(replacement: Replacement, run: Run, n: int) -> Run:
    """What `run` reads from the logits, with the model's head replaced by its slope.

    The slopes `[n, width]` are those by the last residual stream, at its plain value: a head that
    caps its logits is no affine function of it.
    """
    source, last = replacement.source, last_site(replacement.source)
    zero = mx.zeros_like(source.run(replacement.tokens, capture=last, stop=True)[last])

    def values(delta: mx.array) -> mx.array:
        return run(replacement.tokens, {last: lambda x: x + delta})[0]

    def slope(cotangent: mx.array) -> mx.array:
        return mx.vjp(values, [zero], [cotangent])[1][0][0, -1].astype(mx.float32)

    with source.frozen():
        slopes = for_each(slope, mx.eye(n))
        mx.eval(slopes)

    def linear(tokens: mx.array, edits: Edits) -> mx.array:
        captured = source.run(tokens, capture=last, edit=dict(edits), stop=True)[last]
        return captured[:, -1].astype(mx.float32) @ slopes.T

    return linear


def last_site(source: ActivationSource) -> str:
    """The residual stream after the last layer."""
    return streams(source)[-1]


def streams(source: ActivationSource) -> list[str]:
    """The residual streams after each layer, in order."""
    found = [site for site in source.sites() if site.component == "resid_post"]
    return [str(site) for site in sorted(found, key=lambda site: site.layer)]


def pre_activations(
    source: ActivationSource,
    coder: SparseCoder,
    block: Block,
    positions: np.ndarray,
    features: np.ndarray,
) -> Run:
    """The values of some features of a block at positions, before the activation function:
    `W_enc[features] . x[positions] + b_enc[features]`."""
    names, at = read_by(coder, block), mx.array(positions)
    encoders = coder.W_enc[mx.array(features)].astype(mx.float32)
    biases = coder.b_enc[mx.array(features)].astype(mx.float32)

    def run(tokens: mx.array, edits: Edits) -> mx.array:
        captured = source.run(tokens, capture=names, edit=dict(edits), stop=True)
        x = mx.concatenate([captured[name] for name in names], axis=-1).astype(mx.float32)
        return (x[:, at] * encoders).sum(axis=-1) + biases

    return run
