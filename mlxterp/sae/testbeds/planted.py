"""Features that drive features of the next layer, by weights that are stated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import mlx.nn as nn
import numpy as np

from mlxterp.sae.sae import SAE
from mlxterp.sae.testbeds.handmade import (
    LEAST,
    MOST,
    WordTokenizer,
    directions,
    llama,
    residual_sae,
    set_embeddings,
    set_neurons,
    token_ids,
    transcoder,
)
from mlxterp.sae.testbeds.handmade import array as to_array
from mlxterp.sae.transcoder import Transcoder

Path = Literal["residual", "mlp", "attention"]
Method = Literal["gradient", "integrated_gradients", "ablation"]

ZERO_DIGITS = 6  # what rounds to 0 is meant to be 0

# Row v: what word v starts with. Feature 3 occurs beside feature 2 only, which it weakens later.
STARTS = [
    [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1],
    [1, 0.5, 0, 0], [0, 2, 1, 0], [2, 0, 1, 0.5], [0, 0, 2, 1],
]  # fmt: skip
# [layer][feature that is driven][feature that drives]
MLP = [
    [[1, 0, 0, 0], [0.5, 1, 0, 0], [0, 0, 2, 0], [0, 0, 1, 0]],
    [[1, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    [[0.5, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0.5]],
]
RESIDUAL = [
    [[0, 0, 0, 0], [-0.25, 0, 0, 0], [0, 0, 0, -0.5], [0, 0, 0, 1]],
    [[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, -0.25], [0, 0, 0, 0]],
    [[0, 0, 0, 0.5], [-0.125, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
]
ATTENTION = [
    np.zeros((4, 4)),
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
    [[0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
]


@dataclass(frozen=True)
class PlantedEdge:
    """Feature `target` of level `level + 1` grows by `weight` per unit of feature `source` of
    `level`: along the residual stream, through an MLP, or by attention, which takes the mean of the
    source over the tokens so far."""

    level: int
    source: int
    target: int
    weight: float
    path: Path


@dataclass(frozen=True, eq=False)
class PlantedCircuit:
    """A llama whose features drive each other in a known way, and the coders of these features.

    There are `n_layers + 1` levels of `n_features` features. The embedding holds those of level 0,
    `starts [n_words, n_features]`; layer l adds those of level l + 1:

        v[l + 1, t] = max(mlp[l] v[l, t] - threshold, 0)   the MLP
                    + residual[l] v[l, t]                  features of level l point there as well
                    + attention[l] mean(v[l, :t + 1])      a head without preferences

    Feature i of level l has the number `l * n_features + i` in the SAE of the residual stream after
    each layer, `saes`, which describes all levels that are there. What the MLP of layer l - 1 adds
    to it is feature i of that MLP's transcoder, `transcoders`. The logit of word i is feature i of
    the last level, and 0 for words beyond the features. All is exact to float32 precision.
    """

    model: nn.Module
    tokenizer: WordTokenizer
    saes: Mapping[int, SAE]
    transcoders: Mapping[int, Transcoder]
    starts: np.ndarray
    mlp: np.ndarray
    residual: np.ndarray
    attention: np.ndarray
    threshold: float

    def __repr__(self) -> str:
        return (
            f"PlantedCircuit({self.n_layers} layers, {self.n_features} features a level, "
            f"{len(self.starts)} words, {len(self.edges)} edges)"
        )

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.mlp)

    @property
    def n_features(self) -> int:
        """The number of features of a level."""
        return self.mlp.shape[1]

    @property
    def edges(self) -> tuple[PlantedEdge, ...]:
        """All that was planted."""
        weights: dict[Path, np.ndarray] = {
            "residual": self.residual,
            "mlp": self.mlp,
            "attention": self.attention,
        }
        return tuple(
            PlantedEdge(level, source, target, float(w[level, target, source]), path)
            for path, w in weights.items()
            for level, target, source in np.argwhere(w).tolist()
        )

    def texts(self, n: int, length: int = 12, seed: int = 0) -> list[str]:
        """Random texts of `length` words."""
        ids = np.random.default_rng(seed).integers(0, len(self.starts), (n, length))
        return [self.tokenizer.decode(row) for row in ids.tolist()]

    def values(self, tokens: Sequence[int]) -> np.ndarray:
        """The values of all features on a sequence of tokens, `[n_levels, S, n_features]`.

        Raises `ValueError` for other token ids, and where a value is none that a coder can
        describe: it must be 0 or in `[2^-10, 2^8]`.
        """
        ids = token_ids(tokens, len(self.starts))
        values = [self.starts[ids]]
        for layer in range(self.n_layers):
            v, driven = values[-1], self._driven(values[-1], layer)
            along = v @ self.residual[layer].T
            values.append(driven + along + _means(len(v)) @ v @ self.attention[layer].T)
        _check_values(np.stack(values), ids)
        return np.stack(values)

    def code(self, tokens: Sequence[int], layer: int) -> np.ndarray:
        """The code of the SAE of a layer, `[S, its features]`.

        Raises `ValueError` as `values` does, and for a layer that the model has not.
        """
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer must be in [0, {self.n_layers - 1}], got {layer}.")
        values = self.values(tokens)[: layer + 2]
        return values.transpose(1, 0, 2).reshape(len(tokens), -1)

    def effects(
        self,
        tokens: Sequence[int],
        source_layer: int,
        target_layer: int,
        method: Method = "integrated_gradients",
    ) -> np.ndarray:
        """What features of the SAE of one layer do to the pre-activations of that of a later layer,
        `[S, features of the target, S, features of the source]`, with tokens of both.

        By integrated gradients from all features of the source at zero, by gradient times value, or
        by taking out the one feature. Through several layers, or with a threshold, they differ:
        there `ablation` is known for neighbouring layers only, and with a threshold
        `integrated_gradients` as well. Raises `ValueError` for layers that are not in order, and
        where the effects are not known.
        """
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {list(get_args(Method))}, got {method!r}.")
        if not 0 <= source_layer < target_layer < self.n_layers:
            raise ValueError(
                f"source_layer and target_layer must be ascending, in [0, {self.n_layers - 1}], "
                f"got {source_layer} and {target_layer}."
            )
        single = method == "ablation" or (method == "integrated_gradients" and self.threshold > 0)
        if single and target_layer > source_layer + 1:
            raise ValueError(
                f"target_layer must be {source_layer + 1}, the next layer, with {method!r} and a "
                f"threshold of {self.threshold}, got {target_layer}."
            )
        values, n = self.values(tokens), len(tokens)
        slopes = np.eye(n * (source_layer + 2) * self.n_features)
        for layer in range(source_layer + 1, target_layer + 1):
            slopes = self._slopes(values[layer], layer, method) @ slopes
        slopes = slopes.reshape(n, -1, n, (source_layer + 2) * self.n_features)
        return slopes * self.code(tokens, source_layer)

    def _driven(self, v: np.ndarray, layer: int) -> np.ndarray:
        """What the MLP of a layer makes of the values of the level that it reads."""
        return np.maximum(v @ self.mlp[layer].T - self.threshold, 0)

    def _slopes(self, v: np.ndarray, layer: int, method: Method) -> np.ndarray:
        """How the SAE of a layer depends on that of the layer before, all tokens flattened."""
        n, n_before = len(v), (layer + 1) * self.n_features
        through = self.mlp[layer] * self._share(v, layer, method) + self.residual[layer]
        slopes = np.zeros((n, n_before + self.n_features, n, n_before))
        for t, mean in enumerate(_means(n)):
            slopes[t, :n_before, t] = np.eye(n_before)  # what is in the stream stays there
            slopes[t, n_before:, t, -self.n_features :] = through[t]
            slopes[t, n_before:, :, -self.n_features :] += (
                self.attention[layer][:, None] * mean[:, None]
            )
        return slopes.reshape(n * (n_before + self.n_features), n * n_before)

    def _share(self, v: np.ndarray, layer: int, method: Method) -> np.ndarray:
        """The part of a weight of the MLP that acts, `[S, target, source]`."""
        above = (v @ self.mlp[layer].T - self.threshold)[..., None]
        driven = np.maximum(above, 0)
        if method == "ablation":
            single = self.mlp[layer] * v[:, None]
            left = np.maximum(above - single, 0)
            return (driven - left) / np.where(single, single, 1)
        if method == "integrated_gradients" and self.threshold > 0:
            return driven / (driven + self.threshold)
        return np.heaviside(np.round(above, ZERO_DIGITS), 0.5)


def planted_circuit(
    starts: Any = None,
    mlp: Any = None,
    residual: Any = None,
    attention: Any = None,
    *,
    threshold: float = 0.0,
) -> PlantedCircuit:
    """A llama with planted features that drive each other along the residual stream, through MLPs
    and by attention; see `PlantedCircuit`.

    `starts [n_words, n_features]` are the features of each word, `mlp`, `residual` and `attention`
    `[n_layers, n_features, n_features]` what drives what, those of MLPs and of attention not
    negative. The defaults are an example of 8 words, 4 features and 3 layers; with `mlp` given,
    `residual` and `attention` are zero by default. Raises `ValueError` for other shapes and values,
    and where a word by itself gives a feature a value that no coder can describe, such as a
    negative one.
    """
    if mlp is None:
        mlp, residual, attention = (
            default if given is None else given
            for given, default in ((mlp, MLP), (residual, RESIDUAL), (attention, ATTENTION))
        )
    mlp = _weights("mlp", mlp, None)
    residual = _weights("residual", residual, mlp.shape)
    attention = _weights("attention", attention, mlp.shape)
    starts = np.array(STARTS if starts is None else starts, float)
    n_layers, n = mlp.shape[:2]
    if starts.ndim != 2 or starts.shape[1] != n or len(starts) < n:
        raise ValueError(f"starts must have shape [>= {n}, {n}], got {list(starts.shape)}.")
    positive = {"starts": starts, "mlp": mlp, "attention": attention, "threshold": threshold}
    for name, values in positive.items():
        if not np.min(values) >= 0:
            raise ValueError(f"{name} must be >= 0, got {np.min(values)}.")
    for name, values in {**positive, "residual": residual}.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {np.sum(values)}.")
    along = directions((n_layers + 1) * n).reshape(n_layers + 1, n, -1)
    written = along.copy()
    for level in reversed(range(n_layers)):
        written[level] += residual[level].T @ written[level + 1]
    model = llama(along.shape[-1], n_layers, n, 2 * n, len(starts))
    set_embeddings(model, starts @ written[0])
    bias, saes, transcoders = np.full(n, -threshold), {}, {}
    for layer, block in enumerate(model.layers):
        reads = mlp[layer] @ along[layer]
        set_neurons(block.mlp, reads, bias, written[layer + 1])
        _copy(block.self_attn, along[layer], attention[layer].T @ written[layer + 1])
        transcoders[layer] = transcoder(layer, reads, bias, written[layer + 1])
        there = (layer + 2) * n
        stay = np.concatenate([*along[: layer + 1], written[layer + 1]])
        saes[layer] = residual_sae(layer, along.reshape(-1, along.shape[-1])[:there], stay)
    head = np.zeros((len(starts), along.shape[-1]))
    head[:n] = along[-1]
    model.lm_head.weight = to_array(head)
    words = [f"word{i}" for i in range(len(starts))]
    circuit = PlantedCircuit(
        model, WordTokenizer(words), saes, transcoders, starts, mlp, residual, attention, threshold
    )
    for word in range(len(starts)):
        circuit.values([word])
    return circuit


def _copy(attention: Any, reads: np.ndarray, writes: np.ndarray) -> None:
    """The only head adds `writes [n, width]` times the mean of what `reads` read so far."""
    n, d = reads.shape
    values = np.zeros((attention.head_dim, d))
    values[:n] = reads
    attention.v_proj.weight = to_array(values)
    out = np.zeros((d, attention.head_dim))
    out[:, :n] = writes.T
    attention.o_proj.weight = to_array(out)


def _weights(name: str, given: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    weights = np.zeros(shape or 0) if given is None else np.array(given, float)
    square = weights.ndim == 3 and weights.size and weights.shape[1] == weights.shape[2]
    if not square or (shape is not None and weights.shape != shape):
        wanted = "n_layers, n_features, n_features" if shape is None else str(list(shape))[1:-1]
        raise ValueError(f"{name} must have shape [{wanted}], got {list(weights.shape)}.")
    return weights


def _check_values(values: np.ndarray, ids: np.ndarray) -> None:
    """Raise `ValueError` for a value that no coder can describe."""
    zero = np.round(values, ZERO_DIGITS) == 0
    for level, t, feature in np.argwhere(~zero & ~((values >= LEAST) & (values <= MOST))).tolist():
        raise ValueError(
            f"Feature {feature} of level {level} must be 0 or in [{LEAST}, {MOST}], got "
            f"{values[level, t, feature]:.3g} at token {t} of {ids.tolist()}."
        )


def _means(n: int) -> np.ndarray:
    """The pattern of a head without preferences, `[n, n]`."""
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
