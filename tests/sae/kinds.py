"""One coder of every kind, between the sites of one dataset."""

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder
from mlxterp.sae.sae import SAE
from mlxterp.sae.transcoder import Transcoder

SITES = Columns(("in.0", "in.1", "out.0", "out.1"), (6, 6, 5, 5))
KINDS = {  # class, what it reads, what it writes, further options
    "sae": (SAE, ("in.0",), ("in.0",), {}),
    "transcoder": (Transcoder, ("in.0",), ("out.0",), {}),
    "skip transcoder": (Transcoder, ("in.0",), ("out.0",), {"skip": True}),
    "crosscoder": (Crosscoder, ("in.0", "out.0"), ("in.0", "out.0"), {}),
    "cross-layer transcoder": (
        CrossLayerTranscoder, ("in.0", "in.1"), ("out.0", "out.1"), {},
    ),
}  # fmt: skip


def make(kind: str, activation_function: str = "topk", n_features: int = 30, k: int = 4):
    """An untrained coder of the kind."""
    of_kind, reads, writes, options = KINDS[kind]
    return of_kind(
        _columns(reads), _columns(writes), n_features, activation_function, k=k, **options
    )


def settings(kind: str) -> dict:
    """What a config needs to train that kind."""
    cross_layer = {"decoder_unit_norm": False, "resample_dead_every": 0}
    return {"skip": "skip" in kind} | (cross_layer if "cross-layer" in kind else {})


def activations(n: int = 200, seed: int = 0) -> mx.array:
    """Rows `[n, width]` of all sites, each of them mixed from one sparse code."""
    rng = np.random.default_rng(seed)
    z = rng.uniform(0.5, 1.5, (n, 24)) * (rng.random((n, 24)) < 0.12)
    mixing = np.random.default_rng(1).normal(size=(24, SITES.width))
    scale = np.repeat([1, 3, 10, 0.2], SITES.widths)
    rows = (z @ mixing + 0.05 * rng.normal(size=(n, SITES.width)) + 0.3) * scale
    return mx.array(rows.astype(np.float32))


def of_sites(rows: mx.array) -> dict[str, mx.array]:
    """Activations by site."""
    return {name: rows[:, part] for name, part in SITES.slices.items()}


def _columns(names: tuple[str, ...]) -> Columns:
    return Columns(names, tuple(SITES.only(name).width for name in names))


def dense_decoder(coder: SparseCoder, W_dec: mx.array | None = None) -> np.ndarray:
    """`[n_features, d_out]`, with zeros where features do not write."""
    parts = zip(coder.decoder_blocks(W_dec), coder.blocks, strict=True)
    return np.concatenate([np.array(coder.in_place(W, block)) for W, block in parts])


def dense_encoder(coder: SparseCoder, W_enc: mx.array | None = None) -> np.ndarray:
    """`[n_features, d_in]`, with zeros where features do not read."""
    W_enc = np.array(coder.W_enc if W_enc is None else W_enc)
    found = np.zeros((coder.n_features, coder.d_in), W_enc.dtype)
    for block in coder.blocks:
        found[block.features, block.reads] = W_enc[block.features]
    return found
