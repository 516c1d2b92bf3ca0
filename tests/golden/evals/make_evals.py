"""What SAELens's own evaluation says of a coder, on a model of one layer.

    python tests/golden/evals/make_evals.py        needs sae-lens; made with 6.54.12

The model looks activations up in a table by token and position, and predicts by one matrix. Coder,
model and tokens are in `saelens.npz`, the metrics in `saelens.json`. The divergence is that of all
positions; `kl_by_position` has it for each, since here the last one predicts no token.
"""

import json
from pathlib import Path

import numpy as np
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.evals import EvalConfig, get_recons_loss, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler

HERE = Path(__file__).parent
HOOK = "blocks.0.hook_resid_post"
D, F, V, PROMPTS, CONTEXT = 8, 32, 50, 12, 20


class Model:
    """The part of a HookedTransformer that the evaluation calls."""

    tokenizer = None

    def __init__(self, table, unembed):
        self.table, self.unembed = table, unembed

    def activations(self, tokens):
        return self.table[torch.arange(tokens.shape[1])[None], tokens]

    def run_with_cache(self, tokens, **_):
        return None, {HOOK: self.activations(tokens)}

    def __call__(self, tokens, **_):
        return self.run_with_hooks(tokens, fwd_hooks=[])

    def run_with_hooks(self, tokens, fwd_hooks, **_):
        x = self.activations(tokens)
        for _, hook in fwd_hooks:
            x = hook(x, hook=None)
        logits = x @ self.unembed
        log_p = logits.log_softmax(dim=-1)
        return logits, -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


class Store:
    """All tokens as the one batch."""

    context_size, store_batch_size_prompts = CONTEXT, PROMPTS

    def __init__(self, tokens):
        self.tokens = tokens

    def get_batch_tokens(self, *_):
        return self.tokens

    def reset_input_dataset(self):
        pass


def drawn(rng, arrays):
    """Tokens that the model itself predicts, so that ablation makes its loss worse."""
    tokens = np.zeros((PROMPTS, CONTEXT), int)
    tokens[:, 0] = rng.integers(0, V, size=PROMPTS)
    for i in range(CONTEXT - 1):
        logits = (arrays["table"][i, tokens[:, i]] @ arrays["unembed"]).astype(np.float64)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        tokens[:, i + 1] = [rng.choice(V, p=row) for row in p]
    return tokens


def main():
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.normal(size=(CONTEXT, V, D)) + 2 * rng.normal(size=D),
        "unembed": 0.25 * rng.normal(size=(D, V)),
        "W_enc": 0.4 * rng.normal(size=(D, F)),
        "b_enc": -0.3 * np.abs(rng.normal(size=F)),
        "W_dec": 0.4 * rng.normal(size=(F, D)),
        "b_dec": 0.2 * rng.normal(size=D),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    tokens = drawn(rng, arrays)
    # A coder that is better than chance: the least-squares decoder of its own codes.
    x = arrays["table"][np.arange(CONTEXT)[None], tokens].reshape(-1, D)
    z = np.maximum(x @ arrays["W_enc"] + arrays["b_enc"], 0)
    arrays["W_dec"] = np.linalg.solve(z.T @ z + np.eye(F), z.T @ (x - arrays["b_dec"]))
    arrays["W_dec"] = arrays["W_dec"].astype(np.float32)
    config = StandardSAEConfig(
        d_in=D, d_sae=F, apply_b_dec_to_input=False, metadata=SAEMetadata(hook_name=HOOK)
    )
    sae = StandardSAE(config)
    sae.load_state_dict({name: torch.tensor(arrays[name]) for name in sae.state_dict()})
    model = Model(torch.tensor(arrays["table"]), torch.tensor(arrays["unembed"]))
    batch, scaler = torch.tensor(tokens), ActivationScaler()
    wanted = EvalConfig(
        n_eval_reconstruction_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    metrics, features = run_evals(
        sae, Store(batch), model, scaler, wanted, exclude_special_tokens=False
    )
    losses = get_recons_loss(sae, model, scaler, batch, compute_kl=True, compute_ce_loss=True)
    by_position = {name: losses[name].tolist() for name in losses if name.startswith("kl")}
    found = {"metrics": metrics, "feature_metrics": features, "kl_by_position": by_position}
    np.savez_compressed(HERE / "saelens.npz", tokens=tokens, **arrays)
    (HERE / "saelens.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
