"""Activations of many prompts, by name and by position."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.analysis import (
    ActivationCache,
    batch_get_activations,
    collect_activations,
    get_activations,
)
from tests.pages import checked

PROMPTS = ["one two three four five", "six", "seven eight", "nine ten eleven"]


def test_the_last_token_is_the_last_real_one(demo):
    together = get_activations(demo, PROMPTS)
    assert list(together) == [f"layer_{i}" for i in range(6)]
    for i, prompt in enumerate(PROMPTS):
        alone = demo.run(prompt, capture="layers.4")["layers.4"][0, -1]
        np.testing.assert_allclose(together["layer_4"][i], alone, rtol=1e-3, atol=1e-4)


def test_positions(demo):
    prompt = PROMPTS[0]
    full = demo.run(prompt, capture="layers.2")["layers.2"]
    several = get_activations(demo, [prompt], layers=[2], positions=[0, -1])
    assert several.keys() == {"layer_2"}
    assert several["layer_2"].shape == (1, 2, 128)
    assert mx.array_equal(several["layer_2"][:, 0], full[:, 0])
    assert mx.array_equal(several["layer_2"][:, 1], full[:, -1])
    one = get_activations(demo, [prompt], layers=[2], positions=[1])["layer_2"]
    assert mx.array_equal(one, full[:, 1])


def test_positions_and_layers_that_do_not_exist_are_errors(demo):
    shortest = len(demo.encode(PROMPTS[1]))
    with pytest.raises(ValueError, match=rf"shortest prompt has {shortest} tokens: {shortest}"):
        get_activations(demo, PROMPTS, positions=shortest)
    with pytest.raises(ValueError, match="no layer 6"):
        get_activations(demo, PROMPTS, layers=[6])
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        batch_get_activations(demo, PROMPTS, batch_size=0)
    with pytest.raises(ValueError, match="prompts must have at least one"):
        batch_get_activations(demo, [])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_give_the_same(demo, batch_size):
    whole = get_activations(demo, PROMPTS, layers=[0, 5], positions=[0, -1])
    parts = batch_get_activations(demo, PROMPTS, [0, 5], [0, -1], batch_size=batch_size)
    assert whole.keys() == parts.keys()
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-3, atol=1e-4)


def test_collect_activations(demo):
    cache = collect_activations(demo, "Hello there")
    assert len(cache) == 6 * 14 + 3  # with the patterns of attention
    assert "__model_output__" not in cache
    assert cache.keys()[0] == "embed_tokens"
    assert cache.metadata == {"input_shape": (1, len(demo.encode("Hello there")))}
    expected = demo.run("Hello there", capture="layers.3.attn")["layers.3.attn"]
    for name in (
        "layers.3.self_attn",
        "model.layers.3.self_attn",
        "model.model.layers.3.self_attn",
    ):
        assert name in cache
        assert mx.array_equal(cache.get(name), expected)
    full = collect_activations(demo, "Hello there", normalize_keys=False)
    assert "model.model.layers.3.self_attn" in full
    few = collect_activations(demo, "Hello there", layers=["layers.3", "layers.1.mlp"])
    assert few.keys() == ["layers.1.mlp", "layers.3"]
    with pytest.raises(ValueError, match="nearest existing"):
        collect_activations(demo, "Hello", layers=["layers.3.mpl"])


def test_a_cache_names_the_nearest():
    cache = ActivationCache({"layers.3.mlp": mx.zeros((1,))})
    assert cache.get("layers.4.mlp") is None
    assert list(cache) == ["layers.3.mlp"]
    assert repr(cache) == "ActivationCache(1 activations)"
    assert ["layers.*.mlp", "3", "[1] float32"] in checked(cache._repr_html_()).cells
    with pytest.raises(KeyError, match=r"nearest existing: layers\.3\.mlp"):
        cache["layers.3.mpl"]


def test_one_prompt_one_layer_and_arrays_of_prompts(demo):
    one = batch_get_activations(demo, "The function", layers=2, positions=np.int64(-1))
    assert mx.array_equal(one["layer_2"], get_activations(demo, "The function", [2])["layer_2"])
    rows = mx.array([[1, 2], [3, 4], [5, 6]])
    found = batch_get_activations(demo, rows, layers=[2], batch_size=2)["layer_2"]
    assert mx.array_equal(found[2:], get_activations(demo, rows[2:], [2])["layer_2"])
    for empty in ("layers", "positions"):
        with pytest.raises(ValueError, match=f"{empty} must have at least one entry"):
            get_activations(demo, "The function", **{empty: []})
