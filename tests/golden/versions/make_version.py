"""Saved coders of the format version that the present code writes, for later code to read.

    python tests/golden/versions/make_version.py 1

Those of a version are made once, by the last code that writes it, and not again: each folder holds
coders as `save` wrote them and `expected.npz`, what they made of the input.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxterp.sae import SAE, Crosscoder, Transcoder
from mlxterp.sae.base import FORMAT_VERSION
from mlxterp.sae.coder import Columns
from mlxterp.sae.metadata import Metadata, Statistics

FIRST, SECOND = Columns(("layers.1.mlp",), (6,)), Columns(("layers.2.mlp",), (5,))
CODERS = {
    "sae": (SAE, FIRST, FIRST, 16, "topk", 3, {}),
    "jumprelu": (SAE, FIRST, FIRST, 16, "jumprelu", None, {}),
    "transcoder": (Transcoder, FIRST, SECOND, 16, "batch_topk", 3, {"skip": True}),
    "crosscoder": (Crosscoder, FIRST.union(SECOND), FIRST.union(SECOND), 16, "gated", None, {}),
}


def main() -> None:
    if int(sys.argv[1]) != FORMAT_VERSION:
        raise SystemExit(f"This code writes version {FORMAT_VERSION}.")
    place = Path(__file__).parent / f"version_{FORMAT_VERSION}"
    random = np.random.default_rng(0)
    expected = {"x": random.normal(size=(12, 11)).astype(np.float32)}
    for name, (kind, reads, writes, n_features, function, k, options) in CODERS.items():
        coder = kind(reads, writes, n_features, function, k, **options)
        for arrays in coder.array_files().values():
            for key, array in arrays.items():
                values = random.normal(size=array.shape) * 0.5
                coder.set_array(key, mx.array(np.abs(values).astype(np.float32)))
        coder.W_enc = mx.array(random.normal(size=coder.W_enc.shape).astype(np.float32))
        coder.W_dec = mx.array(random.normal(size=coder.W_dec.shape).astype(np.float32))
        coder.metadata = Metadata({"name": "a/model"}, {"n_tokens": 7}, {"k": k}, "0.1.0")
        coder.statistics = Statistics(firing_rates=np.full(n_features, 0.25))
        coder.save(place / name)
        x = mx.array(expected["x"][:, : coder.d_in])
        expected[f"{name}.z"] = np.array(coder.encode(x))
        expected[f"{name}.y"] = np.array(coder(x))
    np.savez(place / "expected.npz", **expected)


if __name__ == "__main__":
    main()
