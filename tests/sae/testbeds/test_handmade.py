import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae.testbeds import handmade
from mlxterp.sae.testbeds.handmade import WordTokenizer, array, directions, llama
from tests.sae.testbeds.reference import forward


def test_words_are_tokens():
    tokenizer = WordTokenizer(["a", "b"])
    assert tokenizer.encode(" b a\nb ") == [1, 0, 1] and tokenizer.decode([1, 0]) == "b a"
    assert tokenizer.vocab_size == 2 and tokenizer.bos_token_id is None
    assert tokenizer.encode("") == [] and tokenizer.all_special_ids == []


def test_a_first_token_begins_every_text():
    tokenizer = WordTokenizer(["a", "b"], bos="<s>")
    assert tokenizer.encode("b a") == [0, 2, 1] and tokenizer.encode("") == [0]
    assert tokenizer.decode([0, 2]) == "<s> b" and tokenizer.vocab_size == 3
    assert tokenizer.bos_token_id == 0 and tokenizer.all_special_ids == [0]


def test_words_that_are_not_there_are_errors():
    with pytest.raises(ValueError, match=r"words must be of \['a', 'b'\], got \['c', 'd'\]"):
        WordTokenizer(["a", "b"]).encode("a d c d")
    for words in (["a", "a"], ["a b"], [""], ["<s>"]):
        with pytest.raises(ValueError, match="words must differ and have no spaces, got"):
            WordTokenizer(words, bos="<s>")


@pytest.mark.parametrize(("n", "width"), [(1, 64), (16, 64), (48, 64), (49, 256), (160, 256)])
def test_directions_are_orthonormal_and_exact(n, width):
    rows = directions(n)
    assert rows.shape == (n, width) and not rows[:, -1].any()
    np.testing.assert_array_equal(rows @ rows.T, np.eye(n))
    assert set(np.unique(np.abs(rows))) == {0, 0.25}


def test_an_empty_llama_hands_on_what_it_gets():
    rows = np.zeros((3, 16))
    rows[:, :4] = [[1, -2, 0.125, 3], [0, 0, 100, 0], [-0.001, 7, 0, 0]]
    model = llama(16, 2, 5, 4, 3)
    handmade.set_embeddings(model, rows)
    model.lm_head.weight = array(np.eye(16)[[0, 1, 15]])
    logits = np.array(model(mx.array([[0, 1, 2]])))[0]
    expected = np.column_stack([rows[:, :2], np.ones(3)])
    np.testing.assert_allclose(logits, expected, rtol=2e-7)
    held = InterpretableModel(model).run([0, 1, 2], capture=["layers.1.mlp_in", "layers.1.mlp_out"])
    np.testing.assert_allclose(held["layers.1.mlp_in"][0, :, :-1], rows[:, :-1], rtol=2e-7)
    assert not np.array(held["layers.1.mlp_out"]).any() and not model.training


def test_neurons_are_rectified_to_float32_precision():
    least = handmade.LEAST
    values = [-200, -1, -2 * least, -least, 0, least, 2 * least, 0.3, 1, 200]
    rows = np.zeros((len(values), 16))
    rows[:, 0] = values
    model = llama(16, 1, 2, 4, len(values))
    handmade.set_embeddings(model, rows)
    reads, writes = np.eye(16)[[0, 0]], np.eye(16)[[1, 2]]
    reads[1] *= -1
    block = model.layers[0]
    handmade.set_neurons(block.mlp, reads, np.zeros(2), writes)
    tokens = list(range(len(values)))
    held = InterpretableModel(model).run(tokens, capture="layers.0.mlp_out")
    expected = np.maximum(np.outer(values, [1, -1]), 0)
    np.testing.assert_allclose(held["layers.0.mlp_out"][0, :, 1:3], expected, rtol=5e-7, atol=2e-10)
    exact = forward(model, tokens)["layers.0.mlp_out"][:, 1:3]
    np.testing.assert_allclose(exact, expected, rtol=5e-7, atol=2e-10)


def test_ids_are_checked():
    assert handmade.token_ids((1, 0), 2).tolist() == [1, 0]
    for tokens in ([2], [-1]):
        with pytest.raises(ValueError, match=r"tokens must be in \[0, 1\], got"):
            handmade.token_ids(tokens, 2)
    for tokens in ([], [[1]], ["a"], [True], 1):
        with pytest.raises(ValueError, match="tokens must be one sequence of token ids, got"):
            handmade.token_ids(tokens, 2)
