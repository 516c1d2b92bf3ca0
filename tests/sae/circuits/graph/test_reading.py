"""Attribution graphs out of files, circuit-tracer's and our own."""

import json
from pathlib import Path

import pytest

from mlxterp.sae.circuits.circuit import Edge, Node
from mlxterp.sae.circuits.graph.export import save_attribution_graph
from mlxterp.sae.circuits.graph.reading import load_attribution_graph
from tests.sae.circuits.examples import over_prompt

GOLDEN = Path(__file__).parents[3] / "golden" / "formats" / "circuit_tracer" / "graph.json"
SITES = ("layers.1.mlp_out", "layers.3.mlp_out")


def test_a_graph_of_circuit_tracer():
    circuit = load_attribution_graph(GOLDEN)
    assert circuit.levels == SITES
    assert circuit.tokens == ("<bos>", " a", ' "b"')
    assert circuit.facts == {"slug": "small", "scan": "tiny"}
    assert circuit.nodes == (
        Node("embedding", "", 17, 1),
        Node("embedding", "", 23, 2),
        Node("feature", SITES[0], 42, 1, 2.5),
        Node("feature", SITES[1], 7, 2, 0.125),
        Node("error", SITES[0], -1, 1),
        Node("logit", "", 99, 2, 0.75, label=' "c" (p=1)'),
    )
    assert circuit.edges == (
        Edge(2, 5, -8.0), Edge(2, 3, 4.0), Edge(3, 5, 2.0), Edge(0, 2, 1.5), Edge(1, 3, -0.5),
        Edge(4, 3, 0.25),
    )  # fmt: skip
    assert load_attribution_graph(GOLDEN, "resid_post").levels[0] == "layers.1.resid_post"


def test_a_circuit_comes_back(tmp_path):
    circuit = over_prompt().with_labels({8: {11: "French words"}})
    found = load_attribution_graph(save_attribution_graph(circuit, tmp_path, "one"), "resid_post")
    assert [node.key for node in found.nodes] == [node.key for node in circuit.nodes]
    assert [node.label for node in found.nodes if node.kind == "feature"] == [
        node.label for node in circuit.nodes if node.kind == "feature"
    ]
    assert [n.value for n in found.nodes] == [n.value for n in circuit.nodes]
    own = {(e.source, e.target): e.weight for e in circuit.edges}
    assert {(e.source, e.target): e.weight for e in found.edges} == own
    assert found.levels == tuple(n for n in circuit.levels if n in {k.site for k in circuit.nodes})
    assert len(found.tokens) == len(circuit.tokens)
    assert found.facts["slug"] == "one"


def changed(tmp_path, change):
    graph = json.loads(GOLDEN.read_text())
    change(graph)
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("links"), "has no key 'links'"),
        (lambda g: g["metadata"].pop("prompt_tokens"), "attribution graph: 'prompt_tokens'"),
        (lambda g: g["metadata"].update(prompt_tokens=[1]), "1 is not of the type"),
        (lambda g: g.update(nodes={}), "is not of the type"),
        (lambda g: g["nodes"][2].update(feature_type="lorsa"), "'feature_type' must be one of"),
        (lambda g: g["nodes"][2].update(ctx_idx=3), "'ctx_idx' must be below 3"),
        (lambda g: g["nodes"][2].update(ctx_idx=-1), "'ctx_idx' must be below 3"),
        (lambda g: g["nodes"][2].update(layer="x"), "invalid literal"),
        (lambda g: g["nodes"][2].update(activation="x"), "'x' is not of the type"),
        (lambda g: g["nodes"][2].update(node_id="42"), "'node_id' must be as"),
        (lambda g: g["links"][0].update(source="7_7_7"), "each must be the id of one node"),
        (lambda g: g["links"].pop(3) and g["nodes"][4].update(node_id="1_42_1"), "id of one node"),
        (lambda g: g["links"][0].update(weight=True), "True is not of the type"),
        (lambda g: g["nodes"].append(g["nodes"][1] | {"node_id": "x_23_2"}), "must differ"),
    ],
)  # fmt: skip
def test_what_is_no_graph(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_attribution_graph(changed(tmp_path, change))
