"""Files `.pt` of OpenAI, Qwen Scope, Goodfire, DeepSeek R1 and for hook_z, laid out by hand.

    python tests/golden/formats/make_torch_files.py

Needs torch and sae-lens 6.54.12, which judges all but OpenAI's: these are computed in float64
NumPy, as their library is in no registry.
"""

from collections import OrderedDict

import numpy as np
import torch
from drawn import D, Expected, F, draw, inputs, write_json
from judged import codes, judge

K = 4


def weights(rng):
    """`[F, d]`, `[F]`, `[d, F]`, `[d]`."""
    large = draw(rng, D, scale=20)
    return draw(rng, F, D, scale=0.7), draw(rng, F), draw(rng, D, F), large


def save(path, state, dtype=torch.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        key: torch.tensor(value).to(dtype) if isinstance(value, np.ndarray) else value
        for key, value in state.items()
    }
    torch.save(OrderedDict(state), path)


def openai(x):
    expected = Expected("openai")
    for i, (location, activation) in enumerate(
        (("resid_post_mlp_v5_32k", "TopK"), ("resid_delta_mlp_v4", "ReLU"))
    ):
        W, latent_bias, V, pre_bias = weights(np.random.default_rng(i))
        if activation == "TopK":  # which sees inputs of mean 0 and size 1
            pre_bias = (pre_bias / 20).astype(np.float32)
        state = {
            "pre_bias": pre_bias, "latent_bias": latent_bias, "encoder.weight": W,
            "decoder.weight": V, "latents_activation_frequency": np.linspace(0, 0.5, F),
            "latents_mean_square": np.ones(F), "activation": activation,
        }  # fmt: skip
        state["stats_last_nonzero"] = torch.zeros(F, dtype=torch.long)
        if activation == "TopK":
            state["activation_state_dict"] = OrderedDict(k=K, postact_fn="ReLU")
        save(expected.folder / location / "autoencoders" / "8.pt", state)
        given = x.astype(np.float64)
        mean, std = given.mean(1, keepdims=True), given.std(1, ddof=1, keepdims=True)
        top = activation == "TopK"
        seen = (given - mean) / (std + 1e-5) if top else given
        pre = (seen - pre_bias) @ W.T.astype(np.float64) + latent_bias
        z = np.maximum(pre, 0)
        if top:
            z = np.where(pre >= np.sort(pre, 1)[:, [-K]], z, 0)
        y = z @ V.T.astype(np.float64) + pre_bias
        expected.add(location, x, z, y * std + mean if top else y)
    expected.write()


def qwen_scope(x):
    expected = Expected("qwen_scope")
    W, b_enc, V, b_dec = weights(np.random.default_rng(10))
    b_enc = b_enc - 2  # so that on some inputs fewer than k are positive
    repository = f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    root = expected.folder / repository
    save(root / "layer5.sae.pt", {"W_enc": W, "b_enc": b_enc, "W_dec": V, "b_dec": b_dec})
    sizes = {"d_in": D, "d_sae": F}
    sae = judge("qwen_scope", root, f"Qwen/{repository}", "layer5.sae.pt", sizes)
    assert (codes(sae, x)[0] > 0).sum(1).min() < K
    expected.add(repository, x, *codes(sae, x))
    config = {
        "model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D, "d_sae": F,
        "k": K, "num_layers": 28, "hook_point": "resid_post", "dtype": "float32",
    }  # fmt: skip
    write_json(expected.folder / "with_config" / "config.json", config)
    state = {"W_enc": W, "b_enc": b_enc, "W_dec": V, "b_dec": b_dec}
    save(expected.folder / "with_config" / "layer6.sae.pt", state)
    expected.write()


def goodfire(x):
    expected = Expected("goodfire")
    W, b_enc, V, b_dec = weights(np.random.default_rng(11))
    for name, loader, repository, parts in (
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
         ("encoder_linear", "decoder_linear")),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "deepseek_r1", "", ("encoder", "decoder")),
    ):  # fmt: skip
        encoder, decoder = parts
        state = {
            f"{encoder}.weight": W, f"{encoder}.bias": b_enc, f"{decoder}.weight": V,
            f"{decoder}.bias": b_dec,
        }  # fmt: skip
        dtype = torch.bfloat16 if loader == "deepseek_r1" else torch.float32
        save(expected.folder / name, state, dtype)
        sizes = {"d_in": D, "d_sae": F}
        sae = judge(loader, expected.folder, repository, name, sizes)
        expected.add(name, x, *codes(sae, x))
    expected.write()


def hook_z(x):
    expected = Expected("hook_z")
    W, b_enc, V, b_dec = weights(np.random.default_rng(12))
    state = {"W_enc": W.T.copy(), "b_enc": b_enc, "W_dec": V.T.copy(), "b_dec": b_dec}
    save(expected.folder / "gpt2-small_L1_Hcat_z.pt", state)
    config = {
        "act_name": "blocks.1.attn.hook_z", "act_size": D, "dict_size": F, "lr": 1e-3,
        "model_name": "gpt2-small", "site": "z", "layer": 1,
    }  # fmt: skip
    write_json(expected.folder / "gpt2-small_L1_Hcat_z_cfg.json", config)
    sae = judge("connor_rob_hook_z", expected.folder, "", "gpt2-small_L1_Hcat_z.pt")
    expected.add("hook_z", x, *codes(sae, x))
    expected.write()


if __name__ == "__main__":
    x = inputs(np.random.default_rng(100))
    openai(x)
    qwen_scope(x)
    goodfire(x)
    hook_z(x + np.float32(20))
