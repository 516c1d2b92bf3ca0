import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.steering import steer, steering_edit

AB = Columns(("a", "b"), (2, 3))


def coder() -> SparseCoder:
    made = SparseCoder(AB, AB, 10, k=2)
    made.W_dec = mx.random.normal((10, 5), key=mx.random.key(0))
    return made


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_steering_adds_the_strength_times_the_row(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = x + -2.5 * np.array(coder().W_dec)[3]
    found = steer(coder(), mx.array(x), feature_id=3, strength=-2.5)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-6, atol=1e-6)


def test_steering_keeps_the_type_of_the_activation():
    x = mx.zeros((4, 5), mx.bfloat16)
    assert steer(coder(), x, 3, 2.0).dtype == mx.bfloat16
    assert steering_edit(coder(), 3, 2.0)["b"](x[:, 2:]).dtype == mx.bfloat16


def test_an_edit_adds_to_each_site_its_part_of_the_row():
    edit = steering_edit(coder(), 4, 3.0)
    row = np.array(coder().W_dec)[4]
    assert list(edit) == ["a", "b"]
    np.testing.assert_allclose(np.array(edit["a"](mx.ones((1, 2, 2))))[0, 1], 1 + 3 * row[:2])
    np.testing.assert_allclose(np.array(edit["b"](mx.ones((1, 2, 3))))[0, 1], 1 + 3 * row[2:])


@pytest.mark.parametrize("feature", [-1, 10])
def test_an_unknown_feature_is_refused_before_anything_runs(feature):
    with pytest.raises(ValueError, match=rf"feature_id must be in \[0, 9\], got {feature}"):
        steer(coder(), mx.zeros((5,)), feature)
    with pytest.raises(ValueError, match=rf"feature_id must be in \[0, 9\], got {feature}"):
        steering_edit(coder(), feature)


def test_feature_ids_of_numpy_are_taken():
    (a, _) = steering_edit(coder(), np.int64(4), 1.0).values()
    np.testing.assert_allclose(np.array(a(mx.zeros((2,)))), np.array(coder().W_dec)[4, :2])


def test_another_width_is_an_error():
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 5\], got \(2, 4\)"):
        steer(coder(), mx.zeros((2, 4)), 3)
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 5\], got \(\)"):
        steer(coder(), mx.array(1.0), 3)


def test_a_steered_run_of_the_model_has_exactly_the_row_added(sae, model):
    site, tokens = sae.site, mx.array([model.encode("The function returns")])
    edit = sae.steering_edit(11, 4.0)
    plain, steered = (
        np.array(model.run(tokens, capture=[site], edit=e)[site]) for e in (None, edit)
    )
    np.testing.assert_allclose(steered - plain, 0 * plain + 4 * np.array(sae.W_dec[11]), atol=1e-4)
    by_hand = model.run(tokens, edit={site: lambda x: x + 4 * sae.W_dec[11]}).output
    assert mx.array_equal(model.run(tokens, edit=edit).output, by_hand)
    assert not mx.allclose(model.run(tokens).output, by_hand)


def test_a_steered_generation_differs_and_strength_zero_does_not(sae, model):
    prompt = "The function returns"
    plain = model.generate(prompt, max_tokens=12).text
    strong = max(range(20), key=lambda i: sae.statistics.firing_rates[i])

    def generate(strength):
        edit = sae.steering_edit(strong, strength)
        return model.generate(prompt, max_tokens=12, edit=edit).text

    assert generate(0.0) == plain
    assert generate(100.0) != plain


def test_activations_of_numpy_are_taken():
    x = np.ones((4, 5), np.float32)
    assert mx.array_equal(steer(coder(), x, 3, 2.0), steer(coder(), mx.array(x), 3, 2.0))


@pytest.mark.parametrize("feature", ["abc", None, float("nan"), 3.0, True])
def test_what_is_no_number_of_a_feature_is_refused(feature):
    with pytest.raises(ValueError, match=r"feature_id must be in \[0, 9\], got"):
        steering_edit(coder(), feature)
