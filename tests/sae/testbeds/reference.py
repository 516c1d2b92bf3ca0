"""A llama of one head again, plainly: float64 and one sequence."""

import numpy as np
from mlx.utils import tree_flatten

BALLAST = 2.0**20


def weights_of(model) -> dict[str, np.ndarray]:
    """The parameters of a model in float64."""
    return {name: np.array(value, np.float64) for name, value in tree_flatten(model.parameters())}


def forward(model, tokens) -> dict[str, np.ndarray]:
    """The logits `[S, n_words]` and, by site, what flows through a llama: `layers.0.resid_post`.

    `layers.0.scores` and `layers.0.pattern` are those of its attention `[S, S]`.
    """
    weights, held = weights_of(model), {}
    x = weights["model.embed_tokens.weight"][np.asarray(tokens)]
    for layer, block in enumerate(model.layers):
        prefix = f"model.layers.{layer}"
        part = {k.removeprefix(f"{prefix}."): v for k, v in weights.items() if prefix in k}
        read = _norm(x, part["input_layernorm.weight"])
        q, k, v = (read @ part[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        scores = _turned(q, model.args.rope_theta) @ _turned(k, model.args.rope_theta).T
        scores *= block.self_attn.scale
        pattern = _softmax(np.where(np.tri(len(x)), scores, -np.inf))
        x = x + pattern @ v @ part["self_attn.o_proj.weight"].T
        read = _norm(x, part["post_attention_layernorm.weight"])
        gate = read @ part["mlp.gate_proj.weight"].T + part["mlp.gate_proj.bias"]
        up = read @ part["mlp.up_proj.weight"].T + part["mlp.up_proj.bias"]
        neurons = gate * (1 + np.tanh(gate / 2)) / 2 * up
        added = neurons @ part["mlp.down_proj.weight"].T + part["mlp.down_proj.bias"]
        x = x + added
        sites = {"scores": scores, "pattern": pattern, "mlp_in": read, "mlp_out": added}
        held |= {f"layers.{layer}.{name}": a for name, a in {**sites, "resid_post": x}.items()}
    held["logits"] = _norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    return held


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True)) * weight


def _turned(x: np.ndarray, base: float) -> np.ndarray:
    """Pairs of columns `m` and `m + d / 2` as complex numbers, turned by the position."""
    half = x.shape[1] // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    pairs = pairs * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)
