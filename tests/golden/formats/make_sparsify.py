"""Files that sparsify writes, with the codes that it makes of them.

    python tests/golden/formats/make_sparsify.py        needs eai-sparsify; made with 1.3.3

Each folder of `sparsify/` is one file; `expected.npz` has the input `x` and, by folder, codes and
reconstructions.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which needs a GPU
from sparsify import SparseCoder  # noqa: E402
from sparsify.config import SparseCoderConfig  # noqa: E402

PLACE = Path(__file__).parent / "sparsify"
D, F, K = 8, 32, 4
X = torch.tensor(np.random.default_rng(1).normal(0.4, 1.3, (24, D)).astype(np.float32))

CASES = {
    "layers.3": {"expansion_factor": 4},
    "layers.5.mlp": {"num_latents": F, "transcode": True, "skip_connection": True},
    "h.2.attn": {"num_latents": F, "activation": "groupmax"},
    "layers.6.mlp": {"num_latents": F, "activation": "groupmax", "transcode": True},
    "layers.7": {"num_latents": F, "normalize_decoder": False, "multi_topk": True},  # in bfloat16
}


def main():
    shutil.rmtree(PLACE, ignore_errors=True)
    expected = {"x": X.numpy()}
    for seed, (name, options) in enumerate(CASES.items()):
        random = np.random.default_rng(seed)
        dtype = torch.bfloat16 if name == "layers.7" else torch.float32
        coder = SparseCoder(D, SparseCoderConfig(k=K, **options), dtype=dtype)
        for _, parameter in sorted(coder.named_parameters()):
            parameter.data = torch.tensor(random.normal(0, 0.5, parameter.shape)).to(dtype)
        coder.save_to_disk(PLACE / name)
        coder = SparseCoder.load_from_disk(PLACE / name).float()
        with torch.no_grad():
            out = coder.encode(X)
            z = torch.zeros(len(X), F).scatter(1, out.top_indices, out.top_acts)
            # Not `coder(X)`: with `multi_topk` that reconstructs from 4 k features.
            y = coder.decode(out.top_acts, out.top_indices)
            if coder.W_skip is not None:
                y = y + X @ coder.W_skip.mT
        expected |= {f"{name}.z": z.numpy(), f"{name}.y": y.numpy()}
    np.savez(PLACE / "expected.npz", **expected)


if __name__ == "__main__":
    main()
