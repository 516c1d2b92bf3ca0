"""How a notebook shows coders, and what is known of their training."""

import numpy as np
import pytest

from mlxterp.notebook import visible
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.evals.fidelity import Fidelity
from mlxterp.sae.evals.loss import LossRecovered
from mlxterp.sae.features.connections import Connected, Connection, InputInvariantWeights
from mlxterp.sae.metadata import Metadata, Statistics, training_facts
from mlxterp.sae.trainer import TrainingResult
from tests.pages import NASTY, checked
from tests.sae.kinds import KINDS, make

TRAINING = ({"step": 40, "tokens": 40960, "loss": 0.2, "fvu": 0.25, "l0": 16.04, "dead": 0.0381},)
HELD_OUT = ({"step": 40, "tokens": 40960, "fvu": 0.3, "l0": 16.5, "dead": 0.04},)
FACTS = [
    ("trained on", "40,960 tokens in 40 steps"),
    ("FVU", "0.2500, held out 0.3000"),
    ("L0", "16.0, held out 16.5"),
    ("dead", "3.8%"),
]


def facts(shown) -> dict[str, str]:
    return dict(row for row in checked(shown._repr_html_()).cells if len(row) == 2)


def test_the_last_reports_in_words():
    assert training_facts(TRAINING, HELD_OUT) == FACTS
    assert training_facts(TRAINING, ()) == [
        FACTS[0], ("FVU", "0.2500"), ("L0", "16.0"), FACTS[3],
    ]  # fmt: skip
    assert training_facts((), ()) == []
    odd = {"step": 1, "tokens": 10, "fvu": None}
    assert training_facts((odd,), ())[1:] == [(n, "unknown") for n in ("FVU", "L0", "dead")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_coder_of_every_kind_tells_what_it_is(kind):
    coder = make(kind)
    coder.statistics = Statistics(TRAINING, HELD_OUT)
    coder.metadata = Metadata(model={"name": NASTY}, config=SAEConfig(k=4).to_dict())
    found = facts(coder)
    assert found["reads"] == str(coder.reads) and found["features"] == "30"
    assert found["activation function"] == "topk, k = 4"
    assert ("writes" in found) == (coder.writes != coder.reads)
    assert ("skip connection" in found) == coder.has_skip
    assert found["model"] == visible(NASTY) and found["learning_rate"] == "0.0001"
    assert all(item in found.items() for item in FACTS) and "labels" not in found
    assert type(coder).__name__ in checked(coder._repr_html_()).text


def test_a_coder_without_a_history_is_shown_too():
    coder = make("sae", "relu")
    coder.labels.set(3, NASTY)
    found = facts(coder)
    assert found["activation function"] == "relu" and found["labels"] == "1"
    assert "trained on" not in found and "model" not in found
    assert "Configuration" not in coder._repr_html_()


def test_many_sites_are_folded():
    sites = [Columns(tuple(f"{name}.{i}" for i in range(6)), (4,) * 6) for name in ("in", "out")]
    coder = CrossLayerTranscoder(*sites, 12, "topk", k=2)
    found = facts(coder)
    assert found["reads"] == "6 sites, in.0 to in.5 (width 24 together)"
    assert found["in.3"] == found["out.5"] == "width 4"
    assert "<summary>Sites</summary>" in coder._repr_html_()


def test_what_training_leaves_behind_is_shown():
    result = TrainingResult(TRAINING, HELD_OUT, np.zeros(3), 40960, 12.4)
    assert facts(result) == dict(FACTS) | {"time": "12 seconds"}
    assert facts(Statistics(TRAINING, HELD_OUT)) == dict(FACTS)
    assert facts(Statistics()) == {}


def test_evals_are_shown_as_tables():
    alone = LossRecovered(2.0, 2.1, 2.5, 10)
    page = checked(LossRecovered(2.0, 2.2, 4.0, 10, {NASTY: alone})._repr_html_())
    assert page.cells[1:] == [
        ["all sites", "2.000", "2.200", "4.000", "90.0%"],
        [visible(NASTY), "2.000", "2.100", "2.500", "80.0%"],
    ]
    assert "Loss in nats per token, over 10 tokens" in page.text
    found = facts(Fidelity(0.25, 8.0, 1000, np.array([0, 0.5]), {NASTY: 0.2, "b": 0.3}))
    assert found == {
        "": "", "FVU": "0.2500", "L0": "8.0", "silent": "50.0%",
        f"FVU of {visible(NASTY)}": "0.2000", "FVU of b": "0.3000",
    }  # fmt: skip


def test_connections_are_shown_as_tables():
    page = checked(Connected(3, "reads", ((NASTY, 2.0), ("b", 1.0)), (("c", -1.5),))._repr_html_())
    assert "tokens that feature 3 reads" in page.text
    assert page.cells[1:] == [[visible(NASTY), "2.00", "c", "-1.50"], ["b", "1.00", "", ""]]
    weights = InputInvariantWeights(20, 30, 0.5, (Connection(4, 7, -2.0), Connection(1, 2, 1.0)))
    page = checked(weights._repr_html_())
    assert page.cells[1:] == [["4 → 7", "-2.000", "4.0"], ["1 → 2", "+1.000", "2.0"]]
    assert "20 earlier x 30 later features, root mean square 0.5" in page.text
