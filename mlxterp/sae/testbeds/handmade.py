"""A llama whose weights are written by hand, and coders of its features.

Two of its parts would make values that no one can state beforehand; both are made exact:

* A norm divides by the size of the activation. The last column of the residual stream therefore
  holds the constant `BALLAST`, beside which all that the others hold vanishes in float32: every
  norm divides by the same number, and its weights undo that. So norms hand on what they get, and 1
  in the last column, for weights that are to act as a bias.
* The MLP is gated by a SiLU. The gate gets `GAIN` times what a neuron reads, far out where a SiLU
  is a ReLU, and the other factor is `1 / GAIN`: a neuron is `max(reads . x + bias, 0)` to float32
  precision where `reads . x + bias` is 0 or of a size of at least `LEAST`; at 0 its slope is 1/2.

Features lie along rows of Hadamard matrices, whose entries are powers of two: sums of them are
exact, and no feature is a column of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxterp.sae.coder import Columns
from mlxterp.sae.sae import SAE
from mlxterp.sae.transcoder import Transcoder

BALLAST = 2.0**20
GAIN = 2.0**14
LEAST, MOST = 2.0**-10, 2.0**8  # of the values of features
ROTATION_BASE = 1e30
HADAMARD = 16  # directions and columns of a block
CONTEXT_LENGTH = 512


class WordTokenizer:
    """One token per word: the words of a text stand between spaces.

    A `bos` begins every text. Raises `ValueError` for words that are not different from each other
    or have spaces, and for a text with a word that is not among them.
    """

    def __init__(self, words: Sequence[str], bos: str | None = None) -> None:
        self.words = (*([] if bos is None else [bos]), *words)
        if len(set(self.words)) < len(self.words) or any(w.split() != [w] for w in self.words):
            raise ValueError(f"words must differ and have no spaces, got {list(self.words)}.")
        self.bos_token_id = None if bos is None else 0
        self.all_special_ids = [] if bos is None else [0]
        self._ids = {word: i for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """The number of words."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """The ids of the words of a text."""
        words = text.split()
        unknown = sorted({word for word in words if word not in self._ids})
        if unknown:
            raise ValueError(f"words must be of {list(self.words)}, got {unknown}.")
        return [*self.all_special_ids, *(self._ids[word] for word in words)]

    def decode(self, ids: Sequence[int]) -> str:
        """The words with these ids, and spaces between them."""
        return " ".join(self.words[i] for i in ids)


def token_ids(tokens: Sequence[int], n_words: int) -> np.ndarray:
    """One sequence of tokens, `[S]`; raises `ValueError` for other shapes and other ids."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError(f"tokens must be one sequence of token ids, got {tokens!r}.")
    if ids.min() < 0 or ids.max() >= n_words:
        raise ValueError(f"tokens must be in [0, {n_words - 1}], got {ids.tolist()}.")
    return ids


def directions(n: int) -> np.ndarray:
    """`n` orthonormal vectors, `[n, width]`, without a part in the last column.

    The width is the least power of four that has room for them: its root is a power of two.
    """
    hadamard = np.ones((1, 1))
    while len(hadamard) < HADAMARD:
        hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
    n_blocks = -(-n // HADAMARD)
    rows = np.kron(np.eye(n_blocks), hadamard / HADAMARD**0.5)[:n]
    width = 4
    while width <= rows.shape[1]:
        width *= 4
    return np.pad(rows, [(0, 0), (0, width - rows.shape[1])])


def llama(width: int, n_layers: int, n_neurons: int, head_dim: int, n_words: int) -> Any:
    """A llama of one head that adds nothing to the stream, and whose norms hand on what they get.

    Of the rotary frequencies `ROTATION_BASE ** (-2 m / head_dim)` those of the later half are so
    low that they turn nothing.
    """
    from mlx_lm.models.llama import Model, ModelArgs

    args = ModelArgs(
        model_type="llama", hidden_size=width, num_hidden_layers=n_layers,
        intermediate_size=n_neurons, num_attention_heads=1, head_dim=head_dim, rms_norm_eps=1e-6,
        vocab_size=n_words, rope_theta=ROTATION_BASE, mlp_bias=True, tie_word_embeddings=False,
        max_position_embeddings=CONTEXT_LENGTH,
    )  # fmt: skip
    model = Model(args)
    model.update(tree_map(mx.zeros_like, model.parameters()))
    root = width**0.5
    undo = np.full(width, BALLAST / root)
    undo[-1] = 1 / root
    for block in model.layers:
        block.input_layernorm.weight = block.post_attention_layernorm.weight = array(undo)
    model.model.norm.weight = array(undo)
    model.eval()
    return model


def set_embeddings(model: Any, rows: np.ndarray) -> None:
    """What each token starts with, `[n_words, width]`; the ballast is added."""
    rows = rows.copy()
    rows[:, -1] = BALLAST
    model.model.embed_tokens.weight = array(rows)


def set_neurons(mlp: Any, reads: np.ndarray, biases: np.ndarray, writes: np.ndarray) -> None:
    """Neurons `max(reads . x + biases, 0)`, each times its row of `writes`, `[n, width]`."""
    mlp.gate_proj.weight, mlp.gate_proj.bias = array(GAIN * reads), array(GAIN * biases)
    mlp.up_proj.bias = mx.full(len(reads), 1 / GAIN)
    mlp.down_proj.weight = array(writes.T)


def transcoder(layer: int, reads: np.ndarray, biases: np.ndarray, writes: np.ndarray) -> Transcoder:
    """The transcoder of an MLP of such neurons, which are its features."""
    n, width = reads.shape
    ends = [Columns((f"layers.{layer}.{name}",), (width,)) for name in ("mlp_in", "mlp_out")]
    return _filled(Transcoder(ends[0], ends[1], n, "jumprelu"), reads, biases, writes)


def residual_sae(layer: int, reads: np.ndarray, writes: np.ndarray) -> SAE:
    """An SAE of the residual stream after a layer; its bias is the ballast."""
    n, width = reads.shape
    columns = Columns((f"layers.{layer}.resid_post",), (width,))
    sae = _filled(SAE(columns, columns, n, "jumprelu"), reads, np.zeros(n), writes)
    sae.b_dec[-1] = BALLAST
    return sae


def _filled(coder: Any, reads: np.ndarray, biases: np.ndarray, writes: np.ndarray) -> Any:
    coder.W_enc, coder.b_enc, coder.W_dec = array(reads), array(biases), array(writes)
    coder.activation_function.threshold = mx.full(coder.n_features, LEAST)
    return coder


def array(values: np.ndarray) -> mx.array:
    """The values in float32."""
    return mx.array(np.asarray(values, np.float32))
