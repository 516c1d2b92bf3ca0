"""Small random weights and inputs for the golden files of foreign formats, and what they must give.

All numbers are multiples of 1/64, so that products and sums of a few are exact in float32 in any
order, and a pre-activation can equal its threshold exactly: on the first input it is
`W_enc[:, 0] + b_enc`.
"""

import json
from pathlib import Path

import numpy as np

D, F, ROWS = 8, 32, 12
HERE = Path(__file__).parent


def grid(values):
    return (np.round(np.asarray(values) * 64) / 64).astype(np.float32)


def draw(rng, *shape, scale=1.0):
    """Random multiples of 1/64."""
    return grid(scale * rng.normal(size=shape))


def inputs(rng, centre=None, d=D):
    """`[ROWS, d]`; the first row is a unit vector, after the centre is taken off."""
    x = draw(rng, ROWS, d)
    x[0] = np.eye(d, dtype=np.float32)[0]
    return x if centre is None else x + centre


def thresholds_at(pre):
    """A threshold `[F]` for each feature, of which the first eight equal `pre` exactly, where that
    is positive, and the next eight are 1/64 smaller."""
    threshold = np.full(pre.shape, 0.5, np.float32)
    threshold[:8] = pre[:8]
    threshold[8:16] = pre[8:16] - 1 / 64
    return np.where(threshold > 0, threshold, np.float32(0.5))


def jump_relu(x, p, centred=False):
    """`(z, y)` in float64 of the usual formula, with `W_enc [d, F]` and `W_dec [F, d_out]`."""
    p = {name: np.asarray(array, np.float64) for name, array in p.items()}
    pre = (x.astype(np.float64) - (p["b_dec"] if centred else 0)) @ p["W_enc"] + p["b_enc"]
    z = np.maximum(pre, 0) * (pre > p["threshold"])
    y = z @ p["W_dec"] + p["b_dec"]
    return z, y + x.astype(np.float64) @ p["skip"] if "skip" in p else y


class Expected:
    """Inputs, codes and reconstructions by case, as they are written to `expected.npz`."""

    def __init__(self, format):
        self.folder = HERE / format
        self.folder.mkdir(exist_ok=True)
        self.arrays = {}

    def add(self, case, x, z, y):
        z, y = np.asarray(z, np.float64), np.asarray(y, np.float64)
        assert (z != 0).any() and np.isfinite(y).all(), case
        self.arrays |= {f"{case}/x": x, f"{case}/z": z, f"{case}/y": y}

    def write(self):
        arrays = {name: array.astype(np.float32) for name, array in self.arrays.items()}
        np.savez_compressed(self.folder / "expected.npz", **arrays)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
