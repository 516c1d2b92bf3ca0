"""Files of Gemma Scope 1 and 2, laid out by hand; SAELens 6.54.12 judges those that it reads right.

    python tests/golden/formats/make_gemma_scope.py

Needs torch and sae-lens. In float64 NumPy are the SAE of the embedding, of which SAELens scales the
weights but not `b_dec`, and the cross-layer transcoder, of which SAELens sums the decoders of all
layers.
"""

import numpy as np
import torch
from drawn import D, Expected, F, draw, inputs, jump_relu, thresholds_at, write_json
from judged import codes, judge
from safetensors.torch import save_file

LAYERS, FEATURES = 3, 16
SIZES = {"d_in": D, "d_sae": F}
SECOND = {"width": F, "model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu", "l0": 5}
BEFORE = "model.layers.{}.pre_feedforward_layernorm.output"
AFTER = "model.layers.{}.post_feedforward_layernorm.output"


def weights(rng, n=F, d_out=D):
    p = {
        "W_enc": draw(rng, D, n, scale=0.7), "W_dec": draw(rng, n, d_out), "b_enc": draw(rng, n),
        "b_dec": draw(rng, d_out, scale=20),
    }  # fmt: skip
    return p | {"threshold": thresholds_at(p["W_enc"][0] + p["b_enc"])}


def first(expected, x):
    """Gemma Scope 1: `{repository}/{folder}/params.npz`."""
    folders = {
        "gemma-scope-2b-pt-res": "layer_3/width_16k/average_l0_71",
        "gemma-scope-9b-it-mlp": "layer_4/width_65k/average_l0_20",
        "gemma-scope-27b-pt-att": "layer_5/width_131k/average_l0_9",
    }
    for i, (repository, folder) in enumerate(folders.items()):
        root = expected.folder / repository
        (root / folder).mkdir(parents=True, exist_ok=True)
        np.savez(root / folder / "params.npz", **weights(np.random.default_rng(i)))
        sae = judge("gemma_2", root, f"google/{repository}", folder, SIZES)
        expected.add(repository, x, *codes(sae, x))

    root, folder = expected.folder / "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
    (root / folder).mkdir(parents=True, exist_ok=True)
    p = weights(np.random.default_rng(7))
    np.savez(root / folder / "params.npz", **p)
    expected.add("embedding", x, *jump_relu(x, p))

    root = expected.folder / "gemma-scope-2b-pt-transcoders"
    folder = "layer_3/width_16k/average_l0_76"
    (root / folder).mkdir(parents=True, exist_ok=True)
    np.savez_compressed(root / folder / "params.npz", **weights(np.random.default_rng(8)))
    sizes = SIZES | {"d_out": D}
    sae = judge("gemma_2_transcoder", root, "google/gemma-scope-2b-pt-transcoders", folder, sizes)
    expected.add(root.name, x, *codes(sae, x))


def second(expected, x):
    """Gemma Scope 2: `{kind}/{folder}/config.json` and `params.safetensors`."""
    root, repository = expected.folder / "gemma-scope-2-270m-pt", "google/gemma-scope-2-270m-pt"
    cases = {
        "resid_post/layer_5_width_16k_l0_big": ("model.layers.5.output", "model.layers.5.output"),
        "attn_out/layer_5_width_16k_l0_big": ("model.layers.5.self_attn.o_proj.input",) * 2,
        "mlp_out/layer_5_width_16k_l0_big": (AFTER.format(5), AFTER.format(5)),
        "transcoder/layer_5_width_16k_l0_big": (BEFORE.format(5), AFTER.format(5)),
        "transcoder/layer_5_width_16k_l0_big_affine": (BEFORE.format(5), AFTER.format(5)),
    }
    for i, (folder, (reads, writes)) in enumerate(cases.items()):
        rng = np.random.default_rng(20 + i)
        p = {key.lower(): array for key, array in weights(rng).items()}
        affine, kind = folder.endswith("affine"), "sae" if reads == writes else "transcoder"
        if affine:
            p["affine_skip_connection"] = draw(rng, D, D)
        hooks = {"hf_hook_point_in": reads, "hf_hook_point_out": writes}
        config = SECOND | hooks | {"affine_connection": affine, "type": kind}
        if not folder.startswith("mlp_out"):  # which some folders of the release lack
            write_json(root / folder / "config.json", config)
        (root / folder).mkdir(parents=True, exist_ok=True)
        dtype = torch.bfloat16 if folder.startswith("attn_out") else torch.float32
        arrays = {key: torch.tensor(array).to(dtype) for key, array in p.items()}
        save_file(arrays, root / folder / "params.safetensors")
        sae = judge("gemma_3", root, repository, folder)
        expected.add(folder, x, *codes(sae, x))


def cross_layer(expected):
    """`w_dec [F, L, d]` by the layer that is written; features of a layer write to later ones."""
    root = expected.folder / "gemma-scope-2-270m-pt" / "clt" / "width_262k_l0_big"
    hooks = {
        "hf_hook_point_in": BEFORE.replace("{}", "{all}"),
        "hf_hook_point_out": AFTER.replace("{}", "{all}"),
    }
    write_json(root / "config.json", SECOND | hooks | {"affine_connection": False, "type": "clt"})
    rng = np.random.default_rng(40)
    x = np.stack([inputs(rng) for _ in range(LAYERS)], axis=1)
    codes_of, y = [], np.zeros(x.shape)
    for i in range(LAYERS):
        p = weights(rng, FEATURES)
        w_dec = draw(rng, FEATURES, LAYERS, D)
        w_dec[:, :i] = 0
        z, _ = jump_relu(x[:, i], p)
        codes_of.append(z)
        y += np.einsum("bf,fld->bld", z, w_dec.astype(np.float64))
        y[:, i] += p["b_dec"]
        arrays = {key.lower(): torch.tensor(array) for key, array in p.items()}
        arrays["w_dec"] = torch.tensor(w_dec)
        save_file(arrays, root / f"params_layer_{i}.safetensors")
    expected.add("clt", x.reshape(len(x), -1), np.concatenate(codes_of, 1), y.reshape(len(x), -1))


def main():
    expected = Expected("gemma_scope")
    x = inputs(np.random.default_rng(100))
    first(expected, x)
    second(expected, x)
    cross_layer(expected)
    expected.write()


if __name__ == "__main__":
    main()
