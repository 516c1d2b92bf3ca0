import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.coder import Columns, SparseCoder, check_feature
from tests.sae.kinds import KINDS, dense_decoder, dense_encoder, make

AB = Columns(("a", "b"), (2, 3))


def random_coder(reads=AB, writes=AB, n_features=20, k=4, name="topk") -> SparseCoder:
    coder = SparseCoder(reads, writes, n_features, activation_function=name, k=k)
    rng = np.random.default_rng(0)
    for owner, names in (
        (coder, ("W_enc", "b_enc", "W_dec", "b_dec")),
        (coder.activation_function, list(coder.activation_function.arrays)),
    ):
        for part in names:
            owner[part] = mx.array(rng.normal(size=owner[part].shape).astype(np.float32))
    return coder


def by_hand(coder: SparseCoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    W_enc, b_enc, W_dec, b_dec = (
        np.array(coder[name], np.float64) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    pre = x.astype(np.float64) @ W_enc.T + b_enc
    smallest = np.sort(pre, axis=-1)[..., -coder.k, None]
    z = np.where(pre >= smallest, np.maximum(pre, 0), 0)
    return z, z @ W_dec + b_dec


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_follows_the_formula_of_dense_matrices(kind):
    coder, rng = make(kind, "relu"), np.random.default_rng(2)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", *(["W_skip"] if coder.has_skip else [])):
        coder[name] = mx.array(rng.normal(size=coder[name].shape).astype(np.float32))
    W_enc, W_dec = dense_encoder(coder).astype(np.float64), dense_decoder(coder).astype(np.float64)
    x = rng.normal(size=(7, coder.d_in))
    z = np.maximum(x @ W_enc.T + np.array(coder.b_enc), 0)
    y = z @ W_dec + np.array(coder.b_dec)
    total = y + (x @ np.array(coder.W_skip).T if coder.has_skip else 0)
    x32 = mx.array(x.astype(np.float32))
    near = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(np.array(coder.encode(x32)), z, **near)
    np.testing.assert_allclose(np.array(coder.decode(mx.array(z.astype(np.float32)))), y, **near)
    np.testing.assert_allclose(np.array(coder(x32)), total, **near)
    for i, block in enumerate(coder.blocks):
        z_block = np.array(coder.encode_block(i, x32[:, block.reads]))
        np.testing.assert_allclose(z_block, z[:, block.features], **near)
    for i in range(coder.n_features):
        np.testing.assert_allclose(np.array(coder.direction(i)), W_dec[i])
    norms = [np.linalg.norm(W_dec[:, part], axis=1) for part in coder.writes.slices.values()]
    np.testing.assert_allclose(np.array(coder.decoder_norms()), np.stack(norms, 1), **near)
    parts = coder.decoder_blocks()
    assert mx.array_equal(coder.joined_decoder(parts), coder.W_dec)


def test_a_cross_layer_transcoder_stores_no_zero_blocks():
    coder = make("cross-layer transcoder")
    assert coder.W_enc.shape == (30, 6)
    assert coder.W_dec.size == 15 * (5 + 5) + 15 * 5
    assert not dense_decoder(coder.update({"W_dec": mx.ones((45, 5))}))[15:, :5].any()


def test_columns_of_sites_lie_side_by_side():
    joined = AB.join({"b": mx.ones((4, 3)), "a": mx.zeros((4, 2))})
    assert joined[0].tolist() == [0, 0, 1, 1, 1]
    assert AB.width == 5 and AB.slices == {"a": slice(0, 2), "b": slice(2, 5)}
    assert AB.take(mx.arange(5)[None], ("b",)).tolist() == [[2, 3, 4]]
    assert AB.take(mx.arange(5)[None], ("b", "a")).tolist() == [[2, 3, 4, 0, 1]]
    assert AB.to_list() == [{"site": "a", "width": 2}, {"site": "b", "width": 3}]


def test_the_columns_of_one_site_stand_alone():
    assert AB.only("b") == Columns(("b",), (3,)) and AB.only("b").slices == {"b": slice(0, 3)}
    with pytest.raises(ValueError, match=r"\['c'\] are missing; there are \['a', 'b'\]"):
        AB.only("c")


def test_columns_are_joined_picked_and_looked_for():
    other = Columns(("b", "c"), (3, 4))
    assert AB.union(other) == Columns(("a", "b", "c"), (2, 3, 4))
    assert AB.union(other).those(("c", "a")) == Columns(("c", "a"), (4, 2))
    assert AB.has(AB.only("b")) and not AB.has(other)
    assert not AB.has(Columns(("b",), (4,)))


def test_a_missing_site_is_named():
    with pytest.raises(ValueError, match=r"\['b'\] are missing; there are \['a'\]"):
        AB.join({"a": mx.zeros((4, 2))})
    with pytest.raises(ValueError, match=r"\['c'\] are missing; there are \['a', 'b'\]"):
        AB.take(mx.zeros((4, 5)), ("c",))


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)])
def test_codes_and_reconstructions_follow_the_formula(shape):
    coder = random_coder()
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    z, y = by_hand(coder, x)
    np.testing.assert_allclose(np.array(coder.encode(mx.array(x))), z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(coder(mx.array(x))), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(coder.encode(x)), z, rtol=1e-4, atol=1e-5)
    assert z.any() and (z != 0).sum(axis=-1).max() <= 4


def test_a_mapping_of_sites_and_a_joined_array_have_the_same_code():
    coder = random_coder()
    x = mx.random.normal((6, 5), key=mx.random.key(0))
    parts = {"b": x[:, 2:], "a": x[:, :2]}
    assert mx.array_equal(coder.encode(parts), coder.encode(x))
    assert mx.array_equal(coder(parts), coder(x))


def test_a_coder_may_write_other_sites_than_it_reads():
    coder = random_coder(reads=Columns(("a",), (2,)), writes=Columns(("b",), (3,)))
    assert (coder.d_in, coder.d_out, coder.n_features, coder.k) == (2, 3, 20, 4)
    assert coder(mx.ones((7, 2))).shape == (7, 3)


def test_half_precision_is_encoded_in_the_precision_of_the_coder():
    coder = random_coder()
    x = mx.random.normal((6, 5), key=mx.random.key(0)).astype(mx.bfloat16)
    assert mx.array_equal(coder.encode(x), coder.encode(x.astype(mx.float32)))


@pytest.mark.parametrize("shape", [(4,), (3, 6), ()])
def test_another_width_is_an_error_with_both_shapes(shape):
    coder = random_coder()
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 5\], got"):
        coder.encode(mx.zeros(shape))
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 20\], got"):
        coder.decode(mx.zeros(shape))


@pytest.mark.parametrize("k", [0, 21, -1])
def test_k_must_be_within_the_number_of_features(k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, n_features = 20\], got {k}"):
        SparseCoder(AB, AB, 20, k=k)


def test_an_unknown_activation_function_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"activation_function must be one of .*got 'sigmoid'"
    ) as e:
        SparseCoder(AB, AB, 20, activation_function="sigmoid", k=3)
    assert all(repr(name) in str(e.value) for name in ARRAYS)


# The arrays that an activation function has of its own.
ARRAYS = {
    "topk": (), "abs_topk": (), "batch_topk": ("threshold",), "relu": (),
    "jumprelu": ("threshold",), "gated": ("log_gain", "offset"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_only_the_arrays_are_parameters(name):
    parameters = dict(random_coder(name=name).parameters())
    assert set(parameters.pop("activation_function")) == set(ARRAYS[name])
    assert set(parameters) == {"W_enc", "b_enc", "W_dec", "b_dec", "site_scale"}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("shape", [(5,), (0, 5), (7, 5), (2, 3, 5)])
def test_every_activation_function_codes_tokens_one_by_one(name, shape):
    coder = random_coder(name=name)
    x = mx.random.normal(shape, key=mx.random.key(0))
    z = coder.encode(x)
    assert z.shape == (*shape[:-1], 20) and coder(x).shape == shape
    for row, code in zip(x.reshape(-1, 5), z.reshape(-1, 20), strict=True):
        np.testing.assert_allclose(np.array(coder.encode(row)), np.array(code), atol=1e-5)
    if x.size:
        assert 0 < (z != 0).sum().item() < z.size


@pytest.mark.parametrize("name", ARRAYS)
def test_k_is_that_of_functions_that_select(name):
    selects = name in ("topk", "abs_topk", "batch_topk")
    assert random_coder(name=name).k == (4 if selects else None)
    if selects:
        with pytest.raises(ValueError, match=r"k must be in \[1, n_features = 20\], got None"):
            random_coder(name=name, k=None)
    else:
        assert random_coder(name=name, k=None).n_features == 20


def test_a_code_of_numpy_is_decoded():
    z = np.eye(20, dtype=np.float32)
    found = random_coder().decode(z)
    assert isinstance(found, mx.array) and mx.array_equal(found, random_coder().decode(mx.array(z)))


@pytest.mark.parametrize("feature", [-1, 20, 10**6, 1.5, True])
def test_an_unknown_feature_is_an_error_with_the_range(feature):
    with pytest.raises(ValueError, match=rf"feature_id must be in \[0, 19\], got {feature}"):
        check_feature(random_coder(), feature)


def test_feature_ids_of_numpy_are_taken():
    assert check_feature(random_coder(), np.int64(5)) == 5
