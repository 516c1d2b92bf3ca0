"""SAEs of GPT-2 small by OpenAI: files `{layer}.pt` of the state of their `Autoencoder`.

    z  = activation((x - pre_bias) @ encoder.weight.T + latent_bias)
    y' = z @ decoder.weight.T + pre_bias

`encoder.weight` is `[F, d]`, `decoder.weight` `[d, F]`. Those with the `activation` TopK normalise
every token, to mean 0 and standard deviation 1, and scale its reconstruction back; those with ReLU
do not.

Reference: Gao et al. 2024, arXiv 2406.04093.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.single import (
    centred,
    in_path,
    names_in,
    no_site,
    parts_between,
    transposed,
)
from mlxterp.sae.formats.tensors import TensorFile, open_tensors

NAME = "openai"
KEYS = {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"}
FOLDER = r"/(mlp_post_act|resid_\w+?)(?:_v\d\w*)?/autoencoders/(\d+)\.pt$"
SITES = {
    "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out",
    "resid_post_attn": "resid_mid",
    "resid_post_mlp": "resid_post",
}


def recognise(path: Path) -> bool:
    """Whether it is a file of the state of an `Autoencoder` of OpenAI."""
    return path.suffix == ".pt" and names_in(path) >= KEYS


def read(path: Path, site: str | None = None) -> Parts:
    """The SAE in a file `{layer}.pt`.

    The folders of the release say the site, `resid_post_mlp_v5_32k/autoencoders/8.pt`; elsewhere it
    has to be given. Raises `ValueError` for tied weights and other activation functions.
    """
    folder = in_path(FOLDER, path)
    if site is None and folder and folder[1] in SITES:
        site = f"layers.{int(folder[2])}.{SITES[folder[1]]}"
    if site is None:
        raise no_site(path)
    with open_tensors(path) as file:
        function, options = _activation(file)
        arrays = _arrays(file)
        rates = _rates(file, len(arrays["b_enc"]))
    parts = parts_between(
        site, site, function, arrays,
        source={"location": folder and folder[1]},
        options=options, model="gpt2" if folder else None,
        token_norm="layer_norm" if function == "topk" else "none",
    )  # fmt: skip
    return replace(parts, firing_rates=rates)


def _activation(file: TensorFile) -> tuple[str, dict[str, Any]]:
    name = file.value("activation") if file.has("activation") else "ReLU"
    if name == "ReLU":
        return "relu", {}
    inner = "activation_state_dict."
    after = file.values.get(f"{inner}postact_fn", "ReLU")
    if name != "TopK" or after != "ReLU":
        raise ValueError(
            f"{file.path}: 'activation' must be ReLU, or TopK followed by ReLU, got {name!r} "
            f"followed by {after!r}."
        )
    k = file.value(f"{inner}k") if file.has(f"{inner}k") else None
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{file.path}: '{inner}k' must be a whole number >= 1, got {k!r}.")
    return "topk", {"k": k}


def _arrays(file: TensorFile) -> dict[str, mx.array]:
    shape = file.shape("encoder.weight")
    if len(shape) != 2:
        raise ValueError(f"{file.path}: 'encoder.weight' must be a matrix, got shape {shape}.")
    n, d = shape
    W_enc, b_dec = file.read("encoder.weight"), file.read("pre_bias", (d,))
    return {
        "W_enc": W_enc,
        "b_enc": centred(W_enc, file.read("latent_bias", (n,)), b_dec),
        "W_dec": transposed(file.read("decoder.weight", (d, n))),
        "b_dec": b_dec,
    }


def _rates(file: TensorFile, n: int) -> np.ndarray:
    """The measured firing rates, where all of them are shares."""
    name = "latents_activation_frequency"
    if not file.has(name):
        return np.zeros(0)
    rates = np.array(file.read(name, (n,)), dtype=np.float64)
    # Ones are the values before anything is measured.
    measured = (rates >= 0).all() and (rates <= 1).all() and (rates < 1).any()
    return rates if measured else np.zeros(0)
