"""Coders of ours as other libraries read them: their codes and reconstructions beside ours.

    python benchmarks/formats.py --peers PYTHON     an interpreter with sae-lens and eai-sparsify

Random coders of every kind that a format can express are exported, with the codes and the
reconstructions that they make here of random tokens. The other interpreter, which needs no
mlxterp, loads each export with the library's own loader and compares. Differences are the largest
ones as shares of the largest value; tokens on which another feature is active, as its value lies on
the edge between on and off, are counted and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

D, N_FEATURES, K, N_TOKENS = 256, 4096, 32, 512
CASES = {  # format: name -> kind, activation function, norm of tokens
    "saelens": {
        "relu": ("sae", "relu", "none"),
        "topk": ("sae", "topk", "none"),
        "abs_topk": ("sae", "abs_topk", "none"),
        "batch_topk": ("sae", "batch_topk", "none"),
        "jumprelu": ("sae", "jumprelu", "none"),
        "gated": ("sae", "gated", "none"),
        "layer_norm": ("sae", "topk", "layer_norm"),
        "rescale": ("sae", "jumprelu", "rescale"),
        "transcoder": ("transcoder", "relu", "none"),
        "transcoder_layer_norm": ("transcoder", "relu", "layer_norm"),
        "jumprelu_transcoder": ("transcoder", "jumprelu", "none"),
        "batch_topk_transcoder": ("transcoder", "batch_topk", "none"),
        "skip_transcoder": ("skip transcoder", "relu", "none"),
        "jumprelu_skip_transcoder": ("skip transcoder", "jumprelu", "none"),
    },
    "sparsify": {
        "topk": ("sae", "topk", "none"),
        "groupmax": ("sae", "groupmax", "none"),
        "transcoder": ("transcoder", "topk", "none"),
        "groupmax_transcoder": ("transcoder", "groupmax", "none"),
        "skip_transcoder": ("skip transcoder", "topk", "none"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--peers", help="a Python with the other libraries")
    parser.add_argument("--compare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compare:
        compare(Path(arguments.compare))
        return
    if not arguments.peers:
        parser.error("--peers is needed")
    with tempfile.TemporaryDirectory() as place:
        export(Path(place))
        # Without this folder in front of its path, where a `datasets.py` is.
        command = [arguments.peers, "-P", __file__, "--compare", place]
        subprocess.run(command, check=True, env={**os.environ, "SPARSIFY_DISABLE_TRITON": "1"})


def export(place: Path) -> None:
    """Write every case, and beside it what our own coder makes of the tokens."""
    from mlxterp.version import __version__  # isort: skip - before MLX, so that it is fast

    import mlx.core as mx

    print(f"mlxterp {__version__}, d {D}, {N_FEATURES} features, {N_TOKENS} tokens")
    x = mx.array(np.random.default_rng(0).normal(0.3, 2, (N_TOKENS, D)).astype(np.float32))
    for format, cases in CASES.items():
        for name, (kind, function, norm) in cases.items():
            coder = random_coder(kind, function, norm)
            coder.export(format, place / format / name)
            results = {"x": np.array(x), "z": np.array(coder.encode(x)), "y": np.array(coder(x))}
            np.savez(place / format / f"{name}.npz", **results)


def random_coder(kind: str, function: str, norm: str) -> Any:
    """A coder with random arrays, of which about one feature in a hundred is active."""
    import mlx.core as mx

    from mlxterp.sae import SAE, Transcoder
    from mlxterp.sae.coder import Columns

    reads, writes = Columns(("layers.3.mlp_in",), (D,)), Columns(("layers.3.mlp",), (D,))
    if kind == "sae":
        coder: Any = SAE(writes, writes, N_FEATURES, function, K, token_norm=norm)
    else:
        skip = kind == "skip transcoder"
        coder = Transcoder(reads, writes, N_FEATURES, function, K, skip=skip, token_norm=norm)
    rng = np.random.default_rng(1)
    scales = {"b_dec": 1.0, "b_enc": 0.3, "log_gain": 0.3, "offset": 0.1, "threshold": 1.0}
    for arrays in coder.array_files().values():
        for name, array in arrays.items():
            values = rng.normal(0, scales.get(name, D**-0.5), array.shape).astype(np.float32)
            coder.set_array(name, mx.array(np.abs(values) + 2 if name == "threshold" else values))
    return coder


def compare(place: Path) -> None:
    """In the other interpreter: load every export, and print how far the results are apart."""
    warnings.simplefilter("ignore")
    header = f"{'format':<10} {'case':<26} {'class':<24} {'active':>7} {'left out':>8}"
    print(f"{header} {'code':>9} {'output':>9}")
    for format, load in LOADERS.items():
        for name in CASES[format]:
            expected = np.load(place / format / f"{name}.npz")
            called, z, y = load(place / format / name, expected["x"])
            ours, active = expected["z"], (expected["z"] != 0).sum(axis=1).mean()
            same = ((z != 0) == (ours != 0)).all(axis=1)
            print(
                f"{format:<10} {name:<26} {called:<24} {active:>7.1f} {(~same).sum():>8} "
                f"{apart(z[same], ours[same]):>9.1e} {apart(y[same], expected['y'][same]):>9.1e}"
            )
    versions = ("torch", "sae-lens", "eai-sparsify")
    print(", ".join(f"{name} {version(name)}" for name in versions))


def apart(theirs: np.ndarray, ours: np.ndarray) -> float:
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


Loaded = tuple[str, np.ndarray, np.ndarray]


def by_saelens(path: Path, x: np.ndarray) -> Loaded:
    import torch
    from sae_lens import SAE

    sae, tokens = SAE.load_from_disk(path), torch.tensor(x)
    assert str(sae.cfg.metadata.hook_name).startswith("blocks.3.")
    with torch.no_grad():
        return type(sae).__name__, sae.encode(tokens).numpy(), sae(tokens).numpy()


def by_sparsify(path: Path, x: np.ndarray) -> Loaded:
    import torch
    from sparsify import SparseCoder

    coder, tokens = SparseCoder.load_from_disk(path), torch.tensor(x)
    with torch.no_grad():
        out = coder(tokens)
        z = torch.zeros(len(x), coder.num_latents)
        z = z.scatter(1, out.latent_indices, out.latent_acts)
    activation = json.loads((path / "cfg.json").read_text())["activation"]
    return f"SparseCoder, {activation}", z.numpy(), out.sae_out.numpy()


LOADERS: dict[str, Callable[[Path, np.ndarray], Loaded]] = {
    "saelens": by_saelens,
    "sparsify": by_sparsify,
}

if __name__ == "__main__":
    main()
