"""Activation functions: small modules that turn pre-activations into a sparse code."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxterp.sae.kernels import scatter_code, top_k


class TopK(nn.Module):
    """Keep the `k` largest pre-activations of each token, and of those only the positive ones.

        z_i = max(pre_i, 0) if pre_i is among the k largest, else 0

    Reference: Gao et al. 2024, arXiv 2406.04093.
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def select(self, pre: mx.array) -> mx.array:
        """Indices `[batch, k]` of the features that may be active, from `pre` `[batch, n]`."""
        return top_k(pre, self.k)

    def __call__(self, pre: mx.array) -> mx.array:
        """The code `[..., n_features]` for pre-activations of the same shape."""
        rows = pre.reshape(-1, pre.shape[-1])
        indices = self.select(mx.stop_gradient(rows))
        values = mx.maximum(mx.take_along_axis(rows, indices, axis=-1), 0)
        return scatter_code(values, indices, rows.shape[-1]).reshape(pre.shape)


ACTIVATION_FUNCTIONS = {"topk": TopK}
