"""Files that SAELens writes, of every architecture, with the codes that it makes of them.

    python tests/golden/formats/make_saelens.py        needs sae-lens; made with 6.54.12

Each folder of `saelens/` is one file; `expected.npz` has the input `x` and, by folder, codes and
reconstructions. Two are written by hand, as releases before 6.0 wrote them: `old_finetuned`, which
the present SAELens cannot read, is computed in float64 from the formula that 5.x had.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from sae_lens import (
    SAE,
    AbsTopKSAE,
    AbsTopKSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from safetensors.torch import load_file, save_file

PLACE = Path(__file__).parent / "saelens"
D, D_OUT, F, K = 8, 6, 32, 4
LAYER_NORM = {"normalize_activations": "layer_norm"}
HOOK = "blocks.3.hook_resid_post"
X = torch.tensor(np.random.default_rng(0).normal(0.4, 1.3, (24, D)).astype(np.float32))
EXPECTED = {"x": X.numpy()}

SAES = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "standard_plain": (StandardSAE, StandardSAEConfig, {"apply_b_dec_to_input": False}),
    "standard_layer_norm": (StandardSAE, StandardSAEConfig, LAYER_NORM),
    "topk": (TopKSAE, TopKSAEConfig, {"k": K}),
    "topk_by_norm": (TopKSAE, TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "topk_rescaled": (
        TopKSAE, TopKSAEConfig, {"k": K, "normalize_activations": "constant_norm_rescale"},
    ),
    "abstopk": (AbsTopKSAE, AbsTopKSAEConfig, {"k": K}),
    "abstopk_by_norm": (
        AbsTopKSAE, AbsTopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True},
    ),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "jumprelu_bf16": (JumpReLUSAE, JumpReLUSAEConfig, {"dtype": "bfloat16"}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "gated_plain": (GatedSAE, GatedSAEConfig, {"apply_b_dec_to_input": False}),
    "gated_layer_norm": (GatedSAE, GatedSAEConfig, LAYER_NORM),
}  # fmt: skip
TRANSCODERS = {
    "transcoder": (Transcoder, TranscoderConfig, {}),
    "transcoder_layer_norm": (Transcoder, TranscoderConfig, LAYER_NORM),
    "skip_transcoder": (SkipTranscoder, SkipTranscoderConfig, {}),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig, {}),
    "jumprelu_skip_transcoder": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, {}),
}  # fmt: skip


def metadata(**more):
    return SAEMetadata(
        model_name="gpt2-small", hook_name=HOOK, dataset_path="a/dataset", context_size=128,
        prepend_bos=True, **more,
    )  # fmt: skip


def randomise(sae, seed):
    random = np.random.default_rng(seed)
    for name, parameter in sorted(sae.named_parameters()):
        values = random.normal(0, 0.5, parameter.shape)
        if name == "threshold":
            values = np.abs(values)
        parameter.data = torch.tensor(values).to(parameter.dtype)
    return sae


@torch.no_grad()
def expect(name, sae, x=X):
    z = sae.encode(x)
    EXPECTED[f"{name}.z"] = z.float().numpy()
    EXPECTED[f"{name}.y"] = sae(x).float().reshape(len(X), -1).numpy()


def main():
    shutil.rmtree(PLACE, ignore_errors=True)
    for seed, (name, (kind, config, options)) in enumerate(SAES.items()):
        cfg = config(d_in=D, d_sae=F, metadata=metadata(), **options)
        sae = randomise(kind(cfg), seed)
        sae.save_model(PLACE / name)
        expect(name, SAE.load_from_disk(PLACE / name, dtype="float32"))
    for seed, (name, (kind, config, options)) in enumerate(TRANSCODERS.items()):
        cfg = config(
            d_in=D, d_sae=F, d_out=D_OUT, apply_b_dec_to_input=False,
            metadata=metadata(hook_name_out="blocks.3.hook_mlp_out"), **options,
        )  # fmt: skip
        sae = randomise(kind(cfg), 50 + seed)
        sae.save_model(PLACE / name)
        expect(name, SAE.load_from_disk(PLACE / name))

    rates = np.array([0, 1] + list(np.linspace(0.001, 0.9, F - 2)))
    logs = torch.log10(torch.tensor(rates, dtype=torch.float32) + 1e-10)
    save_file({"sparsity": logs}, PLACE / "standard" / "sparsity.safetensors")
    EXPECTED["rates"] = rates

    cfg = TopKSAEConfig(
        d_in=D, d_sae=F, k=K, reshape_activations="hook_z",
        metadata=SAEMetadata(model_name="gpt2-small", hook_name="blocks.3.attn.hook_z"),
    )  # fmt: skip
    sae = randomise(TopKSAE(cfg), 70)
    sae.save_model(PLACE / "hook_z")
    expect("hook_z", sae, X.reshape(len(X), 2, D // 2))

    training_checkpoints()
    old_files()
    refused()
    np.savez(PLACE / "expected.npz", **EXPECTED)


def training_checkpoints():
    """What a run of training leaves; expected is what it saves for inference."""
    kinds = {
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
        "batchtopk_fraction": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 4.5}),
        "matryoshka_batchtopk": (
            MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": K, "matryoshka_widths": [8, F]},
        ),
        "batchtopk_scaled": (
            BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig,
            {"k": K, "normalize_activations": "expected_average_only_in"},
        ),
        "standard_scaled": (
            StandardTrainingSAE, StandardTrainingSAEConfig,
            {"normalize_activations": "expected_average_only_in"},
        ),
    }  # fmt: skip
    for seed, (name, (kind, config, options)) in enumerate(kinds.items()):
        sae = randomise(kind(config(d_in=D, d_sae=F, metadata=metadata(), **options)), 80 + seed)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(0.7654321, dtype=torch.double)
        sae.save_model(PLACE / name)
        if name.endswith("scaled"):
            scaler = {"scaling_factor": 1.37, "has_whitening": False}
            (PLACE / name / "activation_scaler.json").write_text(json.dumps(scaler))
            sae.fold_activation_norm_scaling_factor(1.37)
        scratch = PLACE / "scratch"
        sae.save_inference_model(scratch)
        expect(name, SAE.load_from_disk(scratch))
        shutil.rmtree(scratch)


def old_files():
    flat = {
        "model_name": "gpt2-small", "hook_point": HOOK, "hook_point_layer": 3,
        "hook_point_head_index": None, "d_in": D, "d_sae": F, "dtype": "torch.float32",
        "device": "cpu", "finetuning_scaling_factor": False, "context_size": 128,
        "dataset_path": "a/dataset", "normalize_activations": False,
        "sae_lens_training_version": "3.20.0",
    }  # fmt: skip
    weights = load_file(PLACE / "standard" / "sae_weights.safetensors")
    cases = {
        "old_standard": ({"activation_fn_str": "relu", "activation_fn_kwargs": {}}, {}),
        "old_topk": ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, {}),
        "old_ones": ({}, {"scaling_factor": torch.ones(F)}),
        "old_finetuned": (
            {"finetuning_scaling_factor": True},
            {"finetuning_scaling_factor": torch.linspace(0.5, 1.5, F)},
        ),
    }
    for name, (config, arrays) in cases.items():
        (PLACE / name).mkdir()
        (PLACE / name / "cfg.json").write_text(json.dumps(flat | config))
        save_file(weights | arrays, PLACE / name / "sae_weights.safetensors")
        if name != "old_finetuned":
            expect(name, SAE.load_from_disk(PLACE / name))
    w = {key: value.double().numpy() for key, value in weights.items()}
    x, factor = X.double().numpy(), np.linspace(0.5, 1.5, F)
    z = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    EXPECTED["old_finetuned.z"] = z.astype(np.float32)
    EXPECTED["old_finetuned.y"] = ((z * factor) @ w["W_dec"] + w["b_dec"]).astype(np.float32)


def refused():
    cfg = MatchingPursuitSAEConfig(d_in=D, d_sae=F, metadata=metadata(), residual_threshold=0.1)
    randomise(MatchingPursuitSAE(cfg), 90).save_model(PLACE / "refused_matching_pursuit")
    cfg = TemporalSAEConfig(
        d_in=D, d_sae=F, n_heads=2, n_attn_layers=1, bottleneck_factor=2, metadata=metadata()
    )
    randomise(TemporalSAE(cfg), 91).save_model(PLACE / "refused_temporal")


if __name__ == "__main__":
    main()
