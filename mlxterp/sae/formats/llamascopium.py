"""Coders of llamascopium (OpenMOSS): a folder with `config.json` and `sae_weights.safetensors`.

    sae          W_E [d, F]      b_E [F]      W_D [F, d]                b_D [d]
    crosscoder   W_E [H, d, F]   b_E [H, F]   W_D [H, F, d]             b_D [H, d]    of H sites
    clt          W_E [L, d, F]   b_E [L, F]   W_D.{i} [i + 1, F, d]     b_D.{i} [d]   of L layers

and of `jumprelu` the logarithm of the threshold. In units in which what is read and what is written
have, in the mean over the training data, the norm `sqrt(d)` (x -> s x),

    pre = x @ W_E + b_E         of a crosscoder summed over the sites
    z   = pre where pre * n is active, else 0;    y' = z @ W_D + b_D

`n` is the norm of the feature's decoder row, over all layers, or 1 where
`sparsity_include_decoder_norm` is false. Scales and norms are folded into our arrays. Codes are in
units of what is read, as of llamascopium's `fold_activation_scale`, of a crosscoder in the units
above, and for `topk` times `n`, as this is what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxterp.sae.coder import Columns
from mlxterp.sae.files import read_json
from mlxterp.sae.formats.names import from_transformer_lens
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import json_or_nothing, names_in, plain, transposed, two_sites
from mlxterp.sae.formats.tensors import TensorFile, open_tensors
from mlxterp.sae.metadata import Metadata

NAME = "llamascopium"
CONFIG = "config.json"
WEIGHTS = tuple(
    f"{stem}.{suffix}"
    for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for suffix in ("safetensors", "pt", "dcp")
)
TYPES = ("sae", "crosscoder", "clt")
NOT_READ = {
    "lorsa": "it has attention heads for features, which no coder of ours has",
    "molt": "its features are matrices, not directions",
}
NORM = "dataset_average_activation_norm"
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
NEVER = 1e30  # as a threshold, of features whose decoder row is zero


@dataclass(frozen=True)
class Source:
    """The configuration and the weights of one folder."""

    config: Mapping[str, Any]
    path: Path
    file: TensorFile

    @property
    def sizes(self) -> tuple[int, int]:
        """The width of a site, and the number of features of a layer."""
        d, factor = self.config["d_model"], self.config["expansion_factor"]
        numbers = all(isinstance(n, (int, float)) and 0 < n < 1 << 40 for n in (d, factor))
        if not numbers or not isinstance(d, int) or int(d * factor) < 1:
            raise ValueError(
                f"{self.path}: 'd_model' and 'expansion_factor' must be numbers > 0, got {d!r} and "
                f"{factor!r}."
            )
        return d, int(d * factor)

    @property
    def with_norms(self) -> bool:
        """Whether the decoder's norms count in what is active."""
        return bool(self.config.get("sparsity_include_decoder_norm", True))

    @property
    def act_fn(self) -> str:
        """The activation function, as the file calls it."""
        return str(self.config.get("act_fn", "relu")).lower()

    @property
    def k(self) -> int:
        """How many features are active, of `topk`."""
        k = self.config.get("top_k", 50)
        if not isinstance(k, int) or isinstance(k, bool):
            raise ValueError(f"{self.path}: 'top_k' must be a whole number, got {k!r}.")
        return k

    @property
    def has_bias(self) -> bool:
        """Whether the decoder has a bias."""
        return bool(self.config.get("use_decoder_bias", True))

    def key(self, name: str) -> str:
        """The name of an array in the file; those of a `.pt` are in a dictionary `sae`."""
        return name if self.file.has(name) or not self.file.has(f"sae.{name}") else f"sae.{name}"

    def read(self, name: str, shape: tuple[int, ...]) -> mx.array:
        """An array of that shape."""
        return self.file.read(self.key(name), shape)

    def scale(self, hook: str) -> float:
        """`s` of a hook: what brings its activations to the mean norm `sqrt(d)`."""
        if self.config.get("norm_activation", "dataset-wise") != "dataset-wise":
            return 1.0
        norm = self.file.value(self.key(f"{NORM}.{hook}"))
        if not 0 < norm < math.inf:
            raise ValueError(f"{self.path}: {NORM}.{hook} must be > 0, got {norm!r}.")
        return math.sqrt(self.config["d_model"]) / norm


def recognise(path: Path) -> bool:
    """Whether it is a folder of llamascopium."""
    config = json_or_nothing(path / CONFIG)
    kind = str(config.get("sae_type", "sae"))
    if kind in NOT_READ or kind not in TYPES or "expansion_factor" not in config:
        return kind in NOT_READ
    weights = _weights(path)
    if weights is None or weights.suffix == ".dcp":
        return weights is not None
    return bool(names_in(weights) & {"W_E", "sae.W_E"})


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE, transcoder, crosscoder or cross-layer transcoder in a folder.

    `site` takes the place of the hooks of an SAE, `layers.8.mlp_in -> layers.8.mlp_out` of a
    transcoder. Raises `ValueError` for other kinds, for activation functions that depend on the
    batch, for crosscoders in which every site has a threshold of its own (all but `relu`), and for
    arrays that do not fit the configuration.
    """
    config_file = path / CONFIG
    config = read_json(config_file, ("d_model", "expansion_factor"))
    kind = str(config.get("sae_type", "sae"))
    if kind not in TYPES:
        reason = NOT_READ.get(kind, f"known are {', '.join(TYPES)}")
        raise ValueError(f"{config_file}: 'sae_type' {kind!r} is not read: {reason}.")
    if site is not None and kind != "sae":
        raise ValueError(f"{path} says itself which sites it is of; got site={site!r}.")
    weights = _weights(path)
    if weights is None or weights.suffix == ".dcp":
        raise ValueError(
            f"{path} has no sae_weights.safetensors or .pt, only {weights}: load it with "
            "llamascopium and save it again on one device."
            if weights
            else f"{path} has no weights; looked for {', '.join(WEIGHTS)}."
        )
    with open_tensors(weights) as file:
        source = Source(config, config_file, file)
        _check(source)
        return {"sae": _sae, "crosscoder": _crosscoder, "clt": _cross_layer}[kind](source, site)


def _weights(path: Path) -> Path | None:
    return next((path / name for name in WEIGHTS if (path / name).exists()), None)


def _check(source: Source) -> None:
    config, kind = source.config, source.config.get("sae_type", "sae")
    single = kind == "sae" and config.get("hook_point_in") == config.get("hook_point_out")
    norms = ("dataset-wise", "inference", *(["token-wise"] * single))
    act_fns = ("relu",) if kind == "crosscoder" else ("relu", "jumprelu", "topk")
    for key, values, usual in (
        ("norm_activation", norms, "dataset-wise"),
        ("act_fn", act_fns, "relu"),
        ("use_glu_encoder", (False,), False),
    ):
        if config.get(key, usual) not in values:
            raise ValueError(
                f"{source.path}: of a {kind!r} {key!r} must be {' or '.join(map(repr, values))}, "
                f"got {config[key]!r}{_why(kind, config[key])}."
            )


def _why(kind: str, value: Any) -> str:
    if kind == "crosscoder" and value in ("jumprelu", "topk"):
        return ", which every site decides by its own decoder norm: ours have one code for all"
    return ", which depends on the other tokens of a batch" if "batch" in str(value) else ""


def _sae(source: Source, site: str | None) -> Parts:
    d, n = source.sizes
    hooks = _hooks(source, "hook_point_in")[0], _hooks(source, "hook_point_out")[0]
    if site is None:
        sites = from_transformer_lens(hooks[0]), from_transformer_lens(hooks[1])
    else:
        sites = (site, site) if hooks[0] == hooks[1] else two_sites(site)
    s_in, s_out = source.scale(hooks[0]), source.scale(hooks[1])
    W_D = source.read("W_D", (n, d)) * (s_in / s_out)
    norms = mx.linalg.norm(W_D, axis=1) if source.with_norms else mx.ones((n,))
    arrays = _with_norms(
        source.act_fn,
        transposed(source.read("W_E", (d, n))),
        source.read("b_E", (n,)) / s_in,
        [W_D],
        norms,
        _threshold(source, (n,)) / (s_out if source.with_norms else s_in),
    )
    arrays["b_dec"] = _bias(source, "b_D", (d,)) / s_out
    columns = [Columns((name,), (d,)) for name in sites]
    token_wise = source.config.get("norm_activation") == "token-wise"
    kind = "sae" if sites[0] == sites[1] else "transcoder"
    return _parts(source, kind, columns, arrays, "rescale" if token_wise else "none")


def _crosscoder(source: Source, site: str | None) -> Parts:
    d, n = source.sizes
    hooks = _hooks(source, "hook_points")
    scales, h = [source.scale(hook) for hook in hooks], len(hooks)
    key = source.key("W_E")
    for name, shape in (("W_E", (h, d, n)), ("W_D", (h, n, d))):
        _check_shape(source, name, shape)
    W_enc = [transposed(source.file.read_part(key, i)) * s for i, s in enumerate(scales)]
    W_dec = [source.file.read_part(source.key("W_D"), i) / s for i, s in enumerate(scales)]
    arrays = {
        "W_enc": mx.concatenate(W_enc, axis=1),
        "b_enc": source.read("b_E", (h, n)).sum(axis=0),
        "W_dec": mx.concatenate(W_dec, axis=1),
        "b_dec": (_bias(source, "b_D", (h, d)) / mx.array(scales)[:, None]).reshape(-1),
    }
    columns = Columns(tuple(from_transformer_lens(hook) for hook in hooks), (d,) * h)
    return _parts(source, "crosscoder", [columns, columns], arrays)


def _cross_layer(source: Source, site: str | None) -> Parts:
    d, n = source.sizes
    hooks = [_hooks(source, f"hook_points_{side}") for side in ("in", "out")]
    count = len(hooks[0])
    if count != len(hooks[1]):
        raise ValueError(f"{source.path}: there must be as many hook points in as out.")
    _check_shape(source, "W_E", (count, d, n))
    for i in range(count):
        _check_shape(source, f"W_D.{i}", (i + 1, n, d))
    scales = [[source.scale(hook) for hook in side] for side in hooks]
    biases, thresholds = source.read("b_E", (count, n)), _threshold(source, (count, n))
    layers = []
    for i, s_in in enumerate(scales[0]):
        rows = [source.file.read_part(source.key(f"W_D.{j}"), i) for j in range(i, count)]
        # The norms that count are those in units of training, over all layers.
        norms = mx.sqrt(sum((r.square().sum(axis=1) for r in rows), mx.zeros((n,))))
        rows = [r * (s_in / s_out) for r, s_out in zip(rows, scales[1][i:], strict=True)]
        layers.append(
            _with_norms(
                source.act_fn,
                transposed(source.file.read_part(source.key("W_E"), i)),
                biases[i] / s_in,
                rows,
                norms if source.with_norms else mx.ones((n,)),
                thresholds[i] / s_in,
            )
        )
    arrays = {key: mx.concatenate([layer[key] for layer in layers]) for key in layers[0]}
    arrays["b_dec"] = mx.concatenate(
        [_bias(source, f"b_D.{i}", (d,)) / s for i, s in enumerate(scales[1])]
    )
    columns = [Columns(tuple(map(from_transformer_lens, side)), (d,) * count) for side in hooks]
    return _parts(source, "cross_layer_transcoder", columns, arrays)


def _with_norms(
    act_fn: str,
    W_enc: mx.array,
    b_enc: mx.array,
    rows: Sequence[mx.array],
    norms: mx.array,
    threshold: mx.array,
) -> dict[str, mx.array]:
    """The arrays of features `[n, ...]` that are active where `pre * norms` is; `rows` are what
    they write to each site `[n, d]`, and `threshold` is what `pre * norms` has to exceed."""
    arrays = {"W_enc": W_enc, "b_enc": b_enc}
    some = mx.where(norms > 0, norms, 1)
    if act_fn == "topk":
        arrays |= {"W_enc": W_enc * norms[:, None], "b_enc": b_enc * norms}
        rows = [row / some[:, None] for row in rows]
    if act_fn == "jumprelu":
        arrays["threshold"] = mx.where(norms > 0, threshold / some, NEVER)
    arrays["W_dec"] = mx.stack(list(rows), axis=1).reshape(-1, rows[0].shape[1])
    return arrays


def _parts(
    source: Source,
    kind: str,
    columns: Sequence[Columns],
    arrays: Mapping[str, mx.array],
    token_norm: str = "none",
) -> Parts:
    mx.eval(arrays)
    facts = plain({**source.config, "format": NAME})
    return Parts(
        kind, columns[0], columns[1], source.act_fn, arrays,
        {"k": source.k} if source.act_fn == "topk" else {},
        token_norm, Metadata(source=facts),
    )  # fmt: skip


def _threshold(source: Source, shape: tuple[int, ...]) -> mx.array:
    if source.act_fn != "jumprelu":
        return mx.zeros(shape)
    return mx.exp(source.read(LOG_THRESHOLD, shape))


def _bias(source: Source, name: str, shape: tuple[int, ...]) -> mx.array:
    return source.read(name, shape) if source.has_bias else mx.zeros(shape)


def _check_shape(source: Source, name: str, shape: tuple[int, ...]) -> None:
    found = source.file.shape(source.key(name))
    if found != shape:
        raise ValueError(f"{source.file.path}: {name!r} must have shape {shape}, got {found}.")


def _hooks(source: Source, key: str) -> list[str]:
    """The hooks of a key, one or a list of them."""
    found = source.config.get(key)
    hooks = [found] if isinstance(found, str) else found
    if not isinstance(hooks, list) or not hooks or not all(isinstance(h, str) for h in hooks):
        raise ValueError(f"{source.path}: {key!r} must name hooks, got {found!r}.")
    return hooks
