"""Training on several processes, which together make the coder that one of them would have made.

Every process is given every batch; what is divided is the work on it:

* `"data"`: the tokens. A selecting activation function (TopK and its kin) has sparse codes, so the
  processes exchange codes and reconstructions and each forms the gradient of the whole batch
  (`ByPairs`). The others have dense codes, so each takes the loss of its own tokens, and gradients
  are averaged (`ByTokens`).
* `"features"`: the coder itself, with its moments and counters (`ByFeatures`).

Only `mx.distributed` is used, and of it only what its ring knows: sums, extremes, gathering.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import mlx.core as mx

from mlxterp.sae.activation_functions import BatchTopK, TopK
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.kernels import Pairs, decode_pairs, top_k
from mlxterp.sae.processes import wait_for_all

Parallel = Literal["data", "features"]
Group = mx.distributed.Group

# The arrays that have no row for every feature.
SHARED = ("b_dec", "W_skip")

# The stubs of MLX say that what it decorates returns `object`.
_custom_function: Any = mx.custom_function


class Undivided:
    """All work in one process; what the other divisions do otherwise, and when it matters.

    `size` is the number of processes, and `divides_features` says whether each holds but a part of
    the coder. The first process alone writes files and hears of callbacks.
    """

    size = 1
    is_first = True
    divides_features = False

    def own_tokens(self, array: mx.array) -> mx.array:
        """The rows of a batch whose loss this process takes."""
        return array

    def encoded_tokens(self, x: mx.array) -> mx.array:
        """The rows of these that this process encodes, where codes are sparse."""
        return x

    def replicated(self, params: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The parameters, with gradients that are means over all tokens."""
        return dict(params)

    def mean_over_tokens(self, array: mx.array) -> mx.array:
        """The mean over all tokens from the mean over the own ones."""
        return array

    def sum_over_tokens(self, array: mx.array) -> mx.array:
        """The sum over all tokens from the sum over the own ones."""
        return array

    def sum_over_features(self, array: mx.array) -> mx.array:
        """The sum over all features from the sum over the own ones."""
        return array

    def select(
        self, function: TopK, pre: mx.array, k: int, ordered: bool, weights: mx.array | None = None
    ) -> tuple[Pairs, mx.array]:
        """The pairs of the batch that may be active, and their pre-activations `[n_pairs]`.

        `pre` are those of `encoded_tokens`; with `ordered` each token's pairs are by feature. The
        largest are selected, times the features' `weights` where there are such.
        """
        pairs = function.select(pre if weights is None else pre * weights, k)
        pairs = pairs.ordered() if ordered else pairs
        return pairs, pairs.at(pre)

    def selected(
        self, values: mx.array, pairs: Pairs, k: int, weights: mx.array | None = None
    ) -> mx.array:
        """The values at the pairs, 0 where other processes have larger ones, by their weight."""
        return values

    def largest(self, values: mx.array, k: int) -> mx.array:
        """Of the values `[n_rows, n]` those among the `k` largest of a row over all processes."""
        return values

    def decode(
        self, values: mx.array, pairs: Pairs, W_dec: mx.array, bounds: tuple[int, ...]
    ) -> mx.array:
        """As `kernels.decode_pairs`, before the sum over features."""
        return decode_pairs(values, pairs, W_dec, bounds)

    def looked_at(self, dead: mx.array, n: int) -> mx.array:
        """Which of the own features are among `n` dead ones, the same as in one process."""
        return dead

    def own_bounds(self, bounds: tuple[int, ...], n_features: int) -> tuple[int, ...]:
        """The first features of nested groups, counted from the first of the own features."""
        return bounds

    def summed_squares(self, squares: Mapping[str, mx.array]) -> mx.array:
        """The squared norm of all gradients from those of each parameter."""
        return mx.stack(list(squares.values())).sum()

    def smallest(self, values: mx.array) -> mx.array:
        """The smallest positive value of all processes; infinite where there is none."""
        return mx.where(values > 0, values, mx.inf).min()

    def shard(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The own part of a state."""
        return tree

    def gather(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `shard`; every process must ask for it."""
        return tree

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all processes; every process must ask for it."""
        return list(numbers)


UNDIVIDED = Undivided()


class _Divided(Undivided):
    def __init__(self, group: Group):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.is_first = self.rank == 0

    def _part(self, array: mx.array) -> mx.array:
        n = len(array) // self.size
        return array[self.rank * n : (self.rank + 1) * n]

    def _sum(self, array: mx.array) -> mx.array:
        return mx.distributed.all_sum(array, group=self.group)

    def _joined(self, array: mx.array) -> mx.array:
        return mx.distributed.all_gather(array, group=self.group)

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        largest: Any = mx.distributed.all_max(mx.array(list(numbers)), group=self.group).tolist()
        return largest


class ByTokens(_Divided):
    """Each process takes the loss of its own tokens, and gradients are averaged."""

    def own_tokens(self, array: mx.array) -> mx.array:
        return self._part(array)

    def replicated(self, params: Mapping[str, mx.array]) -> dict[str, mx.array]:
        @_custom_function
        def same(array: mx.array) -> mx.array:
            return array

        @same.vjp
        def _vjp(primal, cotangent, _):
            return self._sum(cotangent) / self.size

        return {name: same(array) for name, array in params.items()}

    def mean_over_tokens(self, array: mx.array) -> mx.array:
        # The gradient of a mean over processes would carry 1 / size, but `replicated` brings that.
        return _with_identity_gradient(lambda a: self._sum(a) / self.size, array)

    def sum_over_tokens(self, array: mx.array) -> mx.array:
        return self._sum(array)


class ByPairs(_Divided):
    """Each process encodes its own tokens and decodes its share of the pairs.

    Codes and reconstructions are exchanged, so that all the rest is the same everywhere.
    """

    def encoded_tokens(self, x: mx.array) -> mx.array:
        return self._part(x)

    def select(
        self, function: TopK, pre: mx.array, k: int, ordered: bool, weights: mx.array | None = None
    ) -> tuple[Pairs, mx.array]:
        (n_own, n_features), n_tokens = pre.shape, len(pre) * self.size
        # All that the whole batch selects may lie on the tokens of one process.
        candidates = min(k * self.size, n_features) if isinstance(function, BatchTopK) else k
        own, raw = super().select(function, pre, candidates, ordered, weights)
        tokens, features, raw = map(
            self._joined, (own.tokens + self.rank * n_own, own.features, raw)
        )
        if not isinstance(function, BatchTopK):
            return Pairs(tokens, features, n_tokens, n_features, k), raw
        sizes = raw if weights is None else raw * weights[features]
        best = mx.sort(top_k(sizes[None], k * n_tokens)[0])
        return Pairs(tokens[best], features[best], n_tokens, n_features, None), raw[best]

    def decode(
        self, values: mx.array, pairs: Pairs, W_dec: mx.array, bounds: tuple[int, ...]
    ) -> mx.array:
        n_tokens, by_token = pairs.n_tokens, pairs.per_token is not None
        tokens = self._part(pairs.tokens)
        if by_token:  # then a share of the pairs is that of as many tokens
            n_tokens = n_tokens // self.size
            tokens = tokens - self.rank * n_tokens
        own = Pairs(tokens, self._part(pairs.features), n_tokens, pairs.n_features, pairs.per_token)

        @_custom_function
        def decode(values: mx.array, W_dec: mx.array) -> mx.array:
            decoded = decode_pairs(self._part(values), own, W_dec, bounds)
            return self._joined(decoded) if by_token else self._sum(decoded)

        @decode.vjp
        def _vjp(primals, cotangent, _):
            values, W_dec = primals
            at_own = self._part(cotangent) if by_token else cotangent
            _, (dots,) = mx.vjp(
                lambda v: decode_pairs(v, own, W_dec, bounds), [self._part(values)], [at_own]
            )
            _, (rows,) = mx.vjp(
                lambda W: decode_pairs(values, pairs, W, bounds), [W_dec], [cotangent]
            )
            return self._joined(dots), rows

        return decode(values, W_dec)


class ByFeatures(_Divided):
    """Each process holds a part of the features: their rows, moments and counters."""

    divides_features = True

    def sum_over_features(self, array: mx.array) -> mx.array:
        # What follows is the same on all processes, and so is its gradient.
        return _with_identity_gradient(self._sum, array)

    def select(
        self, function: TopK, pre: mx.array, k: int, ordered: bool, weights: mx.array | None = None
    ) -> tuple[Pairs, mx.array]:
        return super().select(function, pre, min(k, pre.shape[1]), ordered, weights)

    def selected(
        self, values: mx.array, pairs: Pairs, k: int, weights: mx.array | None = None
    ) -> mx.array:
        n_rows = 1 if pairs.per_token is None else pairs.n_tokens
        k *= pairs.n_tokens // n_rows
        sizes = values if weights is None else values * weights[pairs.features]
        kept = self._among_largest(sizes.reshape(n_rows, -1), k).reshape(-1)
        return mx.where(kept, values, 0)

    def largest(self, values: mx.array, k: int) -> mx.array:
        return mx.where(self._among_largest(values, k), values, 0)

    def _among_largest(self, values: mx.array, k: int) -> mx.array:
        """True at the `k` values of each row that are largest over all processes."""
        n_rows, n = values.shape
        sizes = self._joined(mx.abs(mx.stop_gradient(values))[None])
        chosen = top_k(sizes.transpose(1, 0, 2).reshape(n_rows, self.size * n), k)
        # A count, so that on all processes the same ones win where values are equal.
        kept = mx.put_along_axis(mx.zeros((n_rows, self.size * n)), chosen, mx.array(1.0), axis=-1)
        return kept[:, self.rank * n : (self.rank + 1) * n] > 0

    def looked_at(self, dead: mx.array, n: int) -> mx.array:
        living = self._joined(mx.where(dead, 0, 1))
        rows = mx.argpartition(living, min(n, len(living) - 1))[:n]
        return dead & (self._part(mx.zeros(living.shape).at[rows].add(1.0)) > 0)

    def own_bounds(self, bounds: tuple[int, ...], n_features: int) -> tuple[int, ...]:
        n = n_features // self.size
        return tuple(min(max(bound - self.rank * n, 0), n) for bound in bounds)

    def summed_squares(self, squares: Mapping[str, mx.array]) -> mx.array:
        own = mx.stack([square for name, square in squares.items() if name not in SHARED])
        shared = mx.stack([square for name, square in squares.items() if name in SHARED])
        return self._sum(own.sum()) + shared.sum()

    def smallest(self, values: mx.array) -> mx.array:
        return mx.distributed.all_min(super().smallest(values)[None], group=self.group)[0]

    def shard(self, tree: dict[str, Any]) -> dict[str, Any]:
        return _rows(tree, self._part)

    def gather(self, tree: dict[str, Any]) -> dict[str, Any]:
        return _rows(tree, self._joined)


def _with_identity_gradient(function: Any, array: mx.array) -> mx.array:
    forward = _custom_function(function)
    forward.vjp(lambda primal, cotangent, _: cotangent)
    return forward(array)


def _rows(tree: dict[str, Any], function: Any) -> dict[str, Any]:
    """The function of all arrays in a state that have a row for every feature."""
    return {
        name: _rows(value, function)
        if isinstance(value, dict)
        else function(value)
        if value.ndim and name not in SHARED
        else value
        for name, value in tree.items()
    }


def is_first(parallel: Parallel | None) -> bool:
    """Whether this process writes files and talks to the user.

    Raises `ValueError` for a way to divide the work that does not exist.
    """
    if parallel is not None and parallel not in get_args(Parallel):
        raise ValueError(f"parallel must be None or one of {get_args(Parallel)}, got {parallel!r}.")
    return parallel is None or mx.distributed.init().rank() == 0


def divide(parallel: Parallel | None, coder: SparseCoder, batch_size: int) -> Undivided:
    """How the processes share the work on a coder.

    Raises `ValueError` where tokens or features cannot be divided evenly.
    """
    if parallel is None or mx.distributed.init().size() == 1:
        return UNDIVIDED
    group = mx.distributed.init()
    field, n = "batch_size", batch_size
    if parallel == "features":
        field, n = "n_features", coder.n_features
    if n % group.size():
        raise ValueError(
            f"{field} must be a multiple of the number of processes, {group.size()}, got {n}."
        )
    if parallel == "features" and len(coder.blocks) > 1:
        raise ValueError(
            f'parallel="features" divides coders of one block of features; this one has '
            f'{len(coder.blocks)}. Use parallel="data".'
        )
    if parallel == "features":
        return ByFeatures(group)
    return ByPairs(group) if isinstance(coder.activation_function, TopK) else ByTokens(group)


@contextlib.contextmanager
def first_before_others(parallel: Parallel | None) -> Iterator[None]:
    """The first process goes through the block, and then the others."""
    first = is_first(parallel)
    if not first:
        wait_for_all()
    try:
        yield
    finally:
        if first and parallel is not None:
            wait_for_all()
