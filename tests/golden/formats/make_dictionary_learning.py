"""Folders of dictionary_learning, written and read by the library itself.

    python tests/golden/formats/make_dictionary_learning.py

Needs torch and dictionary-learning 0.1.0. Codes and reconstructions are those of `load_dictionary`.
"""

import numpy as np
import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from drawn import D, Expected, F, draw, inputs, thresholds_at, write_json

K = 4
CLASSES = {
    "AutoEncoder": AutoEncoder(D, F),
    "AutoEncoderNew": AutoEncoderNew(D, F),
    "GatedAutoEncoder": GatedAutoEncoder(D, F),
    "JumpReluAutoEncoder": JumpReluAutoEncoder(D, F),
    "AutoEncoderTopK": AutoEncoderTopK(D, F, K),
    "BatchTopKSAE": BatchTopKSAE(D, F, K),
    "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, K, [8, 8, 16]),
}
TRAINERS = {
    "AutoEncoder": "StandardTrainerAprilUpdate",
    "AutoEncoderNew": "PAnnealTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}
BUFFER = {"d_submodule": D, "io": "out", "n_ctxs": 8, "ctx_len": 128, "device": "cpu"}


def config_of(name, submodule):
    trainer = {
        "trainer_class": TRAINERS[name], "dict_class": name, "lr": 3e-4, "steps": 100, "seed": 0,
        "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped",
        "wandb_name": name, "submodule_name": submodule, "device": "cpu",
    }  # fmt: skip
    if hasattr(CLASSES[name], "k"):
        trainer["k"] = K
    return {"trainer": trainer, "buffer": BUFFER}


def fill(name, ae, rng):
    """Random weights with a large bias of the decoder; its norms are 1 where the library keeps them
    so, and a threshold is met exactly on the first input."""
    state = {key: draw(rng, *value.shape) for key, value in ae.state_dict().items()}
    bias = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}.get(name, "b_dec")
    if bias in state:
        state[bias] = draw(rng, D, scale=20)
    W_enc = state["W_enc"] if "W_enc" in state else state["encoder.weight"].T
    b_enc = next((state[key] for key in ("b_enc", "encoder.bias") if key in state), 0)
    pre = W_enc[0] + b_enc
    if name == "JumpReluAutoEncoder":
        state["threshold"] = thresholds_at(pre)
    elif "threshold" in state:  # unset, of per-token top-k; met by one feature on the first input
        state["threshold"] = np.float32(-1 if name == "AutoEncoderTopK" else np.sort(pre)[-6])
    if "k" in state:
        state["k"] = np.int32(K)
    if "group_sizes" in state:
        state["group_sizes"] = np.array([8, 8, 16])
    if name == "AutoEncoderTopK":  # on some inputs fewer than k are positive
        state["encoder.bias"] -= 2
    return {key: torch.tensor(value) for key, value in state.items()}, bias


def main():
    expected = Expected("dictionary_learning")
    for i, (name, ae) in enumerate(CLASSES.items()):
        rng = np.random.default_rng(i)
        state, bias = fill(name, ae, rng)
        ae.load_state_dict(state)
        folder = expected.folder / name / "trainer_0"
        submodule = "model.layers.3.mlp" if name == "GatedAutoEncoder" else "resid_post_layer_3"
        write_json(folder / "config.json", config_of(name, submodule))
        torch.save(ae.state_dict(), folder / "ae.pt")
        if name == "AutoEncoder":
            (folder / "checkpoints").mkdir(exist_ok=True)
            torch.save(ae.state_dict(), folder / "checkpoints" / "ae_50.pt")
        loaded, _ = load_dictionary(str(folder), device="cpu")
        centre = state[bias].numpy() if bias in state and name != "JumpReluAutoEncoder" else None
        x = inputs(rng, centre)
        expected.add(name, x, *codes(loaded, x))
    ties(expected)
    expected.write()


def codes(ae, x):
    with torch.no_grad():
        return ae.encode(torch.tensor(x)).numpy(), ae(torch.tensor(x)).numpy()


def ties(expected):
    """Features in pairs that are the same, of which `k`, which is odd, cuts one."""
    ae, rng = AutoEncoderTopK(D, F, K + 1), np.random.default_rng(50)
    state = ae.state_dict()
    for key, axis in (("encoder.weight", 0), ("encoder.bias", 0), ("decoder.weight", 1)):
        half = np.split(draw(rng, *state[key].shape), 2, axis)[0]
        state[key] = torch.tensor(np.concatenate([half, half], axis))
    ae.load_state_dict(state)
    folder = expected.folder / "ties" / "trainer_0"
    config = config_of("AutoEncoderTopK", "resid_post_layer_3")
    config["trainer"]["k"] = K + 1
    write_json(folder / "config.json", config)
    torch.save(ae.state_dict(), folder / "ae.pt")
    x = inputs(rng)
    expected.add("ties", x, *codes(load_dictionary(str(folder), device="cpu")[0], x))


if __name__ == "__main__":
    main()
