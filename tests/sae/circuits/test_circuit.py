import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlxterp.sae.circuits.circuit import Circuit, Edge, Node
from mlxterp.sae.circuits.nodes import Names, cells, cut
from mlxterp.sae.circuits.validation import Validation
from tests.sae.circuits.examples import LEVELS, NASTY, nasty, over_dataset, over_prompt, small

MAKERS = (small, over_dataset, over_prompt, nasty)


def weights(circuit: Circuit) -> list[float]:
    return [edge.weight for edge in circuit.edges]


def keys(circuit: Circuit) -> list[tuple]:
    """The edges by what they connect."""
    return [
        (circuit.nodes[e.source].key, circuit.nodes[e.target].key, e.weight) for e in circuit.edges
    ]


def test_a_summary_says_what_is_there_and_lists_edges_without_errors():
    assert repr(small()).splitlines() == [
        "Circuit of 4 features, 1 error and 5 edges, "
        "from layers.8.resid_post to layers.12.resid_post,",
        "  method gradient, explained 83.1%",
        "  source              target  weight  share  consistency   n  measured",
        "  L8/42 French words   L10/5      +2    75%         100%  24",
        "  L8/7                 L10/5      -1    50%          90%  24",
        "  L10/5               L12/91    +0.5   100%          80%  12     +0.25",
    ]


def test_a_summary_lists_ten_edges_and_quotes_the_prompt():
    assert len(repr(over_dataset()).splitlines()) == 12
    assert "“The capital of France is the city of Paris”" in repr(over_prompt())
    assert "L8/11 at 3 “␣France”" in repr(over_prompt())
    assert "logit Paris (61.0%) at 8" in repr(over_prompt())


def test_tables_and_the_strongest_edges_are_sorted_by_size():
    circuit = small()
    assert [e.weight for e in circuit.strongest(2)] == [2.0, -1.0]
    assert [e.weight for e in circuit.strongest(9, errors=True)] == [-3.0, 2.0, -1.0, 0.5, 0.1]
    assert [row[:3] for row in circuit.table(2).rows] == [
        ("L8 error", "L10/5", "-3"), ("L8/42 French words", "L10/5", "+2"),
    ]  # fmt: skip
    assert circuit.table(1, errors=False).header == (
        "source", "target", "weight", "share", "consistency", "n",
    )  # fmt: skip


def test_nodes_have_a_table_too_by_effect_or_influence():
    circuit = small()
    assert [row[0] for row in circuit.node_table(2).rows] == ["L8/42 French words", "L8/7"]
    assert circuit.node_table().header == ("node", "value")
    known = {0: (-2.0, 0.055), 1: (0.25, 0.5), 2: (3.0, None), 3: (math.nan, 0.2)}
    nodes = tuple(
        replace(node, effect=known.get(i, (None, 0))[0], influence=known.get(i, (0, None))[1])
        for i, node in enumerate(circuit.nodes)
    )
    table = replace(circuit, nodes=nodes).node_table(3)
    assert table.header == ("node", "value", "effect", "influence")
    assert table.rows == (
        ("L10/5", "0", "+3", ""), ("L8/42 French words", "1.5", "-2", "5.5%"),
        ("L8/7", "0", "+0.25", "50%"),
    )  # fmt: skip
    by_influence = tuple(replace(node, effect=None) for node in nodes)
    rows = replace(circuit, nodes=by_influence).node_table(2).rows
    assert rows == (("L8/7", "0", "50%"), ("L12/91", "0", "20%"))


def test_a_share_of_almost_nothing_has_no_sign():
    assert "completeness 0.0%" in repr(replace(small(), facts={"completeness": -1e-9}))


def test_weights_that_are_no_numbers_come_last():
    circuit = replace(small(), edges=(Edge(0, 2, math.nan), Edge(1, 2, 0.1)))
    assert [e.source for e in circuit.strongest()] == [1, 0]


@pytest.mark.parametrize("make", MAKERS)
def test_a_notebook_shows_a_table_with_texts_escaped(make):
    page = make()._repr_html_()
    assert "<table" in page and "<script" not in page and "<img" not in page


def test_an_empty_circuit_can_be_shown():
    empty = Circuit((), (), LEVELS)
    assert repr(empty).startswith("Circuit of no nodes and 0 edges")
    assert empty.restricted(n_edges=3) is empty and empty.to_dict()["nodes"] == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"levels": LEVELS[:2]}, "is at none of the levels"),
        ({"edges": (Edge(0, 5, 1.0),)}, "must be between two of 5 nodes"),
        ({"edges": (Edge(-1, 2, 1.0),)}, "must be between two of 5 nodes"),
        ({"nodes": (Node("feature", LEVELS[0], 1, value=1.0),) * 5}, "several are"),
    ],
)
def test_a_circuit_that_cannot_be_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        replace(small(), **change)


def test_a_part_keeps_the_largest_weights_and_drops_bare_nodes():
    circuit = small()
    part = circuit.restricted(min_weight=0.5)
    assert keys(part) == [key for key in keys(circuit) if abs(key[2]) >= 0.5]
    part = circuit.restricted(min_weight=2.5)
    assert [node.key[:3] for node in part.nodes] == [
        ("feature", LEVELS[1], 5), ("error", LEVELS[0], -1),
    ]  # fmt: skip
    assert weights(part) == [-3.0]


def test_errors_are_not_counted_but_those_of_the_same_targets_stay():
    circuit = small()
    assert weights(circuit.restricted(n_edges=1)) == [2.0, -3.0]
    assert weights(circuit.restricted(n_edges=3)) == [2.0, -1.0, 0.5, -3.0]
    assert circuit.restricted(n_edges=5) is circuit
    assert weights(circuit.restricted(min_weight=1, n_edges=2)) == [2.0, -1.0, -3.0]
    assert weights(circuit.restricted(n_edges=0)) == []


def test_facts_of_the_whole_are_not_facts_of_a_part():
    part = small().restricted(n_edges=2).restricted(n_edges=1)
    assert list(part.facts) == ["part_of"]
    assert part.facts["part_of"]["explained"] == 0.831 and part.facts["part_of"]["n_edges"] == 5
    assert "part of 5 edges, whole method gradient, whole explained 83.1%" in repr(part)


@pytest.mark.parametrize("options", [{"min_weight": -1}, {"n_edges": -1}, {"min_weight": math.nan}])
def test_a_part_below_zero_is_an_error(options):
    with pytest.raises(ValueError, match="must be >= 0"):
        small().restricted(**options)


@pytest.mark.parametrize("key", [12, "layers.12.resid_post"])
def test_labels_are_by_layer_or_site(key):
    circuit = small()
    found = circuit.with_labels({key: {91: "Capital cities", 3: "not in the circuit"}})
    assert [node.label for node in found.nodes] == [
        "French words", None, None, "Capital cities", None,
    ]  # fmt: skip
    assert circuit.nodes[3].label is None and found.edges == circuit.edges
    labels = {91: SimpleNamespace(text="Towns")}
    assert found.with_labels({key: labels}).nodes[3].label == "Towns"


def test_a_layer_stands_for_all_sites_of_it():
    levels = ("layers.1.attn_out", "layers.1.mlp_out", "layers.2.mlp, layers.3.mlp")
    circuit = Circuit(tuple(Node("feature", level, 4) for level in levels), (), levels)

    def labels(of):
        return [node.label for node in circuit.with_labels(of).nodes]

    assert labels({1: {4: "a"}}) == ["a", "a", None]
    assert labels({3: {4: "b"}}) == labels({"layers.2.mlp": {4: "b"}}) == [None, None, "b"]
    assert labels({1: {4: "a"}, levels[1]: {4: "c"}}) == ["a", "c", None]


@pytest.mark.parametrize("key", [9, "layers.9.mlp", "8"])
def test_labels_of_an_unknown_layer_are_an_error(key):
    with pytest.raises(ValueError, match="feature_labels must be by layer or site, of"):
        small().with_labels({key: {42: "x"}})


@pytest.mark.parametrize(
    "levels, expected",
    [
        (LEVELS, ["L8", "L10", "L12"]),
        (("layers.1.attn", "layers.1.mlp"), ["L1.attn", "L1.mlp"]),
        (("layers.1.mlp, layers.2.mlp", "norm"), ["L1+2", "norm"]),
    ],
)
def test_levels_have_short_names_that_differ(levels, expected):
    names = Names(levels)
    assert [names.level(Node("feature", level, 0)) for level in levels] == expected


def test_spaces_of_tokens_are_visible():
    names = Names((), (" a b ", "  ", "\n"))
    assert [names.token(i) for i in range(4)] == ["␣a b␣", "␣␣", "⏎", "3"]


@pytest.mark.parametrize("text", [*NASTY, ""])
@pytest.mark.parametrize("widest", [1, 2, 7, 20])
def test_texts_are_cut_to_a_width(text, widest):
    found = cut(text, widest)
    assert cells(found) <= widest and (found == text or found.endswith("…"))


@dataclass
class FakeOrigin:
    """Every effect is half of what was predicted."""

    asked: dict = field(default_factory=dict)

    def validate(self, circuit, **options):
        self.asked = {"circuit": circuit, **options}
        predicted = np.array([e.weight for e in circuit.edges[1:3]])
        return Validation(predicted, predicted / 2, (1, 2), "halved")


def test_validation_asks_what_the_circuit_was_found_in():
    origin = FakeOrigin()
    circuit = small().bind(origin)
    found = circuit.validate(n=2)
    assert origin.asked == {"circuit": circuit, "n": 2}
    assert found.slope == pytest.approx(0.5)
    assert found.names == ("L8/7 → L10/5", "L10/5 → L12/91")
    assert circuit.restricted(n_edges=2).origin is origin
    assert circuit.with_labels({8: {7: "x"}}).origin is origin


def test_without_an_origin_validation_says_what_to_do():
    with pytest.raises(ValueError, match=r"find it again, or .*circuit\.bind\(other\.origin\)"):
        small().validate()


def test_a_graph_holds_everything_that_is_known():
    networkx = pytest.importorskip("networkx")
    graph = small().to_networkx()
    assert isinstance(graph, networkx.DiGraph)
    assert graph.nodes[0] == {
        "name": "L8/42 French words", "kind": "feature", "site": LEVELS[0], "index": 42,
        "value": 1.5, "label": "French words",
    }  # fmt: skip
    assert graph.edges[2, 3] == {
        "weight": 0.5, "share": 1.0, "consistency": 0.8, "n": 12, "measured": 0.25,
    }  # fmt: skip
    assert len(graph.edges) == 5
    assert networkx.node_link_data(graph, edges="edges")["graph"]["levels"] == list(LEVELS)


def test_a_missing_networkx_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"pip install 'mlxterp\[analysis\]'"):
        small().to_networkx()


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_saved_comes_back(make, tmp_path):
    circuit = make()
    path = tmp_path / "new" / "circuit.json"
    assert circuit.save(path) == path
    found = Circuit.load(path)
    for name in ("nodes", "edges", "levels", "tokens"):
        assert getattr(found, name) == getattr(circuit, name)
    assert found.to_dict() == circuit.to_dict() == json.loads(json.dumps(circuit.to_dict()))
    assert found.origin is None


def test_numbers_that_are_not_finite_survive(tmp_path):
    circuit = replace(small(), edges=(Edge(0, 2, math.nan),))
    (edge,) = Circuit.load(circuit.save(tmp_path / "c.json")).edges
    assert math.isnan(edge.weight)


def test_saving_replaces_a_file_whole(tmp_path):
    path = tmp_path / "c.json"
    small().save(path)
    over_prompt().save(path)
    assert Circuit.load(path).tokens == over_prompt().tokens
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(ValueError, match="path must be that of a file"):
        small().save(tmp_path)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = small().save(tmp_path / "c.json")
    monkeypatch.setattr(Path, "write_bytes", cut_short)
    with pytest.raises(OSError, match="disk full"):
        over_prompt().save(path)
    assert Circuit.load(path).facts["method"] == "gradient"


def cut_short(path, content):
    path.write_text(content[:40].decode())
    raise OSError("disk full")


def edited(change):
    values = {"format": "circuit", "format_version": 1, **small().to_dict()}
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is not valid JSON"),
        (edited(lambda v: None)[:300], "is not valid JSON"),
        ("[]", "must hold an object"),
        ("{}", "has no key 'format'"),
        (edited(lambda v: v.update(format="labels")), "has format 'labels'"),
        (edited(lambda v: v.update(format_version=2)), "this release of mlxterp reads 1"),
        (edited(lambda v: v.pop("edges")), "has no key 'edges'"),
        (edited(lambda v: v.update(nodes=3)), "does not hold a circuit"),
        (edited(lambda v: v.update(levels="abc")), "does not hold a circuit"),
        (edited(lambda v: v["nodes"][0].pop("site")), "does not hold a circuit"),
        (edited(lambda v: v["nodes"][0].update(kind="<b>")), "kind must be one of"),
        (edited(lambda v: v["nodes"][0].update(index="4")), "is not of type int"),
        (edited(lambda v: v["nodes"][0].update(label=["x"])), "is not of type str"),
        (edited(lambda v: v["edges"][0].update(weight="<b>")), "is not of type float"),
        (edited(lambda v: v["edges"][0].update(target=99)), "must be between two of 5 nodes"),
        (edited(lambda v: v.update(facts=[1])), "does not hold a circuit"),
    ],
)
def test_a_file_that_is_no_circuit_is_an_error_that_names_it(content, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Circuit.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        Circuit.load(tmp_path / "c.json")
