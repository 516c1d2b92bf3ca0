"""The training step again, plainly: dense products, automatic gradients, Adam, all in float64."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def keep_largest(pre: mx.array, k: int) -> mx.array:
    """True at the k largest entries of each row (no ties)."""
    return pre >= mx.sort(pre, axis=-1)[:, -k][:, None]


def dense_terms(params, x, y, dead, *, k, k_auxiliary=0) -> dict[str, mx.array]:
    """The terms of the objective for arrays of any floating type."""
    W_enc = params.get("W_enc", params["W_dec"])
    pre = x @ W_enc.T + params["b_enc"]
    z = mx.where(keep_largest(pre, k), mx.maximum(pre, 0), 0)
    y_hat = z @ params["W_dec"] + params["b_dec"]
    terms = {"error": mx.mean((y_hat - y) ** 2), "l1": mx.abs(z).sum() / len(x), "z": z}
    if k_auxiliary:
        residual = mx.stop_gradient(y - y_hat)
        pre = mx.where(dead, pre, -mx.inf)
        z_dead = mx.where(keep_largest(pre, k_auxiliary) & dead, mx.maximum(pre, 0), 0)
        left = ((z_dead @ params["W_dec"] - residual) ** 2).sum()
        terms["auxiliary"] = left / ((residual - residual.mean(axis=0)) ** 2).sum()
    return terms


@dataclass
class ReferenceTrainer:
    """Parameters and moments in float64; `step` does what the compiled step should do."""

    params: dict[str, np.ndarray]
    k: int
    lambda_sparse: float = 0.0
    auxiliary_coefficient: float = 0.0
    k_auxiliary: int = 0
    clip: float = 0.0
    m: dict[str, np.ndarray] = field(default_factory=dict)
    v: dict[str, np.ndarray] = field(default_factory=dict)
    t: int = 0

    def __post_init__(self):
        self.params = {name: np.array(p, np.float64) for name, p in self.params.items()}
        self.m = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: np.zeros_like(p) for name, p in self.params.items()}

    def objective(self, params, x, y, dead):
        terms = dense_terms(params, x, y, dead, k=self.k, k_auxiliary=self.k_auxiliary)
        loss = terms["error"] + self.lambda_sparse * terms["l1"]
        if self.k_auxiliary:
            loss = loss + self.auxiliary_coefficient * terms["auxiliary"]
        return loss, terms

    def gradients(self, x, y, dead):
        with mx.stream(mx.cpu):
            arrays = {n: mx.array(p, dtype=mx.float64) for n, p in self.params.items()}
            data = (mx.array(np.array(a, np.float64), dtype=mx.float64) for a in (x, y))
            (loss, terms), gradients = mx.value_and_grad(self.objective)(
                arrays, *data, mx.array(dead)
            )
            mx.eval(loss, terms, gradients)
        return loss.item(), np.array(terms["z"]), {n: np.array(g) for n, g in gradients.items()}

    def step(self, x, y, dead, rate):
        loss, z, gradients = self.gradients(x, y, dead)
        W = self.params["W_dec"]
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
        W = self.params["W_dec"]
        self.params["W_dec"] = W / np.linalg.norm(W, axis=1, keepdims=True)
        return loss, z, norm
