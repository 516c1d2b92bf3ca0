import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.harvest import NormLimits, harvest
from mlxterp.sae.source import find_site
from tests.fakes import BOS, EOS, FIRST, SITE, FakeSource, counts_passes

COLUMNS = Columns((SITE,), (6,))


def ids(text: str) -> list[int]:
    return [FIRST + ord(character) - ord(" ") for character in text]


def harvested(source, corpus, contexts=None, limits=None):
    contexts = np.arange(len(corpus)) if contexts is None else contexts
    return list(harvest(source, corpus, COLUMNS, contexts, limits))


def letters(found) -> list[int]:
    return [int(i) for part in found for i in part.activations[:, 0].tolist()]


def test_it_yields_the_activations_of_the_tokens_that_count():
    source = FakeSource()
    corpus = Corpus.from_documents(source, ["abc", "defgh", "xy"], 6)
    order = np.array([1, 2, 0])
    found = harvested(source, corpus, order)
    activations = np.concatenate([np.array(part.activations) for part in found])
    positions = np.concatenate([part.positions for part in found])
    tokens, counts = corpus.tokens[order], corpus.documents(order) >= 0
    assert activations[:, 0].tolist() == tokens[counts].tolist()
    assert not {BOS, EOS} & set(activations[:, 0].tolist())
    np.testing.assert_array_equal(activations, np.array(source.table)[tokens[counts]])
    # Positions say where in the corpus each one is from.
    np.testing.assert_array_equal(corpus.tokens.reshape(-1)[positions], tokens[counts])
    owners = corpus.documents(order)[counts]
    np.testing.assert_array_equal(corpus.owners.reshape(-1)[positions], owners)
    assert len(set(positions.tolist())) == corpus.n_tokens


def test_activations_that_are_not_finite_are_left_out_and_counted():
    source = FakeSource(not_finite="e")
    corpus = Corpus.from_documents(source, ["abc", "defgh", "e"], 6)
    found = harvested(source, corpus)
    assert letters(found) == ids("abcdfgh")
    positions = np.concatenate([part.positions for part in found])
    assert corpus.tokens.reshape(-1)[positions].tolist() == ids("abcdfgh")
    assert corpus.owners.reshape(-1)[positions].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert sum(part.n_not_finite for part in found) == 2
    assert sum(part.n_outliers for part in found) == 0


@counts_passes
def test_forward_passes_hold_about_4096_tokens():
    source = FakeSource()
    corpus = Corpus.from_documents(source, ["a" * 15] * 600, 16)
    found = harvested(source, corpus)
    assert source.passes == 3 and sum(len(part.positions) for part in found) == 9000


@counts_passes
def test_all_forwards_of_a_corpus_are_of_one_size():
    """The last contexts are few, and of those before them not all positions count."""
    source = FakeSource()
    corpus = Corpus.from_documents(source, ["a" * (1 + i % 40) for i in range(600)], 16)
    few = len(corpus) % 256
    assert few and len(corpus) > 512
    for contexts in (np.arange(len(corpus)), np.arange(few)):
        found = harvested(source, corpus, contexts)
        assert {len(part.computed) for part in found} == {4096}
        assert sum(len(part.rows) for part in found) == (corpus.documents(contexts) >= 0).sum()


@counts_passes
def test_no_more_than_one_forward_is_ahead_of_what_is_looked_at():
    source = FakeSource()
    corpus = Corpus.from_documents(source, ["a" * 15] * 256 * 6, 16)
    passes = [source.passes for _ in harvest(source, corpus, COLUMNS, np.arange(len(corpus)))]
    assert passes == [2, 3, 4, 5, 6, 6]


def test_a_site_that_is_not_one_vector_per_token_is_refused():
    class Heads(FakeSource):
        def run(self, tokens, **options):
            found = super().run(tokens, **options)
            found[SITE] = found[SITE].reshape(*tokens.shape, 2, 3)
            return found

    corpus = Corpus.from_documents(FakeSource(), ["abc"], 6)
    with pytest.raises(ValueError, match=rf"{SITE} must be one vector per token.*\[1, 6, 2, 3\]"):
        harvested(Heads(), corpus)


# --- outliers


class Tall(FakeSource):
    """`~` is an outlier: its activation is long, all others have norms from 1 to 2."""

    def __init__(self, length=100.0, **options):
        super().__init__(**options)
        table = np.random.default_rng(1).normal(size=self.table.shape)
        norms = 1 + np.arange(len(table)) / len(table)
        norms[ids("~")] = length
        table *= (norms / np.linalg.norm(table, axis=1))[:, None]
        self.table = mx.where(mx.isfinite(self.table), mx.array(table.astype(np.float32)), np.nan)


def test_limits_are_multiples_of_the_median_norm():
    source = Tall(not_finite="#")
    texts = ["abcdefg", "hijkl~mn#o", "pqrstuvw"]
    corpus = Corpus.from_documents(source, texts, 8)
    limits = NormLimits.measure(source, corpus, COLUMNS, 5.0, drop=True)
    table = np.array(source.table, np.float64)
    norms = np.linalg.norm(table[ids("".join(texts).replace("#", ""))], axis=1)
    assert limits.drop and limits.limits == pytest.approx([5 * np.quantile(norms, 0.5)], rel=1e-5)


def test_limits_are_measured_over_all_of_the_corpus_in_one_forward():
    source = Tall()
    corpus = Corpus.from_documents(source, ["a" * 15] * 600 + ["z" * 15] * 600, 16)
    (limit,) = NormLimits.measure(source, corpus, COLUMNS, 1.0, drop=False).limits
    low, high = np.linalg.norm(np.array(source.table)[ids("az")], axis=1)
    assert source.passes == 1 and low * 0.999 < limit < high * 1.001
    few = Corpus.from_documents(source, ["z" * 15] * 700 + ["a" * 15] * 500, 16)
    (limit,) = NormLimits.measure(source, few, COLUMNS, 1.0, drop=False).limits
    assert limit == pytest.approx(high, rel=1e-5)


@pytest.mark.parametrize("drop", [True, False])
def test_outliers_are_counted_and_dropped_on_request(drop):
    source = Tall(not_finite="#")
    text = "ab~cd#ef~~g#~"
    corpus = Corpus.from_documents(source, [text], 8)
    found = harvested(source, corpus, limits=NormLimits((10.0,), drop))
    assert sum(part.n_outliers for part in found) == 4
    assert sum(part.n_not_finite for part in found) == 2
    positions = np.concatenate([part.positions for part in found])
    kept = text.replace("#", "").replace("~", "" if drop else "~")
    assert corpus.tokens.reshape(-1)[positions].tolist() == ids(kept)
    activations = np.concatenate([np.array(part.activations) for part in found])
    np.testing.assert_array_equal(activations, np.array(source.table)[ids(kept)])


def test_an_outlier_at_any_site_is_one():
    class TwoSites(Tall):
        def site(self, layer, component=None):
            return layer

        def run(self, tokens, **options):
            hidden = super().run(tokens, **{**options, "capture": [SITE]})[SITE]
            longer = mx.where(mx.array(tokens) == ids("a")[0], 100, 1)
            return {"a": hidden, "b": hidden * longer[..., None]}

    source, columns = TwoSites(), Columns(("a", "b"), (6, 6))
    corpus = Corpus.from_documents(source, ["xa~y"], 8)
    (found,) = harvest(source, corpus, columns, [0], NormLimits((10.0, 1e6), drop=True))
    assert found.n_outliers == 1
    (found,) = harvest(source, corpus, columns, [0], NormLimits((10.0, 10.0), drop=True))
    assert found.n_outliers == 2
    assert corpus.tokens.reshape(-1)[found.positions].tolist() == ids("xy")


# --- sites


def test_a_site_is_found_by_layer_or_by_its_whole_name():
    source = FakeSource()
    assert find_site(source, 0) == find_site(source, 0, "mlp") == find_site(source, SITE) == SITE
    with pytest.raises(ValueError, match="no site 'layers.0.attn'"):
        find_site(source, 0, "attn")


@pytest.mark.parametrize("layer", [2, np.int64(2)])
def test_a_layer_number_alone_means_its_mlp(model, layer):
    assert str(find_site(model, layer)) == "layers.2.mlp"


def test_the_bundled_model_is_an_activation_source(model):
    corpus = Corpus.from_documents(model, ["Hello world.", "Another text"], 8)
    site = str(model.site(2, "mlp"))
    found = list(harvest(model, corpus, Columns((site,), (128,)), np.arange(len(corpus))))
    assert sum(len(part.positions) for part in found) == corpus.n_tokens
    full = model.run(mx.array(corpus.tokens), capture=[site])[site]
    expected = np.array(full.reshape(-1, 128))[(corpus.documents() >= 0).reshape(-1)]
    activations = np.concatenate([np.array(part.activations) for part in found])
    np.testing.assert_allclose(activations, expected, atol=1e-5)
    assert not model.special_token_ids & set(corpus.tokens[corpus.documents() >= 0].tolist())
