"""Logistic regressions by scikit-learn, on standardised columns: run where that is installed."""

from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

rng = np.random.default_rng(0)
arrays = {}
for name, (n, d) in {"tall": (80, 4), "wide": (24, 30)}.items():
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 9, d) + 3
    y = (x[:, 0] - 3) / x[:, 0].std() + rng.normal(size=n) > 0.7
    scaler = StandardScaler().fit(x)
    arrays |= {f"{name}_x": x, f"{name}_y": y}
    for weight in (None, "balanced"):
        model = LogisticRegression(C=1.0, tol=1e-12, max_iter=100_000, class_weight=weight)
        model.fit(scaler.transform(x), y)
        arrays[f"{name}_{weight}"] = model.decision_function(scaler.transform(x))
np.savez(Path(__file__).with_name("logistic.npz"), **arrays)
