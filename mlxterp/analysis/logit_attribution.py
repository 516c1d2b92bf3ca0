"""Direct logit attribution: what each part of a model adds to a logit by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp import freezing, tracing
from mlxterp.analysis.heads import HeadPlace, tapped
from mlxterp.analysis.logit_parts import LogitParts
from mlxterp.analysis.metrics import texts_of
from mlxterp.analysis.source import Readable
from mlxterp.sae.circuits.behavior.ablation import Found, find
from mlxterp.sae.circuits.behavior.targets import token_id
from mlxterp.sae.coder import SparseCoder
from mlxterp.sites import Site

STREAM = ("resid_pre", "resid_mid", "resid_post")
PARTS = ("attn", "mlp", "attn_out", "mlp_out")
TOLERANCE = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}  # of a sum, of its size
Token = str | int


def logit_attribution(
    model: Readable,
    text: Any,
    target: Token | None = None,
    against: Token | None = None,
    position: int = -1,
    coder: SparseCoder | None = None,
) -> LogitParts:
    """A logit split over all that adds to the residual stream, with the final norm's scale held.

        logit[target] = sum over parts of v_part . slope + bias
        slope = d logit[target] / d h,  h = sum of v_part      the last stream, [d_model]

    The parts are the embedding and what each attention and MLP adds (after a norm or scale of its
    own, if it has one); the parts of heads are those of the directions in which their outputs reach
    the stream, and those of a coder's features those of their decoder rows. It may write one
    place of the stream, or what attentions or MLPs return or add. `target` is by default the token
    that the model predicts at `position` of the text; with `against` the difference of both logits
    is split.

    Raises `ValueError` where the stream is no plain sum: blocks that add anything else than one
    attention and one MLP, run several times, or keep several streams. Likewise for several texts,
    for what is no token or position, and for a coder of other sites.
    """
    ids, start, parts = _one_text(model, text), model.site("layers.0.resid_pre"), _parts(model)
    position = _position(position, ids.shape[1])
    places = [HeadPlace(layer, "z") for layer in range(model.n_layers)]
    last = model.site(-1, "resid_post")
    with tapped(model.architecture, capture=places) as heads:
        done = model.run(ids, capture=[start, *parts, last])
    h = done[last][0, position]
    logits = done.output[0, position].astype(mx.float32)
    size = logits.shape[-1]
    wanted = int(mx.argmax(logits)) if target is None else token_id(model, target, size)
    other = None if against is None else token_id(model, against, size, "against")
    tail = _Tail(model, wanted, other, h)
    direct = _Direct(model, ids, position, tail.slope)
    vectors = {"embedding": done[start], **{str(site): done[site] for site in parts}}
    at = {name: x[0, position].astype(mx.float32) for name, x in vectors.items()}
    _check_sum(model, h, [*at.values()])
    split = {name: float(x @ tail.slope) for name, x in at.items()}
    by_head, head_rest = _heads(direct, heads, split)
    described = {} if coder is None else _described(direct, coder)
    names = texts_of(model, [wanted] if other is None else [wanted, other])
    return LogitParts(
        logit=tail.logit, target=names[0], against=None if other is None else names[1],
        position=position, parts={**split, "bias": tail.bias}, heads=by_head,
        head_rest=head_rest, affine=tail.affine, **described,
    )  # fmt: skip


class _Tail:
    """A logit, or the difference of two, as an affine function of the last stream `h [d_model]`."""

    def __init__(self, model: Readable, wanted: int, other: int | None, h: mx.array) -> None:
        def value(h: mx.array) -> mx.array:
            logits = model.unembed(h).astype(mx.float32)
            return logits[wanted] if other is None else logits[wanted] - logits[other]

        with model.frozen():
            logit, slope = mx.value_and_grad(value)(h)
        self.slope = slope.astype(mx.float32)
        self.logit = float(logit)
        self.bias = self.logit - float(h.astype(mx.float32) @ self.slope)
        self.affine = _is_affine(model, h)


def _is_affine(model: Readable, h: mx.array) -> bool:
    """Whether all logits are affine functions of the stream, with the scale of the norm at `h`:
    `f(8 h) = 8 f(h) - 7 f(0)`, which caps of logits are not."""
    edits = {Site(model.n_layers - 1, "resid_post"): (lambda x, context: h[None, None],)}
    plan, tokens = tracing.Plan(edits=edits), mx.zeros((1, 1), dtype=mx.int32)
    with model.frozen(freezing.record(model.architecture, tokens, plan)):
        # One after the other, since not all that is recorded is recorded by row.
        far, near, zero = (model.unembed(c * h).astype(mx.float32) for c in (8, 1, 0))
    off = mx.abs(far - (8 * near - 7 * zero)).max() / mx.abs(8 * near).max()
    return float(off) <= TOLERANCE.get(h.dtype, 1e-3)


@dataclass(frozen=True)
class _Direct:
    """How what is written at a position reaches a logit by itself: through no later block."""

    model: Readable
    ids: mx.array
    position: int
    slope: mx.array

    def attentions(self, layers: Sequence[int]) -> mx.array:
        """What the attentions of some layers add to the logit, with no slope by earlier ones."""
        cut = {Site(layer, "resid_pre"): (_cut,) for layer in range(self.model.n_layers)}
        sites = tuple(Site(layer, "attn_out") for layer in layers)
        plan = tracing.Plan(sites, cut)
        done = tracing.run(self.model.architecture, self.ids, plan, stop=True)
        values = (done[site][0, self.position].astype(mx.float32) for site in sites)
        return sum((x @ self.slope for x in values), mx.array(0.0))

    def of_site(self, site: Site) -> mx.array:
        """The slope of the logit by what is written at a site of the stream, an attention or an
        MLP, `[width]`."""
        if site.component not in ("attn", "mlp"):
            return self.slope
        end = Site(site.layer, f"{site.component}_out")

        def value(delta: mx.array) -> mx.array:
            edits = {site: (lambda x, context: x + delta.astype(x.dtype),)}
            plan = tracing.Plan((end,), edits)
            done = tracing.run(self.model.architecture, self.ids, plan, stop=True)
            return done[end][0, self.position].astype(mx.float32) @ self.slope

        with self.model.frozen():
            return mx.grad(value)(mx.zeros(self.model.width(site)))


def _cut(x: mx.array, context: Any) -> mx.array:
    return mx.stop_gradient(x)


def _heads(
    direct: _Direct, held: Mapping[HeadPlace, list[mx.array]], split: Mapping[str, float]
) -> tuple[dict[tuple[int, int], float], dict[int, float]]:
    """The shares of heads, and what is left of each attention's."""
    layers = [p.layer for p in held if f"layers.{p.layer}.attn_out" in split]
    z = {layer: held[HeadPlace(layer, "z")] for layer in layers}
    if not layers:
        return {}, {}

    def value(deltas: dict[int, list[mx.array]]) -> mx.array:
        edits = {
            HeadPlace(layer, "z"): lambda x, call, own=own: x + own[call]
            for layer, own in deltas.items()
        }
        with tapped(direct.model.architecture, edits):
            return direct.attentions(layers)

    with direct.model.frozen():
        slopes = mx.grad(value)({n: [mx.zeros_like(x) for x in own] for n, own in z.items()})
    shares, rest = {}, {}
    for layer in layers:
        pairs = zip(slopes[layer], z[layer], strict=True)
        calls = [(g * x).astype(mx.float32)[0, :, direct.position].sum(axis=-1) for g, x in pairs]
        own: list[float] = np.array(mx.stack(calls).sum(axis=0)).tolist()
        shares |= {(layer, head): share for head, share in enumerate(own)}
        rest[layer] = split[f"layers.{layer}.attn_out"] - sum(own)
    return shares, rest


def _described(direct: _Direct, coder: SparseCoder) -> dict[str, Any]:
    """The shares of a coder's features and of what is left of what it describes."""
    model, names = direct.model, coder.writes.names
    sites = [model.site(name) for name in names]
    streams = [site for site in sites if site.component in STREAM]
    known = all(site.layer is not None and site.component in (*STREAM, *PARTS) for site in sites)
    if not known or (streams and len(sites) > 1):
        raise ValueError(
            "coder must write one place of the residual stream, or what attentions or MLPs return "
            f"or add; it writes {', '.join(names)}"
        )
    slopes = mx.concatenate([direct.of_site(site) for site in sites])
    found: Found = find(model, {0: coder}, np.array(direct.ids[0]).tolist())[0]
    rows = [
        W_dec.astype(mx.float32) @ slopes[block.writes]
        for block, W_dec in zip(coder.blocks, coder.decoder_blocks(), strict=True)
    ]
    codes = np.array(found.codes[direct.position])
    shares = codes * np.array(mx.concatenate(rows))
    rest = {"error": found.errors[direct.position], "bias": coder.b_dec.astype(mx.float32)}
    if coder.has_skip:
        rest["skip"] = coder.W_skip.astype(mx.float32) @ found.read[direct.position]
    return {
        "features": {int(i): float(shares[i]) for i in np.flatnonzero(codes)},
        "rest": {name: float(x @ slopes) for name, x in rest.items()},
        "described": names,
    }


def _one_text(model: Readable, text: Any) -> mx.array:
    ids, mask = model.tokens(text)
    if mask is None or ids.shape[0] != 1:
        raise ValueError(f"text must be one text, or its token ids, not {ids.shape[0]} rows")
    return ids


def _position(position: int, count: int) -> int:
    if not -count <= index(position) < count:
        raise ValueError(f"position must be {-count} to {count - 1}, not {position}")
    return index(position) % count


def _parts(model: Readable) -> list[Site]:
    """What is added to the stream, in order; raises `ValueError` where a block adds more."""
    sites, flow = model.sites(), model.architecture.survey()
    times = Counter(id(call.module) for call in flow.calls)
    found = []
    for layer, block in enumerate(flow.blocks):
        reason = f"in layer {layer} {block.additive}" if block.additive else ""
        if (n := times[id(model.architecture.blocks[layer])]) != 1:
            reason = f"layer {layer} is called {n} times"
        if reason:
            raise ValueError(
                f"the residual stream of {model.name} is no plain sum of attentions and MLPs: "
                f"{reason}"
            )
        both = (Site(layer, name) for name in ("attn_out", "mlp_out"))
        found += [site for site in both if site in sites]
    return found


def _check_sum(model: Readable, h: mx.array, vectors: Sequence[mx.array]) -> None:
    whole = h.astype(mx.float32)
    off = float(mx.linalg.norm(whole - sum(vectors, mx.zeros_like(whole))) / mx.linalg.norm(whole))
    if not off <= TOLERANCE.get(h.dtype, 1e-3):
        raise ValueError(
            f"the residual stream of {model.name} is no plain sum of its embedding and of what its "
            f"blocks add: {off:.0%} of it is something else"
        )
