"""Random coders of every kind between sites of the bundled model; derivatives by differences."""

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder
from mlxterp.sae.sae import SAE
from mlxterp.sae.transcoder import Transcoder

EPS = 0.05
KINDS = {
    "sae": (SAE, ("layers.2.resid_post",), ("layers.2.resid_post",), {}),
    "transcoder": (Transcoder, ("layers.1.mlp_in",), ("layers.3.mlp_out",), {}),
    "skip transcoder": (Transcoder, ("layers.1.mlp_in",), ("layers.3.mlp_out",), {"skip": True}),
    "crosscoder": (
        Crosscoder, ("layers.1.mlp_out", "layers.3.resid_post"),
        ("layers.1.mlp_out", "layers.3.resid_post"), {},
    ),
    "cross-layer transcoder": (
        CrossLayerTranscoder, ("layers.1.mlp_in", "layers.3.mlp_in"),
        ("layers.1.mlp_out", "layers.3.mlp_out"), {},
    ),
}  # fmt: skip


def make(kind: str, n_features: int = 40, k: int = 6) -> SparseCoder:
    of_kind, reads, writes, options = KINDS[kind]
    return filled(of_kind(_columns(reads), _columns(writes), n_features, k=k, **options))


def of_sites(reads, writes, n_features: int = 40) -> SparseCoder:
    return filled(SparseCoder(_columns(reads), _columns(writes), n_features, k=4))


def filled(made: SparseCoder) -> SparseCoder:
    for i, name in enumerate(("W_enc", "b_enc", "W_dec")):
        made[name] = mx.random.normal(made[name].shape, key=mx.random.key(i)) / 4
    return made


def by_differences(coder, model, ids, feature, position, sites=None) -> np.ndarray:
    """The derivative of all logits `[n_tokens, vocabulary]` by a feature's value at one token."""
    row = coder.direction(feature)
    parts = {name: coder.writes.take(row, (name,)) for name in sites or coder.writes.names}
    here = (mx.arange(len(ids)) == position).astype(mx.float32)[None, :, None]

    def logits(step: float) -> np.ndarray:
        edit = {name: lambda x, part=part: x + step * here * part for name, part in parts.items()}
        return np.array(model.run(mx.array([ids]), edit=edit).output[0], np.float64)

    return (logits(EPS) - logits(-EPS)) / (2 * EPS)


def past_the_layers(coder, model, ids, feature, position) -> np.ndarray:
    """As `by_differences`, with the rows of all sites added to the last residual stream."""
    row = coder.direction(feature)
    row = sum(coder.writes.take(row, (name,)) for name in coder.writes.names)
    here = (mx.arange(len(ids)) == position).astype(mx.float32)[None, :, None]
    last = f"layers.{model.n_layers - 1}.resid_post"

    def logits(step: float) -> np.ndarray:
        edit = {last: lambda x: x + step * here * row}
        return np.array(model.run(mx.array([ids]), edit=edit).output[0], np.float64)

    return (logits(EPS) - logits(-EPS)) / (2 * EPS)


def _columns(names: tuple[str, ...]) -> Columns:
    return Columns(names, (128,) * len(names))
