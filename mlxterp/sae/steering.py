"""Change a model's behaviour through features."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlxterp.sae.analysis import check_feature
from mlxterp.sae.coder import SparseCoder

Edit = Callable[[mx.array], mx.array]


def steer(
    coder: SparseCoder, activation: mx.array, feature_id: int, strength: float = 1.0
) -> mx.array:
    """`activation + strength * W_dec[feature_id]`, `[..., d_out]` in the dtype of the activation.

    Decoder rows have unit norm, so `strength` is in units of the activation. Raises `ValueError`
    for an unknown feature or another width.
    """
    direction = coder.W_dec[check_feature(coder, feature_id)]
    activation = mx.array(activation)
    if activation.ndim == 0 or activation.shape[-1] != coder.d_out:
        raise ValueError(
            f"The activation must have shape [..., {coder.d_out}], got {tuple(activation.shape)}."
        )
    return activation + (strength * direction).astype(activation.dtype)


def steering_edit(coder: SparseCoder, feature_id: int, strength: float = 1.0) -> dict[str, Edit]:
    """`{site: edit}` that adds a feature at every token, for `run`, `trace` and `generate`."""
    feature_id = check_feature(coder, feature_id)
    return {
        name: lambda x, part=part: x + (strength * coder.W_dec[feature_id, part]).astype(x.dtype)
        for name, part in coder.writes.slices.items()
    }
