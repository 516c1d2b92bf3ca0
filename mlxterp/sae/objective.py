"""What one step minimises: the error of the reconstruction, a penalty, and the revival of features.

It is the same for every kind of coder and every activation function; the parts are in `losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxterp.sae import losses
from mlxterp.sae.activation_functions import TopK
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.kernels import Pairs, decode_groups, with_gradients
from mlxterp.sae.parallel import UNDIVIDED, Undivided

Params = dict[str, mx.array]


@dataclass(frozen=True)
class Code:
    """A code in training.

    `values` are those at `pairs` `[n_pairs]`, or of all features `[batch, n_features]` where
    `pairs` is `None`; `penalised` has the same shape; `pre` are the pre-activations.
    """

    pre: mx.array
    values: mx.array
    penalised: mx.array
    pairs: Pairs | None

    @property
    def active(self) -> mx.array:
        """1 where the code is not zero."""
        return (self.values != 0).astype(mx.float32)

    def firings(self) -> mx.array:
        """On how many tokens each feature is active, `[n_features]`."""
        if self.pairs is None:
            return self.active.sum(axis=0)
        zeros = mx.zeros((self.pairs.n_features,))
        return zeros.at[self.pairs.features].add(self.active)


@dataclass(frozen=True)
class Objective:
    """The loss of a coder on normalised activations, as a function of its parameters.

    `k` is the number of active features for functions that select; `n_revived` is how many dead
    features the auxiliary loss looks at, and with 0 there is no such term. `division` says which
    part of the work is this process's.
    """

    coder: SparseCoder
    config: SAEConfig
    k: int
    n_revived: int = 0
    division: Undivided = UNDIVIDED

    def encode(self, params: Params, x: mx.array) -> Code:
        """The code of inputs `[batch, d_in]`, with gradients for the parameters."""
        function, dtype = self.coder.activation_function, self._dtype
        W_enc = params.get("W_enc", params["W_dec"]).astype(dtype)
        b_enc, x = params["b_enc"].astype(dtype), x.astype(dtype)
        if not isinstance(function, TopK):
            pre = mx.addmm(b_enc, x, W_enc.T).astype(mx.float32)
            values, penalised = function.code(pre, params, self.config.bandwidth)
            return Code(pre, values, penalised, None)
        pre = mx.stop_gradient(mx.addmm(b_enc, self.division.encoded_tokens(x), W_enc.T))
        pairs, raw = self.division.select(function, pre, self.k, ordered=bool(self._bounds))
        raw = with_gradients(raw, pairs, x, W_enc, b_enc)
        values = function.values(raw.astype(mx.float32))
        values = self.division.selected(values, pairs, self.k)
        return Code(pre, values, mx.abs(values), pairs)

    def parts(self, params: Params, code: Code) -> mx.array:
        """What each group of features adds to the reconstruction, `[batch, n_groups, d_out]`."""
        W_dec = params["W_dec"].astype(self._dtype)
        if code.pairs is None:
            parts = decode_groups(code.values.astype(self._dtype), W_dec, self._bounds)
        else:
            parts = self.division.decode(code.values, code.pairs, W_dec, self._bounds)
        return self.division.sum_over_features(parts.astype(mx.float32))

    def reconstruct(self, params: Params, x: mx.array) -> mx.array:
        """The reconstruction `[batch, d_out]` as it is in training."""
        return self.parts(params, self.encode(params, x)).sum(axis=1) + params["b_dec"]

    def __call__(
        self, params: Params, x: mx.array, y: mx.array, dead: mx.array, coefficient: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss on inputs and targets `[batch, d]`, and what else a step needs to know."""
        division, n_tokens = self.division, len(x)
        x, y, params = division.own_tokens(x), division.own_tokens(y), division.replicated(params)
        code = self.encode(params, x)
        error, residual = losses.nested_error(self.parts(params, code), params["b_dec"], y)
        loss = error
        if self.config.penalty is not None:
            loss = loss + coefficient * self._penalty(params, code, len(x))
        if self.coder.activation_function.from_gate:
            frozen = {name: mx.stop_gradient(params[name]) for name in ("W_dec", "b_dec")}
            decoded = division.sum_over_features(code.penalised @ frozen["W_dec"])
            loss = loss + losses.squared_error(decoded + frozen["b_dec"], y)
        if self.n_revived:
            revival = self._revival(params, residual, x, dead)
            loss = loss + self.config.auxiliary_coefficient * revival
        firings = division.sum_over_tokens(code.firings())
        return division.mean_over_tokens(loss), {
            "error": division.mean_over_tokens(residual.square().sum(axis=0).sum() / residual.size),
            # A flat sum of float32 ones ends at 2^24 on the CPU.
            "l0": division.sum_over_features(firings.sum()) / n_tokens,
            "firings": firings,
            "values": division.with_smallest(code.values),
        }

    @property
    def _dtype(self) -> mx.Dtype:
        return mx.bfloat16 if self.config.precision == "bfloat16" else mx.float32

    @property
    def _bounds(self) -> tuple[int, ...]:
        """The first features of all nested groups but the first, among the own ones."""
        n = self.coder.n_features
        bounds = {min(max(1, round(share * n)), n - 1) for share in self.config.matryoshka_prefixes}
        return self.division.own_bounds(tuple(sorted(bounds)), n)

    def _penalty(self, params: Params, code: Code, n_tokens: int) -> mx.array:
        name, division = self.config.penalty, self.division
        if name in ("l0", "quadratic"):
            function = self.coder.activation_function
            counts = function.count(code.pre, params, self.config.bandwidth).mean()
            counts = division.mean_over_tokens(division.sum_over_features(counts))
            if name == "l0":
                return losses.l0(counts)
            return losses.quadratic(counts, self.config.wanted_l0)
        norms: mx.array | float = 1.0
        if not self.config.decoder_unit_norm:
            norms = mx.linalg.norm(params["W_dec"], axis=-1)
            norms = norms if code.pairs is None else norms[code.pairs.features]
        penalty = (losses.l1 if name == "l1" else losses.tanh)(code.penalised, norms, n_tokens)
        return division.sum_over_features(penalty)

    def _revival(self, params: Params, residual: mx.array, x: mx.array, dead: mx.array) -> mx.array:
        n = self.n_revived
        dead = self.division.looked_at(dead, n)
        rows = mx.argpartition(mx.where(dead, 0, 1), min(n, len(dead) - 1))[:n]
        W_enc = params.get("W_enc", params["W_dec"])
        arrays = W_enc[rows], params["b_enc"][rows], params["W_dec"][rows]
        k = max(1, self.coder.d_out // 2)
        living = mx.logical_not(dead[rows])
        return losses.auxiliary(residual, x, living, k, *arrays, division=self.division)
