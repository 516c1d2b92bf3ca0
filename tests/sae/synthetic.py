"""Activations that are sums of a few known features each."""

import numpy as np


def planted(n_tokens, n_features=64, width=32, active=3.0, seed=0):
    """Unit rows `[n_features, width]` and tokens `[n_tokens, width]`; rates differ sevenfold."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_features, width))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rates = 1 / (np.arange(n_features) + 10)
    on = rng.random((n_tokens, n_features)) < active * rates / rates.sum()
    code = on * rng.uniform(0.5, 1.5, (n_tokens, n_features))
    tokens = code @ features + 0.01 * rng.normal(size=(n_tokens, width))
    return features, tokens.astype(np.float32)


def recovery(features: np.ndarray, rows: np.ndarray) -> float:
    """The mean over true features of the largest cosine similarity with any of the rows."""
    rows = np.array(rows, np.float64)
    return float((features @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T).max(1).mean())
