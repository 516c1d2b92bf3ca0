"""SAEs of the attention heads of GPT-2 small: `{name}.pt` with `{name}_cfg.json` beside it.

    z = max((x - b_dec) @ W_enc + b_enc, 0);  y' = z @ W_dec + b_dec

They read `hook_z`, the outputs of all heads side by side; `W_enc` is `[d, F]`, `W_dec` `[F, d]`.

Reference: Kissane et al. 2024, arXiv 2406.17759.
"""

from __future__ import annotations

from pathlib import Path

from mlxterp.sae.files import read_json
from mlxterp.sae.formats.names import from_transformer_lens
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import (
    centred,
    json_or_nothing,
    names_in,
    no_site,
    parts_between,
    transposed,
)
from mlxterp.sae.formats.tensors import open_tensors

NAME = "connor_rob_hook_z"
KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
FACTS = ("act_name", "act_size", "dict_size", "l1_coeff", "lr", "seq_len")


def recognise(path: Path) -> bool:
    """Whether it is a file of weights with such a configuration beside it."""
    return "act_size" in json_or_nothing(_config(path)) and names_in(path) >= KEYS


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE in a file, of the hook `act_name` in its configuration.

    Raises `ValueError` for arrays of other shapes, and where the site has to be given.
    """
    config = read_json(_config(path), ("act_size", "dict_size"))
    d, n = config["act_size"], config["dict_size"]
    hook = config.get("act_name")
    if site is None and not isinstance(hook, str):
        raise no_site(_config(path), "layers.8.attn_z")
    site = site or from_transformer_lens(str(hook))
    with open_tensors(path) as file:
        W_enc, b_dec = transposed(file.read("W_enc", (d, n))), file.read("b_dec", (d,))
        arrays = {
            "W_enc": W_enc,
            "b_enc": centred(W_enc, file.read("b_enc", (n,)), b_dec),
            "W_dec": file.read("W_dec", (n, d)),
            "b_dec": b_dec,
        }
    return parts_between(
        site, site, "relu", arrays, source={key: config.get(key) for key in FACTS},
        model=config.get("model_name"),
    )  # fmt: skip


def _config(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")
