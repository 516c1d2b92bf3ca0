import dataclasses
import tracemalloc

import numpy as np
import pytest

from mlxterp.sae import corpus as module
from mlxterp.sae.corpus import Corpus
from tests.fakes import BOS, EOS, FIRST, FakeSource


def ids(text: str) -> list[int]:
    return [FIRST + ord(character) - ord(" ") for character in text]


def corpus(documents, context=16, max_tokens=None, separate=False, seed=None, **options) -> Corpus:
    source = FakeSource(**options)
    return Corpus.from_documents(source, documents, context, max_tokens, separate, seed)


def bodies(found: Corpus) -> list[list[int]]:
    """The token ids of each document that count, by number."""
    owners = found.documents()
    return [found.tokens[owners == number].tolist() for number in range(found.n_documents)]


class WithSpecials(FakeSource):
    def encode_batch(self, texts):
        return [[BOS, BOS, *ids("ab"), EOS, *ids("c"), EOS] for _ in texts]


# --- documents


def test_documents_are_packed_and_only_their_tokens_count():
    packed = corpus(["abc", "defgh"], context=6)
    assert packed.tokens[0].tolist() == [BOS, *ids("abc"), BOS, *ids("d")]
    assert packed.owners[0].tolist() == [-1, 0, 0, 0, -1, 1]
    assert packed.tokens[1, :5].tolist() == [BOS, *ids("efgh")]
    assert packed.owners[1].tolist() == [-1, 1, 1, 1, 1, -1]
    assert packed.documents().tolist() == packed.owners.tolist()
    assert (len(packed), packed.context, packed.n_tokens, packed.n_documents) == (2, 6, 8, 2)


def test_texts_chats_and_token_ids_are_documents_in_the_order_given():
    chat = [{"role": "user", "content": "de"}, {"role": "assistant", "content": "f"}]
    found = [
        "abc", chat, ids("gh"), "i", np.array(ids("jk"), np.uint16), [BOS, *ids("lm"), EOS], (),
        "", [], np.array([], np.int64), tuple(ids("n")), "op",
    ]  # fmt: skip
    expected = ["abc", "def", "gh", "i", "jk", "lm", "n", "op"]
    for iterable in (found, iter(found)):
        assert bodies(corpus(iterable, context=5)) == [*map(ids, expected)]


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_texts_keep_their_order_however_many_are_tokenised_at_once(n):
    texts = [chr(ord("!") + i % 90) * (1 + i % 3) for i in range(n)]
    mixed = [ids(text) if i % 100 == 99 else text for i, text in enumerate(texts)]
    assert bodies(corpus(mixed, context=64)) == [*map(ids, texts)]


def test_special_tokens_at_the_ends_and_within_never_count():
    packed = Corpus.from_documents(WithSpecials(), ["any"], 8)
    assert packed.n_tokens == 3 and packed.document_sizes.tolist() == [3]
    assert packed.tokens[0, :5].tolist() == [BOS, *ids("ab"), EOS, *ids("c")]
    assert packed.documents()[0].tolist() == [-1, 0, 0, -1, 0, -1, -1, -1]
    assert packed.documents([0])[0].tolist() == packed.documents()[0].tolist()


def test_without_a_first_token_contexts_hold_text_only():
    packed = corpus(["abc", "de"], context=4, bos=False)
    assert packed.tokens[0].tolist() == ids("abcd") and packed.owners[0].tolist() == [0, 0, 0, 1]
    assert packed.owners[1].tolist() == [1, -1, -1, -1] and packed.bos_id is None


@pytest.mark.parametrize("bos", [True, False])
def test_documents_without_tokens_are_left_out(bos):
    assert corpus(["", "ab", ""], bos=bos).n_documents == 1
    assert corpus([[BOS], "ab", [EOS, BOS]], bos=bos).n_documents == 1


@pytest.mark.parametrize("documents", [[], [""], ["", ""], iter([]), [[]], [[BOS, EOS]]])
@pytest.mark.parametrize("bos", [True, False])
def test_no_token_at_all_is_an_error(documents, bos):
    with pytest.raises(ValueError, match="dataset is empty"):
        corpus(documents, bos=bos)


# --- how many


@pytest.mark.parametrize("as_ids", [False, True])
def test_max_tokens_cuts_exactly_and_reads_no_further(as_ids):
    read = []

    def documents():
        for i in range(10**9):
            read.append(i)
            yield ids("abcdefg") if as_ids else "abcdefg"

    limited = corpus(documents(), max_tokens=20)
    assert limited.n_tokens == 20 and limited.document_sizes.tolist() == [7, 7, 6]
    assert len(read) == 3 if as_ids else len(read) <= 256


@pytest.mark.parametrize("limit", [1, 6, 7, 8, 13, 14, 15, 999])
def test_max_tokens_leaves_out_nothing_else(limit):
    whole = [i for body in bodies(corpus(["abcdefg"] * 2)) for i in body]
    cut = corpus(["abcdefg"] * 2, max_tokens=limit)
    assert [i for body in bodies(cut) for i in body] == whole[:limit]


def test_max_tokens_counts_what_counts():
    for limit, sizes, inside in [
        (1, [1], "a"),
        (2, [2], "ab"),
        (3, [3], "ab?c"),
        (5, [3, 2], "ab?cab"),
    ]:
        cut = Corpus.from_documents(WithSpecials(), ["any"] * 3, 16, limit)
        assert cut.n_tokens == limit and cut.document_sizes.tolist() == sizes
        expected = [EOS if character == "?" else ids(character)[0] for character in inside]
        assert cut.tokens[cut.owners >= 0].tolist() == expected


def test_memory_holds_twelve_bytes_a_token_while_documents_are_shuffled():
    rng, n = np.random.default_rng(0), 400_000
    rows = (rng.integers(FIRST, 90, 1000, dtype=np.int32) for _ in range(n // 1000))
    tracemalloc.start()
    packed = corpus(rows, context=512, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert packed.n_tokens == n and 11 < peak / n < 14


def test_sizes_are_counted_over_many_blocks(monkeypatch):
    texts = [chr(ord("!") + i) * (1 + 5 * i % 13) for i in range(40)]
    expected = [len(text) for text in texts]
    monkeypatch.setattr(module, "CONTEXTS_PER_BLOCK", 2)
    packed = corpus(texts, context=7)
    assert len(packed) > 20 and packed.document_sizes.tolist() == expected
    assert packed.n_tokens == sum(expected) and bodies(packed) == [*map(ids, texts)]


# --- a context for each document


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("context", [4, 5, 16])
def test_no_context_holds_two_documents_when_they_are_separate(context, bos):
    texts = ["abcdefghij", "k", "lmno", "pqrst", "u"]
    packed = corpus(texts, context, separate=True, bos=bos)
    for tokens, owners in zip(packed.tokens, packed.owners, strict=True):
        assert len(set(owners[owners >= 0].tolist())) == 1
        assert (tokens[0] == BOS) == bos
    assert bodies(packed) == [*map(ids, texts)] and packed.n_tokens == sum(map(len, texts))
    room = context - bos
    assert len(packed) == sum(-(-len(text) // room) for text in texts)


def test_padding_counts_as_nothing_whatever_token_stands_there():
    packed = corpus(["ab", "cde"], context=6, separate=True, bos=False)
    assert packed.owners.tolist() == [[0, 0, -1, -1, -1, -1], [1, 1, 1, -1, -1, -1]]
    plain = dataclasses.replace(packed, special=frozenset())
    assert plain.n_tokens == packed.n_tokens == 5
    (_, _, counts), *rest = packed.blocks()
    assert not rest and np.array(counts).tolist() == (packed.owners >= 0).tolist()


def test_parts_of_separate_documents_are_separate():
    packed = corpus(["abcdefghij"[: 1 + i % 7] for i in range(30)], 16, separate=True)
    for part in (*packed.split(0.3, 0), packed.shuffled(1)):
        assert part.separate and all(len(set(o[o >= 0].tolist())) == 1 for o in part.owners)


def test_blocks_are_all_contexts_in_order(monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_FORWARD", 20)
    packed = corpus(["abcdefghij" * 4], context=6)
    starts, tokens, counts = zip(*packed.blocks(), strict=True)
    assert starts == tuple(range(0, len(packed), 3))
    np.testing.assert_array_equal(np.concatenate(tokens), packed.tokens)
    np.testing.assert_array_equal(np.concatenate(counts), packed.owners >= 0)
    assert {packed.rows_per_forward, corpus(["a"], 64).rows_per_forward} == {3, 1}


# --- parts


TEXTS = [chr(ord("a") + i) * (5 + i % 7) for i in range(26)]


def as_sets(*parts):
    return [{tuple(body) for body in bodies(part)} for part in parts]


def test_split_is_by_document_and_loses_none():
    whole = corpus(TEXTS)
    training, held_out = whole.split(0.2, seed=3)
    found = as_sets(training, held_out)
    assert not found[0] & found[1] and found[0] | found[1] == {tuple(ids(t)) for t in TEXTS}
    assert training.n_tokens + held_out.n_tokens == whole.n_tokens
    assert 0.1 < held_out.n_tokens / whole.n_tokens < 0.25
    again, other = whole.split(0.2, seed=3)[1], whole.split(0.2, seed=4)[1]
    assert again.fingerprint == held_out.fingerprint != other.fingerprint
    assert {(p.context, p.bos_id, p.special) for p in (whole, training, held_out)} == {
        (16, BOS, frozenset({BOS, EOS}))
    }


def test_split_keeps_a_document_that_is_nearly_everything_in_training():
    training, held_out = corpus(["x" * 500, "abc", "de"]).split(0.05, seed=0)
    assert training.n_tokens >= 500 and 2 <= held_out.n_tokens <= 5


def test_a_large_share_leaves_the_rest_its_part():
    training, held_out = corpus(["x" * 10] * 100).split(0.9, seed=0)
    assert held_out.n_tokens <= 910 and training.n_tokens >= 90


@pytest.mark.parametrize(("share", "sizes"), [(0.2, (8, 2)), (0.001, (9, 1)), (0.999, (1, 9))])
def test_a_single_document_is_cut_in_two(share, sizes):
    parts = corpus(["abcdefghij"]).split(share, seed=0)
    assert tuple(part.n_tokens for part in parts) == sizes
    assert [i for part in parts for i in bodies(part)[0]] == ids("abcdefghij")


def test_shuffling_only_changes_the_order_of_documents():
    whole = corpus(TEXTS, context=7)
    mixed = whole.shuffled(1)
    assert as_sets(mixed) == as_sets(whole) and bodies(mixed) != bodies(whole)
    assert mixed.n_tokens == whole.n_tokens and mixed.context == 7
    assert whole.shuffled(1).fingerprint == mixed.fingerprint
    assert corpus(TEXTS, context=7, seed=1).fingerprint == mixed.fingerprint
    assert mixed.fingerprint not in (whole.fingerprint, whole.shuffled(2).fingerprint)


def test_special_tokens_within_documents_stay_where_they_are_in_parts():
    whole = Corpus.from_documents(WithSpecials(), ["any"] * 10, 8)
    for part in (*whole.split(0.3, 0), whole.shuffled(0)):
        inside = part.tokens[part.owners >= 0].tolist()
        assert inside == [*ids("ab"), EOS, *ids("c")] * part.n_documents
        assert part.n_tokens == 3 * part.n_documents


# --- what it depends on


def test_the_fingerprint_is_the_same_for_the_same_tokens():
    assert corpus(TEXTS).fingerprint == corpus(iter(TEXTS)).fingerprint
    as_ids = corpus(["a", *map(ids, TEXTS[1:])])
    assert as_ids.fingerprint != corpus(TEXTS).fingerprint
    assert corpus([ids(TEXTS[0]), *TEXTS[1:]]).fingerprint == corpus(TEXTS).fingerprint


def test_the_fingerprint_changes_with_everything_that_matters():
    packed = corpus(TEXTS)
    tokens, owners = packed.tokens.copy(), packed.owners.copy()
    tokens[3, 5] += 1
    owners[3, 5] += 1
    others = [
        dataclasses.replace(packed, tokens=tokens),
        dataclasses.replace(packed, owners=owners),
        dataclasses.replace(packed, bos_id=None),
        dataclasses.replace(packed, special=frozenset({BOS})),
        dataclasses.replace(
            packed, tokens=packed.tokens.reshape(-1, 8), owners=packed.owners.reshape(-1, 8)
        ),
        corpus(TEXTS, context=15),
        corpus(TEXTS, separate=True),
        corpus(TEXTS, max_tokens=packed.n_tokens - 1),
        corpus(TEXTS[::-1]),
        corpus(TEXTS, bos=False),
    ]
    assert len({packed.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
