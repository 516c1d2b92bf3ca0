"""What sends, what receives and what is held between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import mlx.core as mx

from mlxterp.analysis.grid import Axis, Grid, Group, head_counts, number_axis, numbers
from mlxterp.analysis.heads import HeadPlace
from mlxterp.analysis.metrics import texts_of
from mlxterp.analysis.patches import Patch, Spot, Where
from mlxterp.sites import Site

Head = tuple[int, int]
Sender = Head | str
Receiver = tuple[int, int, Literal["q", "k", "v"]] | str


@dataclass(frozen=True, eq=False)
class Receivers:
    """What is to receive: the heads of each place, and the inputs of MLPs; neither, for logits."""

    heads: Mapping[HeadPlace, tuple[int, ...]]
    inputs: tuple[Site, ...]

    def __bool__(self) -> bool:
        return bool(self.heads or self.inputs)

    def reached_from(self, patch: Patch) -> bool:
        """Whether one of them comes after something that sends."""
        if not self:
            return True
        first = min(_depth(spot.where) for spot in patch)
        return any(_depth(where) > first for where in (*self.heads, *self.inputs))


def held_sites(model: Any, freeze: Sequence[str]) -> list[Site]:
    """What is held: all that blocks add; raises `ValueError` where they do not just add."""
    blocks = model.architecture.survey().blocks
    calls = Counter(id(call.module) for call in model.architecture.survey().calls)
    for layer, (block, module) in enumerate(zip(blocks, model.architecture.blocks, strict=True)):
        reason = block.additive if block.called else "the model never calls its blocks as modules"
        if calls[id(module)] > 1:
            reason = f"a pass goes through it {calls[id(module)]} times"
        if reason:
            raise ValueError(
                f"paths through layer {layer} of {model.name} cannot be held: {reason}"
            )
    return [
        Site(layer, name)
        for layer, block in enumerate(blocks)
        for name in ("attn", "mlp")
        if name in freeze and getattr(block, name) is not None
    ]


def find_receivers(model: Any, tokens: mx.array, receivers: Any) -> Receivers:
    """The receivers that are asked for; raises `ValueError` for what cannot receive."""
    single = isinstance(receivers, str) or _is_head(receivers)
    given: list[Any] = [receivers] if single else [*receivers]
    if given == ["logits"]:
        return Receivers({}, ())
    heads: dict[HeadPlace, tuple[int, ...]] = {}
    inputs: list[Site] = []
    for receiver in given:
        if _is_head(receiver):
            layer, head, part = receiver
            layer, head = _head(model, tokens, layer, head)
            place = HeadPlace(layer, part)
            heads[place] = (*heads.get(place, ()), head)
            continue
        site = model.site(receiver) if isinstance(receiver, str) and receiver != "logits" else None
        if site is None or site.component not in ("mlp", "mlp_in"):
            raise ValueError(
                "receivers must be 'logits' alone, or of (layer, head, 'q'), with 'k' or 'v', and "
                f"MLPs such as 'layers.5.mlp', got {receiver!r}."
            )
        inputs.append(model.site(f"layers.{site.layer}.mlp_in"))
    if not given:
        raise ValueError("receivers must have at least one entry, got none.")
    return Receivers(heads, tuple(dict.fromkeys(inputs)))


def sender_grid(
    model: Any, tokens: mx.array, senders: Any, positions: Any, into: Receivers
) -> Grid:
    """The patches of the senders, None where no receiver comes after them."""
    if senders == "heads":
        counts = head_counts(model, tokens, None)
        heads = range(max(counts.values()))
        axes = [
            number_axis("layer", [(n,) for n in counts]),
            number_axis("head", [(h,) for h in heads]),
        ]
        sending = [
            [Spot(HeadPlace(n, "z"), None, (h,))] if h < counts[n] else []
            for n, h in product(counts, heads)
        ]
    elif senders == "mlps":
        sites = model.architecture.expand("layers.*.mlp")
        axes = [number_axis("layer", [(site.layer,) for site in sites])]
        sending = [[Spot(site)] for site in sites]
    else:
        given = [senders] if isinstance(senders, str) or _is_head(senders, 2) else [*senders]
        lists = [entry if isinstance(entry, list) else [entry] for entry in given]
        if not lists or not all(lists):
            raise ValueError(f"senders must have at least one entry, got {senders!r}.")
        sending = [[_sender(model, tokens, one) for one in group] for group in lists]
        labels = tuple("+".join(map(_label, spots)) for spots in sending)
        axes = [Axis("sender", labels, labels)]
    groups: list[Group | None] = [None]
    if positions is not None:
        ids: Any = tokens[0].tolist()
        some = numbers("positions", positions, tokens.shape[1])
        axes.append(number_axis("position", some, texts_of(model, ids)))
        groups = [*some]
    patches: list[Patch | None] = []
    for spots, at in product(sending, groups):
        patch = tuple(spot._replace(positions=at) for spot in spots)
        patches.append(patch if patch and into.reached_from(patch) else None)
    if not any(patches):
        raise ValueError("receivers must come after senders: there is no path between them.")
    return Grid(tuple(axes), tuple(patches))


def _sender(model: Any, tokens: mx.array, sender: Any) -> Spot:
    if _is_head(sender, 2):
        layer, head = _head(model, tokens, *sender)
        return Spot(HeadPlace(layer, "z"), None, (head,))
    site = model.site(sender) if isinstance(sender, (str, Site)) else None
    if site is None or site.component not in ("attn", "mlp", "resid_pre"):
        raise ValueError(
            "senders must be 'heads', 'mlps', or of (layer, head), and sites such as "
            f"'layers.3.mlp', 'layers.3.attn' or 'layers.0.resid_pre', got {sender!r}."
        )
    return Spot(site)


def _head(model: Any, tokens: mx.array, layer: int, head: int) -> tuple[int, int]:
    """A layer and one of its heads; negative numbers count from the end."""
    [(found, count)] = head_counts(model, tokens, [layer]).items()
    [(number,)] = numbers("head", [head], count)
    return found, number


def _is_head(entry: Any, size: int = 3) -> bool:
    """Whether an entry is a head, with what of it receives where it does."""
    if not isinstance(entry, tuple) or len(entry) != size or isinstance(entry[0], (str, tuple)):
        return False
    if size == 3 and entry[2] not in ("q", "k", "v"):
        raise ValueError(f"what a head receives must be 'q', 'k' or 'v', got {entry[2]!r}.")
    return not isinstance(entry[1], (str, tuple))


def _depth(where: Where) -> tuple[int, int]:
    """The order in which places of blocks come."""
    if isinstance(where, HeadPlace):
        return where.layer, 1
    order = {"resid_pre": 0, "attn": 1}
    return where.layer or 0, order.get(where.component, 2)


def _label(spot: Spot) -> str:
    if isinstance(spot.where, HeadPlace):
        return f"{spot.where.layer}.{(spot.heads or (0,))[0]}"
    return str(spot.where)
