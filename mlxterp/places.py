"""Where the components of a block are read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxterp.hooks import Key, own
from mlxterp.norms import gain_and_bias
from mlxterp.probing import Block, Branch

RECEIVED = ("attn_in", "attn_unit", "attn_z", "mlp_in", "mlp_unit")


@dataclass(frozen=True)
class Place:
    """Where a site is read and written: what `module` receives as `argument`, or returns.

    The value of the site is `scale` times that array, plus what `stream` (a block) received. Of a
    `norm` that made the array it is what there was before the gain and the bias.
    """

    module: nn.Module
    is_input: bool = False
    argument: Key | None = None
    scale: float = 1.0
    stream: nn.Module | None = None
    norm: nn.Module | None = None

    def value(self, array: mx.array, stream: mx.array | None = None) -> mx.array:
        """The value of the site, of the array at the place and of what `stream` received."""
        if self.norm is not None:
            gain, bias = gain_and_bias(self.norm)
            return ((array - bias) / gain).astype(array.dtype)
        array = array if self.scale == 1 else array * self.scale
        return array if stream is None else stream + array

    def array(self, value: mx.array, stream: mx.array | None = None) -> mx.array:
        """The inverse of `value`."""
        if self.norm is not None:
            gain, bias = gain_and_bias(self.norm)
            return (value * gain + bias).astype(value.dtype)
        value = value if stream is None else value - stream
        return value if self.scale == 1 else value / self.scale

    def edited(
        self, array: mx.array, stream: mx.array | None, edit: Callable[[mx.array], mx.array]
    ) -> mx.array:
        """The array after an edit of the site's value, which may change its argument in place."""
        value = own(self.value(array, stream))
        as_it_was = own(value)
        changed = edit(value)
        is_plain = self.norm is None and self.scale == 1 and self.stream is None
        if changed is not value or is_plain:
            return self.array(changed, stream)
        # Where it was not changed in place after all, the difference is exactly 0.
        return array + (self.array(changed, stream) - self.array(as_it_was, stream))


def place_in(component: str, block: nn.Module, wiring: Block) -> Place:
    """Where a component of a block is, which the block must have: see `why_missing`."""
    if component == "resid_post":
        return Place(block)
    if component == "resid_pre":
        return Place(block, is_input=True, argument=wiring.stream)
    name, _, part = component.partition("_")
    branch = _branch("attn" if component == "resid_mid" else name, wiring)
    if component == "resid_mid":
        return Place(branch.addend, argument=wiring.stream, scale=branch.scale, stream=block)
    match part:
        case "in":
            return Place(branch.module, is_input=True)
        case "unit":
            return Place(branch.module, is_input=True, norm=branch.norm)
        case "z" if branch.projection is not None:
            return Place(branch.projection, is_input=True)
        case "out":
            return Place(branch.addend, scale=branch.scale)
    return Place(branch.module)


def why_missing(component: str, wiring: Block) -> str:
    """Why a block has no such component; empty where it has."""
    if component.startswith("resid") and not wiring.called:
        return "the model never calls its blocks as modules"
    if component == "resid_mid":
        return wiring.sequential
    name, _, part = component.partition("_")
    branch: Branch | None = getattr(wiring, name, None)
    if branch is None:
        return "" if name == "resid" else f"the block has no single {name}"
    if part == "out":
        return wiring.additive
    if part == "unit":
        return branch.no_unit
    if part == "z" and branch.projection is None:
        return f"what its {name} returns is not what one projection in it makes"
    return ""


def _branch(name: str, wiring: Block) -> Branch:
    branch: Branch | None = getattr(wiring, name)
    if branch is None:
        raise ValueError(f"the block has no single {name}")
    return branch
