import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.coder import Columns
from mlxterp.sae.harvest import Corpus, find_site, harvest, rows_per_forward
from tests.fakes import BOS, EOS, FIRST, SITE, FakeSource


def ids(text: str) -> list[int]:
    return [FIRST + ord(character) - ord(" ") for character in text]


def corpus(texts, context=16, max_tokens=None, **options) -> Corpus:
    return Corpus.from_texts(FakeSource(**options), texts, context, max_tokens)


def test_rows_are_packed_and_only_text_counts():
    tokens, documents = corpus(["abc", "defgh"], context=6).rows
    assert tokens[0].tolist() == [BOS, *ids("abc"), BOS, *ids("d")]
    assert documents[0].tolist() == [-1, 0, 0, 0, -1, 1]
    assert tokens[1, :5].tolist() == [BOS, *ids("efgh")]
    assert documents[1].tolist() == [-1, 1, 1, 1, 1, -1]


def test_special_tokens_at_the_ends_and_within_never_count():
    class WithSpecials(FakeSource):
        def encode_batch(self, texts):
            return [[BOS, BOS, *ids("ab"), EOS, *ids("c"), EOS] for _ in texts]

    packed = Corpus.from_texts(WithSpecials(), ["any"], 8, None)
    tokens, documents = packed.rows
    assert packed.n_tokens == 3
    assert tokens[0, :5].tolist() == [BOS, *ids("ab"), EOS, *ids("c")]
    assert documents[0].tolist() == [-1, 0, 0, -1, 0, -1, -1, -1]


def test_without_a_first_token_rows_hold_text_only():
    tokens, documents = corpus(["abc", "de"], context=4, bos=False).rows
    assert tokens[0].tolist() == ids("abcd") and documents[0].tolist() == [0, 0, 0, 1]
    assert documents[1].tolist() == [1, -1, -1, -1]


def test_texts_without_tokens_are_left_out():
    assert len(corpus(["", "ab", ""], bos=False).documents) == 1
    assert len(corpus(["", "ab", ""]).documents) == 1


@pytest.mark.parametrize("texts", [[], [""], ["", ""], iter([])])
def test_no_token_at_all_is_an_error(texts):
    for bos in (True, False):
        with pytest.raises(ValueError, match="dataset is empty"):
            corpus(texts, bos=bos)


def test_one_string_in_place_of_a_list_is_an_error():
    with pytest.raises(ValueError, match="list of texts, got one string"):
        corpus("abc")


@pytest.mark.parametrize(("item", "name"), [(3, "int"), (None, "NoneType"), (b"ab", "bytes")])
def test_an_item_that_is_not_text_is_named_by_place_and_type(item, name):
    with pytest.raises(ValueError, match=f"item 2 is {name}"):
        corpus(["a", "b", item])


def test_max_tokens_cuts_exactly_and_reads_no_further():
    read = []

    def texts():
        for i in range(10**9):
            read.append(i)
            yield "abcdefg"

    limited = corpus(texts(), max_tokens=20)
    assert limited.n_tokens == 20
    assert [len(document) for document in limited.documents] == [7, 7, 6]
    assert len(read) <= 256


def test_split_is_by_document_and_loses_none():
    texts = [chr(ord("a") + i) * (5 + i % 7) for i in range(26)]
    whole = corpus(texts)
    training, held_out = whole.split(0.2, seed=3)
    letters = [{int(d[0]) for d in part.documents} for part in (training, held_out)]
    assert not letters[0] & letters[1] and len(letters[0] | letters[1]) == 26
    assert training.n_tokens + held_out.n_tokens == whole.n_tokens
    assert 0.1 < held_out.n_tokens / whole.n_tokens < 0.25
    again, other = whole.split(0.2, seed=3)[1], whole.split(0.2, seed=4)[1]
    assert [d.tolist() for d in again.documents] == [d.tolist() for d in held_out.documents]
    assert [d.tolist() for d in other.documents] != [d.tolist() for d in held_out.documents]


def test_split_keeps_a_document_that_is_nearly_everything_in_training():
    training, held_out = corpus(["x" * 500, "abc", "de"]).split(0.05, seed=0)
    assert training.n_tokens >= 500 and 2 <= held_out.n_tokens <= 5


@pytest.mark.parametrize(("share", "sizes"), [(0.2, (8, 2)), (0.001, (9, 1)), (0.999, (1, 9))])
def test_a_single_document_is_cut_in_two(share, sizes):
    parts = corpus(["abcdefghij"]).split(share, seed=0)
    assert tuple(part.n_tokens for part in parts) == sizes
    assert np.concatenate([part.documents[0] for part in parts]).tolist() == ids("abcdefghij")


def test_harvest_yields_the_activations_of_the_tokens_that_count():
    source = FakeSource()
    packed = Corpus.from_texts(source, ["abc", "defgh", "xy"], 6, None)
    order = np.array([1, 0])
    chunks = list(harvest(source, packed, Columns((SITE,), (6,)), order))
    activations = np.concatenate([np.array(chunk) for chunk, _ in chunks])
    owners = np.concatenate([owners for _, owners in chunks])
    tokens, documents = packed.rows
    counts = documents[order] >= 0
    assert activations[:, 0].tolist() == tokens[order][counts].tolist()
    assert owners.tolist() == documents[order][counts].tolist()
    assert not {BOS, EOS} & set(activations[:, 0].tolist())
    np.testing.assert_array_equal(activations, np.array(source.table)[tokens[order][counts]])


def test_harvest_leaves_out_activations_that_are_not_finite():
    source = FakeSource(not_finite="e")
    packed = Corpus.from_texts(source, ["abc", "defgh"], 6, None)
    chunks = list(harvest(source, packed, Columns((SITE,), (6,)), np.arange(2)))
    found = [i for chunk, _ in chunks for i in chunk[:, 0].tolist()]
    assert found == ids("abcdfgh")
    assert [o for _, owners in chunks for o in owners.tolist()] == [0, 0, 0, 1, 1, 1, 1]


def test_forward_passes_hold_about_4096_tokens():
    assert [rows_per_forward(context) for context in (16, 256, 5000)] == [256, 16, 1]
    source = FakeSource()
    packed = Corpus.from_texts(source, ["a" * 15] * 600, 16, None)
    chunks = list(harvest(source, packed, Columns((SITE,), (6,)), np.arange(600)))
    assert source.passes == 3 and sum(len(chunk) for chunk, _ in chunks) == 9000


def test_a_site_is_found_by_layer_or_by_its_whole_name():
    source = FakeSource()
    assert find_site(source, 0) == find_site(source, 0, "mlp") == find_site(source, SITE) == SITE
    with pytest.raises(ValueError, match="no site 'layers.0.attn'"):
        find_site(source, 0, "attn")


def test_the_bundled_model_is_an_activation_source(model):
    packed = Corpus.from_texts(model, ["Hello world.", "Another text"], 8, None)
    site = str(model.site(2, "mlp"))
    (chunk, owners), *rest = harvest(model, packed, Columns((site,), (128,)), np.arange(2))
    assert not rest and len(chunk) == packed.n_tokens == len(owners)
    tokens, documents = packed.rows
    full = model.run(mx.array(tokens), capture=[site])[site]
    expected = np.array(full.reshape(-1, 128))[(documents >= 0).reshape(-1)]
    np.testing.assert_allclose(np.array(chunk), expected, atol=1e-5)
    assert not model.special_token_ids & set(tokens[documents >= 0].tolist())


def test_a_mapping_in_place_of_a_list_is_an_error():
    with pytest.raises(ValueError, match=r"got a mapping; pass one of \['train', 'test'\]"):
        corpus({"train": ["abc"], "test": ["def"]})


def test_a_large_share_leaves_the_rest_its_part():
    training, held_out = corpus(["x" * 10] * 100).split(0.9, seed=0)
    assert held_out.n_tokens <= 910 and training.n_tokens >= 90


@pytest.mark.parametrize("layer", [2, np.int64(2)])
def test_a_layer_number_alone_means_its_mlp(model, layer):
    assert str(find_site(model, layer)) == "layers.2.mlp"
