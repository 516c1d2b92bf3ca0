"""Names of sites in TransformerLens and in Hugging Face models, in ours and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from mlxterp.sites import Site

# What TransformerLens, its bridge and circuit-tracer call the sites of a block; of several names
# for one the first is written.
_BLOCK_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "ln1.hook_in": "resid_pre",
    "ln1.hook_normalized": "attn_unit",
    "attn.hook_in": "attn_in",
    "ln1.hook_out": "attn_in",
    "attn.hook_z": "attn_z",
    "attn.hook_out": "attn",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "ln2.hook_in": "resid_mid",
    "ln2.hook_normalized": "mlp_unit",
    "mlp.hook_in": "mlp_in",
    "ln2.hook_out": "mlp_in",
    "mlp.hook_out": "mlp",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
}
_HOOKS = {component: hook for hook, component in reversed(_BLOCK_HOOKS.items())}
# Models whose stream starts with positions added to the embedding.
_LEARNED_POSITIONS = re.compile(r"gpt-?2|(^|[^a-z])opt-|gpt-neo-|gelu-|solu-|attn-only", re.I)

_ATTENTION = ("self_attn", "attn", "attention", "linear_attn")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo")
# Of the norms of a block that are called alike in all models: what they read, what they return.
_NORMS = {
    "input_layernorm": ("resid_pre", "attn_in"),
    "ln_1": ("resid_pre", "attn_in"),
    "pre_feedforward_layernorm": ("resid_mid", "mlp_in"),
    "ln_2": ("resid_mid", "mlp_in"),
    "post_feedforward_layernorm": ("mlp", "mlp_out"),
}
# In some models before the MLP, in others after the attention: its output is a site of its own.
_OTHER_NORMS = ("post_attention_layernorm",)
_OUTSIDE = {
    name: f"model.{name}"
    for name in (
        "embed_tokens", "wte", "embed_in", "norm", "ln_f", "final_layer_norm",
    )
} | {"lm_head": "lm_head", "embed_out": "model.embed_out"}  # fmt: skip
_BASES = ("model", "transformer", "gpt_neox", "language_model", "base_model")

_GEMMA2 = {
    "attn_out": "post_attention_layernorm.output",
    "mlp_out": "post_feedforward_layernorm.output",
    "resid_mid": "pre_feedforward_layernorm.input",
}
_FAMILIES = {  # the path of a block, the names of attention, output projection, MLP, other sites
    "llama": ("model.layers", "self_attn", "o_proj", "mlp", {
        "resid_mid": "post_attention_layernorm.input",
    }),
    "gemma2": ("model.layers", "self_attn", "o_proj", "mlp", _GEMMA2),
    "gpt2": ("transformer.h", "attn", "c_proj", "mlp", {"resid_mid": "ln_2.input"}),
    "gpt_neox": ("gpt_neox.layers", "attention", "dense", "mlp", {}),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def from_transformer_lens(name: str, model_name: str | None = None) -> str:
    """Our name of the site of a hook: `blocks.8.hook_resid_post` is `layers.8.resid_post`.

    `hook_mlp_out` and `hook_attn_out` are what is added to the stream, `mlp.hook_out` what the
    module returns. `hook_normalized` is what a norm makes before its gain: so it is in all RMS
    norms, and in layer norms where the model was loaded with its norms folded, as by default.
    `hook_embed` is the start of the stream or, where `model_name` is that of a model with learned
    positions such as gpt2, what the embedding returns. Raises `ValueError` for a hook that is no
    site.
    """
    if name == "hook_embed":
        return _embedding(model_name)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match and match[2] in _BLOCK_HOOKS:
        return f"layers.{int(match[1])}.{_BLOCK_HOOKS[match[2]]}"
    raise _unknown("hook", name, ["hook_embed", *(f"blocks.N.{hook}" for hook in _BLOCK_HOOKS)])


def to_transformer_lens(site: str) -> str:
    """The hook of one of our sites: `layers.8.resid_post` is `blocks.8.hook_resid_post`.

    Raises `ValueError` for a site that has no hook.
    """
    place = Site.from_string(site)
    if place.layer is None or place.component not in _HOOKS:
        raise _unknown("site", site, [f"layers.N.{component}" for component in _HOOKS])
    return f"blocks.{place.layer}.{_HOOKS[place.component]}"


def from_hugging_face(path: str, side: str | None = None) -> str:
    """Our name of what a module returns or receives: `model.layers.8.mlp` is `layers.8.mlp`.

    The path may start with the name of the model (`model`, `transformer`, `gpt_neox`, ...) and end
    in the side, `.output` or `.input`; otherwise `side` says it, by default the output. The output
    of `mlp` is not what is added to the stream where a norm follows, as in Gemma 2: that is
    `post_feedforward_layernorm`. Raises `ValueError` for a module that is no site.
    """
    match = re.fullmatch(r"(.*?)(?:\.(input|output))?", path)
    inner, found = (match[1], match[2]) if match else (path, None)
    if side not in (None, "input", "output") or (side and found and side != found):
        raise ValueError(f'side must be "input" or "output", as {path!r} says, got {side!r}.')
    is_input = (side or found) == "input"
    inner = _without_base(inner)
    block = re.fullmatch(r"(?:layers|h|blocks)\.(\d+)(?:\.(.+))?", inner)
    if block and (component := _component(block[2] or "", is_input)):
        return f"layers.{int(block[1])}.{component}"
    if inner in _OUTSIDE and not is_input:
        return _OUTSIDE[inner]
    if block and block[2] in _OTHER_NORMS:
        raise ValueError(
            f"What {path!r} receives is, by the model, what the attention returns or the stream: "
            f"give site='layers.{block[1]}.attn' or 'layers.{block[1]}.resid_mid'."
        )
    raise _unknown("module", path, _known_modules())


def to_hugging_face(site: str, family: str = "llama") -> str:
    """The module and side of one of our sites: `layers.8.mlp` is `model.layers.8.mlp.output`.

    `family` is one of `FAMILIES`, which name their modules alike: "llama" (also Mistral, Qwen, Phi
    3, Gemma 1), "gemma2" (also Gemma 3), "gpt2" and "gpt_neox" (Pythia). Raises `ValueError` for
    another family, and for a site that is no side of a module.
    """
    if family not in _FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}.")
    base, attention, projection, mlp, others = _FAMILIES[family]
    known = {
        "resid_pre": "input",
        "attn_in": f"{attention}.input",
        "attn_z": f"{attention}.{projection}.input",
        "attn": f"{attention}.output",
        "attn_out": f"{attention}.output",
        "mlp_in": f"{mlp}.input",
        "mlp": f"{mlp}.output",
        "mlp_out": f"{mlp}.output",
        "resid_post": "output",
    } | others
    place = Site.from_string(site)
    if place.layer is None or place.component not in known:
        raise _unknown("site", site, [f"layers.N.{component}" for component in known])
    return f"{base}.{place.layer}.{known[place.component]}"


def to_hookpoint(site: str, family: str = "llama") -> str:
    """The path of the module, inside the model, that returns one of our sites.

    `layers.8.resid_post` is `layers.8`, of gpt2 `h.8`. Raises `ValueError` as `to_hugging_face`
    does, and for what a module receives.
    """
    path = to_hugging_face(site, family)
    if path.endswith(".input"):
        raise ValueError(f"site must be what a module returns, got {site!r}, which is {path!r}.")
    return path.removesuffix(".output").partition(".")[2]


def _embedding(model_name: str | None) -> str:
    if not model_name:
        raise ValueError(
            "hook_embed is the start of the stream in models without learned positions, and comes "
            "before these in others, and no model is named: give site='layers.0.resid_pre', or the "
            "path of the embedding such as site='model.wte'."
        )
    if not _LEARNED_POSITIONS.search(model_name):
        return "layers.0.resid_pre"
    return "model.wte"


def _without_base(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in _BASES:
        parts = parts[1:]
    return ".".join(parts)


def _component(path: str, is_input: bool) -> str | None:
    """The component that a module of a block receives or returns; None where it is no site."""
    head, _, rest = path.partition(".")
    if not path:
        return "resid_pre" if is_input else "resid_post"
    if path in _NORMS:
        return _NORMS[path][not is_input]
    if head in _ATTENTION and rest in _OUTPUT_PROJECTIONS:
        return "attn_z" if is_input else "attn"
    for names, component in ((_ATTENTION, "attn"), (_MLP, "mlp")):
        if head in names and not (is_input and rest):
            return (f"{component}_in" if is_input else component) if not rest else path
    return path if path in _OTHER_NORMS and not is_input else None


def _known_modules() -> list[str]:
    names = ("", *_NORMS, *_OTHER_NORMS, *_ATTENTION, "self_attn.o_proj", *_MLP)
    inside = [f"layers.N.{name}".removesuffix(".") for name in names]
    return [*inside, *_OUTSIDE]


def _unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    near = difflib.get_close_matches(re.sub(r"\d+", "N", name), known, n=1)
    hint = f" (the nearest is {near[0]})" if near else ""
    return ValueError(
        f"No site of ours is the {what} {name!r}{hint}; known are {', '.join(known)}."
    )
