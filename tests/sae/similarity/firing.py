"""Collected data of a coder whose firing is given."""

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.features.codes import SparseCodes
from mlxterp.sae.features.data import FeatureData, Settings


def codes_of(fires: np.ndarray) -> SparseCodes:
    """Codes of `[n_tokens, n_features]`, with a value of 1 where features fire."""
    n_tokens, n_features = fires.shape
    starts = np.append(0, np.cumsum(fires.sum(axis=1)))
    features = np.nonzero(fires)[1].astype(np.uint16)
    values = np.ones(len(features), np.float16)
    return SparseCodes(
        np.zeros(1, int), np.arange(n_tokens), starts, features, values, 1.0, n_features
    )


def data_of(coder: SparseCoder, fires: np.ndarray) -> FeatureData:
    """Data of which only the codes and the numbers of features are filled in."""
    n_tokens, n = fires.shape
    corpus = Corpus(np.zeros((1, n_tokens), np.int32), np.zeros((1, n_tokens), np.int32))
    counts, none = fires.sum(axis=0), np.zeros((n, 1))
    return FeatureData(
        coder, None, corpus, Settings(1, 1, 0), 1, n_tokens, 0, counts, counts, counts > 0, none,
        none, none, codes_of(fires),
    )  # fmt: skip
