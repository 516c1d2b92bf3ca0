"""Run the training steps of SAELens and dictionary_learning on small weights and keep the numbers.

    python tests/golden/make_golden.py [folder]

Needs torch, sae-lens and dictionary-learning; the versions that made the files stand in their
`meta`. Everything runs on the CPU in float64, except where a library itself casts to float32 (see
README.md). All arrays are written in the orientation of this project: rows belong to features.
"""

import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from descriptions import FORMULAS
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

SEED, BATCH, D, F, K = 8, 24, 8, 32, 4
WIDTHS = [4, 12, 32]
DEAD = [3, 8, 13, 20, 26, 31]
FEW_DEAD = [8, 20, 31]
CORE = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_inputs() -> dict[str, np.ndarray]:
    """Weights and batches, all exact in float32 so that either precision starts alike."""
    rng = np.random.default_rng(SEED)

    def grid(array):
        return np.round(np.asarray(array) * 256) / 256

    rows = rng.normal(size=(F, D))
    W_dec = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    W_enc, b_enc = grid(0.4 * rng.normal(size=(F, D))), grid(0.3 * rng.normal(size=F))
    # Weak features: above zero on some tokens, among the largest on none.
    W_enc[DEAD] /= 4
    arrays = {
        "x": grid(rng.normal(size=(3, BATCH, D)) + rng.normal(size=D)),
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": W_dec,
        "W_dec_norms": W_dec.astype(np.float64) * grid(rng.uniform(0.5, 1.5, size=(F, 1))),
        "b_dec": grid(0.5 * rng.normal(size=D)),
        "threshold": grid(rng.uniform(0.1, 0.8, size=F)),
        "b_gate": grid(0.3 * rng.normal(size=F)),
        "b_mag": grid(0.3 * rng.normal(size=F)),
        "r_mag": grid(0.3 * rng.normal(size=F)),
        "dead": np.isin(np.arange(F), DEAD),
        "few_dead": np.isin(np.arange(F), FEW_DEAD),
    }
    return {n: a if a.dtype == bool else a.astype(np.float32) for n, a in arrays.items()}


INPUTS = make_inputs()


def tensor(name):
    array = INPUTS[name]
    return torch.tensor(array if array.dtype == bool else array.astype(np.float64))


def write(folder, name, library, arrays, cases, **more):
    meta = {"library": library, "version": version(library), "torch": version("torch")}
    meta |= {"seed": SEED, "formula": FORMULAS[name], "cases": cases} | more
    arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    np.savez_compressed(folder / f"{name}.npz", meta=np.array(json.dumps(meta)), **arrays)


def fill(parameter, value, transpose):
    """Copy the weights; `requires_grad` and the optimiser's hold on the parameter stay."""
    parameter.data = (value.T if transpose else value).to(parameter.dtype).contiguous().clone()


def gradients(places, only=None):
    """`{name: gradient}` in our orientation; `places` is `{name: (parameter, is transposed)}`."""
    return {
        f"grad_{name}": (p.grad.T if transposed else p.grad).numpy().copy()
        for name, (p, transposed) in places.items()
        if only is None or name in only
    }


def prefixed(case, arrays):
    return {f"{case}/{key}": value for key, value in arrays.items()}


# SAELens


def saelens_case(sae_class, config_class, options, *, coefficients=None, decoder="W_dec",
                 dead=None, extra=(), only=None, threshold=None):  # fmt: skip
    """One `training_forward_pass` and `backward`: arrays and the entry for `meta`."""
    options = {"apply_b_dec_to_input": False} | options
    config = config_class(d_in=D, d_sae=F, dtype="float64", device="cpu", **options)
    sae = sae_class(config)
    names = [n for n in (*CORE, *extra) if hasattr(sae, n)]
    places = {name: (getattr(sae, name), name == "W_enc") for name in names}
    for name, (parameter, transpose) in places.items():
        fill(parameter, tensor(decoder if name == "W_dec" else name), transpose)
    if threshold is not None:
        sae.topk_threshold.fill_(threshold)
    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=tensor("x")[0],
            coefficients=coefficients or {},
            dead_neuron_mask=None if dead is None else tensor(dead),
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    out.loss.backward()
    losses = {n: value.item() for n, value in out.losses.items()} | {"loss": out.loss.item()}
    case = {"class": sae_class.__name__, "options": options, "coefficients": coefficients or {}}
    case |= {"decoder": decoder, "dead": dead, "losses": losses}
    if threshold is not None:
        case |= {"threshold_before": threshold, "threshold_after": sae.topk_threshold.item()}
    arrays = {"z": out.feature_acts.detach().numpy()} | gradients(places, only)
    return arrays, case


def saelens_file(folder, name, runs, **more):
    """`runs` is `{case: (class, config class, options, keywords)}`; `z` is that of the first."""
    arrays, cases, with_z = {}, {}, name != "saelens_matryoshka"
    for case, (sae_class, config_class, options, keywords) in runs.items():
        found, cases[case] = saelens_case(sae_class, config_class, options, **keywords)
        z = found.pop("z")
        arrays |= {"z": z} if with_z and not arrays else {}
        arrays |= prefixed(case, found)
    write(folder, name, "sae-lens", arrays, cases, **more)


def saelens_files(folder):
    top = (TopKTrainingSAE, TopKTrainingSAEConfig)
    options = {"k": K, "rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": 0.5}
    runs = {
        "plain": (*top, options, {}),
        "centred": (*top, options | {"apply_b_dec_to_input": True}, {}),
        "aux": (*top, options, {"dead": "dead"}),
        "aux_few": (*top, options, {"dead": "few_dead"}),
    }
    saelens_file(folder, "saelens_topk", runs)

    batch = (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)
    runs = {
        "plain": (*batch, options, {"threshold": 0.0}),
        "aux": (*batch, options, {"dead": "dead", "threshold": 0.75}),
    }
    saelens_file(folder, "saelens_batchtopk", runs)

    nested = (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig)
    options = options | {"matryoshka_widths": WIDTHS}
    level = options | {"use_matryoshka_aux_loss": True}
    runs = {
        "plain": (*nested, options, {"threshold": 0.0}),
        "aux": (*nested, options, {"dead": "dead", "threshold": 0.0}),
        "level_aux": (*nested, level, {"dead": "dead", "threshold": 0.0, "only": ()}),
    }
    saelens_file(folder, "saelens_matryoshka", runs)
    saelens_penalised(folder)


def saelens_penalised(folder):
    jump = (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig)
    step = {"jumprelu_bandwidth": 0.5, "jumprelu_sparsity_loss_mode": "step"}
    tanh = step | {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 4.0}
    quadratic = step | {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 6.0}
    to_input = step | {"jumprelu_ste_to_input": True}
    anthropic = tanh | {"jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 0.01}
    common = {"coefficients": {"l0": 0.3}, "extra": ("threshold",)}
    runs = {
        "step": (*jump, step, common),
        "quadratic": (*jump, quadratic, common | {"only": ("threshold",)}),
        "tanh": (*jump, tanh, common),
        "step_to_input": (*jump, to_input, common | {"only": ("W_enc", "b_enc", "threshold")}),
        "anthropic": (*jump, anthropic, common | {"dead": "dead", "decoder": "W_dec_norms"}),
    }
    note = (
        "gradients that are not here equal those of step: quadratic W_enc, b_enc, W_dec, b_dec; "
        "step_to_input W_dec, b_dec"
    )
    saelens_file(folder, "saelens_jumprelu", runs, note=note)

    gated = (GatedTrainingSAE, GatedTrainingSAEConfig)
    common = {"coefficients": {"l1": 0.4}, "extra": ("b_gate", "b_mag", "r_mag")}
    runs = {
        "unit": (*gated, {}, common),
        "norms": (*gated, {}, common | {"decoder": "W_dec_norms", "only": ()}),
    }
    saelens_file(folder, "saelens_gated", runs)

    standard = (StandardTrainingSAE, StandardTrainingSAEConfig)
    common = {"coefficients": {"l1": 0.4}}
    runs = {
        "unit": (*standard, {}, common),
        "norms": (*standard, {}, common | {"decoder": "W_dec_norms"}),
    }
    saelens_file(folder, "saelens_standard", runs)


# dictionary_learning

LINEAR = {
    "W_enc": ("encoder.weight", False),
    "b_enc": ("encoder.bias", False),
    "W_dec": ("decoder.weight", True),
    "b_dec": ("b_dec", False),
}
PLAIN = {name: (name, name == "W_enc") for name in CORE}
GATED = {
    "W_enc": ("encoder.weight", False),
    "W_dec": ("decoder.weight", True),
    "b_dec": ("decoder_bias", False),
    "b_gate": ("gate_bias", False),
    "b_mag": ("mag_bias", False),
    "r_mag": ("r_mag", False),
}


def dl_trainer(trainer_class, paths, decoder="W_dec", dead=None, **options):
    """A trainer in float64 with our weights and, for the auxiliary loss, these dead features."""
    common = {"steps": 100, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "none"}
    trainer = trainer_class(**common, warmup_steps=0, device="cpu", seed=0, **options)
    trainer.ae.double()
    parameters = dict(trainer.ae.named_parameters())
    places = {n: (parameters[path], transposed) for n, (path, transposed) in paths.items()}
    for name, (parameter, transpose) in places.items():
        fill(parameter, tensor(decoder if name == "W_dec" else name), transpose)
    if dead:
        window = torch.tensor(trainer.dead_feature_threshold)
        trainer.num_tokens_since_fired = torch.where(tensor(dead), window, 0)
    return trainer, places


def dl_case(trainer_class, paths, step=5, decoder="W_dec", dead=None, only=None, **options):
    """One `trainer.loss` and `backward`: arrays and the entry for `meta`."""
    trainer, places = dl_trainer(trainer_class, paths, decoder, dead, **options)
    log = trainer.loss(tensor("x")[0], step=step, logging=True)
    trainer, places = dl_trainer(trainer_class, paths, decoder, dead, **options)
    loss = trainer.loss(tensor("x")[0], step=step)
    loss.backward()
    assert not dead or trainer.dead_features == INPUTS[dead].sum(), "a dead feature fired"
    options = {n: v.__name__ if isinstance(v, type) else v for n, v in options.items()}
    case = {"class": trainer_class.__name__, "autoencoder": type(trainer.ae).__name__}
    case |= {"options": options, "decoder": decoder, "dead": dead, "losses": log.losses}
    return {"z": log.f.detach().numpy()} | gradients(places, only), case


def dl_update(trainer_class, paths, threshold, keep, **options):
    """Three full `update`s, one a batch, from a running threshold; arrays after steps `keep`."""
    trainer, places = dl_trainer(trainer_class, paths, dead="dead", lr=0.01, **options)
    trainer.ae.threshold = torch.tensor(threshold, dtype=torch.float32)
    arrays, losses, thresholds = {}, [], []
    for i, x in enumerate(tensor("x")):
        losses.append(trainer.update(5 + i, x))
        assert trainer.dead_features == len(DEAD), "a dead feature fired"
        thresholds.append(trainer.ae.threshold.item())
        if i + 1 in keep:
            after = {n: (p.data.T if t else p.data) for n, (p, t) in places.items()}
            arrays |= prefixed(f"after_{i + 1}", {n: p.numpy().copy() for n, p in after.items()})
    case = {"options": options, "learning_rate": 0.01, "betas": [0.9, 0.999], "epsilon": 1e-8}
    case |= {"clip": 1.0, "losses": losses, "threshold_before": threshold, "dead": "dead"}
    return arrays, case | {"thresholds": thresholds}


def dl_files(folder):
    def write_dl(name, arrays, cases):
        write(folder, name, "dictionary-learning", arrays, cases)

    for name, trainer in (("topk", TopKTrainer), ("batchtopk", BatchTopKTrainer)):
        options = {"k": K, "auxk_alpha": 1 / 32, "threshold_beta": 0.9, "threshold_start_step": 4}
        arrays, case = dl_case(trainer, LINEAR, dead="dead", **options)
        z = arrays.pop("z")
        keep = (1, 3) if name == "topk" else (3,)
        steps, update = dl_update(trainer, LINEAR, 0.75, keep, **options)
        arrays = {"z": z} | prefixed("aux", arrays) | prefixed("update", steps)
        write_dl(f"dl_{name}", arrays, {"aux": case, "update": update})

    arrays, cases = {}, {}
    fractions = {"k": K, "group_fractions": [1 / 8, 1 / 4, 5 / 8], "auxk_alpha": 1 / 32}
    weighted = {"group_weights": [0.5, 0.25, 0.25], "only": ()}
    for name, more in {"aux": {}, "weighted": weighted}.items():
        keywords = fractions | more | {"dead": "dead", "threshold_start_step": 50}
        found, cases[name] = dl_case(MatryoshkaBatchTopKTrainer, PLAIN, **keywords)
        found.pop("z")
        arrays |= prefixed(name, found)
    write_dl("dl_matryoshka", arrays, cases)
    dl_penalised(write_dl)


def dl_penalised(write_dl):
    options = {"bandwidth": 0.5, "sparsity_penalty": 0.7, "target_l0": 5.0}
    paths = PLAIN | {"threshold": ("threshold", False)}
    arrays, case = dl_case(JumpReluTrainer, paths, sparsity_warmup_steps=None, **options)
    z = arrays.pop("z")
    write_dl("dl_jumprelu", {"z": z} | prefixed("loss", arrays), {"loss": case})

    options = {"l1_penalty": 0.4, "sparsity_warmup_steps": None}
    arrays, case = dl_case(GatedSAETrainer, GATED, **options)
    z = arrays.pop("z")
    write_dl("dl_gated", {"z": z} | prefixed("loss", arrays), {"loss": case})

    centred = {n: ("bias" if n == "b_dec" else path, t) for n, (path, t) in LINEAR.items()}
    new = LINEAR | {"b_dec": ("decoder.bias", False)}
    arrays, cases = {}, {}
    for name, paths, more in (
        ("autoencoder", centred, {"dict_class": AutoEncoder}),
        ("new", new, {"dict_class": AutoEncoderNew}),
    ):
        keywords = options | more | {"decoder": "W_dec_norms"}
        found, cases[name] = dl_case(StandardTrainerAprilUpdate, paths, **keywords)
        found.pop("z")
        arrays |= prefixed(name, found)
    write_dl("dl_standard", arrays, cases)


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    warnings.simplefilter("ignore")
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    np.savez_compressed(folder / "inputs.npz", **INPUTS)
    saelens_files(folder)
    dl_files(folder)


if __name__ == "__main__":
    main()
