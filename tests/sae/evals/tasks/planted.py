"""Coders written by hand whose features are known."""

import mlx.core as mx
import numpy as np

from mlxterp.sae import SAE
from mlxterp.sae.coder import Columns
from tests.fakes import SITE


def coder_of(encoder, decoder, bias=None) -> SAE:
    """`z = relu(x @ encoder.T + bias)`, and `y = z @ decoder`."""
    n, width = np.shape(encoder)
    columns = Columns((SITE,), (width,))
    coder = SAE(columns, columns, n, "relu", k=None)
    coder.W_enc, coder.W_dec = (mx.array(np.asarray(a, np.float32)) for a in (encoder, decoder))
    coder.b_enc = mx.array(np.zeros(n) if bias is None else bias, mx.float32)
    return coder


def rotation(width: int, seed: int = 0) -> np.ndarray:
    """Orthonormal rows `[width, width]`, none of them along a column."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
