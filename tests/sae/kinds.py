"""One coder of every kind, between the sites of one dataset."""

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.cross_layer import CrossLayerTrainer, CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder, CrosscoderTrainer
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.sae import SAE, SAETrainer
from mlxterp.sae.transcoder import Transcoder, TranscoderTrainer

SITES = Columns(("in.0", "in.1", "out.0", "out.1"), (6, 6, 5, 5))
KINDS = {  # class, what it reads, what it writes, further options
    "sae": (SAE, ("in.0",), ("in.0",), {}),
    "transcoder": (Transcoder, ("in.0",), ("out.0",), {}),
    "skip transcoder": (Transcoder, ("in.0",), ("out.0",), {"skip": True}),
    "crosscoder": (Crosscoder, ("in.0", "out.0"), ("in.0", "out.0"), {}),
    "cross-layer transcoder": (
        CrossLayerTranscoder, ("in.0", "in.1"), ("out.0", "out.1"), {},
    ),
}  # fmt: skip
TRAINERS = {
    SAE: SAETrainer, Transcoder: TranscoderTrainer, Crosscoder: CrosscoderTrainer,
    CrossLayerTranscoder: CrossLayerTrainer,
}  # fmt: skip
# Of all pairs of a kind and an activation function enough that whatever differs meets: every kind
# with a function of each sort, and every function with a coder of one site and one of several.
FUNCTIONS = ("topk", "batch_topk", "abs_topk", "jumprelu", "relu", "gated")
PAIRS = [
    (kind, name)
    for kind in KINDS
    for name in FUNCTIONS
    if kind in ("sae", "crosscoder") or name in ("topk", "batch_topk", "relu")
]


def make(kind: str, activation_function: str = "topk", n_features: int = 30, k: int = 4):
    """An untrained coder of the kind."""
    of_kind, reads, writes, options = KINDS[kind]
    return of_kind(
        _columns(reads), _columns(writes), n_features, activation_function, k=k, **options
    )


def untrained(kind: str, config: SAEConfig) -> SparseCoder:
    """An untrained coder of the kind, of the config's size."""
    of_kind, reads, writes, _ = KINDS[kind]
    return of_kind.untrained(_columns(reads), _columns(writes), config)


def fit(
    kind: str, rows: mx.array, config: SAEConfig | None, *args, resume: bool = False, **options
):
    """A coder of the kind, as its trainer makes it from activations of all sites."""
    of_kind, reads, writes, _ = KINDS[kind]
    trainer = TRAINERS[of_kind](config, *args, **options)
    wanted = of_sites(rows)
    if of_kind in (SAE, Crosscoder):  # which have no choice of sites
        return trainer.fit({name: wanted[name] for name in reads}, resume)
    reads, writes = (names[0] if len(names) == 1 else names for names in (reads, writes))
    return trainer.fit(wanted, reads=reads, writes=writes, resume=resume)


def settings(kind: str) -> dict:
    """What a config needs to train that kind."""
    cross_layer = {"decoder_unit_norm": False, "resample_dead_every": 0}
    return {"skip": "skip" in kind} | (cross_layer if "cross-layer" in kind else {})


def activations(n: int = 200, seed: int = 0) -> mx.array:
    """Rows `[n, width]` of all sites, each of them mixed from one sparse code."""
    rng = np.random.default_rng(seed)
    z = rng.uniform(0.5, 1.5, (n, 24)) * (rng.random((n, 24)) < 0.12)
    mixing = np.random.default_rng(1).normal(size=(24, SITES.width))
    scale = np.repeat([1, 3, 10, 0.2], SITES.widths)
    rows = (z @ mixing + 0.05 * rng.normal(size=(n, SITES.width)) + 0.3) * scale
    return mx.array(rows.astype(np.float32))


def dataset(n: int = 200, seed: int = 0) -> ActivationDataset:
    """The same rows as a dataset of all sites."""
    return ActivationDataset.from_activations(of_sites(activations(n, seed)))


def of_sites(rows: mx.array) -> dict[str, mx.array]:
    """Activations by site."""
    return {name: rows[:, part] for name, part in SITES.slices.items()}


def _columns(names: tuple[str, ...]) -> Columns:
    return Columns(names, tuple(SITES.only(name).width for name in names))


def dense_decoder(coder: SparseCoder, W_dec: mx.array | None = None) -> np.ndarray:
    """`[n_features, d_out]`, with zeros where features do not write."""
    parts = zip(coder.decoder_blocks(W_dec), coder.blocks, strict=True)
    return np.concatenate([np.array(coder.in_place(W, block)) for W, block in parts])


def dense_encoder(coder: SparseCoder, W_enc: mx.array | None = None) -> np.ndarray:
    """`[n_features, d_in]`, with zeros where features do not read."""
    W_enc = np.array(coder.W_enc if W_enc is None else W_enc)
    found = np.zeros((coder.n_features, coder.d_in), W_enc.dtype)
    for block in coder.blocks:
        found[block.features, block.reads] = W_enc[block.features]
    return found


def dense(coder: SparseCoder, params: dict) -> dict:
    """The parameters with both matrices in their dense form."""
    forms = {"W_enc": dense_encoder, "W_dec": dense_decoder}
    if len(coder.blocks) == 1:
        return dict(params)
    return {n: forms[n](coder, mx.array(a)) if n in forms else a for n, a in params.items()}


def compact(coder: SparseCoder, arrays: dict) -> dict:
    """The inverse of `dense`, for arrays of NumPy."""
    if len(coder.blocks) == 1:
        return dict(arrays)
    width, blocks = coder.W_dec.shape[1], coder.blocks
    rows = [arrays["W_dec"][b.features, b.writes].reshape(-1, width) for b in blocks]
    read = [arrays["W_enc"][b.features, b.reads] for b in blocks]
    return {**arrays, "W_dec": np.concatenate(rows), "W_enc": np.concatenate(read)}
