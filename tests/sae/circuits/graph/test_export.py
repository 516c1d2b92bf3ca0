import json
import re
from dataclasses import replace
from pydoc_data.topics import topics

import numpy as np
import pytest

from mlxterp.model import InterpretableModel
from mlxterp.sae.circuits.circuit import Circuit, Edge, Node
from mlxterp.sae.circuits.graph.export import feature_id, harmless, save_attribution_graph
from mlxterp.sae.circuits.graph.search import find_attribution_graph
from tests.sae.circuits.examples import LEVELS, NASTY, over_dataset, over_prompt
from tests.sae.circuits.frozen_llama import Numbers, transcoder
from tests.tiny_models import build

NODE = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str,
    "token_prob": float, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int,
    "jsNodeId": str, "clerp": str, "influence": float | None, "activation": float | None,
}  # fmt: skip
QUOTES = ('"', 'a "b" c', "(p=0.9)", '" (p=1.0)', "<b>x</b>", "</script>", "\n", "\t", " ", "")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    model = InterpretableModel(build("llama"), Numbers())
    coders = {layer: transcoder(model, layer) for layer in (0, 1, 2)}
    return find_attribution_graph(model, coders, [0, 4, 9, 3, 7, 9, 5, 4], verbose=False)


def saved(circuit, directory, slug="graph", **options) -> dict:
    return json.loads(save_attribution_graph(circuit, directory, slug, **options).read_text())


def shown(graph: dict) -> dict:
    """What the open front-end makes of a graph: its nodes by id, with their links, as it does."""
    n_tokens = len(graph["metadata"]["prompt_tokens"])
    js, by_id, by_feature = {}, {}, {}
    for node in map(dict, graph["nodes"]):
        key = f"{node['layer']}_{node['feature']}"
        if "error" in node["feature_type"]:
            key += f"__err_idx_{n_tokens - node['ctx_idx']}"
        if node["feature_type"] == "logit" and node["clerp"]:
            node["logitPct"] = float(node["clerp"].split("(p=")[1].split(")")[0])
            node["logitToken"] = node["clerp"].split('"')[1]
        node["links"] = []
        js[node["jsNodeId"]], by_id[node["node_id"]] = node, node
        by_feature.setdefault(key, []).append(node)
    for nodes in by_feature.values():
        if len(nodes) > n_tokens * 2 / 3:
            for node in nodes:
                del js[node["jsNodeId"]], by_id[node["node_id"]]
    for link in graph["links"]:
        if link["source"] in by_id and link["target"] in by_id:
            by_id[link["source"]]["links"].append(link)
    return js


def test_the_graph_has_the_schema(circuit, tmp_path):
    graph = saved(circuit, tmp_path, scan="tiny")
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    assert graph["qParams"] == {
        "linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": "",
    }  # fmt: skip
    about = graph["metadata"]
    assert about["slug"] == "graph" and about["scan"] == "tiny" and about["node_threshold"] == 0.8
    assert about["prompt_tokens"] == list(map(str, [0, 4, 9, 3, 7, 9, 5, 4]))
    assert about["transcoder_list"] == [] and about["schema_version"] == 1
    for node in graph["nodes"]:
        assert set(node) == set(NODE)
        assert all(isinstance(node[name], kind) for name, kind in NODE.items())
        assert 0 <= node["ctx_idx"] < 8
    assert {node["feature_type"] for node in graph["nodes"]} == {
        "cross layer transcoder", "mlp reconstruction error", "embedding", "logit",
    }  # fmt: skip
    assert all(set(link) == {"source", "target", "weight"} for link in graph["links"])


def test_nodes_and_links_are_those_of_the_circuit(circuit, tmp_path):
    graph = saved(circuit, tmp_path)
    assert (len(graph["nodes"]), len(graph["links"])) == (len(circuit.nodes), len(circuit.edges))
    ids = [node["node_id"] for node in graph["nodes"]]
    for link, edge in zip(graph["links"], circuit.edges, strict=True):
        assert (ids.index(link["source"]), ids.index(link["target"])) == (edge.source, edge.target)
        assert link["weight"] == edge.weight
    for known, node in zip(graph["nodes"], circuit.nodes, strict=True):
        if node.kind == "feature":
            layer = int(node.site.split(".")[1])
            assert known["node_id"] == f"{layer}_{node.index}_{node.position}"
            assert known["layer"] == str(layer) and known["activation"] == node.value
            assert (
                known["feature"] == (layer + node.index) * (layer + node.index + 1) / 2 + node.index
            )


def test_the_checks_of_the_graph_are_in_its_metadata(circuit, tmp_path):
    facts = saved(circuit, tmp_path)["metadata"]["facts"]
    assert facts["checks"]["conservation_error"] < 1e-9
    assert facts["replacement_score"] == circuit.facts["replacement_score"]


def test_influence_adds_up_from_the_most_influential_on(circuit, tmp_path):
    known = saved(circuit, tmp_path)["nodes"]
    pairs = [(n.influence, k["influence"]) for n, k in zip(circuit.nodes, known, strict=True)
             if n.kind != "logit"]  # fmt: skip
    pairs.sort(key=lambda pair: -pair[0])
    own = np.array([share for share, _ in pairs])
    np.testing.assert_allclose([x for _, x in pairs], np.cumsum(own) / own.sum(), atol=1e-9)


def test_the_front_end_shows_every_node_and_link(circuit, tmp_path):
    found = shown(saved(circuit, tmp_path))
    assert len(found) == len(circuit.nodes)
    assert sum(len(node["links"]) for node in found.values()) == len(circuit.edges)
    logits = {n.index: n.value for n in circuit.nodes if n.kind == "logit"}
    for node in (node for node in found.values() if node["feature_type"] == "logit"):
        assert node["logitPct"] == pytest.approx(logits[node["feature"]], abs=5e-4)
        assert node["logitToken"] == str(node["feature"])
    best = max(logits, key=lambda i: logits[i])
    assert [n["feature"] for n in found.values() if n["is_target_logit"]] == [best]


def colliding() -> Circuit:
    """The same feature twice, and errors that are numbered as features are elsewhere."""
    nodes = (
        *(Node("feature", "layers.0.mlp_out", i, t) for i in (0, 1) for t in (1, 2)),
        *(Node("error", f"layers.{layer}.mlp_out", -1, t) for layer in (0, 1) for t in (1, 2)),
        *(Node("embedding", "", 1, t) for t in range(3)),
        *(Node("logit", "", i, 2, 0.5, label="x") for i in (0, 1)),
        *(Node("feature", "layers.1.mlp_out", i, t) for i in (0, 1) for t in (1, 2)),
    )
    edges = tuple(Edge(0, i, float(i)) for i in range(1, len(nodes)))
    return Circuit(nodes, edges, ("layers.0.mlp_out", "layers.1.mlp_out"), ("a", "a", "a"))


def test_no_two_nodes_have_one_id(tmp_path):
    graph = saved(colliding(), tmp_path)
    for name in ("node_id", "jsNodeId"):
        assert len({node[name] for node in graph["nodes"]}) == len(graph["nodes"])
    # One token everywhere is no feature that is too common to be shown.
    assert len(shown(graph)) == len(graph["nodes"])


def test_ids_of_features_are_different_for_all_layers():
    ids = {feature_id(layer, i) for layer in range(60) for i in range(400)}
    assert len(ids) == 60 * 400 and feature_id(0, 0) == 0 and feature_id(2, 3) == 18
    assert feature_id(100, 2**25) < 2**53  # exact as a number of JavaScript


def test_features_that_front_ends_hide_are_warned_of(tmp_path):
    nodes = [Node("feature", "layers.0.mlp_out", 5, t) for t in range(3)]
    common = Circuit(tuple(nodes), (), ("layers.0.mlp_out",), ("a", "b", "c", "d"))
    with pytest.warns(UserWarning, match=r"more than two thirds .*layers.0.mlp_out/5"):
        graph = saved(common, tmp_path)
    assert not shown(graph)


@pytest.mark.parametrize("text", [*NASTY, *QUOTES])
def test_texts_that_are_hard_to_show_do_no_harm(text, tmp_path):
    nodes = (
        Node("feature", "layers.0.mlp_out", 1, 0, label=text),
        Node("embedding", "", 1, 0),
        Node("logit", "", 7, 1, 0.125, label=text),
        Node("logit", "", 8, 1, 0.25, label="other"),
    )
    hard = Circuit(nodes, (Edge(0, 2, 1.0),), ("layers.0.mlp_out",), (text, "b"), {text: text})
    graph = saved(hard, tmp_path)
    found = shown(graph)
    assert len(found) == 4
    assert [n["logitPct"] for n in found.values() if n["feature_type"] == "logit"] == [0.125, 0.25]
    token = found["L_7-1"]["logitToken"]
    assert token == (harmless(text) or "token 7").replace('"', "”").replace("(p=", "(p꞊")
    shown_texts = [*graph["metadata"]["prompt_tokens"], *(n["clerp"] for n in graph["nodes"])]
    for one in shown_texts:
        assert not re.search(r"<[A-Za-z/!?]", one) and "\n" not in one


def test_harmless_texts_stay():
    for text in ("a < b", "x <= 3", "Größe", " the", "&amp;", "5 > 4"):
        assert harmless(text) == text


OUTSIDE = ("", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "a\x00", ".hidden", "-x", "x" * 129, "ü",
           "a b", "a\n", None, 3)  # fmt: skip


@pytest.mark.parametrize("slug", OUTSIDE)
def test_names_that_leave_the_directory_are_errors(circuit, tmp_path, slug):
    inside = tmp_path / "inside"
    with pytest.raises(ValueError, match="slug must be 1 to 128 letters"):
        save_attribution_graph(circuit, inside, slug)
    if slug is not None:
        with pytest.raises(ValueError, match="scan must be 1 to 128 letters"):
            save_attribution_graph(circuit, inside, "fine", scan=slug or "/")
    assert not list(tmp_path.iterdir())


def test_the_index_lists_all_graphs_and_keeps_what_is_there(circuit, tmp_path):
    other = {"slug": "other", "scan": "x", "prompt": "p", "prompt_tokens": []}
    index = tmp_path / "graph-metadata.json"
    index.write_text(json.dumps({"graphs": [other], "more": 1}))
    saved(circuit, tmp_path, "first")
    saved(circuit, tmp_path, "second")
    graph = saved(circuit.origin.circuit(0.5), tmp_path, "first")
    content = json.loads(index.read_text())
    assert content["more"] == 1 and content["graphs"][0] == other
    assert [known["slug"] for known in content["graphs"]] == ["other", "second", "first"]
    assert content["graphs"][2] == graph["metadata"] and graph["metadata"]["node_threshold"] == 0.5
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["graph-metadata.json", "graph_data/first.json", "graph_data/second.json"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"graphs": 3}', '{"graphs": [1]}'])
def test_a_damaged_index_is_an_error_and_nothing_is_written(circuit, tmp_path, content):
    (tmp_path / "graph-metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"graph-metadata.json"):
        save_attribution_graph(circuit, tmp_path, "graph")
    assert [path.name for path in tmp_path.iterdir()] == ["graph-metadata.json"]


def test_a_circuit_over_a_dataset_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="circuit must be one of a prompt"):
        save_attribution_graph(over_dataset(), tmp_path, "graph")


def test_levels_of_one_layer_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="circuit must have one level in each layer"):
        save_attribution_graph(
            replace(over_prompt(), levels=(*LEVELS, "layers.8.mlp")), tmp_path, "graph"
        )
    with pytest.raises(ValueError, match="levels that are in a layer, got 'model.norm'"):
        save_attribution_graph(
            replace(over_prompt(), levels=(*LEVELS, "model.norm")), tmp_path, "graph"
        )


def test_circuits_of_other_kinds_and_from_files_are_exported(circuit, tmp_path):
    behaviour = saved(over_prompt(), tmp_path, "behaviour")
    assert behaviour["metadata"]["scan"] == "mlxterp"
    assert all(node["influence"] is None for node in behaviour["nodes"])
    loaded = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    graphs = [saved(c, tmp_path, "graph", scan="s") for c in (circuit, loaded)]
    assert graphs[0] == graphs[1]


def test_features_with_examples_have_files(demo, tmp_path):
    coders = {layer: transcoder(demo, layer, n=64, k=6) for layer in (0, 1)}
    texts = [text[:400] for text in list(topics.values())[:4]]
    coders[1].collect(texts, n_examples=6, verbose=False)
    found = find_attribution_graph(demo, coders, "The for statement", verbose=False)
    graph = saved(found, tmp_path, scan="set")
    features = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    expected = {f"{node['feature']}.json" for node in features if node["layer"] == "1"}
    place = tmp_path / "features" / "set"
    assert {path.name for path in place.iterdir()} == expected and len(expected) > 3
    of = {node["feature"]: int(node["node_id"].split("_")[1]) for node in features}
    for path in place.iterdir():
        content = json.loads(path.read_text())
        own, data = of[int(path.stem)], coders[1].features
        assert content["index"] == own and content["transcoder_id"] == "layers.1.mlp_out"
        assert content["act_max"] == pytest.approx(float(data.maxima[own]))
        assert content["activation_frequency"] == pytest.approx(float(data.firing_rates[own]))
        assert sum(content["histogram"]) == len(data.codes.of(own)[0])
        assert len(content["quantile_values"]) == 5
        assert content["top_logits"][0] == demo_top(coders[1], own)
        for group in content["examples_quantiles"]:
            assert group["quantile_name"] and group["examples"]
            for example in group["examples"]:
                assert len(example["tokens"]) == len(example["tokens_acts_list"])
                assert example["tokens_acts_list"][example["train_token_ind"]] > 0
                assert example["is_repeated_datapoint"] is False
    few = saved(found, tmp_path / "other", coders=[coders[0]])
    assert len(few["nodes"]) == len(graph["nodes"])
    assert not (tmp_path / "other" / "features").exists()


def demo_top(coder, feature: int) -> str:
    from mlxterp.sae.features.logit_effects import logit_effects

    return logit_effects(coder, coder.known_model(), feature).top[0][0]
