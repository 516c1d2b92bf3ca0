"""What the circuit of a behaviour is about: a number that a model computes from a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.given import read_by, site_of
from mlxterp.sae.circuits.nodes import Node
from mlxterp.sae.coder import SparseCoder, check_feature
from mlxterp.sae.source import ActivationSource

Token = str | int
Metric = Callable[[mx.array], mx.array]
Edits = Mapping[str, Callable[..., mx.array]]


@dataclass(frozen=True, eq=False)
class Target:
    """A number of each row of a batch: `measure(tokens [B, S], edits) -> [B]`.

    `layer` is that of the coder whose feature it is, None where it is one of logits.
    """

    node: Node
    text: str
    measure: Callable[[mx.array, Edits], mx.array]
    layer: int | None = None


def find_target(
    source: ActivationSource,
    coders: Mapping[int, SparseCoder],
    ids: Sequence[int],
    target: Token | tuple[Token, Token] | None = None,
    feature: tuple[int, int] | None = None,
    metric: Metric | None = None,
    position: int = -1,
) -> Target:
    """The target that is asked for; raises `ValueError` for more than one, and for a token, a
    feature or a position that there is not."""
    if sum(x is not None for x in (target, feature, metric)) > 1:
        raise ValueError("Give one of target, feature and metric: a circuit is that of one number.")
    if not -len(ids) <= position < len(ids):
        raise ValueError(
            f"position must be in [{-len(ids)}, {len(ids) - 1}] in a prompt of {len(ids)} tokens, "
            f"got {position}."
        )
    position %= len(ids)
    if feature is not None:
        return _of_feature(source, coders, feature, position)
    if metric is not None:
        node = Node("logit", "", -1, position, label="metric")
        return Target(node, "metric", _of_logits(source, metric))
    return _of_tokens(source, ids, target, position)


def _of_feature(
    source: ActivationSource,
    coders: Mapping[int, SparseCoder],
    feature: tuple[int, int],
    position: int,
) -> Target:
    """The pre-activation of a feature."""
    if not isinstance(feature, Sequence) or len(feature) != 2:
        raise ValueError(f"feature must be (layer, feature_id), got {feature!r}.")
    layer, feature_id = feature
    if layer not in coders:
        raise ValueError(f"feature must be of a layer of saes, {[*coders]}, got {feature!r}.")
    coder = coders[layer]
    feature_id = check_feature(coder, feature_id)
    block = next(b for b in coder.blocks if feature_id < b.features.stop)
    names = read_by(coder, block)
    row, bias = coder.W_enc[feature_id].astype(mx.float32), coder.b_enc[feature_id]

    def measure(tokens: mx.array, edits: Edits) -> mx.array:
        captured = source.run(tokens, capture=names, edit=edits, stop=True)
        x = mx.concatenate([captured[name][:, position] for name in names], axis=-1)
        return x.astype(mx.float32) @ row + bias.astype(mx.float32)

    node = Node("feature", site_of(coder), feature_id, position)
    return Target(node, f"feature {feature_id} of layer {layer}", measure, layer)


def _of_logits(source: ActivationSource, metric: Metric) -> Callable[[mx.array, Edits], mx.array]:
    of_rows = row_by_row(metric)
    return lambda tokens, edits: of_rows(source.run(tokens, edit=edits).output)


def row_by_row(metric: Metric) -> Callable[[mx.array], mx.array]:
    """The metric of each row of logits `[B, S, vocab]`, `[B]`; the metric is given one row at a
    time and must return an array of one number, else a `ValueError` says what it did."""

    def measure(logits: mx.array) -> mx.array:
        values = [metric(logits[i : i + 1]) for i in range(len(logits))]
        for value in values:
            if not isinstance(value, mx.array) or value.size != 1:
                what = f"shape {value.shape}" if isinstance(value, mx.array) else repr(value)
                raise ValueError(f"metric(logits) must return an array of one number, got {what}.")
        return mx.stack([value.reshape(()).astype(mx.float32) for value in values])

    return measure


def _of_tokens(
    source: ActivationSource,
    ids: Sequence[int],
    target: Token | tuple[Token, Token] | None,
    position: int,
) -> Target:
    """The logit of a token, by default of the likeliest, or the first less the second of two."""
    logits = source.run(mx.array([[*ids]])).output[0, position].astype(mx.float32)
    if target is None:
        target = int(mx.argmax(logits))
    wanted = target if isinstance(target, (tuple, list)) else (target,)
    if len(wanted) not in (1, 2):
        raise ValueError(f"target must be a token or a pair of tokens, got {target!r}.")
    found = [token_id(source, token, logits.shape[-1]) for token in wanted]
    if len(set(found)) < len(found):
        raise ValueError(f"target must be a pair of different tokens, got {target!r}.")
    texts = source.to_str_tokens(found)
    signs = mx.array([1.0, -1.0][: len(found)])

    def measure(tokens: mx.array, edits: Edits) -> mx.array:
        out = source.run(tokens, edit=edits).output[:, position, mx.array(found)]
        return out.astype(mx.float32) @ signs

    one = len(found) == 1
    chance = float(mx.softmax(logits)[found[0]]) if one else 0.0
    label = texts[0] if one else f"{texts[0]} − {texts[1]}"
    text = f"logit of {texts[0]!r}" if one else f"logit of {texts[0]!r} less that of {texts[1]!r}"
    return Target(Node("logit", "", found[0], position, chance, label=label), text, measure)


def token_id(source: ActivationSource, token: Any, size: int, name: str = "target") -> int:
    """The id of a token of `size` that is given as text or by its id; raises `ValueError`, in which
    it is called `name`, for what is no single token."""
    if isinstance(token, str):
        return _token_of_text(source, token, size, name)
    if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
        raise ValueError(f"{name} must be a token, as text or by its id, got {token!r}.")
    if not 0 <= token < size:
        raise ValueError(f"{name} must be the id of a token, in [0, {size - 1}], got {token}.")
    return int(token)


def _token_of_text(source: ActivationSource, text: str, size: int, name: str) -> int:
    """The one token that a text is, in itself or, as some tokenizers add a space, anywhere."""
    pieces = []
    if text:
        special = source.special_token_ids
        ids = [i for i in source.encode_batch([text])[0] if i not in special]
        pieces = source.to_str_tokens(ids)
        if pieces == [text]:
            return ids[0]
        every = source.to_str_tokens(range(size))
        if text in every:
            return every.index(text)
    raise ValueError(
        f"{name} must be one token, got {text!r}, which is {len(pieces)}: {pieces}. Give one of "
        "them, with its space where it has one, or the id of a token."
    )
