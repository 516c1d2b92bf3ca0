"""Activation functions: small modules that turn pre-activations into a sparse code.

Used after training, each works on one token alone. In training a function either *selects* the
(token, feature) pairs that may be active, which makes the step sparse, or gives a dense code whose
gradients pass its jumps by straight-through estimators. What a function trains besides the coder's
own arrays, it names in `trained`; what it averages over the steps, in `averaged`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxterp.sae.kernels import Pairs, scatter_code, select_from_batch, select_per_token, top_k

# The stubs of MLX say that what it decorates returns `object`.
_custom_function: Any = mx.custom_function

Arrays = Mapping[str, mx.array]


class ActivationFunction(nn.Module):
    """What all of them have; `penalties` lists the sparsity penalties that apply, the usual first.

    `selects`: the number of active features is set by `k`, for every block of features by itself.
    `from_gate`: the penalised values must reconstruct as well.
    """

    selects: ClassVar[bool] = False
    from_gate: ClassVar[bool] = False
    penalties: ClassVar[tuple[str, ...]] = ("l1", "tanh")

    @property
    def options(self) -> dict[str, Any]:
        """What rebuilds the function, besides the number of features."""
        return {}

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The function's own arrays, which are saved with a coder."""
        return {name: array for name, array in self.items() if isinstance(array, mx.array)}

    def of_block(self, i: int, features: slice) -> ActivationFunction:
        """The function of the features of the `i`-th block by themselves."""
        n = features.stop - features.start
        part = make_activation_function(_name_of(self), n, self.options.get("k"))
        for name, array in self.arrays.items():
            part[name] = array[features]
        return part

    def trained(self, threshold: mx.array) -> dict[str, mx.array]:
        """Initial values of the arrays that are trained together with the coder's; `threshold` is
        what as many pre-activations exceed as shall be active."""
        return {}

    def averaged(self) -> dict[str, mx.array]:
        """Initial values of what is averaged over the steps."""
        return {}

    def set_arrays(
        self, trained: Arrays, averaged: Arrays, gain: mx.array, scale: mx.array
    ) -> None:
        """Take the arrays over from training, for pre-activations that are `gain` `[n_features]`
        times larger, and values that are `scale` times what was compared in a selection."""

    def code(self, pre: mx.array, trained: Arrays, bandwidth: float) -> tuple[mx.array, mx.array]:
        """In training: the code `[batch, n_features]`, and the values `>= 0` that are penalised."""
        raise NotImplementedError

    def count(self, pre: mx.array, trained: Arrays, bandwidth: float) -> mx.array:
        """In training: how many features are active per token `[batch]`, with a gradient."""
        raise NotImplementedError


class TopK(ActivationFunction):
    """Keep the `k` largest pre-activations of each token, and of those only the positive ones.

        z_i = max(pre_i, 0) if pre_i is among the k largest, else 0

    Reference: Gao et al. 2024, arXiv 2406.04093.
    """

    selects = True

    def __init__(self, k: int, n_blocks: int = 1):
        super().__init__()
        self.k = k
        self.n_blocks = n_blocks

    @property
    def options(self) -> dict[str, Any]:
        return {"k": self.k}

    def select(self, pre: mx.array, k: int) -> Pairs:
        """The pairs that may be active, `k` on each token, from `pre` `[batch, n_features]`."""
        return select_per_token(pre, k)

    def values(self, raw: mx.array) -> mx.array:
        """The values of the code from the pre-activations of the selected pairs."""
        return mx.maximum(raw, 0)

    def average(self, averaged: Arrays, smallest: mx.array) -> dict[str, mx.array]:
        """What is averaged, one step later; `smallest` is the smallest positive value that was
        selected, of each block, and infinite where there is none."""
        return dict(averaged)

    def __call__(self, pre: mx.array) -> mx.array:
        """The code `[..., n_features]` for pre-activations of the same shape."""
        rows = pre.reshape(-1, pre.shape[-1] // self.n_blocks)
        indices = self._largest(mx.stop_gradient(rows))
        values = self.values(mx.take_along_axis(rows, indices, axis=-1))
        return scatter_code(values, indices, rows.shape[-1]).reshape(pre.shape)

    def _largest(self, rows: mx.array) -> mx.array:
        return top_k(rows, self.k)


class AbsTopK(TopK):
    """Keep the `k` pre-activations of each token that are largest in magnitude, with their sign.

        z_i = pre_i if |pre_i| is among the k largest, else 0

    One feature then stands for a direction and its opposite.

    Reference: Zhu et al. 2025, "AbsTopK: Rethinking Sparse Autoencoders For Bidirectional
    Features", arXiv 2510.00404.
    """

    def select(self, pre: mx.array, k: int) -> Pairs:
        return select_per_token(mx.abs(pre), k)

    def values(self, raw: mx.array) -> mx.array:
        return raw

    def _largest(self, rows: mx.array) -> mx.array:
        return top_k(mx.abs(rows), self.k)


class GroupMax(TopK):
    """Keep the largest pre-activation of each of `k` groups of neighbouring features, if positive.

        z_i = max(pre_i, 0) if pre_i is the largest of its n_features / k, else 0

    As sparsify has it; such coders are read and used, not trained.
    """

    def _largest(self, rows: mx.array) -> mx.array:
        size = rows.shape[-1] // self.k
        best = rows.reshape(-1, self.k, size).argmax(axis=-1)
        return best + mx.arange(self.k, dtype=best.dtype) * size


class BatchTopK(TopK):
    """Keep the `k * batch` largest pre-activations of a whole batch, so that tokens may differ.

    In training the selection is over the batch. Afterwards a feature is active where its
    pre-activation exceeds a threshold, the mean over the last steps of the smallest positive
    value that was kept, and so no token depends on what else is in its batch:

        z_i = pre_i if pre_i > threshold, else 0

    Reference: Bussmann et al. 2024, arXiv 2412.06410.
    """

    momentum: ClassVar[float] = 0.99

    def __init__(self, k: int, n_blocks: int = 1):
        super().__init__(k, n_blocks)
        self.threshold = mx.zeros(() if n_blocks == 1 else (n_blocks,))

    def of_block(self, i: int, features: slice) -> ActivationFunction:
        part = BatchTopK(self.k)
        part.threshold = self.threshold.reshape(-1)[i]
        return part

    def select(self, pre: mx.array, k: int) -> Pairs:
        return select_from_batch(pre, k * len(pre))

    def averaged(self) -> dict[str, mx.array]:
        shape = self.threshold.shape
        return {"threshold": mx.zeros(shape), "threshold_steps": mx.zeros(shape)}

    def average(self, averaged: Arrays, smallest: mx.array) -> dict[str, mx.array]:
        usable = mx.isfinite(smallest)
        steps = averaged["threshold_steps"] + mx.where(usable, 1.0, 0.0)
        # The plain mean over the first steps, then the moving one.
        weight = mx.maximum(1 - self.momentum, 1 / mx.maximum(steps, 1))
        old = averaged["threshold"]
        new = old + weight * (mx.where(usable, smallest, old) - old)
        return {"threshold": new, "threshold_steps": steps}

    def set_arrays(
        self, trained: Arrays, averaged: Arrays, gain: mx.array, scale: mx.array
    ) -> None:
        self.threshold = averaged["threshold"] * scale

    def __call__(self, pre: mx.array) -> mx.array:
        threshold = self.threshold
        if self.n_blocks > 1:
            threshold = mx.repeat(threshold, pre.shape[-1] // self.n_blocks)
        return mx.where(pre > threshold, mx.maximum(pre, 0), 0)


class ReLU(ActivationFunction):
    """Keep what is positive; an L1 penalty makes it sparse.

        z = max(pre, 0)

    Reference: Bricken et al. 2023, "Towards Monosemanticity"; the penalty weighted by decoder norms
    as in Conerly et al. 2024, "Update on how we train SAEs".
    """

    def code(self, pre: mx.array, trained: Arrays, bandwidth: float) -> tuple[mx.array, mx.array]:
        z = mx.maximum(pre, 0)
        return z, z

    def __call__(self, pre: mx.array) -> mx.array:
        return mx.maximum(pre, 0)


class JumpReLU(ActivationFunction):
    """Keep what exceeds a threshold of the feature's own, which is trained.

        z = pre * H(pre - threshold)

    The jump has no gradient; the threshold's is estimated from the pre-activations that lie within
    half a `bandwidth` of it, on both sides: with `K(u) = 1` for `|u| < 1/2` and 0 elsewhere,

        dz / d threshold          = -threshold / bandwidth * K((pre - threshold) / bandwidth)
        dH(pre - threshold) / d threshold =  -1 / bandwidth * K((pre - threshold) / bandwidth)

    The logarithm of the threshold is what is trained, so that it stays positive.

    Reference: Rajamanoharan et al. 2024, arXiv 2407.14435, equations 10 to 12.
    """

    penalties = ("quadratic", "l0", "tanh", "l1")

    def __init__(self, n_features: int):
        super().__init__()
        self.threshold = mx.zeros((n_features,))

    def trained(self, threshold: mx.array) -> dict[str, mx.array]:
        return {"log_threshold": mx.full(self.threshold.shape, mx.log(threshold))}

    def set_arrays(
        self, trained: Arrays, averaged: Arrays, gain: mx.array, scale: mx.array
    ) -> None:
        self.threshold = mx.exp(trained["log_threshold"]) * gain

    def code(self, pre: mx.array, trained: Arrays, bandwidth: float) -> tuple[mx.array, mx.array]:
        z = _jump(pre, mx.exp(trained["log_threshold"]), mx.array(bandwidth))
        return z, z

    def count(self, pre: mx.array, trained: Arrays, bandwidth: float) -> mx.array:
        above = _exceeds(pre, mx.exp(trained["log_threshold"]), mx.array(bandwidth))
        return above.sum(axis=-1)

    def __call__(self, pre: mx.array) -> mx.array:
        return mx.where(pre > self.threshold, mx.maximum(pre, 0), 0)


@_custom_function
def _jump(pre: mx.array, threshold: mx.array, bandwidth: mx.array) -> mx.array:
    return mx.where(pre > threshold, pre, 0)


@_jump.vjp
def _jump_vjp(primals, cotangent, _):
    pre, threshold, bandwidth = primals
    near = mx.abs(pre - threshold) < bandwidth / 2
    at_threshold = mx.where(near, cotangent, 0).sum(axis=0) * (-threshold / bandwidth)
    return mx.where(pre > threshold, cotangent, 0), at_threshold, mx.zeros_like(bandwidth)


@_custom_function
def _exceeds(pre: mx.array, threshold: mx.array, bandwidth: mx.array) -> mx.array:
    return (pre > threshold).astype(pre.dtype)


@_exceeds.vjp
def _exceeds_vjp(primals, cotangent, _):
    pre, threshold, bandwidth = primals
    near = mx.abs(pre - threshold) < bandwidth / 2
    at_threshold = mx.where(near, cotangent, 0).sum(axis=0) / -bandwidth
    return mx.zeros_like(pre), at_threshold, mx.zeros_like(bandwidth)


class Gated(ActivationFunction):
    """Decide whether a feature is active and how strongly it is by two maps that share directions.

        z = H(pre) * max(exp(log_gain) * pre + offset, 0)

    This is the paper's gated encoder written in its gate's pre-activation alone: its `r_mag` is
    `log_gain`, its `b_mag` is `offset + exp(log_gain) * b_enc`. The penalty is on `max(pre, 0)`,
    which must reconstruct through the frozen decoder as well.

    Reference: Rajamanoharan et al. 2024, arXiv 2404.16014.
    """

    from_gate = True

    def __init__(self, n_features: int):
        super().__init__()
        self.log_gain = mx.zeros((n_features,))
        self.offset = mx.zeros((n_features,))

    def trained(self, threshold: mx.array) -> dict[str, mx.array]:
        shape = self.offset.shape
        return {"log_gain": mx.zeros(shape), "offset": mx.zeros(shape)}

    def set_arrays(
        self, trained: Arrays, averaged: Arrays, gain: mx.array, scale: mx.array
    ) -> None:
        self.log_gain, self.offset = trained["log_gain"], trained["offset"] * gain

    def code(self, pre: mx.array, trained: Arrays, bandwidth: float) -> tuple[mx.array, mx.array]:
        return _gated(pre, trained["log_gain"], trained["offset"]), mx.maximum(pre, 0)

    def __call__(self, pre: mx.array) -> mx.array:
        return _gated(pre, self.log_gain, self.offset)


def _gated(pre: mx.array, log_gain: mx.array, offset: mx.array) -> mx.array:
    return mx.where(pre > 0, mx.maximum(mx.exp(log_gain) * pre + offset, 0), 0)


ACTIVATION_FUNCTIONS: dict[str, type[ActivationFunction]] = {
    "abs_topk": AbsTopK,
    "batch_topk": BatchTopK,
    "gated": Gated,
    "jumprelu": JumpReLU,
    "relu": ReLU,
    "topk": TopK,
}
NOT_TRAINED: dict[str, type[ActivationFunction]] = {"groupmax": GroupMax}
_ALL = ACTIVATION_FUNCTIONS | NOT_TRAINED


def _name_of(function: ActivationFunction) -> str:
    return next(name for name, kind in _ALL.items() if type(function) is kind)


def make_activation_function(
    name: str, n_features: int, k: int | None, n_blocks: int = 1
) -> ActivationFunction:
    """The named function; those that select keep `k` of the features of each block.

    Raises `ValueError` for an unknown name, for a `k` outside `[1, features of a block]`, and where
    the blocks, or the groups of `groupmax`, would not be equally large.
    """
    if name not in _ALL:
        raise ValueError(f"activation_function must be one of {sorted(_ALL)}, got {name!r}.")
    kind: Any = _ALL[name]
    if n_features % n_blocks:
        raise ValueError(f"n_features must be a multiple of {n_blocks}, got {n_features}.")
    if kind.selects:
        n = n_features // n_blocks
        if k is None or k != int(k) or not 1 <= k <= n:
            raise ValueError(f"k must be in [1, n_features = {n}], got {k}.")
        if kind is GroupMax and n % k:
            raise ValueError(f"k of groupmax must divide n_features = {n}, got {k}.")
        return kind(int(k), n_blocks)
    return kind() if kind is ReLU else kind(n_features)
