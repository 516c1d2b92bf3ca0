import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset
from mlxterp.sae.coder import Block, Columns, SparseCoder
from mlxterp.sae.sharing import (
    decoder_cosines,
    delta_norms,
    relative_norms,
    sharing,
    site_batches,
)


def coder_of(norms, width: int = 4, seed: int = 0) -> SparseCoder:
    """A crosscoder whose decoder rows have these norms `[n_features, n_sites]`."""
    norms = np.array(norms, float)
    n, n_sites = norms.shape
    columns = Columns(tuple("abcdef"[:n_sites]), (width,) * n_sites)
    coder = SparseCoder(columns, columns, n, activation_function="relu")
    rows = np.random.default_rng(seed).normal(size=(n, n_sites, width))
    rows *= norms[..., None] / np.linalg.norm(rows, axis=-1, keepdims=True)
    coder.W_dec = mx.array(rows.reshape(n, -1).astype(np.float32))
    return coder


class Triangle(SparseCoder):
    """Two features of the first site, which write three, and so on: a cross-layer transcoder."""

    def make_blocks(self, n_features):
        return tuple(
            Block(slice(2 * i, 2 * i + 2), slice(4 * i, 4 * i + 4), slice(4 * i, 12), slice(i, 3))
            for i in range(3)
        )


def triangle() -> Triangle:
    columns = Columns(("a", "b", "c"), (4, 4, 4))
    coder = Triangle(columns, columns, 6, activation_function="relu")
    coder.W_dec = mx.random.normal(coder.W_dec.shape, key=mx.random.key(0))
    return coder


def test_relative_norms_are_shares_in_the_units_of_each_site():
    coder = coder_of([[1, 3], [2, 0], [0, 0]])
    np.testing.assert_allclose(
        relative_norms(coder), [[0.25, 0.75], [1, 0], [np.nan, np.nan]], rtol=1e-6
    )
    coder.site_scale = mx.array([3.0, 1.0])
    np.testing.assert_allclose(relative_norms(coder)[0], [0.5, 0.5], rtol=1e-6)
    several = coder_of(np.random.default_rng(1).uniform(0.1, 1, (9, 5)))
    np.testing.assert_allclose(relative_norms(several).sum(axis=1), 1)


def test_delta_norms_go_from_the_first_site_to_the_second():
    coder = coder_of([[1, 0], [0, 1], [1, 1], [1, 0.5], [0.5, 1], [0, 0]])
    expected = [0, 1, 0.5, 0.25, 0.75, np.nan]
    np.testing.assert_allclose(delta_norms(coder), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"two write sites, got a \(width 4\), b .*, c "):
        delta_norms(coder_of([[1, 1, 1]]))


def test_cosines_are_those_of_the_decoder_rows():
    coder = coder_of(np.random.default_rng(2).uniform(0.1, 2, (7, 3)), width=5)
    rows = np.array(coder.W_dec, np.float64).reshape(7, 3, 5)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    expected = np.einsum("nid,njd->nij", rows, rows)
    np.testing.assert_allclose(decoder_cosines(coder), expected, atol=1e-6)
    assert np.abs(expected[:, 0, 1]).max() > 0.1


def test_there_is_no_cosine_of_rows_that_are_zero_or_of_different_widths():
    cosines = decoder_cosines(coder_of([[1, 0]]))[0]
    np.testing.assert_allclose(cosines, [[1, np.nan], [np.nan, np.nan]], rtol=1e-6)
    columns = Columns(("a", "b"), (2, 3))
    coder = SparseCoder(columns, columns, 1, activation_function="relu")
    coder.W_dec = mx.ones((1, 5))
    np.testing.assert_allclose(decoder_cosines(coder)[0], [[1, np.nan], [np.nan, 1]], rtol=1e-6)


def test_features_of_blocks_have_cosines_at_the_sites_that_they_write():
    coder = triangle()
    cosines, rows = decoder_cosines(coder), np.stack([coder.direction(i) for i in range(6)])
    rows = rows.astype(np.float64).reshape(6, 3, 4)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        norms = np.linalg.norm(rows[:, i], axis=-1) * np.linalg.norm(rows[:, j], axis=-1)
        with np.errstate(invalid="ignore"):
            expected = (rows[:, i] * rows[:, j]).sum(axis=-1) / norms
        np.testing.assert_allclose(cosines[:, i, j], expected, atol=1e-6)
    assert np.isnan(cosines[2:, 0, 1]).all() and np.isfinite(cosines[:4, 1, 2]).all()


@pytest.mark.parametrize(
    "share, name",
    [(0.0, "only a"), (0.09, "only a"), (0.11, "partial"), (0.29, "partial"), (0.31, "shared"),
     (0.5, "shared"), (0.69, "shared"), (0.71, "partial"), (0.89, "partial"), (0.91, "only b")],
)  # fmt: skip
def test_two_sites_have_the_usual_bands(share, name):
    assert sharing(coder_of([[1 - share, share]])).classes.tolist() == [name]


def test_three_sites_have_bands_of_their_equal_share():
    norms = [[1, 1, 1], [0.21, 0.39, 0.4], [0.19, 0.4, 0.41], [0.5, 0.5, 0],
             [0.05, 0.04, 0.91], [0.06, 0.05, 0.89]]  # fmt: skip
    expected = ["shared", "shared", "partial", "partial", "only c", "partial"]
    assert sharing(coder_of(norms)).classes.tolist() == expected


def test_the_bands_can_be_set():
    coder = coder_of([[0.85, 0.15], [0.6, 0.4]])
    found = sharing(coder, specific=0.2, shared=0.9)
    assert found.classes.tolist() == ["only a", "partial"]
    for specific, shared in ((0, 0.6), (0.3, 0.6), (0.1, 1.1)):
        with pytest.raises(ValueError, match=f"got {specific} and {shared}"):
            sharing(coder, specific=specific, shared=shared)


def test_features_of_blocks_are_measured_by_the_sites_within_their_reach():
    coder = triangle()
    parts = [mx.array(np.array(p)) for p in coder.decoder_blocks()]
    ones = [mx.ones_like(p) for p in parts]
    coder.W_dec = coder.joined_decoder(ones)
    assert sharing(coder).classes.tolist() == ["shared"] * 4 + ["only c"] * 2


def test_features_that_write_nothing_or_never_fire_are_dead():
    coder = coder_of([[1, 1], [1, 0], [0, 0], [1, 1]])
    assert sharing(coder).classes.tolist() == ["shared", "only a", "dead", "shared"]
    coder.statistics = SimpleNamespace(firing_rates=np.array([0.0, 0.1, 0.1, 1e-6]))
    assert sharing(coder).classes.tolist() == ["dead", "only a", "dead", "shared"]
    coder.statistics = SimpleNamespace(firing_rates=np.zeros(0))
    assert sharing(coder).counts["dead"] == 1


def test_features_are_found_by_class_or_site():
    found = sharing(coder_of([[1, 1], [1, 0], [0, 1], [1, 1], [3, 1]]))
    assert found.features("shared").tolist() == [0, 3]
    assert found.features("a").tolist() == found.features("only a").tolist() == [1]
    assert found.features("partial").tolist() == [4] and not len(found.features("dead"))
    assert found.counts == {"shared": 2, "partial": 1, "only a": 1, "only b": 1, "dead": 0}
    with pytest.raises(ValueError, match=r"'only a', 'only b', 'dead'\] or a site, got 'c'"):
        found.features("c")


def test_a_coder_of_one_site_shares_nothing():
    columns = Columns(("a",), (4,))
    with pytest.raises(ValueError, match=r"several sites, got a \(width 4\)"):
        sharing(SparseCoder(columns, columns, 8, k=2))


def test_the_classes_can_be_read():
    found = sharing(coder_of([[1, 1], [1, 0], [1, 1]]))
    assert repr(found).splitlines()[0] == "3 features of 2 sites"
    assert "  shared          2  66.7%" in repr(found).splitlines()
    html = found._repr_html_()
    assert html.count("<tr") == 6 and html.count("<td") == 15 and "66.7%" in html
    assert json.loads(json.dumps(found.to_dict()))["classes"] == ["shared", "only a", "shared"]


def test_names_of_sites_are_escaped():
    columns = Columns(("<b>", "c"), (2, 2))
    coder = SparseCoder(columns, columns, 2, activation_function="relu")
    html = sharing(coder)._repr_html_()
    assert "only &lt;b&gt;" in html and "<b>" not in html


def test_two_sites_are_drawn_as_a_histogram_of_the_living():
    found = sharing(coder_of([[1, 1], [1, 0], [1, 1], [0, 0]]))
    (ax,) = found.plot().axes
    # The bars of a stack reach to the sum of those below them.
    assert max(bar.get_y() + bar.get_height() for bar in ax.patches) == 2
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["shared (2)", "only a (1)"]
    assert "at b" in ax.get_xlabel()


def test_more_sites_are_drawn_as_a_map_of_the_living():
    figure = sharing(coder_of([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]])).plot()
    image = figure.axes[0].get_images()[0].get_array()
    expected = [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 1]]
    np.testing.assert_allclose(image, expected, atol=1e-6)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_nothing_living_can_be_drawn():
    for n_sites in (2, 3):
        assert sharing(coder_of(np.zeros((2, n_sites)))).plot()._repr_png_()


def test_batches_hold_the_sites_by_name_and_no_more_tokens_than_asked_for():
    arrays = {s: np.full((5000, 4), i, np.float32) for i, s in enumerate("cab")}
    dataset = ActivationDataset.from_activations(arrays)
    coder = coder_of([[1, 1]])
    for most, total in ((None, 5000), (4500, 4500), (10, 10)):
        batches = list(site_batches(coder, dataset, most, ""))
        assert sum(len(x) for x, _ in batches) == sum(len(y) for _, y in batches) == total
    for array in batches[0]:
        assert array[0].tolist() == [1.0] * 4 + [2.0] * 4
    with pytest.raises(ValueError, match="max_tokens must be None or >= 1, got 0"):
        next(site_batches(coder, dataset, 0, ""))
    with pytest.raises(ValueError, match=r"missing; there are \['elsewhere'\]"):
        other = ActivationDataset.from_activations({"elsewhere": arrays["a"]})
        next(site_batches(coder, other, None, ""))
