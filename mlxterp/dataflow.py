"""Find out how a model is wired from one forward pass that computes nothing.

A model is called on a few tokens while every module notes which arrays it was given and which it
returned. Because MLX is lazy, nothing is evaluated and no weight is loaded, but those of norms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxterp.hooks import Hooks, Key, array_arguments, first_array, stream_argument
from mlxterp.norms import why_not_units
from mlxterp.probing import Block, Branch, probe

_ATTENTION = (
    "self_attn", "attn", "attention", "linear_attn", "temporal_block", "mixer", "mamba", "conv",
    "norm_attn_norm.attn", "attn.attention",
)  # fmt: skip
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "moe")


@dataclass(frozen=True)
class Trait:
    """What is remembered of an array: which one it was, and its kind. Not the array itself, whose
    graph would keep the weights of that moment alive."""

    number: int
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @classmethod
    def of(cls, array: mx.array) -> Trait:
        """The trait of `array`, whose number is its own as long as it lives."""
        return cls(id(array), tuple(array.shape), array.dtype)


@dataclass
class Call:
    """One call of a module in the recorded pass."""

    module: nn.Module
    block: int | None
    inputs: dict[Key, Trait]
    output: Trait | None = None

    @property
    def stream(self) -> Trait | None:
        """The activation among the inputs."""
        key = stream_argument(self.inputs)
        return None if key is None else self.inputs[key]


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
    ends: dict[int, End]  # by id of the module: after which call nothing calls it any more


def survey(model: nn.Module, blocks: Sequence[nn.Module], inputs: mx.array) -> Flow:
    """Record a pass of `model` over `inputs [BATCH, ...]` and probe how its blocks add up."""
    # In a context of its own: whoever traces this model now must not be seen, nor see this.
    return Context().run(_survey, model, list(blocks), inputs)


def _survey(model: nn.Module, blocks: list[nn.Module], inputs: mx.array) -> Flow:
    calls = _record(model, blocks, inputs)
    by_block: dict[int | None, list[Call]] = {}
    for call in calls:
        by_block.setdefault(call.block, []).append(call)
    keys = _stream_keys(calls, blocks)
    wired = [_wire(b, keys[i], by_block.get(i, [])) for i, b in enumerate(blocks)]
    probe(model, blocks, wired, inputs)
    _check_units(wired)
    return Flow(calls, wired, _ends(calls, blocks))


def _record(model: nn.Module, blocks: list[nn.Module], inputs: mx.array) -> list[Call]:
    index = {id(block): i for i, block in enumerate(blocks)}
    # A model may call the parts of a block and never the block.
    owner = {id(m): i for i, block in enumerate(blocks) for _, m in block.named_modules()}
    calls: list[Call] = []
    stack: list[Call] = []
    alive: list[mx.array | None] = []  # or another array could get the number of one that is gone

    def watch(module: nn.Module) -> None:
        def before(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            block = index.get(id(module), stack[-1].block if stack else None)
            block = owner.get(id(module)) if block is None else block
            arrays = array_arguments(args, kwargs)
            alive.extend(arrays.values())
            stack.append(Call(module, block, {key: Trait.of(x) for key, x in arrays.items()}))
            return args, kwargs

        def after(output: Any) -> Any:
            call = stack.pop()
            array = first_array(output)
            alive.append(array)
            call.output = None if array is None else Trait.of(array)
            calls.append(call)
            return output

        hooks.add_before(module, before)
        hooks.add_after(module, after)

    hooks = Hooks()
    for module in {id(m): m for _, m in model.named_modules()}.values():
        watch(module)
    with hooks:
        model(inputs)
    hooks.clear()
    return calls


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
    previous: Trait | None = None
    for call in calls:
        if id(call.module) not in index:
            continue
        layer = index[id(call.module)]
        fallback[layer] = stream_argument(call.inputs)
        for key, array in call.inputs.items():
            if array == previous:
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
        module = paths[path]
        projection = _projection(module, calls)
        if projection and called[id(projection)] != called[id(module)]:
            projection = None
        return Branch(
            path, module, _addend(module, paths, calls),
            norm=_norm_before(module, calls), projection=projection,
        )  # fmt: skip

    attn, mlp = branch(_ATTENTION), branch(_MLP)
    times = called[id(block)]
    once = all(called[id(b.module)] == called[id(b.addend)] == times for b in (attn, mlp) if b)
    return Block(key, attn, mlp, times > 0, once)


def _addend(module: nn.Module, paths: dict[str, nn.Module], calls: list[Call]) -> nn.Module:
    """The norm that is called with the very array that `module` returned, else `module`."""
    output = next(call.output for call in calls if call.module is module)
    norms = {id(m) for path, m in paths.items() if "norm" in path.rpartition(".")[2].lower()}
    for call in calls:
        if id(call.module) in norms and output in call.inputs.values():
            return call.module
    return module


def _check_units(wired: list[Block]) -> None:
    """Learn which norms can be undone; their weights are the only ones that are looked at."""
    places = [(b, name) for b in wired for name in ("attn", "mlp")]
    normed = [(b, n, found) for b, n in places if (found := getattr(b, n)) and found.norm]
    reasons = why_not_units([found.norm for *_, found in normed])
    for (block, name, found), reason in zip(normed, reasons, strict=True):
        setattr(block, name, replace(found, no_unit=reason))


def _norm_before(module: nn.Module, calls: list[Call]) -> nn.Module | None:
    """The norm that returned the very array that `module` receives."""
    received = next(call.stream for call in calls if call.module is module)
    for call in calls:
        if call.output == received and len(call.inputs) == 1 and _n_axes(call.module) == 1:
            return call.module
    return None


def _projection(module: nn.Module, calls: list[Call]) -> nn.Module | None:
    """The matrix inside of `module` that returned the very array that `module` does."""
    inside = {id(m) for _, m in module.named_modules() if m is not module}
    returned = next(call.output for call in calls if call.module is module)
    for call in calls:
        if id(call.module) in inside and call.output == returned and _n_axes(call.module) == 2:
            return call.module
    return None


def _n_axes(module: nn.Module) -> int:
    """The number of axes of the module's own weight, 0 where it has none."""
    weight = module.get("weight")
    return weight.ndim if isinstance(weight, mx.array) else 0


def outside_blocks(flow: Flow) -> Iterator[Call]:
    """The recorded calls of modules that are in no block."""
    return (call for call in flow.calls if call.block is None)


def find_blocks(model: nn.Module, layer_attr: str) -> list[nn.Module]:
    for path in (layer_attr, f"model.{layer_attr}"):
        try:
            found = attrgetter(path)(model)
        except AttributeError:
            continue
        if isinstance(found, (list, tuple)) and found:
            return list(found)
    if layer_attr == "layers" and (found := _largest_list(model)):
        return found
    raise AttributeError(
        f"{type(model).__name__} has no list of layers at {layer_attr!r} or 'model.{layer_attr}': "
        "give its dotted path as layer_attr, such as layer_attr='transformer.h'"
    )


def _largest_list(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules of one class anywhere in `model`; empty where there is none."""
    lists = (
        value
        for _, module in model.named_modules()
        for value in module.values()
        if isinstance(value, list)
        and len(value) > 1
        and isinstance(value[0], nn.Module)
        and len({type(item) for item in value}) == 1
    )
    return max(lists, key=len, default=[])
