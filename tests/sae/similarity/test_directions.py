import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.similarity import directions
from mlxterp.sae.similarity.directions import (
    Directions,
    chance_of_nearest,
    directions_of,
    needed,
    pair_of_directions,
)
from tests.sae.kinds import KINDS
from tests.sae.similarity.coders import drawn, random_units, sae_of, units


def matrix(own: Directions, theirs: Directions) -> np.ndarray:
    found = np.full((own.n_features, theirs.n_features), np.nan)
    for features, block in own.cosines(theirs):
        found[features] = np.array(block)
    return found


def sites_of(kind: str) -> list[tuple[str, str | None]]:
    coder = drawn(kind)
    return [(by, site) for by, columns in (("decoder", coder.writes), ("encoder", coder.reads))
            for site in (None, *columns.names)]  # fmt: skip


CASES = [(kind, *rest) for kind in KINDS for rest in sites_of(kind)]


@pytest.mark.parametrize("rows", [4, 4096])
@pytest.mark.parametrize(("kind", "by", "site"), CASES)
def test_cosines_are_those_of_the_dense_rows(kind, by, site, rows, monkeypatch):
    monkeypatch.setattr(directions, "BLOCK_ROWS", rows)
    coders = drawn(kind, 0), drawn(kind, 1, 40)
    own, theirs = (directions_of(coder, by, site) for coder in coders)
    expected = units(coders[0], by, site) @ units(coders[1], by, site).T
    np.testing.assert_allclose(matrix(own, theirs), expected, atol=1e-6)
    np.testing.assert_allclose(own.cosines_with(17, theirs), expected[17], atol=1e-6)
    a, b = np.indices(expected.shape).reshape(2, -1)
    pairs = own.cosines_of_pairs(a, theirs, b)
    np.testing.assert_allclose(pairs, expected[a, b], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_some_features_have_the_cosines_that_they_have_among_all(kind):
    own = directions_of(drawn(kind))
    some = np.array([2, 3, 11, 14, 29])
    taken = own.take(some)
    assert taken.n_features == 5
    np.testing.assert_allclose(matrix(taken, own), matrix(own, own)[some], atol=1e-6)


def test_blocks_bound_the_size_of_what_is_made(monkeypatch):
    monkeypatch.setattr(directions, "BLOCK_ENTRIES", 100)
    own = directions_of(drawn("sae"))
    shapes = [block.shape for _, block in own.cosines(own)]
    assert shapes == [(3, 30)] * 10


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_directions_in_their_columns(kind, monkeypatch):
    monkeypatch.setattr(directions, "BLOCK_ROWS", 4)
    coder = drawn(kind)
    own, found = directions_of(coder), np.zeros((30, coder.d_out))
    for ids, columns, rows in own.blocks():
        found[ids, columns] = np.array(rows)
    np.testing.assert_allclose(found, units(coder), atol=1e-6)


def test_a_zero_row_has_a_cosine_of_zero_with_everything():
    rows = random_units(6, 5)
    rows[2] = 0
    own = directions_of(sae_of(rows))
    found = matrix(own, own)
    assert not found[2].any() and not found[:, 2].any()
    np.testing.assert_allclose(np.delete(np.diag(found), 2), 1, atol=1e-6)


def test_rows_of_half_precision_are_compared_in_full():
    rows = random_units(20, 16)
    sae = sae_of(rows)
    sae.W_dec = sae.W_dec.astype(mx.bfloat16)
    kept = np.array(sae.W_dec.astype(mx.float32), np.float64)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    own = directions_of(sae)
    np.testing.assert_allclose(matrix(own, own), kept @ kept.T, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_random_directions_have_the_norms_of_the_features_at_each_site(kind):
    coder = drawn(kind)
    own = directions_of(coder)
    made = own.random(3)
    found = np.zeros((2, 30, coder.d_out))
    for i, one in enumerate((own, made)):
        for ids, columns, rows in one.blocks():
            found[i, ids, columns] = np.array(rows)
    for columns in coder.writes.slices.values():
        norms = np.linalg.norm(found[..., columns], axis=-1)
        np.testing.assert_allclose(norms[0], norms[1], atol=1e-5)
    assert np.abs((found[0] * found[1]).sum(axis=-1)).mean() < 0.8
    np.testing.assert_array_equal(matrix(made, own), matrix(own.random(3), own))
    assert not np.allclose(matrix(made, own), matrix(own.random(4), own))


@pytest.mark.parametrize("function", [lambda own: own, lambda own: own.random(0)])
def test_the_dimensions_of_a_feature_are_those_of_its_sites(function):
    columns = Columns(("a", "b"), (6, 10))
    coder = SparseCoder(columns, columns, 3, k=1)
    rows = np.zeros((3, 16), np.float32)
    rows[0, 0], rows[1, 9], rows[2, [0, 6]] = 5, 2, 1
    coder.W_dec = mx.array(rows)
    own = function(directions_of(coder))
    # Half of the squared norm each: 1 / (1/4 / 6 + 1/4 / 10).
    expected = [6, 10, 15]
    assert [own.dimensions(i) for i in range(3)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "width"), [(1, 8), (20, 3), (200, 32), (2000, 128)])
def test_chance_is_the_largest_cosine_of_random_directions(n, width):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(400, n, width)) if n < 300 else rng.normal(size=(20, n, width))
    largest = (rows[..., 0] / np.linalg.norm(rows, axis=-1)).max(axis=1)
    error = largest.std() * np.sqrt(1 / len(largest) + 1 / directions.CHANCE_DRAWS)
    assert abs(chance_of_nearest(n, width) - largest.mean()) < 4 * error


def test_chance_without_others_or_with_one_dimension():
    assert chance_of_nearest(0, 8) == 0
    assert chance_of_nearest(5, 1) == 1


def test_another_coder_is_compared_at_the_site_of_the_same_name_or_at_its_only_one():
    two = drawn("crosscoder")  # in.0 and out.0, of widths 6 and 5
    own, theirs = pair_of_directions(two, drawn("crosscoder", 1), "decoder", "out.0", None)
    assert own.sites == theirs.sites == Columns(("out.0",), (5,))
    own, theirs = pair_of_directions(two, drawn("sae"), "decoder", "in.0", None)
    assert theirs.sites == Columns(("in.0",), (6,))
    own, theirs = pair_of_directions(drawn("sae"), two, "decoder", None, "in.0")
    assert theirs.sites == own.sites
    # One site stands for the other where it is the only one, whatever its name.
    elsewhere = sae_of(random_units(9, 5))
    assert pair_of_directions(two, elsewhere, "decoder", "out.0", None)[1].sites.names == ("x",)


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match=r"by must be 'decoder' or 'encoder', got 'both'"):
        directions_of(drawn("sae"), "both")
    with pytest.raises(ValueError, match=r"\['out.0'\] are missing; there are \['in.0'\]"):
        directions_of(drawn("sae"), site="out.0")
    with pytest.raises(ValueError, match=r"same widths, got in.0 \(width 6\) and x \(width 5\)"):
        pair_of_directions(drawn("sae"), sae_of(random_units(9, 5)), "decoder", None, None)
    turned = [SparseCoder(Columns(names, (4, 4)), Columns(names, (4, 4)), 5, k=1)
              for names in (("a", "b"), ("b", "a"))]  # fmt: skip
    with pytest.raises(ValueError, match="in the same order, got a .* and b "):
        pair_of_directions(*turned, "decoder", None, None)


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(ImportError, match=r"nowhere is missing: pip install 'mlxterp\[analysis\]'"):
        needed("nowhere.inside")
    with pytest.raises(ImportError, match=r"other-name is missing: pip install 'mlxterp\[umap\]'"):
        needed("nowhere", "other-name", "umap")
