"""Noise hides the subject, and what is restored brings it back."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.analysis.causal_tracing import causal_tracing, subject_positions
from mlxterp.model import InterpretableModel
from tests.tiny_models import build

TEXT = "for name in names:\n    print("
A = [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


def test_restoring_everything_brings_all_back_and_nothing_none(model):
    found = causal_tracing(
        model, A, [1, 2], ["resid_pre", "output"], positions=[range(6), ()], n_seeds=3, answers=7
    )
    np.testing.assert_allclose(found.recovered[..., 0], 100, atol=0.02)
    np.testing.assert_allclose(found.recovered[..., 1], 0, atol=0.02)
    np.testing.assert_allclose(found.spread[..., 1], 0, atol=0.02)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "llama_quantized"])
def test_it_is_what_edits_by_hand_do(model_type):
    """Also of an embedding that is scaled, or quantised, after or before."""
    model = InterpretableModel(build(model_type))
    path = next(
        name for name, m in model.architecture.modules.items()
        if m is model.architecture.embedding
    )  # fmt: skip
    rows = np.array(model.architecture.embedding(mx.arange(96)), np.float64)
    drawn = mx.random.normal((4, 6, rows.shape[-1]), key=mx.random.key(5))
    here = (mx.arange(6) == 2)[:, None]
    noise = mx.where(here, drawn * (3 * rows.std()), 0)
    clean = model.run([A], capture="layers.1.mlp")
    at = (mx.arange(6) == 5)[:, None]

    def chance(edit):
        return np.array(mx.softmax(model.run([A] * 4, edit=edit).output[:, -1], axis=-1))[:, 7]

    blurred = {path: lambda x: x + noise}
    restored = {
        **blurred, "layers.1.mlp": lambda x: mx.where(at, clean["layers.1.mlp"], x),
    }  # fmt: skip
    high, low, back = chance({}), chance(blurred), chance(restored)
    found = causal_tracing(model, A, [2], "mlp", n_seeds=4, seed=5, answers=7)
    gap = high.mean() - low.mean()
    assert (found.clean, found.corrupted) == pytest.approx((high.mean(), low.mean()), rel=1e-3)
    assert found[1][5] == pytest.approx(100 * (back.mean() - low.mean()) / gap, abs=0.2)
    shares = 100 * (back - low) / gap
    assert found.spread[1, 5] == pytest.approx(shares.std(ddof=1) / 2, abs=0.2)


def test_more_noise_hides_more(demo):
    values = [
        causal_tracing(demo, TEXT, " name", noise=noise, n_seeds=6, layers=[0]).corrupted
        for noise in (0.3, 1.0, 3.0)
    ]
    assert values == sorted(values, reverse=True)


def test_what_the_bundled_model_recalls(demo):
    """The subject matters at its own position in early layers, and at the last one in late ones."""
    found = demo.causal_tracing(TEXT, " name", n_seeds=6)
    assert found.metric == "probability of 'name'"
    assert found.recovered.shape == (6, 9)
    assert found[0][2] > 80 and found[0][8] < 20
    assert found[5][8] == pytest.approx(100, abs=0.1) and abs(found[5][2]) < 1
    assert found[4][8] > 50 > found[4][2]


def test_a_seed_is_repeated_and_batches_do_not_matter(model):
    first, again, small = (
        causal_tracing(model, A, [1], n_seeds=3, seed=1, answers=7, batch_rows=rows)
        for rows in (None, None, 2)
    )
    np.testing.assert_array_equal(first.recovered, again.recovered)
    np.testing.assert_allclose(first.recovered, small.recovered, atol=0.1)
    other = causal_tracing(model, A, [1], n_seeds=3, seed=2, answers=7)
    assert not np.allclose(first.recovered, other.recovered, atol=0.1)
    assert causal_tracing(model, A, [1], n_seeds=1, answers=7).spread is None


def test_windows_of_layers_are_restored_together(model):
    windows = causal_tracing(model, A, [1], "mlp", window=2, n_seeds=2, answers=7)
    groups = causal_tracing(
        model, A, [1], "mlp", layers=[(0,), (0, 1), (1, 2)], n_seeds=2, answers=7
    )
    assert list(windows) == [0, 1, 2]
    np.testing.assert_allclose(windows.recovered, groups.recovered, atol=0.05)
    one = causal_tracing(model, A, [1], "mlp", layers=[-1], window=3, n_seeds=2, answers=7)
    assert list(one) == [2] and one.title == "Causal tracing of mlp, 3 layers at a time"
    np.testing.assert_allclose(one[2], groups[1, 2], atol=0.05)


def test_subjects(demo):
    tokens, _ = demo.tokens(TEXT)
    assert subject_positions(demo, tokens, "name") == [2, 4]
    assert subject_positions(demo, tokens, " name ") == [2, 3]
    assert subject_positions(demo, tokens, "nt(") == [7, 8]
    assert subject_positions(demo, tokens, [-1, 2]) == [2, 8]
    for wrong in ("value", ""):
        with pytest.raises(ValueError, match="subject must be a part of the text"):
            subject_positions(demo, tokens, wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"n_seeds": 0}, "n_seeds must be at least 1, got 0"),
        ({"noise": 0}, "noise must be above 0 and finite, got 0"),
        ({"noise": float("nan")}, "noise must be above 0"),
        ({"subject": [9]}, r"subject must be in \[-9, 8\], got 9"),
        ({"metric_position": 9}, r"metric_position must be in \[-9, 8\], got 9"),
        ({"batch_rows": 0}, "batch_rows must be at least 1, got 0"),
        ({"text": [TEXT, TEXT]}, "text must be one text"),
    ],
)
def test_what_cannot_be_is_an_error(demo, options, message):
    with pytest.raises(ValueError, match=message):
        demo.causal_tracing(**{"text": TEXT, "subject": " name", **options})


def test_a_subject_that_does_not_matter_has_no_share(demo):
    found = demo.causal_tracing(TEXT, [8], metric=lambda logits: logits[0, 0, 0], n_seeds=2)
    assert np.isnan(found.recovered).all() and found.reason
