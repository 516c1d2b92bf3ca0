import json
import re
import warnings
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.model import InterpretableModel
from mlxterp.sae import CrossLayerConfig, TranscoderConfig
from mlxterp.sae.circuits.circuit import Circuit
from mlxterp.sae.circuits.graph.search import attribution_graph_cost, find_attribution_graph
from mlxterp.sae.coder import Columns
from mlxterp.sae.sae import SAE
from mlxterp.sae.testbeds import induction, planted_circuit
from mlxterp.sae.transcoder import Transcoder
from tests.sae.circuits.examples import small
from tests.sae.circuits.frozen_llama import Numbers, transcoder
from tests.tiny_models import build

IDS = [0, 4, 9, 3, 7, 9, 5, 4]
PROMPT = "The for statement is used to iterate over the elements of a sequence"
MLP = {"from_component": "mlp_in", "to_component": "mlp_out"}
SETTINGS = {"expansion_factor": 4, "k": 16, "learning_rate": 8e-3, "batch_size": 256}


def find(*args, **options) -> Circuit:
    return find_attribution_graph(*args, **({"verbose": False} | options))


def whole(*args, **options) -> Circuit:
    return find(*args, **options, node_share=1.0, edge_share=1.0)


def of_kind(model_type: str = "llama"):
    model = InterpretableModel(build(model_type), Numbers())
    return model, {layer: transcoder(model, layer) for layer in (0, 1)}


@pytest.fixture(scope="module")
def llama():
    return of_kind()


@pytest.fixture(scope="module")
def circuit(llama) -> Circuit:
    return find(*llama, IDS)


@pytest.fixture(scope="module")
def trained(demo):
    texts = [text[:800] for text in list(topics.values())[:6]]
    config = {"dataset": texts, "verbose": False}
    return {
        "transcoders": {
            layer: demo.train_transcoder(
                from_layer=layer, **MLP, config=TranscoderConfig(num_epochs=4, **SETTINGS), **config
            )
            for layer in (0, 3)
        },
        "skip": {
            2: demo.train_transcoder(
                from_layer=2, **MLP, skip=True,
                config=TranscoderConfig(num_epochs=1, **SETTINGS), **config,
            )
        },
        "cross-layer": demo.train_cross_layer_transcoder(
            [1, 2, 4], config=CrossLayerConfig(num_epochs=1, **SETTINGS), **config
        ),
    }  # fmt: skip


# Planted circuits.


def planted_edges(testbed, ids) -> dict:
    """The linear effects between levels: {(source key, target key): weight}."""
    n, n_words, S = testbed.n_features, len(testbed.starts), len(ids)
    means = np.tril(np.ones((S, S))) / np.arange(1, S + 1)[:, None]
    values = testbed.values(ids)
    outputs = [testbed._driven(v, layer) for layer, v in enumerate(values[:-1])]
    embeddings = testbed.tokenizer.encode(testbed.tokenizer.decode(ids))

    def pushed(v: np.ndarray, layer: int) -> np.ndarray:
        return v @ testbed.residual[layer].T + means @ v @ testbed.attention[layer].T

    sources = [("embedding", "", embeddings[t], t, 0, values[0][t]) for t in range(S)]
    sources += [
        ("feature", f"layers.{layer}.mlp_out", i, t, layer + 1, f[t, i] * np.eye(n)[i])
        for layer, f in enumerate(outputs)
        for t, i in np.argwhere(f)
    ]
    found = {}
    for *source, level, vector in sources:
        v = np.zeros((S, n))
        v[source[3]] = vector
        for layer in range(level, testbed.n_layers):
            for t, i in np.argwhere(outputs[layer]):
                target = ("feature", f"layers.{layer}.mlp_out", int(i), int(t))
                found[tuple(source), target] = v[t] @ testbed.mlp[layer][i]
            v = pushed(v, layer)
        logits = np.zeros(n_words)
        logits[:n] = v[-1]
        for i in range(n):
            found[tuple(source), ("logit", "", i, S - 1)] = logits[i] - logits.mean()
    return {ends: weight for ends, weight in found.items() if abs(weight) > 1e-9}


@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_exactly_the_planted_edges_are_found_with_their_weights(threshold):
    testbed = planted_circuit(threshold=threshold)
    model, ids = InterpretableModel(testbed.model, testbed.tokenizer), [3, 5, 1, 6, 7]
    found = whole(model, testbed.transcoders, ids, [0, 1, 2, 3])
    weights = {
        (found.nodes[e.source].key, found.nodes[e.target].key): e.weight
        for e in found.edges
        if abs(e.weight) > 1e-6  # others are due to rounding
    }
    expected = planted_edges(testbed, ids)
    # Features without influence on the last position are not looked at.
    kept = {node.key for node in found.nodes}
    expected = {ends: weight for ends, weight in expected.items() if set(ends) <= kept}
    assert weights == pytest.approx(expected, abs=1e-5)
    assert len(weights) > 50 and {e[0] for e, _ in expected} == {"feature", "embedding"}
    assert found.facts["replacement_score"] == pytest.approx(1.0, abs=1e-6)


def test_of_induction_the_value_is_found_and_what_leads_to_it_is_not():
    testbed = induction()
    model = InterpretableModel(testbed.model, testbed.tokenizer)
    ids = testbed.sequences(1)[0][:9].tolist()
    step = testbed.step(ids)
    found = find(model, testbed.transcoders, ids)
    copied, feature, logit = (
        ("embedding", "", step.token, step.key),
        ("feature", "layers.1.mlp_out", step.token, step.query),
        ("logit", "", step.token, step.query),
    )
    ends = [(found.nodes[e.source].key, found.nodes[e.target].key) for e in found.edges]
    assert ends == [(feature, logit), (copied, feature)]
    # The token before the copied one, which the head matches, has no part in it.
    number = {node.key: node for node in found.nodes}
    assert number["embedding", "", ids[step.query], step.key - 1].influence < 1e-6
    assert number[copied].influence == pytest.approx(1.0, abs=1e-5)


# Trained coders of the bundled model.


@pytest.mark.parametrize("kind", ["transcoders", "skip", "cross-layer"])
def test_every_edge_is_the_effect_of_the_actual_intervention(demo, trained, kind):
    found = find(None, trained[kind], PROMPT)
    validation = found.validate(n=300)
    assert len(validation) == min(300, len(found.edges)) > 100
    np.testing.assert_allclose(validation.measured, validation.predicted, atol=1e-4)
    checks = found.facts["checks"]
    assert checks["affine_error"] < 1e-5 and checks["intervention_error"] < 1e-5
    assert checks["conservation_error"] < 1e-9 and checks["n_interventions"] == 8
    assert validation.method == "sources multiplied by 2, patterns and scales held"
    out = found.validate(n=10, factor=0.0)
    np.testing.assert_allclose(out.measured, out.predicted, atol=1e-4)
    assert np.array_equal(out.predicted, -validation.predicted[:10])


def test_direct_effects_are_compared_with_those_in_the_model_itself(demo, trained):
    circuit = find(None, trained["transcoders"], PROMPT)
    found = circuit.validate(n=40, factor=0.0, frozen=False, kinds=["feature"])
    assert {circuit.nodes[circuit.edges[i].source].kind for i in found.edges} == {"feature"}
    assert found.method == "sources taken out, in the model as it is"
    assert np.isfinite(found.correlation) and np.abs(found.measured - found.predicted).max() > 0.01
    # The strongest edge, by an edit of the model alone.
    edge = circuit.edges[found.edges[0]]
    source, target = circuit.nodes[edge.source], circuit.nodes[edge.target]
    coder = trained["transcoders"][int(source.site.split(".")[1])]
    row = source.value * coder.direction(source.index)

    def less(x):
        x[:, source.position] -= row
        return x

    def value(edit) -> float:
        out = demo.run([demo.encode(PROMPT)], capture="layers.3.mlp_in", edit=edit)
        if target.kind == "logit":
            logits = out.output[0, -1]
            return float(logits[target.index] - logits.mean())
        x = out["layers.3.mlp_in"][0, target.position]
        return float(x @ trained["transcoders"][3].W_enc[target.index])

    assert found.measured[0] == pytest.approx(value({source.site: less}) - value({}), abs=1e-4)


def test_edges_and_bias_add_up_to_the_values_of_features(demo, trained):
    graph = whole(None, trained["transcoders"], PROMPT).origin
    r = graph.replacement
    chosen = np.flatnonzero(graph.targets < r.n_sources)[:50]
    captured = demo.run([r.tokens[0].tolist()], capture=["layers.0.mlp_in", "layers.3.mlp_in"])
    for row in chosen:
        coder, t, i = r.features[graph.targets[row]].tolist()
        own = r.coders[coder]
        x = np.array(captured[own.reads.names[0]][0, t], np.float64)
        value = x @ np.array(own.W_enc[i], np.float64) + float(own.b_enc[i])
        assert r.values[graph.targets[row]] == pytest.approx(max(value, 0), rel=1e-4)
    assert len(chosen) == 50


def test_features_of_a_cross_layer_transcoder_are_at_the_layer_that_they_read(trained):
    found = find(None, trained["cross-layer"], PROMPT)
    assert [level.split(".")[1] for level in found.levels] == list("012345")
    own = trained["cross-layer"]
    for node in (node for node in found.nodes if node.kind == "feature"):
        block = next(b for b in own.blocks if node.index < b.features.stop)
        assert node.site == own.writes.names[block.sites.start]
    assert found.facts["only_errors_at"] == "layers.0.mlp, layers.3.mlp, layers.5.mlp"


# The targets.


def test_targets_are_the_likeliest_tokens_with_their_probability(demo, trained):
    found = find(None, trained["skip"], PROMPT, n_interventions=1)
    logits = demo.run([demo.encode(PROMPT)]).output[0, -1]
    chances = np.array(mx.softmax(logits))
    order = np.argsort(-chances)[:10]
    nodes = [node for node in found.nodes if node.kind == "logit"]
    assert [node.index for node in nodes] == order[: len(nodes)].tolist()
    np.testing.assert_allclose(
        [node.value for node in nodes], chances[order[: len(nodes)]], rtol=1e-4
    )
    assert len(nodes) == 10 or sum(node.value for node in nodes) >= 0.95
    assert [node.label for node in nodes] == demo.to_str_tokens(order[: len(nodes)].tolist())


def test_few_targets_are_enough_where_they_have_all_the_probability(llama, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.circuits.graph.readouts.PROBABILITY", 0.02)
    found = find(*llama, IDS)
    assert sum(node.kind == "logit" for node in found.nodes) < 10


def test_targets_can_be_named_by_text_and_by_id(llama):
    model, coders = llama
    found = find(model, coders, IDS, ["17", 40])
    chances = np.array(mx.softmax(model.run([IDS]).output[0, -1]))
    nodes = [node for node in found.nodes if node.kind == "logit"]
    assert [(node.index, node.position) for node in nodes] == [(17, 7), (40, 7)]
    np.testing.assert_allclose([node.value for node in nodes], chances[[17, 40]], rtol=1e-5)
    alone = find(model, coders, IDS, 17)
    assert [node.index for node in alone.nodes if node.kind == "logit"] == [17]


# The search and the graph.


def test_the_most_influential_features_are_looked_at_first(llama, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.circuits.graph.search.FEATURES_PER_TURN", 5)
    everything = whole(*llama, IDS).origin
    some = find(*llama, IDS, max_features=20).origin
    n = len(some.logits)
    assert len(some.targets) == n + 20
    rows = {target: i for i, target in enumerate(everything.targets.tolist())}
    same = [rows[target] for target in some.targets.tolist()]
    np.testing.assert_allclose(some.weights, everything.weights[same], atol=1e-6)
    left = np.setdiff1d(everything.targets, some.targets)
    chosen = some.targets[n:]
    assert everything.influences[chosen].mean() > 3 * everything.influences[left].mean()
    facts = some.circuit().facts
    assert facts["n_looked_at"] == 20 < facts["n_features"]
    assert facts["not_looked_at"] == pytest.approx(
        sum(some.influences[i] for i in range(facts["n_features"]) if i not in set(chosen))
        / sum(node.value for node in some.logits)
    )
    assert facts["checks"]["conservation_error"] < 1e-9
    assert facts["replacement_score"] < everything.circuit().facts["replacement_score"]


def test_features_without_influence_are_not_looked_at(llama):
    model = llama[0]
    graph = whole(model, {0: transcoder(model, 0), 2: transcoder(model, 2)}, IDS).origin
    r = graph.replacement
    looked_at = np.zeros(len(r.features), bool)
    looked_at[graph.targets[len(graph.logits) :]] = True
    # After the last layer nothing moves to the last position.
    expected = (r.features[:, 0] == 0) | (r.features[:, 1] == len(IDS) - 1)
    assert looked_at.tolist() == expected.tolist()
    assert not graph.influences[: len(r.features)][~looked_at].any() and not looked_at.all()


def test_influences_of_tokens_and_errors_add_up_to_the_probability(circuit):
    graph = circuit.origin
    r = graph.replacement
    ends = graph.influences[len(r.features) : r.n_sources]
    assert ends.sum() == pytest.approx(sum(node.value for node in graph.logits), rel=1e-9)


def test_pruning_again_gives_smaller_circuits(circuit):
    graph = circuit.origin
    sizes, scores = [], []
    for share in (1.0, 0.8, 0.5):
        part = graph.circuit(share, 0.98)
        sizes.append((len(part.nodes), len(part.edges)))
        scores.append(part.facts["pruned_replacement_score"])
    assert sizes == sorted(sizes, reverse=True) and scores == sorted(scores, reverse=True)
    again = graph.circuit()
    assert again.edges == circuit.edges and again.facts == circuit.facts
    kept = sum(node.kind == "embedding" for node in graph.circuit(0.01, 0.01).nodes)
    assert kept == len(IDS)


def test_a_circuit_that_can_be_drawn_has_few_edges_that_lead_to_the_logits(circuit):
    part = circuit.origin.circuit(n_nodes=20, n_edges=30)
    assert 10 < len(part.edges) <= 30
    assert sum(node.kind in ("feature", "error") for node in part.nodes) <= 20
    starts = {edge.source for edge in part.edges}
    assert all(part.nodes[e.target].kind == "logit" or e.target in starts for e in part.edges)
    assert (part.facts["n_nodes"], part.facts["n_edges"]) == (20, 30)
    with pytest.raises(ValueError, match="n_edges must be >= 1, got 0"):
        circuit.origin.circuit(n_edges=0)


def test_errors_can_be_kept(circuit):
    few, more = (circuit.origin.circuit(0.3, 0.5, errors) for errors in ("pruned", "kept"))
    counts = [sum(node.kind == "error" for node in c.nodes) for c in (few, more)]
    assert counts[0] < counts[1] <= 3 * len(IDS)


def test_nodes_say_what_they_are(circuit):
    graph = circuit.origin
    r = graph.replacement
    kinds = [graph.node(i).kind for i in range(graph.n_nodes)]
    assert kinds == (
        ["feature"] * len(r.features) + ["error"] * 24 + ["embedding"] * 8
        + ["logit"] * len(graph.logits)
    )  # fmt: skip
    error = graph.node(len(r.features) + 8 + 3)
    assert (error.site, error.position) == ("layers.1.mlp_out", 3)
    assert error.value == pytest.approx(float(mx.linalg.norm(r.held[2].errors[3])))
    assert graph.node(len(r.features) + 24 + 2).key == ("embedding", "", 9, 2)
    number = next(i for i, at in enumerate(r.features.tolist()) if at[0] == 1)
    assert graph.node(number).site == "layers.1.mlp_out"
    assert graph.node(number).value == r.values[number]
    assert circuit.levels == ("layers.0.mlp_out", "layers.1.mlp_out", "layers.2.mlp")
    assert circuit.tokens == tuple(map(str, IDS))


def test_edges_of_a_circuit_are_the_weights_of_the_graph(circuit):
    graph = circuit.origin
    number = {graph.node(i).key: i for i in range(graph.n_nodes)}
    row = {target: i for i, target in enumerate(graph.targets.tolist())}
    for edge in circuit.edges:
        a, b = (number[circuit.nodes[end].key] for end in (edge.source, edge.target))
        assert edge.weight == graph.weights[row[b], a]
    sizes = [abs(edge.weight) for edge in circuit.edges]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 50


def test_no_feature_is_at_a_special_token(circuit):
    at = [node.position for node in circuit.nodes if node.kind == "feature"]
    assert at and 0 not in at


def test_a_circuit_is_saved_and_bound_again(circuit, tmp_path):
    loaded = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert loaded.edges == circuit.edges and loaded.facts["checks"] == circuit.facts["checks"]
    found = loaded.bind(circuit.origin).validate(n=5)
    np.testing.assert_allclose(found.measured, found.predicted, atol=1e-5)
    json.dumps(circuit.to_dict(), allow_nan=False)
    assert "replacement score" in repr(circuit)


def test_a_part_with_labels_is_validated(circuit):
    part = circuit.with_labels({0: {3: "threes"}}).restricted(n_edges=7)
    found = part.validate()
    assert len(found) == len(part.edges)
    np.testing.assert_allclose(found.measured, found.predicted, atol=1e-5)


def test_the_cost_is_said_beforehand(llama):
    cost = attribution_graph_cost(*llama, IDS)
    graph = find(*llama, IDS).origin
    r = graph.replacement
    assert (cost.n_features, cost.n_sources) == (len(r.features), r.n_sources)
    assert cost.n_targets >= len(graph.targets) - len(graph.logits)
    assert (
        cost.bytes == 4 * (cost.n_targets + len(graph.logits)) * r.n_sources >= graph.weights.nbytes
    )
    assert cost.n_passes == -(-cost.n_targets // 16) and 0 < cost.seconds < 60
    assert attribution_graph_cost(*llama, IDS, max_features=3).n_targets == 3
    assert re.match(r"At most about \d+ seconds and \d+ MiB: \d+ backward passes", repr(cost))
    assert cost.to_dict()["n_targets"] == cost.n_targets


def test_effects_that_do_not_fit_the_memory_are_an_error(llama, monkeypatch):
    from mlxterp.sae.memory import DeviceMemory

    monkeypatch.setattr(
        "mlxterp.sae.circuits.graph.search.device_memory", lambda: DeviceMemory(1 << 30, 1000)
    )
    with pytest.raises(MemoryError, match="lower max_features"):
        find(*llama, IDS)


# Architectures.


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "qwen3", "gpt2", "gemma2", "llama_quantized"]
)
def test_other_architectures_are_as_exact(model_type):
    found = find(*of_kind(model_type), IDS)
    assert max(v for v in found.facts["checks"].values() if v != 8) < 1e-5
    validation = found.validate(n=30)
    largest = np.abs(validation.predicted).max()
    assert np.abs(validation.measured - validation.predicted).max() < 1e-5 * largest
    assert ("head" in found.facts) == (model_type == "gemma2")


def test_where_logits_are_capped_the_slopes_of_the_head_are_taken():
    model, coders = of_kind("gemma2")
    graph = find(model, coders, IDS, [17, 40]).origin
    last, numbers = "layers.2.resid_post", [2, 7]

    def capped(x):
        return model.run([IDS], edit={last: lambda _: x}).output[0, -1, mx.array([17, 40])]

    x = model.run([IDS], capture=last)[last]
    gains = graph.replacement.gains(graph.outputs, numbers)
    assert np.abs(gains - graph.weights[:2, numbers].T).max() < 1e-5
    assert capped(x).shape == (2,) and np.abs(gains).max() > 0.01


@pytest.mark.parametrize("model_type, layer", [("jamba", 0), ("lfm2", 0), ("afmoe", 0)])
def test_a_model_that_is_not_affine_is_an_error(model_type, layer):
    with pytest.raises(ValueError, match=rf"at layers.{layer}.resid_post .*gate, a convolution"):
        find(*of_kind(model_type), IDS)


def test_a_model_in_16_bits_is_nearly_exact():
    model = InterpretableModel(build("llama"), Numbers())
    model.model.set_dtype(mx.bfloat16)
    found = find(model, {0: transcoder(model, 0), 1: transcoder(model, 1)}, IDS)
    assert 1e-5 < found.facts["checks"]["affine_error"] < 0.05


def test_edges_that_are_not_exact_are_warned_of(llama, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.circuits.graph.search.check_interventions", lambda *args: 0.5)
    with pytest.warns(UserWarning, match="wrong by up to 0.5 of the largest"):
        find(*llama, IDS)


# Bad input.


def test_no_coders_are_an_error(llama):
    with pytest.raises(ValueError, match="transcoders must hold the coder of one layer"):
        find(llama[0], {}, IDS)
    for given in (None, [llama[1][0]], {0: "t.mlx"}):
        with pytest.raises(ValueError, match=r"transcoders must be {layer: transcoder}, or one"):
            find(llama[0], given, IDS)


def test_a_coder_that_knows_no_model_is_an_error(llama):
    coder = transcoder(llama[0], 0)
    coder.bind(None)
    with pytest.raises(ValueError, match="does not know its language model"):
        find(None, {0: coder}, IDS)


def test_coders_of_another_model_are_an_error(demo, llama):
    with pytest.raises(ValueError, match=r"coder of layer 0 does not fit the model"):
        find(demo, llama[1], IDS)


def test_what_reads_and_writes_one_site_is_an_error(llama):
    model, width = llama[0], llama[0].width("layers.1.mlp")
    for name in ("layers.1.mlp", "layers.1.resid_post"):
        columns = Columns((name,), (width,))
        with pytest.raises(ValueError, match=r"a SAE that reads and writes.*find_behavior_circuit"):
            find(model, {1: SAE(columns, columns, 8, k=4)}, IDS)


def between(model, reads: str, writes: str) -> Transcoder:
    return Transcoder(*(Columns((n,), (model.width(n),)) for n in (reads, writes)), 8, k=4)


@pytest.mark.parametrize("writes", ["attn_out", "resid_post", "resid_pre"])
def test_what_the_frozen_model_computes_by_itself_is_an_error(llama, writes):
    coder = between(llama[0], "layers.1.mlp_in", f"layers.2.{writes}")
    if writes == "attn_out":
        coder = between(llama[0], "layers.1.attn_in", "layers.1.attn_out")
    with pytest.raises(ValueError, match=r"coder of layer 1 writes .*Sites of MLPs: layers.0.mlp,"):
        find(llama[0], {1: coder}, IDS)


def test_what_reads_after_it_has_written_is_an_error(llama):
    coder = between(llama[0], "layers.2.mlp_in", "layers.1.mlp_out")
    with pytest.raises(ValueError, match=r"reads layers.2.mlp_in, which the model computes from"):
        find(llama[0], {1: coder}, IDS)


def test_two_coders_of_one_mlp_are_an_error(llama):
    model = llama[0]
    coders = {0: between(model, "layers.0.mlp_in", "layers.1.mlp"), 1: transcoder(model, 1)}
    with pytest.raises(ValueError, match=r"layers 0 and 1 both write layers.1.mlp_out"):
        find(model, coders, IDS)


def test_a_coder_over_several_layers_is_taken(llama):
    model = llama[0]
    found = find(model, {0: transcoder(model, 0), 1: _across(model)}, IDS)
    assert found.facts["checks"]["intervention_error"] < 1e-5
    assert "layers.2.mlp_out" in {node.site for node in found.nodes if node.kind == "feature"}


def _across(model) -> Transcoder:
    coder = between(model, "layers.1.mlp_in", "layers.2.mlp_out")
    rng = np.random.default_rng(0)
    for name in ("W_enc", "W_dec"):
        coder[name] = mx.array(rng.normal(size=coder[name].shape).astype(np.float32))
    return coder


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": []}, "targets must be one or more different tokens"),
        ({"targets": [3, 3]}, "targets must be one or more different tokens"),
        ({"targets": [96]}, r"id of a token, in \[0, 95\]"),
        ({"targets": ["5 6"]}, "target must be one token"),
        ({"max_features": 0}, "max_features must be >= 1"),
        ({"n_interventions": 0}, "n_interventions must be >= 1"),
        ({"node_share": 0}, r"node_share must be in \(0, 1\]"),
        ({"edge_share": 1.5}, r"edge_share must be in \(0, 1\]"),
        ({"errors": "no"}, "errors must be one of"),
        ({"prompt": ""}, "prompt must be a text"),
    ],
)  # fmt: skip
def test_bad_options_are_errors(llama, options, message):
    model, coders = llama
    with pytest.raises(ValueError, match=message):
        find(model, coders, **({"prompt": IDS} | options))


def test_a_circuit_of_something_else_is_an_error(circuit):
    with pytest.raises(ValueError, match="circuit must be a part of this attribution graph"):
        small().bind(circuit.origin).validate()


def test_a_prompt_without_features_has_edges_from_errors_and_tokens(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find(*llama, [0, 0])
    kinds = {node.kind for node in found.nodes}
    assert kinds == {"error", "embedding", "logit"} and found.edges
