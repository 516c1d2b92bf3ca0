"""What one step minimises: the error of the reconstruction, a penalty, and the revival of features.

It is the same for every kind of coder and every activation function; the parts are in `losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxterp.sae import losses
from mlxterp.sae.activation_functions import TopK
from mlxterp.sae.coder import Block, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.kernels import Pairs, decode_groups, joined, with_gradients
from mlxterp.sae.parallel import UNDIVIDED, Undivided

Params = dict[str, mx.array]
Blocks = list[tuple[Block, Params, mx.array | None]]

# Parameters that have not one row for every feature.
NOT_BY_FEATURE = ("W_dec", "b_dec", "W_skip")


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

    `k` is the number of active features of a block for functions that select; `n_revived` is how
    many dead features the auxiliary loss looks at, and with 0 there is no such term. `division`
    says which part of the work is this process's.
    """

    coder: SparseCoder
    config: SAEConfig
    k: int
    n_revived: int = 0
    division: Undivided = UNDIVIDED

    def encode(self, params: Params, x: mx.array, weights: mx.array | None = None) -> Code:
        """The code of a block of inputs `[batch, d_in]`, with gradients for its parameters.

        Of functions that select, those pre-activations win that are largest times `weights`
        `[n_features]`.
        """
        function, dtype = self.coder.activation_function, self._dtype
        W_enc = params.get("W_enc", params["W_dec"]).astype(dtype)
        b_enc, x = params["b_enc"].astype(dtype), x.astype(dtype)
        if not isinstance(function, TopK):
            pre = mx.addmm(b_enc, x, W_enc.T).astype(mx.float32)
            values, penalised = function.code(pre, params, self.config.bandwidth)
            return Code(pre, values, penalised, None)
        if weights is not None:
            weights = mx.stop_gradient(weights)
        pre = mx.stop_gradient(mx.addmm(b_enc, self.division.encoded_tokens(x), W_enc.T))
        pairs, raw = self.division.select(function, pre, self.k, bool(self._bounds), weights)
        raw = with_gradients(raw, pairs, x, W_enc, b_enc)
        values = function.values(raw.astype(mx.float32))
        values = self.division.selected(values, pairs, self.k, weights)
        return Code(pre, values, mx.abs(values), pairs)

    def parts(self, params: Params, code: Code) -> mx.array:
        """What each group of a block's features adds to the reconstruction,
        `[batch, n_groups, columns that it writes]`."""
        W_dec = params["W_dec"].astype(self._dtype)
        if code.pairs is None:
            parts = decode_groups(code.values.astype(self._dtype), W_dec, self._bounds)
        else:
            parts = self.division.decode(code.values, code.pairs, W_dec, self._bounds)
        return self.division.sum_over_features(parts.astype(mx.float32))

    def codes(self, params: Params, x: mx.array) -> list[Code]:
        """The code of each block for inputs `[batch, d_in]`."""
        return self._encode(self._blocks(params), x)

    def bias(self, params: Params, x: mx.array) -> mx.array:
        """What is written whatever the code is, `[d_out]` or `[batch, d_out]`."""
        if "W_skip" not in params:
            return params["b_dec"]
        W_skip = params["W_skip"].astype(self._dtype)
        return params["b_dec"] + (x.astype(self._dtype) @ W_skip.T).astype(mx.float32)

    def reconstruct(self, params: Params, x: mx.array) -> mx.array:
        """The reconstruction `[batch, d_out]` as it is in training."""
        blocks = self._blocks(params)
        codes = self._encode(blocks, x)
        return self._parts(blocks, codes).sum(axis=1) + self.bias(params, x)

    def __call__(
        self, params: Params, x: mx.array, y: mx.array, dead: mx.array, coefficient: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss on inputs and targets `[batch, d]`, and what else a step needs to know."""
        division, n_tokens = self.division, len(x)
        x, y, params = division.own_tokens(x), division.own_tokens(y), division.replicated(params)
        blocks = self._blocks(params)
        codes = self._encode(blocks, x)
        bias = self.bias(params, x)
        parts = self._parts(blocks, codes)
        error, residual = losses.nested_error(parts, bias, y, self._importance)
        loss = error
        if self.config.penalty is not None:
            loss = loss + coefficient * self._penalty(blocks, codes, len(x))
        if self.coder.activation_function.from_gate:
            loss = loss + self._error_of_gates(blocks, codes, mx.stop_gradient(bias), y)
        if self.n_revived:
            revival = self._revival(blocks, residual, x, dead)
            loss = loss + self.config.auxiliary_coefficient * revival
        firings = joined([division.sum_over_tokens(code.firings()) for code in codes])
        return division.mean_over_tokens(loss), {
            "error": division.mean_over_tokens(residual.square().sum(axis=0).sum() / residual.size),
            # A flat sum of float32 ones ends at 2^24 on the CPU.
            "l0": division.sum_over_features(firings.sum()) / n_tokens,
            "firings": firings,
            "smallest": self._smallest(blocks, codes),
        }

    @property
    def _dtype(self) -> mx.Dtype:
        return mx.bfloat16 if self.config.precision == "bfloat16" else mx.float32

    @property
    def _bounds(self) -> tuple[int, ...]:
        """The first features of all nested groups but the first, among the own ones of a block."""
        n = self.coder.n_features // len(self.coder.blocks)
        bounds = {min(max(1, round(share * n)), n - 1) for share in self.config.matryoshka_prefixes}
        return self.division.own_bounds(tuple(sorted(bounds)), n)

    @property
    def _importance(self) -> mx.array | None:
        """How much the error in each column counts `[d_out]`, 1 on average; `None`: all alike."""
        writes, weights = self.coder.writes, self.config.weights_of(self.coder.writes.names)
        if weights is None:
            return None
        mean = sum(w * d for w, d in zip(weights, writes.widths, strict=True)) / writes.width
        columns = [mx.full((d,), w / mean) for w, d in zip(weights, writes.widths, strict=True)]
        return mx.concatenate(columns)

    def _blocks(self, params: Params) -> Blocks:
        """Of each block its parameters, and what its features weigh in penalties and selections:
        the norms of their decoder rows, summed over sites. `None`: 1 for all of them."""
        coder, blocks = self.coder, self.coder.blocks
        decoders = coder.decoder_blocks(params["W_dec"])
        unit = self.config.decoder_unit_norm and len(coder.writes.names) == 1
        if len(blocks) == 1:
            weights = None if unit else coder.site_norms(decoders[0], blocks[0]).sum(axis=-1)
            return [(blocks[0], params, weights)]
        own = [name for name in params if name not in NOT_BY_FEATURE]
        split = {name: coder.of_blocks(params[name]) for name in own} | {"W_dec": decoders}
        return [
            (
                block,
                {name: parts[i] for name, parts in split.items()},
                coder.site_norms(decoders[i], block).sum(axis=-1),
            )
            for i, block in enumerate(blocks)
        ]

    def _encode(self, blocks: Blocks, x: mx.array) -> list[Code]:
        return [self.encode(params, x[:, block.reads], w) for block, params, w in blocks]

    def _parts(self, blocks: Blocks, codes: list[Code]) -> mx.array:
        written = [
            self.coder.in_place(self.parts(params, code), block)
            for (block, params, _), code in zip(blocks, codes, strict=True)
        ]
        return sum(written[1:], written[0])

    def _error_of_gates(
        self, blocks: Blocks, codes: list[Code], bias: mx.array, y: mx.array
    ) -> mx.array:
        """The error of what is penalised, by the frozen decoder."""
        written = [
            self.coder.in_place(code.penalised @ mx.stop_gradient(params["W_dec"]), block)
            for (block, params, _), code in zip(blocks, codes, strict=True)
        ]
        decoded = self.division.sum_over_features(sum(written[1:], written[0]))
        return losses.squared_error(decoded + bias, y, self._importance)

    def _penalty(self, blocks: Blocks, codes: list[Code], n_tokens: int) -> mx.array:
        name, division = self.config.penalty, self.division
        both = list(zip(blocks, codes, strict=True))
        if name in ("l0", "quadratic"):
            function, bandwidth = self.coder.activation_function, self.config.bandwidth
            counts = [function.count(c.pre, params, bandwidth).mean() for (_, params, _), c in both]
            total = sum(counts[1:], counts[0])
            total = division.mean_over_tokens(division.sum_over_features(total))
            if name == "l0":
                return losses.l0(total)
            return losses.quadratic(total, self.config.wanted_l0 * len(blocks))
        penalties = []
        for (_, _, weights), code in both:
            norms: mx.array | float = 1.0
            if weights is not None:
                norms = weights if code.pairs is None else weights[code.pairs.features]
            kind = losses.l1 if name == "l1" else losses.tanh
            penalties.append(kind(code.penalised, norms, n_tokens))
        return division.sum_over_features(sum(penalties[1:], penalties[0]))

    def _revival(self, blocks: Blocks, residual: mx.array, x: mx.array, dead: mx.array) -> mx.array:
        """The mean of the blocks' auxiliary losses."""
        terms = [
            self._revival_of(params, residual[:, block.writes], x[:, block.reads], own)
            for (block, params, _), own in zip(blocks, self.coder.of_blocks(dead), strict=True)
        ]
        return sum(terms[1:], terms[0]) / len(terms)

    def _revival_of(
        self, params: Params, residual: mx.array, x: mx.array, dead: mx.array
    ) -> mx.array:
        n = min(self.n_revived, len(dead)) if len(self.coder.blocks) > 1 else self.n_revived
        dead = self.division.looked_at(dead, n)
        rows = mx.argpartition(mx.where(dead, 0, 1), min(n, len(dead) - 1))[:n]
        W_enc = params.get("W_enc", params["W_dec"])
        arrays = W_enc[rows], params["b_enc"][rows], params["W_dec"][rows]
        k = max(1, residual.shape[1] // 2)
        living = mx.logical_not(dead[rows])
        return losses.auxiliary(residual, x, living, k, *arrays, division=self.division)

    def _smallest(self, blocks: Blocks, codes: list[Code]) -> mx.array:
        """The smallest positive selected value of each block, times its feature's weight."""
        found = []
        for (_, _, weights), code in zip(blocks, codes, strict=True):
            values = code.values
            if code.pairs is not None and weights is not None:
                values = values * weights[code.pairs.features]
            found.append(self.division.smallest(values))
        return found[0] if len(found) == 1 else mx.stack(found)
