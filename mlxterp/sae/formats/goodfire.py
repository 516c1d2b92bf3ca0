"""SAEs of Goodfire and of DeepSeek R1: one file of two `nn.Linear` with a ReLU between them.

    z = max(x @ encoder.weight.T + encoder.bias, 0);  y' = z @ decoder.weight.T + decoder.bias

Goodfire calls them `encoder_linear` and `decoder_linear`. The names of the files say the layer:
`Llama-3.1-8B-Instruct-SAE-l19.pth`, `DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt`.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import names_in, no_site, parts_between, transposed
from mlxterp.sae.formats.tensors import open_tensors

NAME = "goodfire"
LAYERS = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))
FILE = r"(.+)-SAE-l(\d+)\.pth?"
ORGANISATIONS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}


def recognise(path: Path) -> bool:
    """Whether it is a file of two linear layers by these names."""
    if path.suffix not in (".pt", ".pth"):
        return False
    names = names_in(path)
    return _keys(*LAYERS[0]) <= names or (
        bool(re.fullmatch(FILE, path.name)) and _keys(*LAYERS[1]) == names
    )


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE in a file, of the output of the layer that its name says where `site` does not.

    Raises `ValueError` for arrays of other shapes, and where the site has to be given.
    """
    named = re.fullmatch(FILE, path.name)
    if site is None and named is None:
        raise no_site(path, "layers.19.resid_post")
    site = site or f"layers.{int(named[2]) if named else 0}.resid_post"
    with open_tensors(path) as file:
        encoder, decoder = LAYERS[0] if file.has("encoder_linear.weight") else LAYERS[1]
        shape = file.shape(f"{encoder}.weight")
        if len(shape) != 2:
            raise ValueError(f"{path}: '{encoder}.weight' must be a matrix, got shape {shape}.")
        n, d = shape
        arrays = {
            "W_enc": file.read(f"{encoder}.weight"),
            "b_enc": file.read(f"{encoder}.bias", (n,)),
            "W_dec": transposed(file.read(f"{decoder}.weight", (d, n))),
            "b_dec": file.read(f"{decoder}.bias", (d,)),
        }
    model = named[1] if named else None
    if model and (owner := ORGANISATIONS.get(model.partition("-")[0])):
        model = f"{owner}/{model}"
    return parts_between(site, site, "relu", arrays, source={}, model=model)


def _keys(encoder: str, decoder: str) -> set[str]:
    return {f"{layer}.{part}" for layer in (encoder, decoder) for part in ("weight", "bias")}
