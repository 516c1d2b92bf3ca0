"""Whether coders and a model are such that the effects of features are exactly linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.circuits.behavior.targets import Edits
from mlxterp.sae.circuits.given import check_choice, check_counts, freezable, read_by
from mlxterp.sae.circuits.graph.held import EMBEDDING
from mlxterp.sae.circuits.graph.influence import Extent
from mlxterp.sae.circuits.graph.readouts import streams
from mlxterp.sae.circuits.graph.replacement import Replacement, Run
from mlxterp.sae.coder import check_sized
from mlxterp.sae.forward_order import depends
from mlxterp.sae.source import ActivationSource, FreezableSource

ErrorNodes = Literal["pruned", "kept"]

TOLERANCE, TOLERANCE_TF32, TOLERANCE_16_BIT = 1e-3, 1e-2, 0.1
FITTING = "An attribution graph takes transcoders and cross-layer transcoders of MLPs"


def checked(
    model: ActivationSource | None, given: Mapping[int, BaseSAE] | BaseSAE | None
) -> tuple[FreezableSource, dict[int, BaseSAE]]:
    """The model that is given, or that the coders know, and the coders by layer.

    Raises `ValueError` for coders that do not fit it, that do not stand for what MLPs do, or that
    write the same.
    """
    # A coder is a mapping, too: of its arrays.
    coders = {0: given} if isinstance(given, BaseSAE) else given
    if not isinstance(coders, Mapping) or not all(
        isinstance(coder, BaseSAE) for coder in coders.values()
    ):
        raise ValueError(
            "transcoders must be {layer: transcoder}, or one cross-layer transcoder, got "
            f"{type(given).__name__}."
        )
    if not coders:
        raise ValueError("transcoders must hold the coder of one layer or more, got none.")
    ordered = {layer: coders[layer] for layer in sorted(coders)}
    source = next(iter(ordered.values())).known_model(model)
    for layer, coder in ordered.items():
        check_sized(coder, f"In attribution graphs, layer {layer}")
        fits = coder.is_compatible(source)
        if not fits:
            raise ValueError(f"The coder of layer {layer} does not fit the model: {fits!r}.")
    held = freezable(source)
    for layer, coder in ordered.items():
        _check_order(source, layer, coder)
    for a, b in combinations(ordered, 2):
        same = [n for n in ordered[b].writes.names if _like(n) & _all_like(ordered[a])]
        if same:
            raise ValueError(f"The coders of layers {a} and {b} both write {', '.join(same)}.")
    _check_written(held, ordered)
    return held, ordered


def check_pruning(extent: Extent, errors: ErrorNodes) -> None:
    """Raises `ValueError` for shares outside (0, 1], numbers below 1 and an unknown choice."""
    check_choice("errors", errors, get_args(ErrorNodes))
    check_counts(n_nodes=extent.n_nodes, n_edges=extent.n_edges)
    for name in ("node_share", "edge_share"):
        if not 0 < getattr(extent, name) <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {getattr(extent, name)}.")


def _like(name: str) -> set[str]:
    """A site and its other name: what an MLP returns, and what is added to the stream of it."""
    start, _, component = name.rpartition(".")
    return {f"{start}.mlp", f"{start}.mlp_out"} if component in ("mlp", "mlp_out") else {name}


def _all_like(coder: BaseSAE) -> set[str]:
    return set().union(*map(_like, coder.writes.names))


def _check_order(source: ActivationSource, layer: int, coder: BaseSAE) -> None:
    """Raises `ValueError` for a coder some of whose features read what they write, or later."""
    if set(coder.reads.names) & set(coder.writes.names):
        raise ValueError(
            f"{FITTING}, which read one site and write another; the coder of layer {layer} is a "
            f"{type(coder).__name__} that reads and writes {coder.reads}. find_behavior_circuit "
            "and find_feature_circuits take it."
        )
    for block in coder.blocks:
        first = coder.writes.names[block.sites][0]
        for name in depends(source, first, read_by(coder, block)):
            raise ValueError(
                f"{FITTING}; that of layer {layer} reads {name}, which the model computes from "
                f"{first}, which it writes."
            )


def _check_written(source: FreezableSource, coders: Mapping[int, BaseSAE]) -> None:
    """Raises `ValueError` for a coder of what the frozen model computes without its MLPs."""
    tokens = mx.array([[0, 1, 2]])
    mlps = [str(site) for site in source.sites() if site.component == "mlp"]
    written = [name for coder in coders.values() for name in coder.writes.names]
    clean = source.run(tokens, capture=[*mlps, EMBEDDING])
    held = {name: lambda x, name=name: clean[name] for name in mlps}
    noise = mx.random.normal(clean[EMBEDDING].shape, key=mx.random.key(0))
    size = mx.sqrt(clean[EMBEDDING].astype(mx.float32).square().mean())

    def values(factor: float) -> Mapping[str, mx.array]:
        moved = clean[EMBEDDING] + (factor * size * noise).astype(clean[EMBEDDING].dtype)
        return source.run(tokens, capture=written, edit=held | {EMBEDDING: lambda x: moved})

    with source.frozen(at=tokens):
        plain, nudged = values(0.0), values(1.0)
    for layer, coder in coders.items():
        for name in coder.writes.names:
            if not mx.array_equal(plain[name], nudged[name], equal_nan=True):
                raise ValueError(
                    f"{FITTING}, because all else is linear where patterns and norm scales are "
                    f"held; the coder of layer {layer} writes {name}. Sites of MLPs: "
                    f"{', '.join(mlps) or 'none'}."
                )


def tolerance(source: ActivationSource, tokens: mx.array) -> float:
    """How large a relative error may be that is due to rounding; GPUs may multiply in TF32, which
    has ten bits for a number, as half precision has."""
    x = source.run(tokens, capture=EMBEDDING, stop=True)[EMBEDDING]
    if x.dtype != mx.float32:
        return TOLERANCE_16_BIT
    return TOLERANCE if mx.default_device() == mx.Device(mx.cpu) else TOLERANCE_TF32


def affine_error(replacement: Replacement, run: Run, rows: np.ndarray) -> float:
    """How far values are from the sum of what all sources and biases add to them, relative to the
    largest of them."""
    clean = replacement.clean(run)
    total = rows.sum(axis=1, dtype=np.float64) + replacement.bias(run)
    return float(np.abs(total - clean).max() / max(np.abs(clean).max(), 1e-30))


def check_affine(replacement: Replacement, allowed: float) -> None:
    """Raises `ValueError` where the residual stream at the last position is not the sum of what
    sources and biases add to it, for the first layer after which that is so.

    It is looked at along one random direction in each layer.
    """
    source, sites = replacement.source, streams(replacement.source)
    width = source.width(sites[0])
    directions = mx.random.normal((len(sites), width), key=mx.random.key(0))

    def run(tokens: mx.array, edits: Edits) -> mx.array:
        captured = source.run(tokens, capture=sites, edit=dict(edits), stop=True)
        last = mx.stack([captured[name][:, -1].astype(mx.float32) for name in sites], axis=1)
        return (last * directions).sum(axis=-1)

    captured = source.run(replacement.tokens, capture=sites, stop=True)
    sizes = [float(mx.linalg.norm(captured[name][0, -1].astype(mx.float32))) for name in sites]
    total = replacement.rows(run, len(sites)).sum(axis=1, dtype=np.float64) + replacement.bias(run)
    errors = np.abs(total - replacement.clean(run)) / np.array(sizes)
    for site, error in zip(sites, errors.tolist(), strict=True):
        if not error <= allowed:
            raise ValueError(
                "The model is no affine function of its features where attention patterns, norm "
                f"scales and MLPs are held: at {site} what they add is wrong by {error:.2g} of "
                "its size. A part of that layer is neither attention nor norm nor MLP, such as a "
                "gate, a convolution or a recurrent state; attribution graphs are for models "
                "without such parts."
            )


def check_interventions(
    replacement: Replacement, run: Run, rows: np.ndarray, numbers: Sequence[int]
) -> float:
    """How far the effects of doubling some sources, one by one, are from what `rows` say, relative
    to the largest value."""
    gains = replacement.gains(run, numbers)
    largest = np.abs(replacement.clean(run)).max(initial=1e-30)
    return float(np.abs(gains - rows[:, numbers].T).max(initial=0) / largest)
