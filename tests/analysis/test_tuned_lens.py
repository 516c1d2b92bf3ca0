"""A tuned lens: its maps, its files, and what it shows."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.analysis.tuned_lens import TunedLens
from mlxterp.model import InterpretableModel
from tests.tiny_models import build

IDS = [3, 1, 4, 1, 5, 9]


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("gemma3_text"))


def trained(layers=4, width=32, seed=0):
    """A lens whose maps are not the identity."""
    rng = np.random.default_rng(seed)
    lens = TunedLens(layers, width)
    for translator in lens.translators:
        translator.weight = mx.array(rng.normal(size=(width, width)).astype(np.float32))
        translator.bias = mx.array(rng.normal(size=width).astype(np.float32))
    return lens


def test_an_untrained_lens_is_the_logit_lens(model):
    lens = TunedLens(model.n_layers, model.d_model)
    plain, tuned = model.logit_lens(IDS, top_k=2), model.tuned_lens(IDS, lens, top_k=2)
    assert tuned == plain
    assert tuned.name == "tuned lens" and repr(tuned).startswith("Tuned lens: ")


def test_states_are_mapped_and_read_by_the_models_tail(model):
    lens = trained()
    h = np.array(model.run(IDS, capture="layers.2")["layers.2"][0], np.float64)
    weight, bias = (np.array(lens.translators[2][n], np.float64) for n in ("weight", "bias"))
    mapped = h @ weight.T + bias
    np.testing.assert_allclose(
        lens(mx.array(h.astype(np.float32)), 2), mapped, rtol=1e-4, atol=1e-4
    )
    found = model.tuned_lens(IDS, lens, layers=[2, 3], position=[1, -1])
    expected = model.unembed(mx.array(mapped.astype(np.float32)))[mx.array([1, 5])]
    np.testing.assert_allclose(found.logits(2), expected, rtol=1e-3, atol=1e-3)
    first, second = model.tuned_lens([IDS, IDS[:3]], lens)
    np.testing.assert_allclose(first.logits(2)[:3], second.logits(2), rtol=1e-3, atol=1e-3)


def test_the_model_itself_is_what_a_lens_is_compared_with(model):
    found = model.tuned_lens(IDS, trained())
    p = np.array(mx.softmax(model.run(IDS).output[0], axis=-1), np.float64)
    for layer in (1, 3):
        log_q = np.array(found.log_probabilities(layer), np.float64)
        expected = (p * (np.log(p) - log_q)).sum(-1)
        np.testing.assert_allclose(found.kl[layer], expected, rtol=1e-3)


def test_maps_keep_the_type_of_the_states():
    lens = trained()
    assert lens(mx.ones((2, 32), mx.bfloat16), 0).dtype == mx.bfloat16


def test_no_random_number_is_drawn():
    mx.random.seed(3)
    expected = mx.random.normal((4,))
    mx.random.seed(3)
    TunedLens(2, 4)
    assert mx.array_equal(mx.random.normal((4,)), expected)


@pytest.mark.parametrize("name", ["lens", "deep/er/lens.v1", "lens.npz", "lens.json"])
def test_files_hold_what_was_saved(tmp_path, name):
    lens = trained(3, 8)
    lens.save(tmp_path / name)
    stem = name.removesuffix(".npz").removesuffix(".json")
    with np.load(tmp_path / f"{stem}.npz") as arrays:
        assert set(arrays) == {f"translators_{i}_{n}" for i in range(3) for n in ("weight", "bias")}
        np.testing.assert_array_equal(arrays["translators_1_weight"], lens.translators[1].weight)
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == {
        "num_layers": 3,
        "hidden_dim": 8,
    }
    loaded = TunedLens.load(tmp_path / name)
    assert repr(loaded) == "TunedLens(num_layers=3, hidden_dim=8)"
    x = mx.random.normal((5, 8), key=mx.random.key(0))
    for layer in range(3):
        assert mx.array_equal(loaded(x, layer), lens(x, layer))


def test_files_that_mlx_wrote_can_be_loaded(tmp_path, model):
    """As earlier versions did, by `mx.savez` and `json.dump`."""
    lens = trained()
    arrays = {
        f"translators_{i}_{name}": t[name]
        for i, t in enumerate(lens.translators)
        for name in ("weight", "bias")
    }
    mx.savez(str(tmp_path / "old.npz"), **arrays)
    (tmp_path / "old.json").write_text('{"num_layers": 4, "hidden_dim": 32}')
    loaded = model.load_tuned_lens(tmp_path / "old")
    assert model.tuned_lens(IDS, loaded) == model.tuned_lens(IDS, lens)


@pytest.mark.parametrize(
    ("sizes", "changed", "message"),
    [
        ({"num_layers": 2, "hidden_dim": 10**9}, {}, "must have shape"),
        ({"num_layers": 10**12, "hidden_dim": 4}, {}, "no key 'translators_2_weight'"),
        ({"num_layers": "2", "hidden_dim": 4}, {}, "num_layers must be a whole number"),
        ({"num_layers": True, "hidden_dim": 4}, {}, "num_layers must be a whole number"),
        ({"num_layers": 2, "hidden_dim": 0}, {}, "hidden_dim must be a whole number"),
        ({"hidden_dim": 4}, {}, "no key 'num_layers'"),
        (None, {"translators_1_bias": np.zeros(5, np.float32)}, "must have shape"),
        (None, {"translators_1_bias": np.full(4, np.nan, np.float32)}, "NaN|finite"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path, sizes, changed, message):
    lens = trained(2, 4)
    lens.save(tmp_path / "lens")
    if sizes is not None:
        (tmp_path / "lens.json").write_text(json.dumps(sizes))
    with np.load(tmp_path / "lens.npz") as file:
        arrays = {**file, **changed}
    np.savez(tmp_path / "lens.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        TunedLens.load(tmp_path / "lens")


def test_files_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"lens\.json is missing"):
        TunedLens.load(tmp_path / "lens")
    trained(2, 4).save(tmp_path / "lens")
    (tmp_path / "lens.npz").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"lens\.npz"):
        TunedLens.load(tmp_path / "lens")


def test_a_lens_must_fit(tmp_path, model):
    other = trained(3, 32)
    other.save(tmp_path / "other")
    message = "for 3 layers of width 32, and gemma3_text has 4"
    with pytest.raises(ValueError, match=message):
        model.tuned_lens(IDS, other)
    with pytest.raises(ValueError, match=message):
        model.load_tuned_lens(tmp_path / "other")
    lens = trained()
    with pytest.raises(ValueError, match="layer_idx must be 0 to 3, not 4"):
        lens(mx.zeros((1, 32)), 4)
    with pytest.raises(ValueError, match="layer_idx must be 0 to 3, not -1"):
        lens(mx.zeros((1, 32)), -1)
    with pytest.raises(ValueError, match="h must have width 32, not 8"):
        lens(mx.zeros((1, 8)), 0)
    with pytest.raises(ValueError, match="position must be of -6 to 5"):
        model.tuned_lens(IDS, lens, position=6)
    for sizes in ((0, 4), (2, 0), (2.0, 4), (True, 4)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            TunedLens(*sizes)
