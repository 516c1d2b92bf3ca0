"""A llama with attention patterns and norm scales held, in NumPy: the independent computation."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.transcoder import Transcoder

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")


class Numbers:
    """A tokenizer whose text is the numbers of the tokens; 0 begins every text."""

    all_special_ids, bos_token_id, vocab_size = [0], 0, 96

    def encode(self, text: str) -> list[int]:
        return [0, *map(int, text.split())]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def transcoder(model, layer: int, skip: bool = False, n: int = 24, k: int = 4) -> Transcoder:
    """A random transcoder of the MLP of a layer, bound to the model."""
    ends = (_columns(model, [layer], part) for part in ("mlp_in", "mlp_out"))
    return _filled(Transcoder(*ends, n, "topk", k, skip=skip), model, layer)


def cross_layer(model, layers, n: int = 48, k: int = 3) -> CrossLayerTranscoder:
    """A random cross-layer transcoder of the MLPs of some layers, bound to the model."""
    ends = (_columns(model, layers, part) for part in ("mlp_in", "mlp_out"))
    return _filled(CrossLayerTranscoder(*ends, n, "topk", k), model, 7)


def _columns(model, layers, part: str) -> Columns:
    names = tuple(f"layers.{layer}.{part}" for layer in layers)
    return Columns(names, tuple(model.width(name) for name in names))


def _filled(coder, model, seed: int):
    rng = np.random.default_rng(seed)
    for name in (name for name in ARRAYS if name in coder):
        coder[name] = mx.array(rng.normal(0, 0.3, coder[name].shape).astype(np.float32))
    coder.bind(model)
    return coder


def weights(module, *names) -> list[np.ndarray]:
    return [np.array(module[name].weight, np.float64) for name in names]


@dataclass
class Layer:
    norm_1: np.ndarray  # scale times weight, [S, d]
    norm_2: np.ndarray
    pattern: np.ndarray  # [heads, S, S]
    values: np.ndarray  # [heads, d_head, d]
    out: np.ndarray  # [d, heads * d_head]
    mlp_in: np.ndarray
    mlp_out: np.ndarray


class FrozenLlama:
    """The pass over some tokens, and what a change of the stream leads to with what it held."""

    def __init__(self, model, ids, n_heads: int = 4, n_kv: int = 2, eps: float = 1e-5):
        (embed,) = weights(model.model, "embed_tokens")
        (self.head,) = weights(model, "lm_head")
        self.embeddings = x = embed[ids]
        self.layers: list[Layer] = []
        for block in model.layers:
            w1, w2 = weights(block, "input_layernorm", "post_attention_layernorm")
            q, k, v, o = weights(block.self_attn, "q_proj", "k_proj", "v_proj", "o_proj")
            norm_1 = w1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
            h = x * norm_1
            heads = [np.split(h @ w.T, n, axis=1) for w, n in ((q, n_heads), (k, n_kv))]
            group = n_heads // n_kv
            pattern = np.stack([
                _pattern(_turned(heads[0][i]), _turned(heads[1][i // group]))
                for i in range(n_heads)
            ])  # fmt: skip
            values = np.repeat(v.reshape(n_kv, -1, v.shape[1]), group, axis=0)
            layer = Layer(norm_1, np.zeros(0), pattern, values, o, np.zeros(0), np.zeros(0))
            x = x + self._attend(layer, x)
            layer.norm_2 = w2 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
            layer.mlp_in = x * layer.norm_2
            gate, up, down = weights(block.mlp, "gate_proj", "up_proj", "down_proj")
            g = layer.mlp_in @ gate.T
            layer.mlp_out = (g / (1 + np.exp(-g)) * (layer.mlp_in @ up.T)) @ down.T
            x = x + layer.mlp_out
            self.layers.append(layer)
        (w,) = weights(model.model, "norm")
        self.norm = w / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
        self.logits = (x * self.norm) @ self.head.T

    def _attend(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        h = x * layer.norm_1
        z = [p @ h @ v.T for p, v in zip(layer.pattern, layer.values, strict=True)]
        return np.concatenate(z, axis=1) @ layer.out.T

    def effects(self, changes: dict[int, np.ndarray], skips=None) -> tuple[list, np.ndarray]:
        """What changes `[S, d]` of the stream before some layers add to the input of each MLP, and
        to the logits; MLPs add nothing but what skip connections do."""
        found, change, nothing = [], 0.0, np.zeros_like(self.embeddings)
        for n, layer in enumerate(self.layers):
            change = change + changes.get(n, nothing)
            change = change + self._attend(layer, change)
            found.append(change * layer.norm_2)
            if skips and n in skips:
                change = change + found[n] @ skips[n].T
        change = change + changes.get(len(self.layers), nothing)
        return found, (change * self.norm) @ self.head.T


def _turned(x: np.ndarray, base: float = 10000.0) -> np.ndarray:
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    turned = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
    return np.concatenate(turned, axis=1)


def _pattern(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
