"""MLX's norms and attention, linear with constants that are made, kept or played back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxterp.attention import attend, attention_pattern
from mlxterp.hooks import Around, suspended


@dataclass(frozen=True, eq=False)
class Recording:
    """The attention patterns and norm scales of one pass, by function in the order of calls."""

    constants: Mapping[str, tuple[mx.array, ...]]

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(kept)} of {name}" for name, kept in self.constants.items())
        return f"Recording({counts})"


class Live:
    """The functions with constants that are those of the pass, and have no derivative."""

    def __init__(self) -> None:
        self._depth = 0  # of calls of the model and of what holds its blocks
        self._attending = 0

    def begin(self) -> None:
        """Called where a pass begins."""

    def pass_(self, function: Around, *args: Any, **kwargs: Any) -> Any:
        if not self._depth:
            self.begin()
        self._depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._depth -= 1

    def attend(self, function: Around, *args: Any, **kwargs: Any) -> Any:
        self._attending += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._attending -= 1

    def inside(self, held: Around) -> Around:
        """`held` in passes of the model, and the function as it is elsewhere."""

        def call(function: Around, *args: Any, **kwargs: Any) -> mx.array:
            return held(function, *args, **kwargs) if self._depth else function(*args, **kwargs)

        return call

    def constant(self, name: str, value: mx.array) -> mx.array:
        return mx.stop_gradient(value)

    def result(self, function: Callable[[], mx.array], linear: mx.array) -> mx.array:
        """The value of `function` to the bit, with the derivative of `linear`."""
        return mx.stop_gradient(function()) + (linear - mx.stop_gradient(linear))

    def rms_norm(
        self, function: Around, x: mx.array, weight: mx.array | None, eps: float, **kwargs: Any
    ) -> mx.array:
        wide = x.astype(mx.float32)
        scale = self.constant(
            "rms_norm", mx.rsqrt(wide.square().mean(axis=-1, keepdims=True) + eps)
        )
        linear = _affine(wide * scale, x, weight)
        return self.result(lambda: function(x, weight, eps, **kwargs), linear)

    def layer_norm(
        self, function: Around, x: mx.array, weight: mx.array | None = None,
        bias: mx.array | None = None, eps: float = 1e-5, **kwargs: Any,
    ) -> mx.array:  # fmt: skip
        wide = x.astype(mx.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        scale = self.constant(
            "layer_norm", mx.rsqrt(wide.square().mean(axis=-1, keepdims=True) + eps)
        )
        linear = _affine(wide * scale, x, weight, bias)
        return self.result(lambda: function(x, weight, bias, eps, **kwargs), linear)

    def scaled_dot_product_attention(
        self, function: Around, q: mx.array, k: mx.array, v: mx.array, *, scale: float,
        mask: mx.array | str | None = None, sinks: mx.array | None = None, **kwargs: Any,
    ) -> mx.array:  # fmt: skip
        with suspended():  # the softmax of the pattern is none of the model's own
            pattern = attention_pattern(q, k, scale, mask, sinks)
        pattern = self.constant("scaled_dot_product_attention", pattern)
        return self.result(
            lambda: function(q, k, v, scale=scale, mask=mask, sinks=sinks, **kwargs),
            attend(pattern, v),
        )

    def softmax(self, function: Around, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        value = function(x, *args, **kwargs)
        return self.constant("softmax", value) if self._attending else value


class Recorder(Live):
    """The functions as they are, whose constants are kept."""

    def begin(self) -> None:
        self.kept: dict[str, list[mx.array]] = {}

    def constant(self, name: str, value: mx.array) -> mx.array:
        self.kept.setdefault(name, []).append(value)
        return value

    def result(self, function: Callable[[], mx.array], linear: mx.array) -> mx.array:
        return function()


class Playback(Live):
    """The functions with constants of an earlier pass."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def begin(self) -> None:
        self._next = {name: iter(kept) for name, kept in self.recording.constants.items()}

    def constant(self, name: str, value: mx.array) -> mx.array:
        kept = next(self._next.get(name, iter(())), None)
        if kept is None:
            raise ValueError(f"the pass calls {name} more often than the recorded pass did")
        if kept.shape[1:] != value.shape[1:] or kept.shape[0] not in (1, value.shape[0]):
            raise ValueError(
                f"the recording is of a pass of another shape: {name} had {list(kept.shape)}, "
                f"and has {list(value.shape)} now"
            )
        return mx.stop_gradient(mx.broadcast_to(kept, value.shape))

    def result(self, function: Callable[[], mx.array], linear: mx.array) -> mx.array:
        return linear


def _affine(
    scaled: mx.array, x: mx.array, weight: mx.array | None, bias: mx.array | None = None
) -> mx.array:
    """`weight scaled + bias` in the type that a norm of `x` has."""
    dtype = x.dtype if weight is None else mx.result_type(x, weight)
    scaled = scaled if weight is None else scaled * weight
    return (scaled if bias is None else scaled + bias).astype(dtype)
