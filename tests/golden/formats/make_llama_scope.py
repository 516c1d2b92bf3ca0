"""Folders of Llama Scope, laid out by hand (the original library is in no registry).

    python tests/golden/formats/make_llama_scope.py

Needs torch and sae-lens 6.54.12. SAELens judges the files whose decoder rows have norm 1; it leaves
`sparsity_include_decoder_norm` out, so for the others the expectation is computed in float64 with
the three steps of the original loader: norms of the dataset into the weights, decoder rows to norm
1, one threshold for all features.
"""

import math

import numpy as np
import torch
from drawn import Expected, draw, inputs, thresholds_at, write_json
from judged import codes, judge
from safetensors.torch import save_file

D, F = 16, 32
NORM = 2.0  # so that sqrt(D) / NORM is 2
CONFIG = {
    "dtype": "torch.bfloat16", "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post", "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": 2, "d_model": D, "d_sae": F,
    "act_fn": "jumprelu", "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": NORM, "out": NORM},
    "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "top_k": 50,
}  # fmt: skip


def weights(rng, norms):
    """Decoder rows of norm 1, 2 or 4 exactly: four entries of a half."""
    rows = np.zeros((F, D), np.float32)
    for i in range(F):
        rows[i, rng.choice(D, 4, replace=False)] = rng.choice([-0.5, 0.5], 4) * norms[i]
    return {
        "encoder.weight": draw(rng, F, D, scale=0.5), "encoder.bias": draw(rng, F, scale=0.3),
        "decoder.weight": rows.T.copy(), "decoder.bias": draw(rng, D),
    }  # fmt: skip


def save(path, arrays, dtype=torch.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: torch.tensor(v).to(dtype) for k, v in arrays.items()}, path)


def original(x, p, theta, s_in, s_out):
    """`(z, y)`; `z` is put back to the units of `s_in * x @ W_enc.T + b_enc`."""
    p = {name: np.asarray(array, np.float64) for name, array in p.items()}
    W_enc, b_enc = p["encoder.weight"], p["encoder.bias"] / s_in
    W_dec, b_dec = p["decoder.weight"] * s_in / s_out, p["decoder.bias"] / s_out
    norms = np.linalg.norm(W_dec, axis=0)
    pre = x.astype(np.float64) @ (W_enc * norms[:, None]).T + b_enc * norms
    act = np.where(pre > theta, pre, 0)
    return act / norms * s_in, act @ (W_dec / norms).T + b_dec


def main():
    expected = Expected("llama_scope")
    x = inputs(np.random.default_rng(1), d=D) / 2  # on the first input, s_in * x is a unit vector

    name, p = "Llama3_1-8B-Base-L15R-8x", weights(np.random.default_rng(2), np.ones(F))
    pre = p["encoder.weight"][:, 0] + p["encoder.bias"]
    theta = float(np.sort(pre)[-6] / 2)  # one feature meets it on the first input
    write_json(expected.folder / name / "hyperparams.json", CONFIG | {"jump_relu_threshold": theta})
    save(expected.folder / name / "checkpoints" / "final.safetensors", p, torch.bfloat16)
    sae = judge("llama_scope", expected.folder, "", name, scale=math.sqrt(D) / NORM)
    expected.add(name, x, *codes(sae, x))

    name, p = "Llama3_1-8B-Base-L8TC-8x", weights(np.random.default_rng(3), [1, 2, 4, 1] * 8)
    config = CONFIG | {
        "hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out",
        "dataset_average_activation_norm": {"in": 2.0, "out": 1.0},
    }  # fmt: skip
    write_json(expected.folder / name / "hyperparams.json", config | {"jump_relu_threshold": 0.25})
    save(expected.folder / name / "checkpoints" / "final.safetensors", p)
    expected.add(name, x, *original(x, p, 0.25, 2.0, 4.0))

    name, p = "R1-Distill/L15R", weights(np.random.default_rng(4), np.ones(F))
    pre = p["encoder.weight"][:, 0] + p["encoder.bias"]
    p["log_jumprelu_threshold"] = np.log(thresholds_at(pre) + np.float32(1 / 256))
    norms = {f"dataset_average_activation_norm.{CONFIG['hook_point_in']}": np.float32(NORM)}
    kept = ("hook_point_in", "hook_point_out", "expansion_factor", "d_model", "norm_activation")
    config = {key: CONFIG[key] for key in kept} | {"sae_type": "sae", "act_fn": "jumprelu"}
    write_json(expected.folder / name / "config.json", config)
    save(expected.folder / name / "sae_weights.safetensors", p | norms)
    sae = judge("llama_scope_r1_distill", expected.folder, "", name, scale=math.sqrt(D) / NORM)
    expected.add(name, x, *codes(sae, x))
    expected.write()


if __name__ == "__main__":
    main()
