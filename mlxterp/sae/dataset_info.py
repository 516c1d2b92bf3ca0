"""What a dataset holds, and how well its batches are mixed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DatasetInfo:
    """Size, sites and mixing of a dataset, as an object to read.

    `n_bytes` is the size of all activations in memory; `n_skipped` counts tokens whose activation
    is not finite, `n_outliers` those with an outlying norm, as far as they have been looked at;
    `mixing` is `documents_per_batch` as a share of what a perfect shuffle has.
    """

    sites: tuple[str, ...]
    width: int
    n_tokens: int
    n_documents: int | None
    context: int | None
    n_bytes: int
    where: str
    n_skipped: int
    n_outliers: int
    batch_size: int
    documents_per_batch: float | None
    mixing: float | None

    def __repr__(self) -> str:
        text = (
            f"{self.n_tokens:,} tokens of {', '.join(self.sites)}, width {self.width}, "
            f"{self.n_bytes / 1e6:,.0f} MB {self.where}"
        )
        if self.n_skipped or self.n_outliers:
            text += f"; {self.n_skipped:,} not finite, {self.n_outliers:,} with an outlying norm"
        if self.documents_per_batch is None:
            return text
        return (
            f"{text};\n{self.n_documents:,} documents in contexts of {self.context} tokens, of "
            f"which a batch of {self.batch_size:,} mixes {self.documents_per_batch:.0f} "
            f"({self.mixing:.0%} of a perfect shuffle)"
        )


def mixing(documents_per_batch: float, sizes: np.ndarray, batch_size: int) -> float:
    """Distinct documents in a batch as a share of those in one drawn at random from all tokens.

    At most 1. That one has `sum_d 1 - (1 - p_d)^batch_size` for documents that hold the share `p_d`
    of tokens.
    """
    shares = sizes / sizes.sum()
    expected = float((1 - (1 - shares) ** batch_size).sum())
    return min(1.0, documents_per_batch / expected)
