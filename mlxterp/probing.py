"""Learn how the blocks of a model add up, without computing any of them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxterp.hooks import (
    Hooks,
    Key,
    array_arguments,
    first_array,
    stream_argument,
    with_argument,
    with_first_array,
)

# Rows of the probing batch: what the stream, the attention and the MLP contribute in each.
_PROBES = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 4))
BATCH, LENGTH = len(_PROBES), 13

_LINEAR = {"Add", "Subtract", "Multiply", "Divide", "AsType", "Broadcast", "Reshape", "ExpandDims",
           "Squeeze", "Full", "Flatten", "Unflatten", "Contiguous", "Copy"}  # fmt: skip
_NORM = _LINEAR | {
    "RMSNorm",
    "LayerNorm",
    "Rsqrt",
    "Sqrt",
    "Square",
    "Sum",
    "Reduce",
    "Power",
    "Load",
}


@dataclass(frozen=True)
class Branch:
    """The attention or the MLP of a block; `addend` is the module whose output, times `scale`,
    is added to the residual stream (a norm that follows `module`, where there is one).

    `norm` is the one that makes what `module` receives, `no_unit` why that cannot be had without
    its gain; `projection` is the matrix inside of `module` that makes what it returns. They are
    None where there is none.
    """

    path: str
    module: nn.Module
    addend: nn.Module
    scale: float = 1.0
    norm: nn.Module | None = None
    no_unit: str = "no norm with a gain makes what it receives"
    projection: nn.Module | None = None


@dataclass
class Block:
    """How one block is wired; `additive` and `sequential` are empty, or why they do not hold."""

    stream: Key | None  # which argument is the residual stream
    attn: Branch | None
    mlp: Branch | None
    called: bool
    once: bool  # whether each call of the block calls its attention and its MLP once
    additive: str = "the architecture could not be probed"
    sequential: str = "the architecture could not be probed"


def probe(model: nn.Module, blocks: list[nn.Module], wired: list[Block], inputs: mx.array) -> None:
    """Learn how each block adds up by putting constants in the place of what it adds.

    With the stream, the attention and the MLP replaced by known arrays the output of an additive
    block depends on them alone, so that it can be computed without touching a weight.
    """
    outputs: dict[int, mx.array] = {}
    read: dict[int, mx.array] = {}
    hooks = Hooks()
    for i, (block, wiring) in enumerate(zip(blocks, wired, strict=True)):
        if wiring.called:
            _substitute(hooks, i, block, wiring, outputs, read)
    with hooks:
        model(inputs)
    summaries = {i: _coefficients(out) for i, out in outputs.items() if _made_of(out, _LINEAR)}
    reads = {i: x[:, 0].astype(mx.float32) for i, x in read.items() if _made_of(x, _NORM)}
    mx.eval(summaries, reads)
    for i, wiring in enumerate(wired):
        if wiring.called:
            _conclude(wiring, summaries.get(i), reads.get(i))


def _substitute(
    hooks: Hooks,
    index: int,
    block: nn.Module,
    wiring: Block,
    outputs: dict[int, mx.array],
    read: dict[int, mx.array],
) -> None:
    def replace_stream(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        arrays = array_arguments(args, kwargs)
        if wiring.stream is None or wiring.stream not in arrays:
            return args, kwargs
        constant = _constant(arrays[wiring.stream], 0)
        return with_argument(args, kwargs, wiring.stream, constant)

    def replace_output(which: int) -> Callable[[Any], Any]:
        def replace(output: Any) -> Any:
            array = first_array(output)
            return output if array is None else with_first_array(output, _constant(array, which))

        return replace

    def note_read(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        arrays = array_arguments(args, kwargs)
        if (key := stream_argument(arrays)) is not None:
            read[index] = arrays[key]
        return args, kwargs

    def note_output(output: Any) -> Any:
        array = first_array(output)
        if array is not None and array.shape[0] == BATCH:
            outputs[index] = array
        return output

    hooks.add_before(block, replace_stream)
    if wiring.attn:
        hooks.add_after(wiring.attn.addend, replace_output(1))
    if wiring.mlp:
        hooks.add_before(wiring.mlp.module, note_read)
        hooks.add_after(wiring.mlp.addend, replace_output(2))
    hooks.add_after(block, note_output)


def _pattern(width: int) -> mx.array:
    # Not constant, which a layer norm would map to zero; powers of two divide exactly.
    return mx.power(2.0, mx.arange(width) % 3)


def _constant(like: mx.array, which: int) -> mx.array:
    if like.ndim < 2 or like.shape[0] != BATCH:
        return like
    rows = mx.array([probe[which] for probe in _PROBES], dtype=mx.float32)
    rows = rows.reshape(BATCH, *(1,) * (like.ndim - 1))
    array = mx.broadcast_to(rows * _pattern(like.shape[-1]), like.shape).astype(like.dtype)
    mx.eval(array)
    return array


def _made_of(array: mx.array, primitives: set[str]) -> bool:
    """Whether the graph of `array` has no primitives but these (or fused ones)."""
    dot = io.StringIO()
    mx.export_to_dot(dot, array)
    labels = set(re.findall(r'label ="(\w+)"', dot.getvalue()))
    return all(label in primitives or label.startswith("Compiled") for label in labels)


def _coefficients(output: mx.array) -> mx.array:
    """The smallest and largest multiple of the pattern in each row, `[2, BATCH]`."""
    ratio = output.reshape(BATCH, -1, output.shape[-1])[:, 0].astype(mx.float32)
    ratio = ratio / _pattern(output.shape[-1])
    return mx.stack([ratio.min(axis=-1), ratio.max(axis=-1)])


def _conclude(wiring: Block, coefficients: mx.array | None, read: mx.array | None) -> None:
    wiring.additive = "it adds more to the stream than one attention and one MLP"
    if wiring.once and coefficients is not None and (scales := _scales(coefficients)) is not None:
        wiring.additive = ""
        attn, mlp = wiring.attn, wiring.mlp
        if attn:
            wiring.attn = replace(attn, scale=scales[0])
        if mlp:
            wiring.mlp = replace(mlp, scale=scales[1])
    wiring.sequential = _why_not_sequential(wiring, read)


def _scales(coefficients: mx.array) -> tuple[float, float] | None:
    """How much of the attention and of the MLP is added, where that and the stream is all."""
    low, high = np.array(coefficients).tolist()
    if low != high:
        return None
    zero, stream, attn, mlp, mixed = low
    close = abs(mixed - (stream + 2 * attn + 4 * mlp)) <= 0.02 * abs(mixed)
    return (attn, mlp) if zero == 0 and stream == 1 and close else None


def _why_not_sequential(wiring: Block, read: mx.array | None) -> str:
    if wiring.additive:
        return wiring.additive
    if wiring.attn is None or wiring.mlp is None:
        return "it has only one of attention and MLP"
    if read is None:
        return "what its MLP reads could not be traced"
    nothing, stream, attn = read[0], read[1], read[2]
    if mx.allclose(attn, nothing).item():
        return "its attention and its MLP work in parallel"
    scale = wiring.attn.scale
    if scale > 0 and mx.allclose(attn, stream, rtol=2e-2, atol=2e-2).item():
        return ""
    return "its MLP does not read the sum of the stream and the attention"
