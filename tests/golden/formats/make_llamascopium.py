"""Files of llamascopium 2.0.0b34, written and judged by itself.

    python tests/golden/formats/make_llamascopium.py

Needs torch and llamascopium. Codes are those of its `encode`, brought to units of what is read; of
`topk` they are times the norm of the decoder row, which is what the library compares.
"""

import json

import numpy as np
import torch
from drawn import D, Expected, F, draw, inputs
from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

LAYERS = 3
COMMON = {"d_model": D, "expansion_factor": F / D, "top_k": 3}
READ, WRITTEN = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
AT = "blocks.2.hook_resid_post"
SAES = {
    "transcoder_relu": (READ, WRITTEN, {"act_fn": "relu"}),
    "transcoder_jumprelu": (READ, WRITTEN, {"act_fn": "jumprelu"}),
    "transcoder_plain": (READ, WRITTEN, {
        "act_fn": "jumprelu", "sparsity_include_decoder_norm": False,
    }),
    "sae_jumprelu": (AT, AT, {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False}),
    "sae_topk": (AT, AT, {"act_fn": "topk"}),
    "sae_topk_without_norms": (AT, AT, {
        "act_fn": "topk", "sparsity_include_decoder_norm": False, "use_decoder_bias": False,
    }),
    "sae_token_wise": (AT, AT, {"act_fn": "jumprelu", "norm_activation": "token-wise"}),
    "sae_inference": (AT, AT, {"act_fn": "relu", "norm_activation": "inference"}),
}  # fmt: skip


def fill(model, seed):
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, array in model.named_parameters():
            scale = 3 if name[:3] == "b_D" else 0.7
            array[:] = torch.tensor(draw(rng, *array.shape, scale=scale))
            if "threshold" in name:
                array[:] = torch.tensor(draw(rng, *array.shape, scale=0.5) - 0.5)
    hooks = list(dict.fromkeys(model.cfg.associated_hook_points))
    model.set_dataset_average_activation_norm({h: 2.0 + 1.25 * i for i, h in enumerate(hooks)})
    model.eval()
    return rng


def save(model, folder, suffix="safetensors"):
    folder.mkdir(exist_ok=True)
    model.cfg.save_hyperparameters(folder)
    model.save_checkpoint(folder / f"sae_weights.{suffix}")


def saes(expected):
    for seed, (name, (reads, writes, options)) in enumerate(SAES.items()):
        cfg = SAEConfig(**COMMON, hook_point_in=reads, hook_point_out=writes, **options)
        model = SparseAutoEncoder(cfg)
        rng = fill(model, seed)
        x = inputs(rng) * 4
        with torch.no_grad():
            batch = {reads: torch.tensor(x)}
            batch.setdefault(writes, batch[reads])
            normalised, scales = model.normalize_activations(batch, return_scale_factor=True)
            z = model.encode(normalised[reads])
            y = model.denormalize_activations({writes: model.decode(z)}, scales)[writes]
            token_wise = cfg.norm_activation == "token-wise"
            z = z if token_wise else z / scales[reads]
            if cfg.act_fn == "topk" and cfg.sparsity_include_decoder_norm:
                z = z * model.decoder_norm() * scales[reads] / scales[writes]
        expected.add(name, x, z, y)
        save(model, expected.folder / name, "pt" if name == "sae_topk" else "safetensors")


def crosscoder(expected):
    hooks = [AT, "blocks.3.hook_resid_post", "blocks.4.hook_resid_post"]
    model = Crosscoder(CrosscoderConfig(**COMMON, hook_points=hooks, act_fn="relu"))
    rng = fill(model, 20)
    x = np.stack([inputs(rng) for _ in hooks], axis=1)
    with torch.no_grad():
        batch = {hook: torch.tensor(x[:, i]) for i, hook in enumerate(hooks)}
        normalised, scales = model.normalize_activations(batch, return_scale_factor=True)
        z = model.encode(model.prepare_input(normalised)[0])
        assert torch.allclose(z[:, 0], z[:, 1]) and torch.allclose(z[:, 0], z[:, 2])
        decoded = model.decode(z)
        y = torch.cat([decoded[:, i] / scales[hook] for i, hook in enumerate(hooks)], dim=-1)
    expected.add("crosscoder", x.reshape(len(x), -1), z[:, 0], y)
    save(model, expected.folder / "crosscoder")


def cross_layer(expected, name, seed, **options):
    sides = (
        [f"blocks.{i}.hook_resid_mid" for i in range(LAYERS)],
        [f"blocks.{i}.hook_mlp_out" for i in range(LAYERS)],
    )
    config = CLTConfig(
        **(COMMON | {"expansion_factor": 2.0}), hook_points_in=sides[0], hook_points_out=sides[1],
        **options,
    )  # fmt: skip
    model = CrossLayerTranscoder(config)
    rng = fill(model, seed)
    x = np.stack([inputs(rng) for _ in range(LAYERS)], axis=1)
    with torch.no_grad():
        batch = {hook: torch.tensor(x[:, i]) for i, hook in enumerate(sides[0])}
        batch |= {hook: torch.zeros(len(x), D) for hook in sides[1]}
        normalised, scales = model.normalize_activations(batch, return_scale_factor=True)
        z = model.encode(model.prepare_input(normalised)[0])
        decoded = model.decode(z)
        y = torch.cat([decoded[i] / scales[hook] for i, hook in enumerate(sides[1])], dim=-1)
        z = torch.stack([z[:, i] / scales[hook] for i, hook in enumerate(sides[0])], dim=1)
        if config.act_fn == "topk":
            z = z * model.decoder_norm_per_feature()
    expected.add(name, x.reshape(len(x), -1), z.reshape(len(x), -1), y)
    save(model, expected.folder / name)


def main():
    expected = Expected("llamascopium")
    saes(expected)
    crosscoder(expected)
    cross_layer(expected, "clt_jumprelu", 30, act_fn="jumprelu")
    cross_layer(expected, "clt_topk", 31, act_fn="topk")
    cross_layer(expected, "clt_plain", 32, act_fn="jumprelu", sparsity_include_decoder_norm=False)
    expected.write()
    lorsa = {"sae_type": "lorsa", "d_model": D, "expansion_factor": 4}
    (expected.folder / "lorsa").mkdir(exist_ok=True)
    (expected.folder / "lorsa" / "config.json").write_text(json.dumps(lorsa) + "\n")


if __name__ == "__main__":
    main()
