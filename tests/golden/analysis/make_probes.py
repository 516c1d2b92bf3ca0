"""Writes probes.npz: rows of three classes, and what scikit-learn's classifiers decide on them.

Needs scikit-learn, which is no dependency of the project.
"""

from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler


def main():
    rng = np.random.default_rng(0)
    found = {}
    for name, (n, d) in {"tall": (90, 6), "wide": (30, 40)}.items():
        y = np.arange(n) % 3
        x = rng.normal(size=(n, d)) * rng.uniform(0.1, 5, d) + rng.normal(size=(3, d))[y] + 3
        found |= {f"{name}_x": x, f"{name}_y": y}
        u = StandardScaler().fit_transform(x)
        logistic = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000)
        several = OneVsRestClassifier(logistic).fit(u, y)
        found[f"{name}_logistic_3"] = several.decision_function(u)
        found[f"{name}_ridge_3"] = RidgeClassifier(alpha=2.0).fit(u, y).decision_function(u)
        found[f"{name}_mean_difference_3"] = NearestCentroid().fit(x, y).predict(x)
        two = y == 1
        found[f"{name}_logistic_2"] = logistic.fit(u, two).decision_function(u)
        found[f"{name}_ridge_2"] = RidgeClassifier(alpha=2.0).fit(u, two).decision_function(u)
        found[f"{name}_f1_2"] = f1_score(two, found[f"{name}_ridge_2"] > 0)
        found[f"{name}_auc_2"] = roc_auc_score(two, found[f"{name}_ridge_2"])
        said = found[f"{name}_ridge_3"].argmax(axis=1)
        found[f"{name}_f1_3"] = f1_score(y, said, average="macro")
    np.savez_compressed(Path(__file__).parent / "probes.npz", **found)


if __name__ == "__main__":
    main()
