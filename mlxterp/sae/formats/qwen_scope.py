"""Qwen Scope: files `layer{n}.sae.pt`, one a layer, with `W_enc [F, d]` and `W_dec [d, F]`.

    z = the k largest of x @ W_enc.T + b_enc, where positive;  y' = z @ W_dec.T + b_dec

The number `k` is in `config.json` beside the files, or in the name of the repository,
`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import (
    in_path,
    json_or_nothing,
    names_in,
    no_site,
    parts_between,
    transposed,
)
from mlxterp.sae.formats.tensors import open_tensors

NAME = "qwen_scope"
CONFIG = "config.json"
FILE = r"layer(\d+)\.sae\.pt"
REPOSITORY = r"SAE-Res-(Qwen.+?)-W(\d+)K-L0_(\d+)(?=/|$)"
KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}


def recognise(path: Path) -> bool:
    """Whether it is a file `layer{n}.sae.pt`, or a folder of such files."""
    files = _files(path)
    return bool(files) and names_in(files[0]) >= KEYS


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE in a file `layer{n}.sae.pt`, or in a folder that holds one such file.

    Raises `ValueError` where a folder holds several, where nothing says `k`, and for arrays of
    other shapes.
    """
    files = _files(path)
    if path.is_dir() and len(files) != 1:
        raise ValueError(
            f"{path} must hold one file layer{{n}}.sae.pt, got {len(files)}: give the path of one."
        )
    weights = files[0] if path.is_dir() else path
    config = json_or_nothing(weights.parent / CONFIG)
    repository = in_path(REPOSITORY, weights)
    k = config.get("k", int(repository[3]) if repository else None)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(
            f"{weights}: 'k' is not known, got {k!r}: it is read from {CONFIG} beside it, or from "
            "the name of the repository in the path, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50."
        )
    layer = re.fullmatch(FILE, weights.name)
    hook = config.get("hook_point", "resid_post")
    if site is None and (layer is None or hook != "resid_post"):
        raise no_site(weights)
    site = site or f"layers.{int(layer[1]) if layer else 0}.resid_post"
    with open_tensors(weights) as file:
        shape = file.shape("W_enc")
        if len(shape) != 2:
            raise ValueError(f"{weights}: 'W_enc' must be a matrix, got shape {shape}.")
        n, d = config.get("d_sae", shape[0]), config.get("d_model", shape[1])
        arrays = {
            "W_enc": file.read("W_enc", (n, d)),
            "b_enc": file.read("b_enc", (n,)),
            "W_dec": transposed(file.read("W_dec", (d, n))),
            "b_dec": file.read("b_dec", (d,)),
        }
    model = config.get("base_model", f"Qwen/{repository[1]}" if repository else None)
    return parts_between(site, site, "topk", arrays, source=config, model=model, options={"k": k})


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("layer*.sae.pt"))
    return [path] if path.name.endswith(".sae.pt") and path.is_file() else []
