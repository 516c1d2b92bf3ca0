"""Sparse coders of sparsify (EleutherAI): a folder named after a module, such as `layers.5.mlp`.

    cfg.json           d_in, num_latents (0: d_in * expansion_factor), k, activation, transcode, ...
    sae.safetensors    encoder.weight [F, d], encoder.bias, W_dec [F, d], b_dec, W_skip [d, d]

    pre = (x - b_dec) @ encoder.weight.T + encoder.bias      transcoders: x itself
    z   = the k largest of max(pre, 0), or the largest of each of k groups
    y'  = z @ W_dec + b_dec (+ x @ W_skip.T)

An SAE reads and writes what the module returns; a transcoder reads what it receives.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxterp.sae.files import read_json, write_directory
from mlxterp.sae.formats.names import from_hugging_face, to_hookpoint
from mlxterp.sae.formats.parts import SITES, Parts
from mlxterp.sae.formats.single import (
    centred,
    json_or_nothing,
    names_in,
    no_site,
    parts_between,
    two_sites,
)
from mlxterp.sae.formats.tensors import open_tensors

NAME = "sparsify"
CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
ORIGIN = "mlxterp.json"  # that of ours, beside what sparsify reads
ACTIVATIONS = ("topk", "groupmax")


def recognise(path: Path) -> bool:
    """Whether it is a folder with the two files."""
    found = names_in(path / WEIGHTS)
    return "encoder.weight" in found and "d_in" in json_or_nothing(path / CONFIG)


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE or transcoder in a folder of sparsify.

    The site is that of the module that the folder is named after. Raises `ValueError` for weights
    that do not fit the configuration, for a file without decoder, and where the site has to be
    given.
    """
    file = path / CONFIG
    config = read_json(file, ("d_in",))
    d, n, k = _sizes(config, file)
    activation = config.get("activation", "topk")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{file}: 'activation' must be topk or groupmax, got {activation!r}.")
    if config.get("signed"):
        raise ValueError(
            f"{file}: 'signed' codes, of the first releases of sparsify, are not read."
        )
    transcode = bool(config.get("transcode", False))
    reads, writes = _sites(path, transcode, site)
    with open_tensors(path / WEIGHTS) as tensors:
        if not tensors.has("W_dec"):
            raise ValueError(f"{tensors.path} has no decoder, 'W_dec'.")
        arrays = {
            "W_enc": tensors.read("encoder.weight", (n, d)),
            "b_enc": tensors.read("encoder.bias", (n,)),
            "W_dec": tensors.read("W_dec", (n, d)),
            "b_dec": tensors.read("b_dec", (d,)),
        }
        if config.get("skip_connection", False):
            arrays["W_skip"] = tensors.read("W_skip", (d, d))
    if not transcode:
        arrays["b_enc"] = centred(arrays["W_enc"], arrays["b_enc"], arrays["b_dec"])
    facts = ("expansion_factor", "normalize_decoder", "multi_topk", "transcode")
    source = {key: config[key] for key in facts if key in config}
    return parts_between(
        reads, writes, activation, arrays, source={**source, "hookpoint": path.absolute().name},
        options={"k": k},
    )  # fmt: skip


def _sizes(config: dict[str, Any], file: Path) -> tuple[int, int, int]:
    """`d_in`, the number of latents and `k`."""
    d, k = config["d_in"], config.get("k", 32)
    factor, n = config.get("expansion_factor", 32), config.get("num_latents", 0)
    for name, value in (("d_in", d), ("k", k), ("expansion_factor", factor), ("num_latents", n)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < (name != "num_latents"):
            raise ValueError(f"{file}: {name!r} must be a whole number, got {value!r}.")
    return d, n or d * factor, k


def _sites(path: Path, transcode: bool, site: str | None) -> tuple[str, str]:
    example = "layers.5.mlp_in -> layers.5.mlp" if transcode else "layers.5.mlp"
    if site is not None:
        return two_sites(site) if transcode else (site, site)
    match json_or_nothing(path / ORIGIN).get(SITES):
        case [str(reads), str(writes)]:
            return reads, writes
    folder = path.absolute()
    if re.fullmatch(r"seed_?\d+", folder.name):  # one of several runs
        folder = folder.parent
    try:
        writes = from_hugging_face(folder.name, "output")
        return (from_hugging_face(folder.name, "input") if transcode else writes), writes
    except ValueError:
        raise no_site(path, example) from None


def write(parts: Parts, path: Path) -> Path:
    """Write an SAE or transcoder with `topk` or `groupmax` as a folder of sparsify.

    sparsify finds coders by their folders' names: its own are those of modules, such as
    `layers.5.mlp`. Raises `ValueError` for another activation function or kind, for a norm of
    tokens, and for transcoders between sites of different width.
    """
    if parts.kind not in ("sae", "transcoder"):
        raise ValueError(f"sparsify knows SAEs and transcoders only, got a {parts.kind}.")
    if parts.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"sparsify knows the activation functions topk and groupmax, got "
            f"{parts.activation_function}."
        )
    if parts.token_norm != "none":
        raise ValueError(f"sparsify normalises no tokens, got token_norm={parts.token_norm!r}.")
    if parts.reads.width != parts.writes.width:
        raise ValueError(
            f"sparsify knows sites of one width only, got {parts.reads} and {parts.writes}."
        )
    arrays, transcode = parts.arrays, parts.kind == "transcoder"
    b_enc = arrays["b_enc"]
    if not transcode:
        b_enc = centred(arrays["W_enc"], b_enc, -arrays["b_dec"])
    weights: dict[str, mx.array] = {
        "encoder.weight": arrays["W_enc"],
        "encoder.bias": b_enc,
        **{name: arrays[name] for name in ("W_dec", "b_dec", "W_skip") if name in arrays},
    }
    reads, writes = parts.reads.names[0], parts.writes.names[0]
    config = {
        "activation": parts.activation_function,
        "expansion_factor": max(1, parts.n_features // parts.reads.width),
        "normalize_decoder": False,
        "num_latents": parts.n_features,
        "k": parts.options["k"],
        "multi_topk": False,
        "skip_connection": "W_skip" in arrays,
        "transcode": transcode,
        "d_in": parts.reads.width,
    }
    origin = {SITES: [reads, writes], "hookpoint": _hookpoint(writes)}
    contents = {CONFIG: config, WEIGHTS: weights, ORIGIN: origin}
    return write_directory(path, contents, marker=WEIGHTS)


def _hookpoint(site: str) -> str | None:
    """The module whose name sparsify would give the folder; none where no module returns it."""
    try:
        return to_hookpoint(site)
    except ValueError:
        return None
