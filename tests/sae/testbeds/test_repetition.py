import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp.sae.testbeds.repetition import repetition_accuracy, repetitions


class Copies(nn.Module):
    """Foresees what stood `distance` tokens before the next one."""

    def __init__(self, distance: int, n_words: int = 9) -> None:
        super().__init__()
        self.distance, self.n_words = distance, n_words

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.eye(self.n_words)[mx.roll(tokens, self.distance - 1, axis=1)]


@pytest.mark.parametrize(("period", "length"), [(5, None), (5, 17), (1, 4), (8, 3)])
def test_sequences_repeat_and_have_no_other_repetition(period, length):
    tokens = repetitions(50, 9, period, length, seed=2)
    assert tokens.shape == (50, 1 + (length or 2 * period)) and tokens.dtype == np.int32
    assert (tokens[:, 0] == 0).all() and tokens[:, 1:].min() == 1 and tokens.max() == 8
    np.testing.assert_array_equal(tokens[:, 1 + period :], tokens[:, 1:-period])
    once = tokens[:, 1 : 1 + period]
    assert all(len(set(row)) == once.shape[1] for row in once.tolist())
    assert len(np.unique(tokens, axis=0)) > 4


def test_all_words_are_as_frequent():
    counts = np.bincount(repetitions(8000, 9, 3)[:, 1:4].ravel(), minlength=9)
    assert counts[0] == 0 and (np.abs(counts[1:] - 3000) < 250).all()


def test_seeds_decide():
    np.testing.assert_array_equal(repetitions(4, 9, 6, seed=1), repetitions(4, 9, 6, seed=1))
    assert (repetitions(4, 9, 6, seed=1) != repetitions(4, 9, 6, seed=2)).any()


def test_the_accuracy_counts_what_can_be_foreseen():
    tokens = repetitions(10, 9, 6, seed=1)
    assert repetition_accuracy(Copies(6), tokens, 6) == 1.0
    assert repetition_accuracy(Copies(5), tokens, 6) == 0.0
    tokens[:4, -1] = 0  # one of five tokens in four of ten rows
    assert repetition_accuracy(Copies(6), tokens, 6) == pytest.approx(1 - 4 / 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 9, 9), r"period must be in \[1, n_words - 1 = 8\], got 9"),
        ((4, 9, 0), "period must be in .*, got 0"),
        ((0, 9, 3), "n must be >= 1, got 0"),
        ((4, 9, 3, 0), "length must be >= 1, got 0"),
    ],
)
def test_sequences_that_do_not_exist_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        repetitions(*arguments)


@pytest.mark.parametrize(("shape", "period"), [((4, 7), 5), ((4, 9), 0), ((9,), 3)])
def test_an_accuracy_of_nothing_is_an_error(shape, period):
    with pytest.raises(ValueError, match=r"must have shape \[n, >= period \+ 3 = \d\], got"):
        repetition_accuracy(Copies(1), np.zeros(shape, np.int32), period)
