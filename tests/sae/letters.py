"""A language model and a coder so small that what features do can be told by reading a text."""

import mlx.core as mx
import numpy as np

from mlxterp.sae import SAE
from mlxterp.sae.coder import Columns
from tests.fakes import FIRST, SITE, FakeSource


class Letters(FakeSource):
    """Column i of an activation is the number given to the letter `abcdef`[i], else zero."""

    def __init__(self, **values: float):
        super().__init__(width=6)
        table = np.zeros((97, 6), np.float32)
        for letter, value in values.items():
            table[FIRST + ord(letter) - ord(" "), "abcdef".index(letter)] = value
        self.table = mx.array(table)


class Words(Letters):
    """Each token is a word of its own, such as ` aa`."""

    def to_str_tokens(self, input):
        return [f" {piece * 2}" for piece in super().to_str_tokens(input)]


def one_to_one(k: int = 6) -> SAE:
    """A coder whose features are the columns of the activation."""
    columns = Columns((SITE,), (6,))
    coder = SAE(columns, columns, 6, k=k)
    coder.W_enc = coder.W_dec = mx.eye(6)
    return coder
