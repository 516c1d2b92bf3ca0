"""What layers predict: the model's own logits at the last, a shorter model's before it."""

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp.analysis import readout
from mlxterp.analysis.lens import LogitLens
from mlxterp.model import InterpretableModel
from tests.pages import checked
from tests.tiny_models import MODEL_TYPES, build

IDS = [3, 1, 4, 1, 5, 9]
SEVERAL_STREAMS = {"gemma3n"}
TEXT = "The function returns the number of"
TOKENS = ["The", "function", "return", "s", "the", "number", "of"]


@cache
def llama() -> InterpretableModel:
    return InterpretableModel(build("llama"))


def softmax(logits):
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_last_layer_has_the_models_logits(model_type):
    model = InterpretableModel(build(model_type))
    if model_type in SEVERAL_STREAMS:
        with pytest.raises(ValueError, match="several streams"):
            model.logit_lens(IDS)
        return
    expected = np.array(model.model(mx.array([IDS]))[0])
    lens = model.logit_lens(IDS, top_k=3)
    np.testing.assert_allclose(lens.logits(model.n_layers - 1), expected, rtol=1e-4, atol=1e-4)
    assert list(lens) == list(range(model.n_layers))
    for row, logits in zip(lens[model.n_layers - 1], expected, strict=True):
        scores = [score for _, score, _ in row]
        np.testing.assert_allclose(scores, np.sort(logits)[::-1][:3], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(logits[[i for i, *_ in row]], scores, rtol=1e-4, atol=1e-4)


def test_many_architectures_are_covered():
    assert len(set(MODEL_TYPES) - SEVERAL_STREAMS) >= 40


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "cohere", "qwen3", "olmoe", "minicpm", "llama_quantized"]
)
def test_a_layer_has_the_logits_of_the_model_that_ends_there(model_type):
    """Tails that are plain, cap, scale, are tied, or are quantised."""
    lens = InterpretableModel(build(model_type)).logit_lens(IDS)
    for layer in lens:
        shorter = build(model_type)
        shorter.model.layers = shorter.model.layers[: layer + 1]
        expected = shorter(mx.array([IDS]))[0]
        np.testing.assert_allclose(lens.logits(layer), expected, rtol=1e-4, atol=1e-4)


def test_logits_are_those_of_the_formula():
    model = llama()
    h = np.array(model.run(IDS, capture="layers.1")["layers.1"][0], np.float64)
    weight = np.array(model.model.model.norm.weight, np.float64)
    head = np.array(model.model.lm_head.weight, np.float64)
    normed = weight * h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + 1e-5)
    lens = model.logit_lens(IDS)
    np.testing.assert_allclose(lens.logits(1), normed @ head.T, rtol=1e-4, atol=1e-4)
    bare = model.logit_lens(IDS, skip_norm=True)
    np.testing.assert_allclose(bare.logits(1), h @ head.T, rtol=1e-4, atol=1e-4)
    twice = nn.RMSNorm(32, eps=1e-5)
    twice.weight = 2 * model.model.model.norm.weight
    given = model.logit_lens(IDS, final_norm=twice)
    np.testing.assert_allclose(given.logits(1), 2 * normed @ head.T, rtol=1e-4, atol=1e-4)
    assert (given.kl[-1] > 1e-3).all()  # of the model's own prediction


def test_what_a_lens_measures():
    lens = llama().logit_lens(IDS)
    logits = np.stack([np.array(lens.logits(layer), np.float64) for layer in lens])
    p = softmax(logits)
    np.testing.assert_allclose(lens.entropy, -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(lens.kl, (p[-1] * np.log(p[-1] / p)).sum(-1), rtol=1e-3, atol=1e-6)
    assert np.abs(lens.kl[-1]).max() < 1e-6 < lens.kl[0].min()
    np.testing.assert_allclose(lens.probability(7), p[..., 7], rtol=1e-4)
    order = np.argsort(-logits, axis=-1)
    np.testing.assert_array_equal(lens.rank(7), 1 + np.argmax(order == 7, axis=-1))
    assert lens.rank(lens[2][4][0][0])[2, 4] == 1
    np.testing.assert_allclose(lens.log_probabilities(0), np.log(p[0]), rtol=1e-4, atol=1e-5)
    some = llama().logit_lens(IDS, layers=1, position=-1)
    np.testing.assert_allclose(some.kl, lens.kl[1:2, -1:], rtol=1e-3)


def test_what_has_no_probability_has_no_part_in_a_measure(monkeypatch):
    lens, head = llama().logit_lens(IDS), readout.Head.__call__
    hidden = mx.where(mx.arange(96) == 5, -mx.inf, 0.0)
    monkeypatch.setattr(readout.Head, "__call__", lambda self, h: head(self, h) + hidden)
    assert np.isfinite(lens.entropy).all() and np.isfinite(lens.kl).all()


def test_texts_are_one_mapping_each(demo):
    lens = demo.logit_lens(TEXT, top_k=2)
    assert isinstance(lens, dict) and isinstance(lens, LogitLens) and len(lens) == 6
    ids = demo.encode(TEXT)
    assert lens.tokens == tuple(ids) and lens.texts == tuple(demo.to_str_tokens(ids))
    token, score, text = lens[5][-1][0]
    assert isinstance(token, int) and isinstance(score, float)
    assert text == demo.token_to_str(token)
    assert [len(lens[layer]) for layer in lens] == [len(ids)] * 6
    assert lens[5][-1][0][1] > lens[5][-1][1][1]
    for same in (ids, mx.array(ids), np.array(ids)):
        assert demo.logit_lens(same, top_k=2) == lens


def test_several_texts_are_read_without_their_padding(demo):
    texts = [TEXT, "one", "two three"]
    lenses = demo.logit_lens(texts, layers=[0, -1])
    assert isinstance(lenses, list) and [lens.layers for lens in lenses] == [(0, 5)] * 3
    for text, lens in zip(texts, lenses, strict=True):
        alone = demo.logit_lens(text, layers=[0, -1])
        assert lens.tokens == alone.tokens
        np.testing.assert_allclose(lens.logits(5), alone.logits(5), rtol=1e-3, atol=1e-3)
        assert [p[0][0] for p in lens[5]] == [p[0][0] for p in alone[5]]
        np.testing.assert_allclose(lens.kl, alone.kl, atol=1e-3)
    (one,) = demo.logit_lens([TEXT])
    assert one.tokens == lenses[0].tokens
    last = demo.logit_lens(texts, position=-1)
    for lens, whole in zip(last, demo.logit_lens(texts), strict=True):
        assert lens.positions == (len(whole.tokens) - 1,) and lens.tokens == whole.tokens[-1:]
        np.testing.assert_allclose(lens.logits(3), whole.logits(3)[-1:], rtol=1e-3, atol=1e-3)


def test_positions_and_layers(demo):
    whole = demo.logit_lens(TEXT)
    assert demo.logit_lens(TEXT, position=-2)[3] == whole[3][-2:-1]
    assert demo.logit_lens(TEXT, position=[2, 0])[3] == [whole[3][2], whole[3][0]]
    assert demo.logit_lens(TEXT, layers=[4, 1, -2]).layers == (1, 4)
    with pytest.raises(KeyError, match="layer 2 is not held; held: 1, 4"):
        demo.logit_lens(TEXT, layers=[4, 1]).logits(2)


def test_states_are_read_in_parts_where_memory_is_short(demo, monkeypatch):
    whole = demo.logit_lens(TEXT, top_k=2)
    calls = []
    unembed = InterpretableModel.unembed
    monkeypatch.setattr(
        InterpretableModel, "unembed", lambda self, h: calls.append(len(h)) or unembed(self, h)
    )
    assert demo.logit_lens(TEXT, top_k=2) == whole
    assert calls == [48]  # all layers at once
    monkeypatch.setattr(readout, "LOGIT_BYTES", 20 * 4 * 4096)
    calls.clear()
    parts = demo.logit_lens(TEXT, top_k=2)
    assert calls == [20, 20, 8]
    assert [[p[0][0] for p in parts[i]] for i in parts] == [
        [p[0][0] for p in whole[i]] for i in whole
    ]
    np.testing.assert_allclose(parts.kl, whole.kl, atol=1e-4)


def test_edits_that_stand_are_seen(demo):
    with demo.editing({"layers.2.mlp": mx.zeros_like}):
        inside = demo.logit_lens(TEXT)
        expected = demo.run(TEXT).output[0]
    np.testing.assert_allclose(inside.logits(5), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(inside.logits(5), demo.logit_lens(TEXT).logits(5), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, r"layers must be of -3 to 2, not \[3\]"),
        ({"layers": []}, "layers must be of"),
        ({"position": 6}, "position must be of -6 to 5, because the text has 6 tokens"),
        ({"position": []}, "position must be of"),
        ({"top_k": 0}, "top_k must be 1 to 96, not 0"),
        ({"top_k": 97}, "top_k must be 1 to 96, not 97"),
        ({"final_norm": nn.RMSNorm(32), "skip_norm": True}, "final_norm is not used"),
        ({"final_norm": nn.Linear(32, 8)}, r"final_norm must keep the shape \[18, 32\]"),
    ],
)
def test_what_cannot_be_read_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        llama().logit_lens(IDS, **options)


def test_a_norm_that_is_no_module_cannot_be_replaced():
    model = InterpretableModel(build("nanochat"))
    with pytest.raises(ValueError, match="no final norm that is a module"):
        model.logit_lens(IDS, skip_norm=True)


def test_no_tokenizer_no_texts():
    lens = llama().logit_lens(IDS)
    assert lens.texts == tuple(map(str, IDS))
    token, _, text = lens[0][0][0]
    assert text == str(token)
    with pytest.raises(ValueError, match="token must be"):
        lens.rank(96)


def test_it_can_be_seen(demo):
    lens = demo.logit_lens(TEXT)
    lines = repr(lens).splitlines()
    assert lines[0] == "Logit lens: the likeliest token after each layer"
    assert lines[1].split() == [
        "layer",
        *["<|bos|>", "The", "function", "return", "s", "the", "number", "of"],
    ]
    assert len(lines) == 8 and lines[-1].split()[-2:] == ["of", "the"]
    assert "⏎" in repr(demo.logit_lens("x = 1\n"))
    table = checked(lens._repr_html_())
    assert table.cells[0][:2] == ["layer", "<|bos|>"] and len(table.cells) == 7
    one = demo.logit_lens(TEXT, position=-1, top_k=3)
    assert repr(one).splitlines()[1].split() == ["layer", "1.", "2.", "3."]
    found = lens.to_dict()
    assert found["layers"][5][-1] == [
        dict(zip(("id", "logit", "text"), lens[5][-1][0], strict=True))
    ]
    assert found["tokens"] == demo.encode(TEXT) and found["positions"] == [*range(8)]


def test_it_can_be_plotted(demo):
    plain = demo.logit_lens(TEXT)
    assert plain.figure is None
    lens = demo.logit_lens(TEXT, plot=True, max_display_tokens=3, figsize=(7, 4), cmap="magma")
    assert lens == plain
    assert lens.figure.get_size_inches().tolist() == [7, 4]
    ax = lens.figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == [" the", " number", " of"]
    assert ax.get_images()[0].get_cmap().name == "magma"
    assert [label.get_text() for label in ax.get_yticklabels()] == list("543210")
    serif = lens.plot(font_family="DejaVu Serif").axes[0].get_xticklabels()[0]
    assert serif.get_fontfamily()[0] == "DejaVu Serif"
    with pytest.raises(ValueError, match="max_display_tokens must be at least 1"):
        lens.plot(max_display_tokens=0)
