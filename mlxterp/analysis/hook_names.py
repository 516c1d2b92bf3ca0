"""The hooks of TransformerLens in a model of ours: where each is read, and how it is laid out."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxterp.analysis.source import Readable
from mlxterp.attention import AttentionHeads
from mlxterp.hooks import suspended
from mlxterp.places import Place
from mlxterp.sae.formats.names import from_transformer_lens
from mlxterp.sites import Site, UnknownSiteError

OUTSIDE = ("hook_embed", "hook_pos_embed", "ln_final.hook_normalized")
BLOCK = (
    "hook_resid_pre", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v",
    "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern",
    "attn.hook_z", "hook_attn_out", "hook_resid_mid", "ln2.hook_normalized", "mlp.hook_pre",
    "mlp.hook_pre_linear", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
# Read of what the heads did: they are no sites, and no edit reaches them.
OF_HEADS: dict[str, Callable[[AttentionHeads], mx.array]] = {
    "attn.hook_pattern": lambda heads: heads.pattern,
    "attn.hook_attn_scores": lambda heads: heads.scores,
    "attn.hook_rot_q": lambda heads: heads.q.swapaxes(1, 2),
    "attn.hook_rot_k": lambda heads: _own(heads, heads.k).swapaxes(1, 2),
}
_OF_PROJECTIONS: dict[str, tuple[str, Callable[[AttentionHeads], mx.array]]] = {
    "attn.hook_q": ("q_proj", lambda heads: heads.q.swapaxes(1, 2)),
    "attn.hook_k": ("k_proj", lambda heads: _own(heads, heads.k).swapaxes(1, 2)),
    "attn.hook_v": ("v_proj", lambda heads: _own(heads, heads.v).swapaxes(1, 2)),
}
_NEURONS = {
    "mlp.hook_pre": ("gate_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    "mlp.hook_pre_linear": ("up_proj",),
}
_POSITIONS = ("wpe", "position_embeddings", "embed_positions")
_WHY = {
    "hook_scale": "the scale of a norm is inside one operation of MLX; model.frozen() holds it",
    "mlp.hook_post": "what the last projection of an MLP receives is no site",
    "attn.hook_result": "what each head adds is never computed: see model.logit_attribution",
    "hook_q_input": "inputs of the attention are not split: see model.path_patching",
    "hook_k_input": "inputs of the attention are not split: see model.path_patching",
    "hook_v_input": "inputs of the attention are not split: see model.path_patching",
}
_SHORT = {
    "attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v",
    "mlp_pre": "pre", "mlp_post": "post",
}  # fmt: skip
_IN_ATTENTION = ("k", "q", "v", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
_IN_MLP = ("pre", "post", "pre_linear")


@dataclass(frozen=True)
class Hook:
    """A hook: at a `site`, where `heads` says into how many heads its last axis is split, or read
    `of_heads` of a layer; `norm` is set where it lies before the gain of that norm."""

    name: str
    layer: int | None
    site: Site | None = None
    heads: int | None = None
    of_heads: Callable[[AttentionHeads], mx.array] | None = None
    norm: Place | None = None

    def value(self, array: mx.array) -> mx.array:
        """The array at the site as TransformerLens lays it out, `[B, S, H, d]` for heads."""
        array = array if self.norm is None else self.norm.value(array)
        if self.heads is None:
            return array
        return array.reshape(*array.shape[:-1], self.heads, -1)

    def array(self, value: mx.array) -> mx.array:
        """The inverse of `value`."""
        value = value if self.heads is None else value.flatten(-2)
        return value if self.norm is None else self.norm.array(value)


class HookNames:
    """The hooks of one model, by their full names, by short ones, and by sites of ours."""

    def __init__(self, model: Readable, example: mx.array | None = None) -> None:
        self._model = model
        self._modules = model.architecture.modules
        self._example = mx.zeros((1, 2), dtype=mx.int32) if example is None else example[:1, :2]
        self._calls: dict[int, AttentionHeads] | None = None
        self._known: dict[str, Hook] = {}

    def all(self, n_layers: int | None = None) -> list[Hook]:
        """Every hook that there is, in the order of a pass, of the first layers alone if asked."""
        n = self._model.n_layers if n_layers is None else n_layers
        names = [*OUTSIDE[:2], *(f"blocks.{i}.{hook}" for i in range(n) for hook in BLOCK)]
        names += OUTSIDE[2:] if n_layers is None else ()
        return [hook for hook in map(self._maybe, names) if hook is not None]

    def find(self, key: Any) -> Hook:
        """The hook of a full name, `("resid_post", 3)`, `"resid_post3"`, or a site of ours.

        Raises `UnknownSiteError`, which is a `ValueError` and a `KeyError`, and says why.
        """
        name = full_name(key, self._model.n_layers)
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _maybe(self, name: str) -> Hook | None:
        try:
            return self.find(name)
        except UnknownSiteError:
            return None

    def _find(self, name: str) -> Hook:
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block is not None:
            return self._in_block(name, int(block[1]), block[2])
        norm = self._model.architecture.final_norm
        if name in ("ln_final.hook_normalized", "ln_final.hook_out") and norm is not None:
            before_gain = Place(norm, norm=norm) if name.endswith("normalized") else None
            return Hook(name, None, self._site_of(norm), norm=before_gain)
        if name == "hook_embed":
            return Hook(name, None, self._embedding())
        if name == "hook_pos_embed" and (position := self._outside(_POSITIONS)) is not None:
            return Hook(name, None, position)
        if "hook_" in name:
            raise self._unknown(name)
        site = self._model.site(name)
        return Hook(str(site), site.layer, site)

    def _in_block(self, name: str, layer: int, hook: str) -> Hook:
        if layer >= self._model.n_layers:
            raise UnknownSiteError(f"no hook {name!r}: layers are 0 to {self._model.n_layers - 1}")
        if hook in OF_HEADS or hook in _OF_PROJECTIONS or hook == "attn.hook_z":
            return self._in_attention(name, layer, hook)
        if hook in _NEURONS:
            for module in _NEURONS[hook]:
                if (site := self._maybe_site(f"layers.{layer}.mlp.{module}")) is not None:
                    return Hook(name, layer, site)
            raise self._unknown(name)
        try:
            return Hook(name, layer, self._model.site(from_transformer_lens(name)))
        except UnknownSiteError as error:
            raise UnknownSiteError(f"no hook {name!r}: {error}") from None
        except ValueError:
            raise self._unknown(name) from None

    def _in_attention(self, name: str, layer: int, hook: str) -> Hook:
        if layer not in self._heads():
            raise UnknownSiteError(
                f"no hook {name!r}: layer {layer} does not attend once, by "
                "mx.fast.scaled_dot_product_attention"
            )
        call, learned = self._heads()[layer], self._outside(_POSITIONS) is not None
        if hook in OF_HEADS and not (learned and "rot_" in hook):
            return Hook(name, layer, of_heads=OF_HEADS[hook])
        if hook == "attn.hook_z":
            if (site := self._maybe_site(f"layers.{layer}.attn_z")) is not None:
                return Hook(name, layer, site, call.q.shape[1])
            raise self._unknown(name)
        if hook not in _OF_PROJECTIONS:
            raise self._unknown(name)
        projection, own_heads = _OF_PROJECTIONS[hook]
        rows = own_heads(call)  # [B, S, H, d]
        site = self._maybe_site(f"layers.{layer}.attn.{projection}")
        # Another width is that of more than the heads, such as of their gates.
        if site is not None and self._model.width(site) == rows.shape[2] * rows.shape[3]:
            return Hook(name, layer, site, rows.shape[2])
        if hook == "attn.hook_v" or learned:
            return Hook(name, layer, of_heads=own_heads)
        raise UnknownSiteError(
            f"no hook {name!r}: the attention of this model has no projection of its own for it; "
            "what is used, after rotary embeddings, is attn.hook_rot_q and attn.hook_rot_k"
        )

    def _heads(self) -> dict[int, AttentionHeads]:
        """The call of the attention of each layer that has one; nothing is computed for it."""
        if self._calls is None:
            try:
                with suspended():  # no edit that stands shall see this pass
                    found = self._model.attention(self._example)
            except ValueError:
                self._calls = {}
            else:
                times = Counter(call.layer for call in found.calls)
                self._calls = {c.layer: c for c in found.calls if times[c.layer] == 1}
        return self._calls

    def _embedding(self) -> Site:
        embedding = self._model.architecture.embedding
        if self._outside(_POSITIONS) is None or embedding is None:
            return self._model.site(0, "resid_pre")  # scaled, where the model does that
        return self._site_of(embedding)

    def _site_of(self, module: Any) -> Site:
        paths = {id(found): path for path, found in self._modules.items()}
        return self._model.site(paths[id(module)])

    def _outside(self, names: Iterable[str]) -> Site | None:
        paths = (p for p in self._modules if p.rpartition(".")[2] in names)
        return next((self._model.site(path) for path in paths), None)

    def _maybe_site(self, name: str) -> Site | None:
        try:
            site = self._model.site(name)
        except UnknownSiteError:
            return None
        return site if site in self._model.architecture.table else None

    def _unknown(self, name: str) -> UnknownSiteError:
        block, hook = re.fullmatch(r"(blocks\.\d+\.)?(.+)", name).groups("")  # type: ignore[union-attr]
        why = next((text for end, text in _WHY.items() if hook.endswith(end)), "")
        near = difflib.get_close_matches(hook, BLOCK if block else OUTSIDE, n=3, cutoff=0.3)
        near = [f"{block}{other}" for other in near if other != hook]
        hint = f": {why}" if why else f"; the nearest are {', '.join(near)}" if near else ""
        return UnknownSiteError(f"no hook {name!r} in this model{hint}")


def full_name(key: Any, n_layers: int) -> str:
    """The full name of `("resid_post", 3)`, `("normalized", 3, "ln1")`, `"resid_post3"` or
    `"embed"`; other names are returned as they are. Raises `ValueError` for another kind of key."""
    if isinstance(key, (str, Site)):
        key = str(key)
        if key in ("embed", "pos_embed"):
            return f"hook_{key}"
        short = re.fullmatch(r"([a-z_]+?)_?(\d+)(ln1|ln2)?", key)
        if short is None:
            return key
        key = (short[1], int(short[2]), short[3])
    if not isinstance(key, tuple) or not 1 <= len(key) <= 3 or not isinstance(key[0], str):
        raise ValueError(f"a hook is a name or such as ('resid_post', 3), not {key!r}.")
    what, layer, kind = (*key, None, None)[:3]
    what = _SHORT.get(str(what), str(what))
    if layer is None:
        return f"{kind}.hook_{what}" if kind else f"hook_{what}"
    if not isinstance(layer, int) or not -n_layers <= layer < n_layers:
        raise UnknownSiteError(f"no layer {layer!r}: layers are {-n_layers} to {n_layers - 1}")
    kind = {"a": "attn", "m": "mlp"}.get(str(kind), kind)
    kind = kind or ("attn" if what in _IN_ATTENTION else "mlp" if what in _IN_MLP else None)
    return f"blocks.{layer % n_layers}.{f'{kind}.' if kind else ''}hook_{what}"


def _own(heads: AttentionHeads, x: mx.array) -> mx.array:
    """Keys or values once for each head that they are made for."""
    return x[:, :: max(1, x.shape[1] // max(1, heads.n_kv_heads))]
