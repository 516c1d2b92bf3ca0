import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, ActivationDataset, compare
from mlxterp.sae.coder import Columns
from tests.fakes import SITE, FakeSource


def shrinking(width: int, kept: float, noise: float = 0.0, site: str = SITE) -> SAE:
    """Writes a share of what it reads, and a constant."""
    columns = Columns((site,), (width,))
    coder = SAE(columns, columns, 2 * width, "relu", k=None)
    both = mx.concatenate([mx.eye(width), -mx.eye(width)])
    coder.W_enc, coder.W_dec = both, kept * both
    coder.b_dec = mx.full((width,), noise)
    return coder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 60, 40)
    return ["".join(rng.choice(list("abcdefgh xyz"), size=n)) for n in sizes]


@pytest.fixture(scope="module")
def source() -> FakeSource:
    # Tokens are told apart by their number, so that logits of the table predict badly: no matter.
    return FakeSource(head=0.01)


@pytest.fixture(scope="module")
def found(source, texts):
    coders = {"good": shrinking(6, 0.9), "same": shrinking(6, 0.9, 1e-4), "bad": shrinking(6, 0.5)}
    return compare(coders, source, texts)


def test_coders_are_measured_on_the_same_tokens(found, source, texts):
    alone = shrinking(6, 0.5).evaluate(source, texts)
    assert found["bad"].data.fingerprint == found["good"].data.fingerprint == alone.data.fingerprint
    assert found["bad"].fvu == pytest.approx(alone.fvu, rel=1e-6)
    assert found["bad"].loss.spliced.value == pytest.approx(alone.loss.spliced.value, rel=1e-6)
    for how, ablation in alone.loss.ablations.items():
        mine = found["bad"].loss.ablations[how]
        assert mine.loss.value == pytest.approx(ablation.loss.value, rel=1e-6)
    with pytest.raises(ValueError, match=r"name must be one of \['good', 'same', 'bad'\]"):
        found["worse"]


def test_a_difference_within_the_noise_is_told_from_one_that_is_not(found):
    small, large = found.difference("good", "same"), found.difference("good", "bad")
    assert large.is_noise is False and large.value < 0
    assert large.value == pytest.approx(found["good"].fvu - found["bad"].fvu, rel=1e-6)
    assert abs(small.value) < 0.01 * abs(large.value)
    # What both share falls out: the spread of the difference is far below that of either.
    assert small.spread < 0.1 * found["good"].fidelity.fvu.spread
    assert found.difference("good", "good").spread == 0
    back = found.difference("bad", "good")
    assert (back.value, back.spread) == pytest.approx((-large.value, large.spread))
    with pytest.raises(ValueError, match="score must be one of .*explained_variance.*got 'beauty'"):
        found.difference("good", "bad", "beauty")


def test_the_noise_of_a_difference_is_that_of_other_documents(source):
    """By drawing documents anew, many times."""
    rng = np.random.default_rng(1)
    coders = [shrinking(6, 0.9), shrinking(6, 0.8, 0.3)]
    values, spreads = [], []
    for _ in range(25):
        sizes = rng.integers(10, 40, 60)
        drawn = ["".join(rng.choice(list(kind), size=n)) for kind, n in zip(
            rng.choice(["abcdef", " .,!", "WXYZ", "0123"], size=60), sizes, strict=True
        )]  # fmt: skip
        data = ActivationDataset.from_texts(source, drawn, SITE, context_length=16)
        one = compare(coders, dataset=data, max_loss_tokens=1)
        difference = one.difference(*one.evaluations)
        values.append(difference.value)
        spreads.append(difference.spread)
    assert np.mean(spreads) == pytest.approx(np.std(values), rel=0.35)


def test_the_comparison_can_be_read(found):
    text = repr(found)
    assert "3 coders on" in text and "bad - good" in text and "same - good" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("bad - good"))
    assert "=" not in line.partition("bad - good")[2].split()[0]
    assert found._repr_html_().count("<table") == 2
    figures = json.loads(found.to_json())
    assert set(figures["evaluations"]) == {"good", "same", "bad"}
    pairs = {(d["first"], d["second"]) for d in figures["differences"]}
    assert pairs == {("good", "same"), ("good", "bad"), ("same", "bad")}


def test_the_frontier_has_a_line_for_each_name(source, texts):
    several = {"relu": [shrinking(6, 0.9), shrinking(6, 0.7)], "other": shrinking(6, 0.8)}
    found = compare(several, source, texts[:10])
    assert list(found.evaluations) == ["relu 1", "relu 2", "other"]
    ax = found.plot().axes[0]
    assert [line.get_label() for line in ax.lines] == ["relu", "other"]
    fvus = sorted(found[name].fvu for name in ("relu 1", "relu 2"))
    assert sorted(ax.lines[0].get_ydata()) == pytest.approx(fvus)


def test_coders_without_names_are_told_apart(source, texts):
    found = compare([shrinking(6, 0.9), shrinking(6, 0.5)], source, texts[:5])
    assert list(found.evaluations) == ["relu, 12 features (1)", "relu, 12 features (2)"]


def test_of_many_coders_each_is_shown_beside_the_first(source, texts):
    found = compare([shrinking(6, 0.5 + 0.05 * i) for i in range(6)], source, texts[:5])
    assert len(found.pairs) == 5
    assert {first for first, _ in found.pairs} == {"relu, 12 features (1)"}


def test_what_is_asked_must_be_there(source, texts):
    with pytest.raises(ValueError, match="at least one coder"):
        compare([], source, texts)
    with pytest.raises(ValueError, match="texts that no coder was trained on"):
        compare([shrinking(6, 0.9)], source)
    with pytest.raises(ValueError, match="does not know its language model"):
        compare([shrinking(6, 0.9)], None, texts)
