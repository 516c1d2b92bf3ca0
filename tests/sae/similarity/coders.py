"""Coders with rows that are drawn or given, and their directions as plain arrays."""

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.sae import SAE
from tests.sae import kinds

SCALES = (0.5, 3.0)  # of the two sites of coders that write two


def drawn(kind: str, seed: int = 0, n_features: int = 30, function: str = "topk") -> SparseCoder:
    """A coder of the kind with random rows, of random sizes, and sites of unlike scales."""
    coder, rng = kinds.make(kind, function, n_features), np.random.default_rng(seed)
    for name in ("W_enc", "W_dec"):
        rows = rng.normal(size=coder[name].shape) * rng.uniform(0.2, 5, (len(coder[name]), 1))
        coder[name] = mx.array(rows.astype(np.float32))
    if "site_scale" in coder:
        coder.site_scale = mx.array(SCALES)
    return coder


def sae_of(W_dec: np.ndarray, W_enc: np.ndarray | None = None, function: str = "topk") -> SAE:
    """An SAE with those rows, by default the same in both matrices."""
    columns = Columns(("x",), (W_dec.shape[1],))
    sae = SAE(columns, columns, len(W_dec), function, 1)
    sae.W_dec = mx.array(W_dec.astype(np.float32))
    sae.W_enc = mx.array((W_dec if W_enc is None else W_enc).astype(np.float32))
    return sae


def units(coder: SparseCoder, by: str = "decoder", site: str | None = None) -> np.ndarray:
    """The directions `[n_features, width]` in float64, with zeros where features have no columns.

    Decoder rows in units of activations that training has scaled, encoder rows of these too.
    """
    columns = coder.writes if by == "decoder" else coder.reads
    dense = kinds.dense_decoder(coder) if by == "decoder" else kinds.dense_encoder(coder)
    rows = dense.astype(np.float64)
    if "site_scale" in coder and (by == "decoder" or coder.reads == coder.writes):
        scale = np.repeat(np.array(coder.site_scale, np.float64), columns.widths)
        rows *= scale if by == "decoder" else 1 / scale
    rows = rows if site is None else rows[:, columns.slices[site]]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def random_units(n: int, width: int, seed: int = 0) -> np.ndarray:
    """Random directions `[n, width]`."""
    rows = np.random.default_rng(seed).normal(size=(n, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def noised(rows: np.ndarray, cosine: float, seed: int) -> np.ndarray:
    """Directions that have that cosine with the given ones."""
    noise = np.random.default_rng(seed).normal(size=rows.shape)
    noise -= (noise * rows).sum(axis=1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return cosine * rows + np.sqrt(1 - cosine**2) * noise


def families(n: int, size: int, width: int, cosine: float, seed: int = 0) -> np.ndarray:
    """Directions of `n` families in order, whose members have that cosine with their centre."""
    centres = np.repeat(random_units(n, width, seed), size, axis=0)
    return noised(centres, cosine, seed + 1)
