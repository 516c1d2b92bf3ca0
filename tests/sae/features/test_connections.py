import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.features import connections
from mlxterp.sae.features.connections import Connection, input_invariant_weights, reads, writes
from mlxterp.sae.features.logit_effects import logit_effects
from tests.fakes import FakeSource

WIDTH = 128


def columns(*names: str, width: int = WIDTH) -> Columns:
    return Columns(names, (width,) * len(names))


def randomised(coder: SparseCoder, seed: int) -> SparseCoder:
    for i, name in enumerate(("W_enc", "b_enc", "W_dec", "b_dec")):
        coder[name] = mx.random.normal(coder[name].shape, key=mx.random.key(10 * seed + i))
    return coder


def transcoder(read: str, write: str, n_features: int, seed: int = 0) -> SparseCoder:
    return randomised(SparseCoder(columns(read), columns(write), n_features, k=3), seed)


def cross_layer(layers=(1, 2, 4), each: int = 10) -> CrossLayerTranscoder:
    of = ([f"layers.{i}.{name}" for i in layers] for name in ("mlp_in", "mlp_out"))
    reads, writes = (columns(*names) for names in of)
    return randomised(CrossLayerTranscoder(reads, writes, each * len(layers), k=3), 5)


def products(earlier: SparseCoder, later: SparseCoder) -> np.ndarray:
    W_dec, W_enc = (np.array(array, np.float64) for array in (earlier.W_dec, later.W_enc))
    return W_dec @ W_enc.T


EARLIER = transcoder("layers.1.mlp_in", "layers.1.mlp_out", 30)
LATER = transcoder("layers.3.mlp_in", "layers.3.mlp_out", 50, seed=1)


def test_weights_are_the_products_of_decoder_and_encoder_rows():
    found = input_invariant_weights(EARLIER, LATER, top_k=40)
    expected = products(EARLIER, LATER)
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-4, atol=1e-4)
    assert found.rms == pytest.approx(np.sqrt(np.mean(expected**2)), rel=1e-5)
    order = np.argsort(-np.abs(expected), axis=None)[:40]
    pairs = [(c.earlier, c.later) for c in found.connections]
    assert pairs == [tuple(map(int, np.unravel_index(i, expected.shape))) for i in order]
    for c in found.strongest(5):
        assert c.weight == pytest.approx(expected[c.earlier, c.later], rel=1e-5)
    assert len(found.strongest(5)) == 5 and len(found.strongest(1000)) == 40


def test_in_blocks_and_without_the_matrix_the_strongest_are_the_same(monkeypatch):
    whole = input_invariant_weights(EARLIER, LATER, top_k=40)
    monkeypatch.setattr(connections, "ROWS_PER_BLOCK", 7)
    monkeypatch.setattr(connections, "LARGEST_MATRIX", 0)
    found = input_invariant_weights(EARLIER, LATER, top_k=40)
    assert found.matrix is None
    assert found.rms == pytest.approx(whole.rms, rel=1e-6)
    assert [(c.earlier, c.later) for c in found.connections] == [
        (c.earlier, c.later) for c in whole.connections
    ]


def test_heads_before_the_output_projection_are_not_connected():
    heads = transcoder("layers.1.attn_z", "layers.1.attn_z", 30)
    with pytest.raises(ValueError, match=r"Nothing that .* writes, layers\.1\.attn_z"):
        input_invariant_weights(heads, LATER)


def test_there_are_no_more_connections_than_pairs():
    small = transcoder("layers.3.mlp_in", "layers.3.mlp_out", 3)
    assert len(input_invariant_weights(EARLIER, small).connections) == 90


def test_the_weight_is_what_a_feature_adds_to_a_later_one(model):
    later = transcoder("layers.2.resid_pre", "layers.2.resid_pre", 20)
    weights = input_invariant_weights(EARLIER, later).matrix
    row = EARLIER.W_dec[4]
    site = "layers.2.resid_pre"
    plain, steered = (
        later.pre_activations(model.run("some text here", capture=[site], edit=edit)[site])
        for edit in (None, {"layers.1.mlp_out": lambda x: x + 3 * row})
    )
    expected = np.broadcast_to(3 * weights[4], plain.shape)
    np.testing.assert_allclose(np.array(steered - plain), expected, rtol=1e-3, atol=1e-3)


def test_through_a_norm_it_is_that_divided_by_the_norm(model):
    later = transcoder("layers.2.attn_in", "layers.2.attn_out", 20)
    later.b_enc = mx.zeros_like(later.b_enc)
    norm = model.model.layers[2].input_layernorm
    norms = {"layers.2.attn_in": norm.weight}
    weights = input_invariant_weights(EARLIER, later, norm_weights=norms).matrix
    pre = []
    for edit in (None, {"layers.1.mlp_out": lambda x: x + 3 * EARLIER.W_dec[4]}):
        done = model.run("some text", capture=["layers.2.attn_in", "layers.2.resid_pre"], edit=edit)
        size = mx.sqrt(done["layers.2.resid_pre"].square().mean(-1, keepdims=True) + norm.eps)
        pre.append(later.pre_activations(done["layers.2.attn_in"]) * size)
    expected = np.broadcast_to(3 * weights[4], pre[0].shape)
    np.testing.assert_allclose(np.array(pre[1] - pre[0]), expected, rtol=1e-3, atol=1e-3)
    bare = input_invariant_weights(EARLIER, later).matrix
    assert not np.allclose(bare, weights, rtol=0.01)


def test_layers_drive_later_layers_alone():
    made = cross_layer()
    found = input_invariant_weights(made, made).matrix
    W_enc = np.array(made.W_enc, np.float64)
    decoders = [np.array(rows, np.float64) for rows in made.decoder_blocks()]
    expected = np.zeros((30, 30))
    for block, rows in enumerate(decoders):
        for layer in range(block + 1, 3):
            # What the block writes from its own layer up to the one before.
            added = sum(rows[:, 128 * i : 128 * i + 128] for i in range(layer - block))
            own = slice(10 * layer, 10 * layer + 10)
            expected[10 * block : 10 * block + 10, own] = added @ W_enc[own].T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert (expected != 0).sum() == 300


def test_a_crosscoder_is_driven_at_every_site_that_comes_later():
    a, b = "layers.1.resid_pre", "layers.2.resid_pre"
    later = randomised(SparseCoder(columns(b, a), columns(b, a), 20, k=3), 3)
    found = input_invariant_weights(EARLIER, later).matrix
    expected = np.array(EARLIER.W_dec, np.float64) @ np.array(later.W_enc[:, :128], np.float64).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    both = transcoder("layers.0.mlp_in", "layers.0.mlp_out", 30)
    expected = np.array(both.W_dec, np.float64) @ (
        np.array(later.W_enc[:, :128] + later.W_enc[:, 128:], np.float64).T
    )
    found = input_invariant_weights(both, later).matrix
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_feature_reads_what_the_matrix_says():
    weights = input_invariant_weights(EARLIER, LATER).matrix
    found = reads(LATER, 17, EARLIER, top_k=4)
    order = np.argsort(-weights[:, 17])
    assert [i for i, _ in found.top] == order[:4].tolist()
    assert [i for i, _ in found.bottom] == order[::-1][:4].tolist()
    assert [w for _, w in found.top] == pytest.approx(weights[order[:4], 17], rel=1e-4)


def test_a_feature_writes_what_the_matrix_says():
    made = cross_layer()
    weights = input_invariant_weights(made, made).matrix
    found = writes(made, 12, made, top_k=3)
    order = np.argsort(-weights[12])
    assert [i for i, _ in found.top] == order[:3].tolist()
    assert all(i >= 20 for i, _ in (*found.top, *found.bottom))
    alone = writes(made, 2, made, site="layers.2.mlp_out", top_k=1).top[0]
    row = made.decoder_blocks()[0][2, 128:256]
    assert alone[1] == pytest.approx(float((made.W_enc[20:] @ row).max().item()), rel=1e-4)


def test_a_site_that_a_feature_does_not_write_is_an_error():
    made = cross_layer()
    with pytest.raises(ValueError, match=r"writes \['layers.2.mlp_out', .* got site='layers.1"):
        writes(made, 12, made, site="layers.1.mlp_out")


def test_the_tokens_a_feature_reads_are_those_whose_embedding_drives_it(model):
    embedding = np.array(model.model.model.embed_tokens.weight, np.float64)
    weights = embedding @ np.array(LATER.W_enc[3], np.float64)
    found = reads(LATER, 3, model, top_k=6)
    order = np.argsort(-weights)
    assert [name for name, _ in found.top] == model.to_str_tokens(order[:6].tolist())
    assert [w for _, w in found.top] == pytest.approx(weights[order[:6]], rel=1e-4)
    assert [w for _, w in found.bottom] == pytest.approx(weights[order[::-1][:6]], rel=1e-4)


def test_a_norms_weight_counts_for_tokens_too(model):
    norm = model.model.layers[3].post_attention_layernorm.weight
    embedding = np.array(model.model.model.embed_tokens.weight, np.float64)
    weights = embedding @ np.array(LATER.W_enc[3] * norm, np.float64)
    found = reads(LATER, 3, model, top_k=1, norm_weights={"layers.3.mlp_in": norm})
    assert found.top[0][1] == pytest.approx(weights.max(), rel=1e-4)


def test_the_tokens_a_feature_writes_are_those_of_the_models_own_head(model):
    effects = logit_effects(EARLIER, model, 9, top_k=5)
    found = writes(EARLIER, 9, model, top_k=5)
    assert (found.top, found.bottom) == (effects.top, effects.bottom)


def test_what_comes_too_late_is_an_error():
    with pytest.raises(ValueError, match=r"layers.3.mlp_out .* before .* layers.1.mlp_in"):
        input_invariant_weights(LATER, EARLIER)


def test_other_models_are_not_connected():
    a = transcoder("base:layers.1.mlp_in", "base:layers.1.mlp_out", 5)
    b = transcoder("tuned:layers.2.mlp_in", "tuned:layers.2.mlp_out", 5)
    with pytest.raises(ValueError, match="before what the later"):
        input_invariant_weights(a, b)


def test_sites_of_unknown_place_are_taken_as_they_are_given():
    a, b = transcoder("x", "y", 5), transcoder("u", "v", 6, seed=1)
    found = input_invariant_weights(a, b).matrix
    np.testing.assert_allclose(found, products(a, b), rtol=1e-4, atol=1e-4)


def test_other_widths_are_an_error(model):
    narrow = randomised(SparseCoder(columns("a", width=6), columns("b", width=6), 5, k=2), 0)
    with pytest.raises(ValueError, match="has width 6, layers.3.mlp_in has 128"):
        input_invariant_weights(narrow, LATER)
    with pytest.raises(ValueError, match="reads a width of 6, and embeddings have 128"):
        reads(narrow, 0, model)


def test_the_weights_norms_and_sizes_are_checked():
    with pytest.raises(ValueError, match=r"\['layers.9.mlp_in'\] are missing"):
        input_invariant_weights(EARLIER, LATER, norm_weights={"layers.9.mlp_in": mx.ones((128,))})
    with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
        input_invariant_weights(EARLIER, LATER, top_k=0)
    with pytest.raises(ValueError, match=r"feature_id must be in \[0, 49\], got 50"):
        reads(LATER, 50, EARLIER)
    with pytest.raises(ValueError, match="vocab_size"):
        reads(LATER, 3, FakeSource())


def test_results_can_be_read_and_saved():
    found = input_invariant_weights(EARLIER, LATER, top_k=12)
    assert "30 earlier x 50 later features" in repr(found) and len(repr(found).splitlines()) == 11
    assert repr(Connection(3, 4, -1.5)) == "3 -> 4: -1.500"
    plain = found.to_dict()
    assert set(plain) == {"n_earlier", "n_later", "rms", "connections"}
    assert plain["connections"][0] == {
        "earlier": found.connections[0].earlier,
        "later": found.connections[0].later,
        "weight": found.connections[0].weight,
    }
    shown = reads(LATER, 17, EARLIER)
    assert repr(shown).startswith("features that feature 17 reads\n  + ")
    assert len(shown.to_dict()["top"]) == 10


def test_the_strongest_can_be_looked_at():
    pytest.importorskip("matplotlib")
    found = input_invariant_weights(EARLIER, LATER, top_k=12)
    (axes,) = found.plot(5).axes
    assert [bar.get_width() for bar in axes.containers[0]] == [c.weight for c in found.strongest(5)]
    first = found.connections[0]
    assert axes.get_yticklabels()[0].get_text() == f"{first.earlier} → {first.later}"
