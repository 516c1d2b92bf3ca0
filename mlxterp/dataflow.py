"""Find out how a model is wired from one forward pass that computes nothing.

A model is called on a few tokens while every module notes which arrays it was given and which it
returned. Because MLX is lazy, nothing is evaluated and no weight is loaded.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .hooks import Hooks

# Rows of the probing batch: what the stream, the attention and the MLP contribute in each.
_PROBES = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 4))
BATCH, LENGTH = len(_PROBES), 13

_ATTENTION = (
    "self_attn", "attn", "attention", "linear_attn", "temporal_block", "mixer", "mamba", "conv",
    "norm_attn_norm.attn", "attn.attention",
)  # fmt: skip
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "moe")

_LINEAR = {"Add", "Subtract", "Multiply", "Divide", "AsType", "Broadcast", "Reshape", "ExpandDims",
           "Squeeze", "Full", "Flatten", "Unflatten", "Contiguous", "Copy"}  # fmt: skip
_NORM = _LINEAR | {"RMSNorm", "LayerNorm", "Rsqrt", "Sqrt", "Square", "Sum", "Reduce", "Power", "Load"}


def first_array(value: Any) -> mx.array | None:
    """The array that a module's output stands for: itself, or the first in a tuple or list."""
    if isinstance(value, mx.array):
        return value
    if isinstance(value, (tuple, list)):
        return next((item for item in value if isinstance(item, mx.array)), None)
    return None


def with_first_array(value: Any, array: mx.array) -> Any:
    """``value`` with ``array`` in the place of its first array."""
    if isinstance(value, mx.array):
        return array
    items = list(value)
    items[next(i for i, item in enumerate(items) if isinstance(item, mx.array))] = array
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


Key = int | str  # of a positional or a named argument


def array_arguments(args: tuple, kwargs: dict) -> dict[Key, mx.array]:
    """The arguments that are arrays."""
    items = (*enumerate(args), *kwargs.items())
    return {key: value for key, value in items if isinstance(value, mx.array)}


def stream_argument(arrays: dict[Key, mx.array]) -> Key | None:
    """Which argument is the activation: the first array ``[B, S, ...]``, else the first of floats."""
    for key, array in arrays.items():
        if array.ndim >= 3:
            return key
    return next((k for k, v in arrays.items() if mx.issubdtype(v.dtype, mx.floating)), None)


def with_argument(args: tuple, kwargs: dict, key: Key, value: Any) -> tuple[tuple, dict]:
    """The arguments with ``value`` at ``key``."""
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: value}


@dataclass
class Call:
    """One call of a module in the recorded pass."""

    module: nn.Module
    block: int | None
    inputs: dict[Key, mx.array]
    output: mx.array | None = None

    @property
    def stream(self) -> mx.array | None:
        """The activation among the inputs."""
        key = stream_argument(self.inputs)
        return None if key is None else self.inputs[key]


@dataclass(frozen=True)
class Branch:
    """The attention or the MLP of a block; ``addend`` is the module whose output, times ``scale``,
    is added to the residual stream (a norm that follows ``module``, where there is one)."""

    path: str
    module: nn.Module
    addend: nn.Module
    scale: float = 1.0


@dataclass
class Block:
    """How one block is wired; ``additive`` and ``sequential`` are empty, or why they do not hold."""

    stream: Key | None  # which argument is the residual stream
    attn: Branch | None
    mlp: Branch | None
    called: bool
    once: bool  # whether each call of the block calls its attention and its MLP once
    additive: str = "the architecture could not be probed"
    sequential: str = "the architecture could not be probed"


@dataclass(frozen=True)
class End:
    """The call of a module, and its position among all calls, that is certainly a last one."""

    module: nn.Module
    call: int
    position: int


@dataclass
class Flow:
    """What the recorded pass of a model showed."""

    calls: list[Call]  # in order of completion
    blocks: list[Block]
    output: Any
    ends: dict[int, End]  # by id of the module: after which call nothing calls it any more


def survey(model: nn.Module, blocks: Sequence[nn.Module], inputs: mx.array) -> Flow:
    """Record a pass of ``model`` over ``inputs [BATCH, ...]`` and probe how its blocks add up."""
    # In a context of its own: whoever traces this model now must not be seen, nor see this.
    return Context().run(_survey, model, list(blocks), inputs)


def _survey(model: nn.Module, blocks: list[nn.Module], inputs: mx.array) -> Flow:
    calls, output = _record(model, blocks, inputs)
    by_block: dict[int | None, list[Call]] = {}
    for call in calls:
        by_block.setdefault(call.block, []).append(call)
    keys = _stream_keys(calls, blocks)
    wired = [_wire(b, keys[i], by_block.get(i, [])) for i, b in enumerate(blocks)]
    _probe(model, blocks, wired, inputs)
    return Flow(calls, wired, output, _ends(calls, blocks))


def _record(model: nn.Module, blocks: list[nn.Module], inputs: mx.array) -> tuple[list[Call], Any]:
    index = {id(block): i for i, block in enumerate(blocks)}
    calls: list[Call] = []
    stack: list[Call] = []

    def watch(module: nn.Module) -> None:
        def before(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            block = index.get(id(module), stack[-1].block if stack else None)
            stack.append(Call(module, block, array_arguments(args, kwargs)))
            return args, kwargs

        def after(output: Any) -> Any:
            call = stack.pop()
            call.output = first_array(output)
            calls.append(call)
            return output

        hooks.add_before(module, before)
        hooks.add_after(module, after)

    hooks = Hooks()
    for module in {id(m): m for _, m in model.named_modules()}.values():
        watch(module)
    with hooks:
        output = model(inputs)
    return calls, output


def _ends(calls: list[Call], blocks: list[nn.Module]) -> dict[int, End]:
    """By module: the end of the block that calls it last, or of its own last call.

    How often a block calls a module may depend on the input; how often the blocks are called not.
    """
    done: Counter[int] = Counter()
    closes: dict[tuple[int, int], int] = {}
    latest: dict[int, tuple[nn.Module, int]] = {}
    for position, call in enumerate(calls):
        outer = call.module if call.block is None else blocks[call.block]
        latest[id(call.module)] = (outer, done[id(outer)] + 1)
        if call.module is outer:
            done[id(outer)] += 1
            closes[id(outer), done[id(outer)]] = position
    return {
        key: End(outer, count, closes[id(outer), count])
        for key, (outer, count) in latest.items()
        if (id(outer), count) in closes
    }


def _stream_keys(calls: list[Call], blocks: list[nn.Module]) -> list[Key | None]:
    """By block: the argument that is the very array the block before returned.

    The first block, and one that the model does something before, has it where the others have.
    """
    index = {id(block): i for i, block in enumerate(blocks)}
    passed: dict[int, Key] = {}
    fallback: dict[int, Key | None] = {}
    previous: mx.array | None = None
    for call in calls:
        if id(call.module) not in index:
            continue
        layer = index[id(call.module)]
        fallback[layer] = stream_argument(call.inputs)
        for key, array in call.inputs.items():
            if array is previous:
                passed[layer] = key
        previous = call.output
    common = Counter(passed.values()).most_common(1)
    usual = common[0][0] if common else None
    return [
        passed.get(layer, fallback.get(layer) if usual is None else usual)
        for layer in range(len(blocks))
    ]


def _wire(block: nn.Module, key: Key | None, calls: list[Call]) -> Block:
    paths = dict(block.named_modules())
    called = Counter(id(call.module) for call in calls if call.output is not None)

    def branch(candidates: tuple[str, ...]) -> Branch | None:
        path = next((p for p in candidates if p in paths and called[id(paths[p])]), None)
        if path is None:
            return None
        return Branch(path, paths[path], _addend(paths[path], paths, calls))

    attn, mlp = branch(_ATTENTION), branch(_MLP)
    times = called[id(block)]
    once = all(called[id(b.module)] == called[id(b.addend)] == times for b in (attn, mlp) if b)
    return Block(key, attn, mlp, times > 0, once)


def _addend(module: nn.Module, paths: dict[str, nn.Module], calls: list[Call]) -> nn.Module:
    """The norm that is called with the very array that ``module`` returned, else ``module``."""
    output = next(call.output for call in calls if call.module is module)
    norms = {id(m) for path, m in paths.items() if "norm" in path.rpartition(".")[2].lower()}
    for call in calls:
        if id(call.module) in norms and any(array is output for array in call.inputs.values()):
            return call.module
    return module


def _probe(
    model: nn.Module, blocks: list[nn.Module], wired: list[Block], inputs: mx.array
) -> None:
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
        x = array_arguments(args, kwargs).get(wiring.stream)
        if x is None:
            return args, kwargs
        return with_argument(args, kwargs, wiring.stream, _constant(x, 0))

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
    """Whether the graph of ``array`` has no primitives but these (or fused ones)."""
    dot = io.StringIO()
    mx.export_to_dot(dot, array)
    labels = set(re.findall(r'label ="(\w+)"', dot.getvalue()))
    return all(label in primitives or label.startswith("Compiled") for label in labels)


def _coefficients(output: mx.array) -> mx.array:
    """The smallest and largest multiple of the pattern in each row, ``[2, BATCH]``."""
    ratio = output.reshape(BATCH, -1, output.shape[-1])[:, 0].astype(mx.float32)
    ratio = ratio / _pattern(output.shape[-1])
    return mx.stack([ratio.min(axis=-1), ratio.max(axis=-1)])


def _conclude(wiring: Block, coefficients: mx.array | None, read: mx.array | None) -> None:
    wiring.additive = "it adds more to the stream than one attention and one MLP"
    if wiring.once and coefficients is not None and (scales := _scales(coefficients)) is not None:
        wiring.additive = ""
        attn, mlp = wiring.attn, wiring.mlp
        if attn:
            wiring.attn = Branch(attn.path, attn.module, attn.addend, scales[0])
        if mlp:
            wiring.mlp = Branch(mlp.path, mlp.module, mlp.addend, scales[1])
    wiring.sequential = _why_not_sequential(wiring, read)


def _scales(coefficients: mx.array) -> tuple[float, float] | None:
    """How much of the attention and of the MLP is added, where that and the stream is all."""
    low, high = coefficients.tolist()
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


def outside_blocks(flow: Flow) -> Iterator[Call]:
    """The recorded calls of modules that are in no block."""
    return (call for call in flow.calls if call.block is None)
