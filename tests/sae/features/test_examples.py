import mlx.core as mx
import numpy as np

from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.coder import Columns
from mlxterp.sae.features.collection import collect
from tests.fakes import SITE
from tests.sae.letters import Letters, one_to_one


def data_of(texts, context_length: int = 16, **values: float):
    dataset = ActivationDataset.from_texts(
        Letters(**values), texts, SITE, context_length=context_length
    )
    return collect(one_to_one(), dataset)


def test_an_example_shows_its_own_document_and_marks_the_peak():
    data = data_of(["zzzz", "xyaxa", "aa"], a=3)
    (example,) = data.examples(0)
    assert "".join(example.tokens) in ("xyaxa", "aa")
    assert (example.token, example.value) == ("a", 3.0)
    assert example.values == tuple(3.0 * (token == "a") for token in example.tokens)
    assert "«a»" in repr(example)
    assert data.corpus.owners.reshape(-1)[example.position] == example.document
    assert data.documents([example.position]).tolist() == [example.document]
    assert data.corpus.tokens.reshape(-1)[example.position] == example.ids[example.peak]


def test_the_window_is_cut_at_its_ends():
    data = data_of(["0123456789" * 2 + "a" + "0123456789" * 2], 64, a=3)
    (example,) = data.examples(0, before=4, after=2)
    assert "".join(example.tokens) == "6789a01" and example.peak == 4


def test_the_text_around_any_position_can_be_shown():
    data = data_of(["bcabc"], a=3)
    (top,) = data.examples(0)
    other = data.example(0, top.position + 1, before=1, after=0)
    assert (other.tokens, other.values, other.peak) == (("a", "b"), (3.0, 0.0), 1)
    assert other.to_dict()["tokens"] == ("a", "b")


def test_characters_of_several_tokens_are_shown_and_marked_whole(demo):
    columns = Columns(("layers.0.resid_post",), (128,))
    coder = SAE(columns, columns, 4, k=4)
    coder.W_enc = mx.random.normal((4, 128), key=mx.random.key(0))
    dataset = ActivationDataset.from_texts(demo, ["ab 👍👍👍 cd 👍"], 0, context_length=64)
    data = collect(coder, dataset)
    (feature, *_) = np.flatnonzero(data.firing_counts)
    for position in data.codes.positions.tolist():
        example = data.example(feature, position, before=1, after=1)
        assert "\ufffd" not in repr(example)
        assert "«»" not in repr(example)
        assert example.token and example.token in "ab 👍 cd"
        assert data.corpus.tokens.reshape(-1)[position] == example.ids[example.peak]


def test_special_tokens_are_no_part_of_an_example():
    data = data_of(["ab", "ba"], 6, a=3)
    assert all("<s>" not in example.tokens for example in data.examples(0))
    assert np.isin(data.codes.positions % 6, [0]).sum() == 0
