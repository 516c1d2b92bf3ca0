import sys

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.coder import Columns
from mlxterp.sae.curation import REASONS, curate
from tests.fakes import FIRST, SITE, VOCABULARY, FakeSource

pytest.importorskip("datasketch")


class Chatting(FakeSource):
    def encode_chat(self, messages):
        return self.encode_batch(["".join(m["content"] for m in messages)])[0]


class Surprised(FakeSource):
    """Predicts each token the better, the later it is in the alphabet."""

    def unembed(self, hidden):
        return mx.broadcast_to(mx.arange(VOCABULARY) * 0.3, (*hidden.shape[:-1], VOCABULARY))


def planted(directions: dict[str, np.ndarray], width: int = 6) -> FakeSource:
    """Every named character has its own activation, all others 0."""
    source = FakeSource(width=width)
    table = np.zeros((VOCABULARY, width), np.float32)
    for character, direction in directions.items():
        table[source._ids(character)] = direction
    source.table = mx.array(table)
    return source


def curated(documents, source=None, **options):
    source = source or Chatting()
    usual = {"context": 16, "max_tokens": None, "diversity_metric": "activation_variance"}
    options = {**usual, **options}
    columns = Columns((SITE,), (source.d_model,))
    return curate(source, documents, columns, **options)


def characters(corpus) -> list[str]:
    return ["".join(chr(ord(" ") + i - FIRST) for i in body) for body in corpus.bodies()]


def words(seed: int, n: int = 120) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(n)]


def adds_up(report) -> bool:
    documents = report.documents_kept + sum(report.documents_dropped.values())
    tokens = report.tokens_kept + sum(report.tokens_dropped.values())
    return (documents, tokens) == (report.documents_seen, report.tokens_seen)


def test_planted_duplicates_are_found_and_no_other_document_is_lost():
    texts = [" ".join(words(i)) for i in range(30)]
    exact = ["  " + texts[i].replace(" ", "  ", 3) for i in range(10)]
    near = [" ".join([*words(i)[:60], "changed", *words(i)[61:]]) for i in range(10, 20)]
    corpus, report = curated(texts + exact + near)
    assert characters(corpus) == texts
    assert report.documents_dropped["exact_duplicate"] == 10
    assert report.documents_dropped["near_duplicate"] == 10
    assert report.documents_kept == 30 and adds_up(report)


def test_documents_that_share_half_of_their_words_both_stay():
    texts = [" ".join(words(0)), " ".join([*words(0)[:60], *words(1)[60:]])]
    assert characters(curated(texts)[0]) == texts


def test_chats_and_token_ids_are_compared_too():
    chat = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]
    ids = FakeSource()._ids("some tokens that are given")
    corpus, report = curated([chat, ids, chat, np.array(ids)])
    assert corpus.n_documents == 2 and report.documents_dropped["exact_duplicate"] == 2


def test_a_common_line_stays_in_its_first_document_only():
    line = "this line is in each of them"
    own = [" ".join(words(i, 20)) for i in range(6)]
    corpus, report = curated([f"{text}\n{line}\n" for text in own], source=Lines())
    bodies = [body.replace("~", "\n") for body in characters(corpus)]
    assert bodies == [f"{own[0]}\n{line}\n", *(f"{text}\n" for text in own[1:])]
    assert report.tokens_dropped["boilerplate"] == 5 * (len(line) + 1)
    assert report.documents_dropped["boilerplate"] == 0 and adds_up(report)


def test_a_line_in_four_documents_stays_in_all():
    texts = [f"{' '.join(words(i, 20))} and this line is in four" for i in range(4)]
    assert characters(curated(texts)[0]) == texts


class Lines(Chatting):
    """Knows line ends, as `~`."""

    def encode_batch(self, texts):
        return super().encode_batch([text.replace("\n", "~") for text in texts])


@pytest.mark.parametrize("text", ["1234 5678 90.5 " * 20, "the same line again\n" * 20])
def test_tables_and_repeated_lines_are_boilerplate(text):
    good = " ".join(words(0))
    corpus, report = curated([good, text], source=Lines())
    assert characters(corpus) == [good]
    assert report.documents_dropped["boilerplate"] == 1
    assert report.tokens_dropped["boilerplate"] == len(text)


def test_without_deduplicate_every_text_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    texts = ["1234 5678", "1234 5678", "abc def"]
    corpus, report = curated(texts, deduplicate=False)
    assert characters(corpus) == texts and report.tokens_kept == report.tokens_seen


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ImportError, match=r'pip install "mlxterp\[data\]"'):
        curated(["abc"])


def test_empty_documents_are_counted():
    _, report = curated(["", "   ", "abc", [], []])
    assert report.documents_dropped["empty"] == 4 and report.tokens_dropped["empty"] == 3
    assert adds_up(report)


def test_pieces_of_short_activations_are_dropped():
    e = np.eye(6)
    source = planted({"a": e[0], "b": 0.01 * e[1]})
    options = {"source": source, "deduplicate": False}
    documents = ["a" * 60, "b" * 15, "a" * 30]
    corpus, report = curated(documents, min_activation_norm=0.1, **options)
    assert characters(corpus) == ["a" * 60, "a" * 30]
    assert report.tokens_dropped["low_norm"] == 15 and report.documents_dropped["low_norm"] == 1
    assert curated(documents, **options)[1].tokens_kept == 105


def test_pieces_whose_activations_are_not_finite_are_dropped():
    corpus, report = curated(["abcd", "xxxx"], Chatting(not_finite="x"), deduplicate=False)
    assert characters(corpus) == ["abcd"] and report.documents_dropped["low_norm"] == 1


def test_kmeans_evens_out_clusters_of_unequal_size():
    e = np.eye(6)
    source = planted({"a": e[0], "b": e[1], "c": e[2], "d": e[3]})
    documents = ["a" * 15] * 170 + ["b" * 15] * 20 + ["c" * 15] * 12 + ["d" * 15] * 10
    corpus, report = curated(
        documents, source, diversity_metric="kmeans", max_tokens=600, pool=10, deduplicate=False
    )
    found = "".join(characters(corpus))
    assert [found.count(character) for character in "abcd"] == [150] * 4
    assert report.covered == pytest.approx(4) and report.covered_at_random < 3
    assert adds_up(report) and report.tokens_kept == corpus.n_tokens == 600


def test_variance_covers_more_directions_than_a_random_choice():
    """Nine tenths of the pieces lie in 2 of 24 dimensions, each other one in one of its own."""
    letters = "abcdefghijklmnopqrstuvwx"
    source = planted(dict(zip(letters, np.eye(24), strict=True)), width=24)
    documents = ["ab" * 7] * 198 + [letter * 14 for letter in letters[2:]]
    documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    covered = []
    for seed in range(3):
        corpus, report = curated(
            documents, source, max_tokens=40 * 14, pool=10, seed=seed, deduplicate=False
        )
        assert len(set("".join(characters(corpus)))) == 24
        covered.append(report.covered - report.covered_at_random)
    assert min(covered) > 5


@pytest.mark.parametrize("metric", ["activation_variance", "kmeans"])
def test_activations_that_are_all_the_same_do_no_harm(metric):
    documents = ["abc", "defg"] * 20
    source = planted({"a": np.zeros(6)})
    options = {"diversity_metric": metric, "max_tokens": 50, "deduplicate": False}
    corpus, report = curated(documents, source, **options)
    assert corpus.n_tokens == 50 and adds_up(report)


def test_beyond_256_axes_the_rest_counts_as_one():
    rng = np.random.default_rng(0)
    source = planted({c: rng.normal(size=300) for c in "abcdefghij"}, width=300)
    documents = [" ".join(words(i, 30)) for i in range(30)]
    corpus, report = curated(documents, source, max_tokens=1000)
    assert report.n_groups == 257 and corpus.n_tokens == 1000


def test_loss_drops_the_easiest_and_the_hardest_and_spreads_evenly():
    letters = [chr(ord("A") + i) for i in range(50)]
    documents = [letter * 15 for letter in letters for _ in range(4)]
    corpus, report = curated(
        documents, Surprised(), diversity_metric="loss", max_tokens=100 * 15, deduplicate=False
    )
    found = {body[0] for body in characters(corpus)}
    assert not found & {*letters[:2], *letters[-2:]}
    assert report.tokens_dropped["extreme_loss"] == 16 * 15 and adds_up(report)
    assert report.covered > 19.5


def test_reading_ends_at_the_pool_and_the_choice_is_exact():
    def endless():
        i = 0
        while True:
            yield " ".join(words(i, 10))
            i += 1

    corpus, report = curated(endless(), max_tokens=500, pool=3)
    assert 1500 <= report.tokens_seen < 1500 + 59
    assert corpus.n_tokens == report.tokens_kept == 500 and adds_up(report)


@pytest.mark.parametrize("metric", ["activation_variance", "kmeans", "loss"])
def test_the_same_seed_makes_the_same_choice(metric):
    documents = [" ".join(words(i, 30)) for i in range(40)]
    options = {"source": Surprised(), "max_tokens": 1500, "diversity_metric": metric}
    first, second, other = (curated(documents, seed=seed, **options) for seed in (0, 0, 1))
    assert first[0].fingerprint == second[0].fingerprint and first[1] == second[1]
    assert first[0].fingerprint != other[0].fingerprint


def test_what_is_chosen_of_a_document_stays_one_document_in_its_order():
    documents = [" ".join(words(i, 50)) for i in range(8)]
    corpus, report = curated(documents, max_tokens=1000)
    assert corpus.n_documents == report.documents_kept
    for body in characters(corpus):
        (document,) = [d for d in documents if body[:3] in d and _is_within(body, d)]
    assert corpus.context == 16 and corpus.special == FakeSource.special_token_ids
    assert (corpus.tokens[:, 0] == corpus.bos_id).all()


def _is_within(body: str, document: str) -> bool:
    rest = iter(document)
    return all(character in rest for character in body)


def test_without_a_limit_the_whole_of_each_document_stays_together():
    documents = [" ".join(words(i, 50)) for i in range(3)]
    corpus, report = curated(documents)
    assert characters(corpus) == documents and sum(report.tokens_dropped.values()) == 0


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="leaves no document of 2: {'boilerplate': 2}"):
        curated(["1234 5678", "12 34 56 78"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"diversity_metric": "norm"}, r"diversity_metric must be one of .*'kmeans'.*got 'norm'"),
        ({"max_tokens": 0}, "max_tokens must be None or a whole number >= 1, got 0"),
        ({"max_tokens": True}, "max_tokens must be .* got True"),
        ({"min_activation_norm": 1.0}, r"min_activation_norm must be in \[0, 1\).* got 1.0"),
        ({"pool": 0.5}, "pool must be a number >= 1, got 0.5"),
        ({"context": 1}, "context must"),
    ],
)
def test_arguments_out_of_range_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        curated(["abc"], **options)


def test_the_report_reads_well_and_is_plain_values():
    _, report = curated(["abc def", "abc def", ""], max_tokens=5)
    text = repr(report)
    assert "5 of 14 tokens kept, from 1 of 3 documents" in text
    assert "exact duplicate: 7 tokens, 1 whole documents" in text and "low norm" not in text
    assert report.to_dict()["tokens_dropped"]["not_needed"] == 2
    assert set(report.documents_dropped) == set(REASONS)
