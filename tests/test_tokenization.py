"""Text to token rows: padding, packing, checks of ids, pieces."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import tokenization
from mlxterp.model import InterpretableModel
from mlxterp.tokenization import pack, pad
from tests.tiny_models import VOCAB, build


@pytest.fixture(scope="module")
def demo():
    return InterpretableModel.demo()


@pytest.fixture(scope="module")
def llama():
    return InterpretableModel(build("llama"))


def test_pad():
    tokens, mask = pad([[1, 2, 3], [4]], pad_id=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    with pytest.raises(ValueError, match="row 1 of 2 has no tokens"):
        pad([[1], []])
    with pytest.raises(ValueError, match="no rows"):
        pad([])


def rows(*args, **kwargs):
    return [(t.tolist(), d.tolist()) for t, d in pack(*args, **kwargs)]


def test_pack_without_bos_joins_and_cuts():
    assert rows([[1, 2, 3], [4, 5], [6, 7, 8]], 4, pad_id=9) == [
        ([1, 2, 3, 4], [0, 0, 0, 1]),
        ([5, 6, 7, 8], [1, 2, 2, 2]),
    ]
    assert rows([[1, 2, 3, 4, 5]], 4, pad_id=9)[1] == ([5, 9, 9, 9], [0, -1, -1, -1])


def test_pack_with_bos_starts_rows_and_documents_with_it():
    assert rows([[1, 2], [3, 4, 5]], 4, bos_id=0, pad_id=9) == [
        ([0, 1, 2, 0], [-1, 0, 0, -1]),
        ([0, 3, 4, 5], [-1, 1, 1, 1]),
    ]


def test_pack_takes_a_bos_that_is_there_already_as_its_own():
    assert rows([[0, 1, 2], [0, 3]], 3, bos_id=0) == rows([[1, 2], [3]], 3, bos_id=0)


@pytest.mark.parametrize("bos_id", [None, 0])
@pytest.mark.parametrize("length", [2, 3, 7, 50])
def test_pack_loses_and_doubles_no_token(bos_id, length):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 50, size=n).tolist() for n in rng.integers(0, 20, size=40)]
    packed = list(pack(documents, length, bos_id))
    for tokens, document in packed:
        assert tokens.shape == document.shape == (length,)
        assert tokens.dtype == document.dtype == np.int32
        assert bos_id is None or (tokens[0] == bos_id and document[0] == -1)
    tokens = np.concatenate([t for t, _ in packed])
    document = np.concatenate([d for _, d in packed])
    for i, ids in enumerate(documents):
        assert tokens[document == i].tolist() == ids


def test_pack_streams():
    endless = ([1, 2, 3] for _ in itertools.count())
    assert len(list(itertools.islice(pack(endless, 4), 5))) == 5


def test_pack_needs_room_for_a_token():
    with pytest.raises(ValueError, match="context_length must be at least 2 tokens, not 1"):
        next(pack([[1]], 1, bos_id=0))
    with pytest.raises(ValueError, match="context_length must be at least 1 tokens, not 0"):
        next(pack([[1]], 0))


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        ([1, 2, 3], (1, 3)),
        ([[1, 2], [3]], (2, 2)),
        (mx.array([1, 2, 3]), (1, 3)),
        (mx.array([[1, 2, 3]]), (1, 3)),
        (np.array([[1, 2]]), (1, 2)),
        ((1, 2), (1, 2)),
    ],
)
def test_inputs_become_rows(llama, inputs, shape):
    tokens, mask = llama.tokens(inputs)
    assert tokens.shape == mask.shape == shape
    assert mx.issubdtype(tokens.dtype, mx.integer)


@pytest.mark.parametrize(
    "inputs",
    [[VOCAB], [[1], [2, VOCAB]], mx.array([[1, VOCAB]]), np.array([VOCAB]), mx.array([VOCAB])],
)
def test_ids_beyond_the_embedding_are_errors(llama, inputs):
    message = (
        f"token ids must be 0 to {VOCAB - 1}, the rows of the embedding: the input has {VOCAB}"
    )
    with pytest.raises(ValueError, match=message):
        llama.run(inputs)
    with pytest.raises(ValueError, match=message), llama.trace(inputs):
        pass


def test_negative_ids_are_errors(llama):
    with pytest.raises(ValueError, match="the input has -1"):
        llama.run([3, -1])
    llama.run([VOCAB - 1])


@pytest.mark.parametrize("inputs", [[], "", [[]], [[1], []], mx.array([], dtype=mx.int32), [""]])
def test_empty_input_is_an_error(inputs):
    with pytest.raises(ValueError, match="at least one token|no tokens"):
        InterpretableModel(build("llama"), tokenizer=Characters()).run(inputs)


@pytest.mark.parametrize("inputs", [None, 3, [1.5], [True], ["a", 1], {"a": 1}])
def test_other_inputs_are_type_errors(llama, inputs):
    with pytest.raises(TypeError, match="inputs must be|token ids must be"):
        llama.run(inputs)


class Characters:
    """A tokenizer without special tokens."""

    def encode(self, text):
        return [ord(c) % VOCAB for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def test_a_minimal_tokenizer_is_enough():
    model = InterpretableModel(build("llama"), tokenizer=Characters())
    assert model.tokenizer.__class__ is Characters
    assert model.run("abc").tokens.tolist() == [[1, 2, 3]]
    assert model.to_str_tokens([65, 66]) == ["A", "B"]
    assert model.special_token_ids == frozenset()


def test_every_tokenizer_method_says_when_there_is_none(llama):
    for call in (
        lambda: llama.encode("a"), lambda: llama.decode([1]), lambda: llama.encode_batch(["a"]),
        lambda: llama.token_to_str(1), lambda: llama.to_str_tokens("a"), lambda: llama.run("a"),
        lambda: llama.to_str_tokens([1]), lambda: llama.run(["a", "b"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no tokenizer: give one"):
            call()
    assert llama.special_token_ids == frozenset()


def test_encode_and_decode(demo):
    ids = demo.encode("Hello world")
    assert all(type(i) is int for i in ids)
    assert ids[0] == demo.tokenizer.bos_token_id in demo.special_token_ids
    assert demo.decode(ids[1:]) == demo.decode(mx.array(ids[1:])) == "Hello world"
    assert demo.encode_batch(["a", "bc"]) == [demo.encode("a"), demo.encode("bc")]
    assert demo.token_to_str(ids[-1]) == demo.decode([ids[-1]])
    assert demo.vocab_size == 4096


def test_tokens_as_text(demo):
    pieces = demo.to_str_tokens("Hello world, it is")
    ids = demo.encode("Hello world, it is")
    assert len(pieces) == len(ids)
    assert "".join(pieces[1:]) == "Hello world, it is"
    assert demo.to_str_tokens(ids) == demo.to_str_tokens(mx.array(ids)) == pieces
    assert demo.to_str_tokens(mx.array([ids, ids])) == pieces
    assert demo.to_str_tokens("Hello", prepend_bos=True) == demo.to_str_tokens("Hello")


def test_parts_of_characters_become_replacements(demo):
    pieces = demo.to_str_tokens("é 日本 🙂")
    assert len(pieces) == len(demo.encode("é 日本 🙂"))
    assert "\ufffd" in "".join(pieces)


def test_a_batch_of_texts_is_padded_and_masked(demo):
    done = demo.run(["one two three four", "one"], capture="layers.5")
    lengths = done.mask.sum(axis=1).tolist()
    assert lengths == [len(demo.encode("one two three four")), len(demo.encode("one"))]
    alone = demo.run("one", capture="layers.5")
    np.testing.assert_allclose(done["layers.5"][1, : lengths[1]], alone["layers.5"][0],
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_booleans_are_no_token_ids(llama):
    with pytest.raises(TypeError, match="token ids must be integers, not bool"):
        llama.tokens(mx.array([True, False]))


def test_a_chat_is_encoded_by_the_template_and_without_one_is_an_error(demo):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    with pytest.raises(ValueError, match="no chat template"):
        demo.encode_chat(messages)
    with pytest.raises(ValueError, match="has no tokenizer"):
        tokenization.encode_chat(None, messages)

    class Templated:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, given, tokenize, return_dict):
            assert tokenize and not return_dict
            return [len(message["content"]) for message in given]

    assert tokenization.encode_chat(Templated(), messages) == [5, 8]


def test_separate_documents_never_share_a_row():
    rows = list(tokenization.pack([[5, 6, 7], [8], [9] * 6], 4, bos_id=1, separate=True))
    assert [tokens.tolist() for tokens, _ in rows] == [
        [1, 5, 6, 7], [1, 8, 0, 0], [1, 9, 9, 9], [1, 9, 9, 9],
    ]  # fmt: skip
    assert [owners.tolist() for _, owners in rows] == [
        [-1, 0, 0, 0], [-1, 1, -1, -1], [-1, 2, 2, 2], [-1, 2, 2, 2],
    ]  # fmt: skip
