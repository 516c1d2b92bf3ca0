import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae import SAEConfig
from mlxterp.sae.circuits.behavior.behavior import find_behavior_circuit
from mlxterp.sae.circuits.circuit import Circuit
from mlxterp.sae.testbeds import induction, planted_circuit, train_induction
from tests.sae.features.coders import KINDS, make

METHODS = ("integrated_gradients", "gradient", "ablation")
WHOLE = {"node_share": 1.0, "edge_share": 1.0, "verbose": False}
ROW = [6, 5, 7, 1, 4, 2, 6]


@pytest.fixture(scope="module")
def planted():
    made = planted_circuit()
    return made, InterpretableModel(made.model, tokenizer=made.tokenizer)


def last(made, feature: int) -> int:
    """The number of a feature of the last level, which is the logit of the word of this number."""
    return made.n_layers * made.n_features + feature


def onward(made, values: np.ndarray, level: int) -> np.ndarray:
    """The last level where a level has these values `[S, n_features]`."""
    means = np.tril(np.ones((len(values), len(values))))
    means = means / means.sum(axis=1, keepdims=True)
    for layer in range(level, made.n_layers):
        driven = np.maximum(values @ made.mlp[layer].T - made.threshold, 0)
        values = driven + values @ made.residual[layer].T + means @ values @ made.attention[layer].T
    return values


def planted_effects(made, layer: int, word: int, method: str) -> np.ndarray:
    """The effects of features of the SAE of a layer on a logit at the end, `[S, its features]`."""
    if method != "ablation":
        return made.effects(ROW, layer, 2, method)[-1, last(made, word)]
    values, found = made.values(ROW), np.zeros(made.code(ROW, layer).shape)
    for t, i in np.ndindex(values[0].shape):
        without = values[layer + 1].copy()
        without[t, i] = 0
        lost = values[-1, -1, word] - onward(made, without, layer + 1)[-1, word]
        found[t, (layer + 1) * made.n_features + i] = lost
    return found


def effects_of(circuit: Circuit, layer: int) -> dict[tuple[int, int], float]:
    """The effects of features of a layer, by position and number, but for noise of float32."""
    return {
        (node.position, node.index): node.effect
        for node in circuit.nodes
        if node.kind == "feature" and node.effect is not None and abs(node.effect) > 1e-5
        and node.site == f"layers.{layer}.resid_post"
    }  # fmt: skip


def sparse(values: np.ndarray) -> dict[tuple[int, ...], float]:
    return {
        tuple(at): float(values[tuple(at)]) for at in np.argwhere(np.abs(values) > 1e-5).tolist()
    }


def edges_of(circuit: Circuit, kind: str) -> dict[tuple, float]:
    """Weights to targets of a kind, by layer, position and number of both ends, but for noise."""
    places = [(node.site[7:8], node.position, node.index) for node in circuit.nodes]
    return {
        (*places[edge.source], *places[edge.target]): edge.weight
        for edge in circuit.edges
        if circuit.nodes[edge.target].kind == kind and abs(edge.weight) > 1e-5
        and circuit.nodes[edge.source].kind == "feature"
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("target", "weights"), [(0, {0: 1}), ("word2", {2: 1}), ((1, "word2"), {1: 1, 2: -1})]
)
def test_effects_on_logits_are_the_planted_ones(planted, method, target, weights):
    made, model = planted
    circuit = find_behavior_circuit(model, made.saes, ROW, target, method=method, **WHOLE)
    for layer in (0, 1):
        wanted = sum(sign * planted_effects(made, layer, i, method) for i, sign in weights.items())
        assert effects_of(circuit, layer) == pytest.approx(sparse(wanted), rel=1e-4, abs=1e-5)
    values = made.values(ROW)[-1, -1]
    assert effects_of(circuit, 2) == pytest.approx(
        {(6, last(made, i)): sign * values[i] for i, sign in weights.items() if values[i]}, rel=1e-4
    )
    assert circuit.facts["value"] == pytest.approx(sum(s * values[i] for i, s in weights.items()))
    if method != "ablation":
        assert circuit.facts["explained"] == pytest.approx(1, abs=1e-4)
        assert circuit.facts["gap"] == pytest.approx(0, abs=1e-4)
    assert circuit.facts["faithfulness"] == pytest.approx(1)
    assert circuit.facts["completeness"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_edges_are_the_parts_of_the_logit_that_flow_along_them(planted, method):
    made, model = planted
    circuit = find_behavior_circuit(model, made.saes, ROW, 0, method=method, **WHOLE)
    found, wanted = edges_of(circuit, "feature"), {}
    by_layer = {layer: made.effects(ROW, layer, 2)[-1, last(made, 0)] for layer in (0, 1)}
    by_layer[2] = np.zeros(made.code(ROW, 2).shape)
    by_layer[2][-1, last(made, 0)] = made.values(ROW)[-1, -1, 0]
    for layer in (0, 1):
        code = made.code(ROW, layer + 1)
        slopes = by_layer[layer + 1] / np.where(code, code, 1)
        weights = made.effects(ROW, layer, layer + 1) * slopes[..., None, None]
        for (t, target, s, source), weight in sparse(weights).items():
            wanted[str(layer), s, source, str(layer + 1), t, target] = weight
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert edges_of(circuit, "logit") == pytest.approx(
        {("2", 6, last(made, 0), "", 6, 0): made.values(ROW)[-1, -1, 0]}, rel=1e-4
    )
    assert not any(node.kind == "error" and abs(node.effect) > 1e-4 for node in circuit.nodes)


@pytest.mark.parametrize("method", METHODS)
def test_effects_on_a_feature_are_the_planted_ones(planted, method):
    made, model = planted
    circuit = find_behavior_circuit(
        model, made.saes, ROW, feature=(2, 13), position=5, method=method, **WHOLE
    )
    assert circuit.levels == tuple(f"layers.{i}.resid_post" for i in range(3))
    for layer in (0, 1):
        wanted = sparse(made.effects(ROW, layer, 2)[5, 13])
        assert effects_of(circuit, layer) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    end = circuit.nodes[-1]
    assert (end.kind, end.index, end.position) == ("feature", 13, 5)
    assert end.value == circuit.facts["value"] == pytest.approx(made.code(ROW, 2)[5, 13])
    assert circuit.facts["target"] == "feature 13 of layer 2"


def test_every_node_keeps_an_edge_and_shares_bound_the_others(planted):
    made, model = planted
    whole = find_behavior_circuit(model, made.saes, ROW, 0, **WHOLE)
    few = find_behavior_circuit(
        model, made.saes, ROW, 0, node_share=0.9, edge_share=0.2, verbose=False
    )
    origin = few.origin
    every = origin.circuit([*origin._places(few)], edge_share=1.0)
    assert {edge.source for edge in few.edges} == {edge.source for edge in every.edges}
    assert 0 < len(few.edges) < len(every.edges) < len(whole.edges)
    for site in few.levels:
        own, every = (
            sorted(abs(n.effect) for n in circuit.nodes if n.site == site)[::-1]
            for circuit in (few, whole)
        )
        assert own == pytest.approx(every[: len(own)])
        assert sum(own[:-1]) < 0.9 * sum(every) <= sum(own) + 1e-5
    three = find_behavior_circuit(model, made.saes, ROW, 0, n_nodes=3, verbose=False)
    assert len(three.nodes) == 4
    shares = sorted((n.influence for n in whole.nodes if n.influence), reverse=True)
    assert [n.influence for n in three.nodes[:3]] == pytest.approx(shares[:3])


def test_a_circuit_of_a_behavior_can_be_kept_and_shown(planted, tmp_path):
    made, model = planted
    circuit = find_behavior_circuit(model, made.saes, made.tokenizer.decode(ROW), 0, **WHOLE)
    loaded = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert loaded.nodes == circuit.nodes and loaded.edges == circuit.edges
    assert loaded.facts == circuit.facts and loaded.tokens == circuit.tokens
    assert loaded.bind(circuit.origin).validate(n=5).correlation == pytest.approx(1)
    page = circuit.save_html(tmp_path / "circuit.html").read_text()
    assert "logit word0" in page and "effect" in page
    title = circuit.table().title
    for fact in ("target logit of 'word0'", "value 4.616", "faithfulness 100.0%", "gap 0.0%",
                 "explained 100.0%", "method integrated_gradients", "errors kept"):  # fmt: skip
        assert fact in title
    table = circuit.node_table(3)
    assert table.header == ("node", "value", "effect", "influence")
    assert [row[0] for row in table.rows][0] == "L2/12 at 6 “word6”"
    pytest.importorskip("matplotlib")
    shown = [text.get_text() for text in circuit.visualize().axes[0].texts]
    assert any(text.startswith("word0 (") for text in shown) and "L2" in shown


@pytest.fixture(scope="module")
def repeating():
    made = induction()
    row = made.sequences(1)[0][:-1].tolist()
    return made, InterpretableModel(made.model, tokenizer=made.tokenizer), row, made.step(row)


def places(circuit: Circuit) -> set[tuple[int, int, int]]:
    return {
        (int(node.site[7]), node.position, node.index)
        for node in circuit.nodes
        if node.kind == "feature"
    }


def test_the_circuit_of_a_repeated_sequence_has_the_value_path_of_the_copied_token(repeating):
    made, model, row, step = repeating
    circuit = find_behavior_circuit(model, made.saes, row, verbose=False)
    copied, foreseen = (0, step.key, step.value_feature), (1, step.query, step.output_feature)
    assert circuit.nodes[-1].index == step.token and {copied, foreseen} <= places(circuit)
    names = [(n.site[7:8], n.position, n.index) for n in circuit.nodes]
    found = {(names[e.source], names[e.target]): e.weight for e in circuit.edges}
    strongest = sorted(found, key=lambda ends: -found[ends])[:2]
    copied, foreseen, logit = (
        ("0", *copied[1:]), ("1", *foreseen[1:]), ("", step.query, step.token),
    )  # fmt: skip
    assert strongest == [(foreseen, logit), (copied, foreseen)]
    assert found[foreseen, logit] == pytest.approx(circuit.facts["value"], rel=1e-3)


def test_the_minimal_circuit_of_induction_is_its_four_features(repeating):
    made, model, row, step = repeating
    circuit = find_behavior_circuit(model, made.saes, row, verbose=False).origin.minimal(0.95)
    assert places(circuit) == {
        (0, step.query, step.query_feature), (0, step.key, step.key_feature),
        (0, step.key, step.value_feature), (1, step.query, step.output_feature),
    }  # fmt: skip
    assert circuit.facts["n_nodes"] == 4
    assert circuit.facts["faithfulness"] == pytest.approx(1, abs=1e-3)
    assert circuit.facts["completeness"] == pytest.approx(0, abs=1e-3)


def test_integrated_gradients_add_up_where_gradients_fail_at_the_softmax(repeating):
    made, model, row, step = repeating
    circuits = {
        method: find_behavior_circuit(model, made.saes, row, method=method, **WHOLE)
        for method in METHODS
    }
    rise = circuits["gradient"].facts["value"]
    assert circuits["integrated_gradients"].facts["gap"] < 0.01
    assert circuits["gradient"].facts["gap"] > 0.5
    where = {(step.key, step.key_feature), (step.query, step.query_feature)}
    looked = {
        method: sum(effects_of(circuit, 0).get(place, 0.0) for place in where)
        for method, circuit in circuits.items()
    }
    assert looked["ablation"] == pytest.approx(2 * rise, rel=1e-3)  # either is needed for all
    assert abs(looked["gradient"]) < 0.05 * rise
    assert looked["integrated_gradients"] > 0.2 * rise


def test_more_steps_are_taken_only_where_they_are_needed(repeating):
    made, model, row, _ = repeating
    levels = find_behavior_circuit(model, made.saes, row, verbose=False).facts["levels"]
    assert [level["n_steps"] for level in levels.values()] == [243, 9]
    few = find_behavior_circuit(model, made.saes, row, n_steps=5, verbose=False).facts
    assert few["levels"]["layers.0.resid_post"]["n_steps"] == 5 and few["gap"] > 0.05


@pytest.fixture(scope="module")
def trained():
    """A model that learned induction, and SAEs of both of its layers."""
    made = train_induction()
    model = InterpretableModel(made.model, tokenizer=made.tokenizer)
    texts = [made.tokenizer.decode(row[1:]) for row in made.sequences(300, period=16, seed=5)]
    config = SAEConfig(
        expansion_factor=4, k=8, learning_rate=3e-3, num_epochs=3, batch_size=512,
        resample_dead_every=0,
    )  # fmt: skip
    saes = {}
    for layer in (0, 1):
        saes[layer] = model.train_sae(
            layer=layer, component="residual", dataset=texts, config=config, verbose=False
        )
    return made, model, saes


def test_induction_that_was_learned_is_in_the_circuit_of_a_repeated_sequence(trained):
    made, model, saes = trained
    for row in made.sequences(3, period=12, seed=9).tolist():
        query, key = 20, 9  # the token before the key is the one at the query
        assert row[key - 1] == row[query] and row[key] == row[query + 1]
        circuit = find_behavior_circuit(model, saes, row[: query + 1], verbose=False)
        assert circuit.nodes[-1].index == row[key] and circuit.facts["gap"] < 0.01
        by_position = np.abs(circuit.origin.flows[0].features).sum(axis=1)
        assert set(np.argsort(-by_position)[:2]) == {key, query}
        assert by_position[[key, query]].sum() > 0.6 * by_position.sum()
        small = circuit.origin.minimal(0.8)
        assert small.facts["faithfulness"] >= 0.8 and small.facts["n_nodes"] <= 30
        found = {(node.site, node.position) for node in small.nodes}
        assert {("layers.0.resid_post", key), ("layers.1.resid_post", query)} <= found
        kept = [e for e in small.edges if small.nodes[e.source].position == key]
        assert any(small.nodes[e.target].position == query for e in kept)


TEXT = "def add(a, b):\n    return a + b"


@pytest.fixture(scope="module")
def saes(model, texts):
    config = SAEConfig(expansion_factor=2, k=8, learning_rate=3e-3, num_epochs=2)
    return {
        layer: model.train_sae(
            layer=layer, component="residual", dataset=texts[:12], config=config, verbose=False
        )
        for layer in (1, 4)
    }


@pytest.mark.parametrize(("of", "target"), [("nodes", "pair"), ("edges", "pair"), ("edges", "one")])
def test_what_gradients_predict_is_what_interventions_do(model, saes, texts, of, target):
    """Over three prompts, in units of the largest effect of each."""
    predicted, measured = [], []
    for text in texts[20:23]:
        ids = model.encode(text[:60])
        ranked = np.argsort(-np.array(model.run([ids]).output[0, -1])).tolist()
        circuit = find_behavior_circuit(
            model, saes, ids, tuple(ranked[:2]) if target == "pair" else ranked[0],
            method="gradient", n_nodes=100, verbose=False,
        )  # fmt: skip
        found = circuit.validate(n=50, of=of)
        assert len(found) == 50 and found.names[0].startswith("L")
        predicted.append(found.predicted / np.abs(found.predicted).max())
        measured.append(found.measured / np.abs(found.predicted).max())
    assert np.corrcoef(np.concatenate(predicted), np.concatenate(measured))[0, 1] > 0.9


def test_what_was_measured_is_what_is_measured_again(model, saes):
    circuit = find_behavior_circuit(model, saes, TEXT, method="ablation", n_nodes=20, verbose=False)
    for of in ("nodes", "edges"):
        found = circuit.validate(n=10, of=of)
        assert len(found) == 10
        np.testing.assert_allclose(found.measured, found.predicted, rtol=1e-3, atol=1e-4)
    effects = [circuit.nodes[i].effect for i in circuit.validate(n=5).nodes]
    np.testing.assert_allclose(circuit.validate(n=5).predicted, effects)


def test_a_model_may_be_left_out_by_coders_that_know_it(saes):
    found = find_behavior_circuit(saes={4: saes[4]}, prompt=TEXT, n_nodes=3, verbose=False)
    assert found.levels == ("layers.4.resid_post",) and len(found.nodes) == 4


def test_coders_stand_in_the_order_of_the_forward_pass(model, saes):
    turned = find_behavior_circuit(model, {4: saes[4], 1: saes[1]}, TEXT, n_nodes=5, verbose=False)
    assert turned.levels == ("layers.1.resid_post", "layers.4.resid_post")


def test_a_feature_is_due_to_earlier_layers_alone(model, saes):
    found = find_behavior_circuit(model, saes, TEXT, feature=(4, 3), n_nodes=5, verbose=False)
    assert {node.site for node in found.nodes[:-1]} == {"layers.1.resid_post"}
    assert found.levels == ("layers.1.resid_post", "layers.4.resid_post")
    assert found.validate(n=3).nodes and not found.validate(n=3, of="edges").nodes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saes": {}}, "saes must hold the coder of one layer or more"),
        (
            {"prompt": ""},
            "prompt must be a text, or ids, of at least one token that is not special",
        ),
        ({"prompt": [0]}, "at least one token that is not special, got"),
        ({"prompt": [5, 9999]}, "token ids must be 0 to 4095.* has 9999"),
        ({"corrupted": "def"}, r"corrupted must have as many tokens as the prompt, \d+, got 2: \["),
        ({"corrupted": ""}, "corrupted must be a text"),
        ({"corrupted": TEXT, "mean_of": ["a"]}, "Give corrupted or mean_of"),
        ({"mean_of": "a text"}, "mean_of must be a list of texts, got one: 'a text'"),
        ({"mean_of": []}, "mean_of must be texts with at least one token that is not special"),
        ({"method": "magic"}, r"method must be one of \['integrated_gradients', .*got 'magic'"),
        ({"errors": "removed"}, r"errors must be one of \['kept', 'nodes'\], got 'removed'"),
        ({"n_steps": 0}, "n_steps must be >= 1, got 0"),
        ({"n_nodes": 0}, "n_nodes must be >= 1, got 0"),
        ({"node_share": 0.0}, r"node_share must be in \(0, 1\], got 0.0"),
        ({"edge_share": 1.5}, r"edge_share must be in \(0, 1\], got 1.5"),
        ({"feature": (1, 3)}, r"saes must hold the coder of a layer before 1, .* got \[1, 4\]"),
        ({"feature": (2, 3)}, r"feature must be of a layer of saes, \[1, 4\], got \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_an_error(model, saes, change, message):
    options = {"model": model, "saes": saes, "prompt": TEXT, "verbose": False} | change
    with pytest.raises(ValueError, match=message):
        find_behavior_circuit(**options)


def test_coders_that_do_not_fit_are_an_error(model, saes, texts, monkeypatch):
    with pytest.raises(ValueError, match="coder of layer 4 reads .*does not compute from all of"):
        find_behavior_circuit(model, {1: saes[4], 4: saes[1]}, TEXT)
    other = planted_circuit()
    stranger = InterpretableModel(other.model, tokenizer=other.tokenizer)
    with pytest.raises(ValueError, match="coder of layer 1 does not fit the model: "):
        find_behavior_circuit(stranger, saes, "word1")
    with pytest.raises(ValueError, match=r"does not know its language model: pass model="):
        find_behavior_circuit(saes=other.saes, prompt=[1])


def test_a_crosscoder_is_refused_as_it_reads_what_comes_after_what_it_writes(model):
    with pytest.raises(ValueError, match="layer 1 reads several sites before it can write the f"):
        find_behavior_circuit(model, {1: make("crosscoder")}, TEXT)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "crosscoder"])
def test_other_kinds_are_not(model, kind):
    found = find_behavior_circuit(model, {1: make(kind)}, TEXT, n_nodes=8, verbose=False)
    assert len(found.nodes) == 9 and found.facts["gap"] < 0.02
    assert found.origin.faithfulness(found) == found.facts["faithfulness"]
