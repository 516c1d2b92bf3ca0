"""The objective and the training step again, plainly: dense products, automatic gradients, float64.

Where a jump has an estimated gradient it is written as `surrogate`: a term whose value is zero and
whose slope is the estimate.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlxterp.sae.config import SAEConfig

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def trained_threshold(threshold) -> dict:
    """JumpReLU's trained arrays for these thresholds."""
    return {"log_threshold": np.log(threshold).astype(np.float32)}


def threshold_of(params) -> mx.array:
    """The inverse of `trained_threshold`, for arrays of MLX."""
    return mx.exp(params["log_threshold"])


def threshold_gradient(gradients: dict, threshold) -> np.ndarray:
    """The gradient of the threshold from those of the trained arrays."""
    return np.array(gradients["log_threshold"], np.float64) / threshold


def central_differences(value, arrays: dict[str, np.ndarray], name: str, step=1e-6) -> np.ndarray:
    """The gradient of `value(arrays)` with respect to one of the float64 arrays, entry by entry."""
    gradient = np.zeros(arrays[name].shape)
    for at in np.ndindex(gradient.shape):
        sides = []
        for sign in (1, -1):
            moved = arrays[name].copy()
            moved[at] += sign * step
            sides.append(value({**arrays, name: moved}))
        gradient[at] = (sides[0] - sides[1]) / (2 * step)
    return gradient


def keep_largest(pre: mx.array, k: int) -> mx.array:
    """True at the k largest entries of each row (no ties)."""
    return pre >= mx.sort(pre, axis=-1)[:, -k][:, None]


def surrogate(array: mx.array, slope: mx.array) -> mx.array:
    """Zero, with the gradient `slope` for `array`."""
    return (array - mx.stop_gradient(array)) * mx.stop_gradient(slope)


@dataclass(frozen=True)
class Reference:
    """The objective of a config; `bounds` are the ends of the nested prefixes, in features.

    `sites` are the columns of the write sites, `blocks` the features that select among themselves,
    with the columns that they read and write; outside of these the matrices are zero.
    """

    config: SAEConfig
    bounds: tuple[int, ...] = ()
    k_auxiliary: int = 0
    sites: tuple[slice, ...] = (slice(None),)
    blocks: tuple[tuple[slice, slice, slice], ...] = ((slice(None), slice(None), slice(None)),)
    importance: np.ndarray | None = None

    def weights(self, params):
        """What features weigh in selections and penalties."""
        if self.config.decoder_unit_norm and len(self.sites) == 1:
            return mx.ones(params["b_enc"].shape, dtype=params["b_enc"].dtype)
        # Of a row that is zero at a site the norm has no gradient.
        squares = [(params["W_dec"][:, site] ** 2).sum(axis=1) for site in self.sites]
        return sum(mx.where(s > 0, mx.sqrt(mx.where(s > 0, s, 1)), 0) for s in squares)

    def code(self, params, pre):
        """The code, the penalised values and the number of active features on each token."""
        name = self.config.activation_function
        if name == "gated":
            z = mx.maximum(mx.exp(params["log_gain"]) * pre + params["offset"], 0)
            return mx.where(pre > 0, z, 0), mx.maximum(pre, 0), None
        if name == "jumprelu":
            return self._jump(pre, threshold_of(params))
        z = pre if name == "abs_topk" else mx.maximum(pre, 0)
        if name != "relu":
            scores = pre * self.weights(params)
            kept = [self._selected(name, scores[:, features]) for features, _, _ in self.blocks]
            z = mx.where(mx.concatenate(kept, axis=1), z, 0)
        return z, mx.abs(z), None

    def _selected(self, name, scores):
        k = self.config.k
        if name == "batch_topk":
            return keep_largest(scores.reshape(1, -1), k * len(scores)).reshape(scores.shape)
        return keep_largest(mx.abs(scores) if name == "abs_topk" else scores, k)

    def _jump(self, pre, threshold):
        width = self.config.bandwidth
        above = (pre > threshold).astype(pre.dtype)
        near = (mx.abs((pre - threshold) / width) < 0.5).astype(pre.dtype)
        threshold = mx.broadcast_to(threshold, pre.shape)
        z = pre * above + surrogate(threshold, -threshold / width * near)
        return z, z, (above + surrogate(threshold, -near / width)).sum(axis=-1)

    def penalty(self, params, penalised, counts):
        name = self.config.penalty
        if name == "l0":
            return counts.mean()
        if name == "quadratic":
            return (counts.mean() / (self.config.wanted_l0 * len(self.blocks)) - 1) ** 2
        weighted = penalised * self.weights(params)
        return (mx.tanh(4 * weighted) if name == "tanh" else weighted).sum(axis=-1).mean()

    def auxiliary(self, params, pre, residual, dead):
        """The mean of the blocks' auxiliary losses."""
        terms = []
        for features, _, writes in self.blocks:
            left, own = residual[:, writes], dead[features]
            pre_of = mx.where(own, pre[:, features], -mx.inf)
            k = self.k_auxiliary if len(self.blocks) == 1 else left.shape[1] // 2
            kept = keep_largest(pre_of, min(k, pre_of.shape[1])) & own
            z = mx.where(kept, mx.maximum(pre_of, 0), 0)
            error = ((z @ params["W_dec"][features, writes] - left) ** 2).sum()
            terms.append(error / ((left - left.mean(axis=0)) ** 2).sum())
        return sum(terms) / len(terms)

    def error(self, y_hat, y):
        squares = (y_hat - y) ** 2
        return (squares if self.importance is None else squares * self.importance).mean()

    def __call__(self, params, x, y, dead, coefficient=None):
        """The loss and its terms; `coefficient` is the penalty's, by default the config's."""
        pre = x @ params.get("W_enc", params["W_dec"]).T + params["b_enc"]
        z, penalised, counts = self.code(params, pre)
        bias = params["b_dec"]
        if "W_skip" in params:
            bias = bias + x @ params["W_skip"].T
        ends = (*self.bounds, z.shape[1])
        y_hats = [z[:, :end] @ params["W_dec"][:end] + bias for end in ends]
        loss = sum(self.error(y_hat, y) for y_hat in y_hats) / len(ends)
        terms = {"z": z, "error": ((y_hats[-1] - y) ** 2).mean()}
        if self.config.penalty:
            coefficient = self.config.lambda_sparse if coefficient is None else coefficient
            loss = loss + coefficient * self.penalty(params, penalised, counts)
        if self.config.activation_function == "gated":
            decoded = penalised @ mx.stop_gradient(params["W_dec"]) + mx.stop_gradient(bias)
            loss = loss + self.error(decoded, y)
        if self.k_auxiliary:
            residual = mx.stop_gradient(y - y_hats[-1])
            auxiliary = self.auxiliary(params, pre, residual, dead)
            loss = loss + self.config.auxiliary_coefficient * auxiliary
        return loss, terms

    def gradients(self, params, x, y, dead, coefficient=None):
        """The loss, its terms and its gradients, computed in float64 from any arrays."""
        with mx.stream(mx.cpu):
            arrays = {name: _float64(array) for name, array in params.items()}
            (loss, terms), gradients = mx.value_and_grad(self)(
                arrays, _float64(x), _float64(y), mx.array(dead), coefficient
            )
            mx.eval(loss, terms, gradients)
        terms = {name: np.array(term) for name, term in terms.items()}
        return loss.item(), terms, {name: np.array(g) for name, g in gradients.items()}


def _float64(array) -> mx.array:
    return mx.array(np.array(array, np.float64), dtype=mx.float64)


@dataclass
class Adam:
    """Moments in float64; `step` projects, clips, moves and restores the norms of decoder rows."""

    params: dict[str, np.ndarray]
    clip: float = 0.0
    unit_norm: bool = True
    m: dict[str, np.ndarray] = field(init=False)
    v: dict[str, np.ndarray] = field(init=False)
    t: int = 0

    def __post_init__(self):
        self.params = {name: np.array(p, np.float64) for name, p in self.params.items()}
        self.m = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: np.zeros_like(p) for name, p in self.params.items()}

    def step(self, gradients, rate):
        """One step; returns the norm of the gradient before clipping."""
        gradients = {name: np.array(g, np.float64) for name, g in gradients.items()}
        W = self.params["W_dec"]
        if self.unit_norm:
            along = np.sum(gradients["W_dec"] * W, axis=1, keepdims=True)
            gradients["W_dec"] = gradients["W_dec"] - along * W
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        if self.clip and norm > self.clip:
            gradients = {name: g * self.clip / norm for name, g in gradients.items()}
        self.t += 1
        for name, g in gradients.items():
            self.m[name] = BETA_1 * self.m[name] + (1 - BETA_1) * g
            self.v[name] = BETA_2 * self.v[name] + (1 - BETA_2) * g**2
            m_hat = self.m[name] / (1 - BETA_1**self.t)
            v_hat = self.v[name] / (1 - BETA_2**self.t)
            self.params[name] = self.params[name] - rate * m_hat / (np.sqrt(v_hat) + EPSILON)
        if self.unit_norm:
            W = self.params["W_dec"]
            self.params["W_dec"] = W / np.linalg.norm(W, axis=1, keepdims=True)
        return norm
