from dataclasses import replace

import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae import SAEConfig, SAETrainer
from mlxterp.sae.circuits.cost import CircuitCost
from mlxterp.sae.circuits.dataset.between import circuit_cost, find_feature_circuits
from mlxterp.sae.testbeds import planted_circuit

QUICK = {"n_steps": 3, "n_tokens": 4, "max_tokens": 1500, "verbose": False}


def trained(model, texts, layer: int, component: str = "residual"):
    config = SAEConfig(expansion_factor=2, k=8, learning_rate=3e-3, num_epochs=2)
    return SAETrainer.train(
        model=model, layer=layer, component=component, dataset=texts, config=config, verbose=False
    )


@pytest.fixture(scope="module")
def saes(model, texts):
    return {layer: trained(model, texts[:12], layer) for layer in (1, 3, 5)}


@pytest.fixture(scope="module")
def circuit(model, saes, texts):
    return find_feature_circuits(model, saes, dataset=texts[:8], top_k=20, **QUICK)


def test_the_strongest_edges_connect_neighbouring_layers(circuit, saes):
    assert circuit.levels == tuple(f"layers.{layer}.resid_post" for layer in saes)
    edges = [edge for edge in circuit.edges if circuit.nodes[edge.source].kind == "feature"]
    assert len(edges) == 20
    sizes = [abs(edge.weight) for edge in edges]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    for edge in edges:
        levels = [circuit.levels.index(circuit.nodes[i].site) for i in (edge.source, edge.target)]
        assert levels[1] == levels[0] + 1  # nothing gets past a coder of the whole stream
        assert 0 < edge.share <= 1 and 0.5 <= edge.consistency <= 1 and 1 <= edge.n <= 4


def test_errors_are_shown_for_every_target(circuit):
    targets = {edge.target for edge in circuit.edges}
    of_errors = [e for e in circuit.edges if circuit.nodes[e.source].kind == "error"]
    assert {edge.target for edge in of_errors} == targets and len(of_errors) == len(targets)


def test_all_features_explain_what_they_add(circuit):
    assert 0 < circuit.facts["explained"] < 1.2
    assert circuit.facts["all_features"] == pytest.approx(1, abs=0.1)


def test_predicted_effects_are_those_of_interventions(circuit):
    found = circuit.validate(n=20)
    assert found.correlation > 0.9 and len(found.edges) == 20
    half = circuit.validate(n=20, factor=0.5)
    np.testing.assert_allclose(half.predicted, found.predicted / 2)
    assert half.correlation > 0.9
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        circuit.validate(n=0)


def test_ablation_measures_what_it_lists(model, saes, texts):
    two = {layer: saes[layer] for layer in (1, 3)}
    found = find_feature_circuits(
        model, two, dataset=texts[:8], top_k=8, method="ablation", **QUICK
    )
    edges = [edge for edge in found.edges if found.nodes[edge.source].kind == "feature"]
    assert [edge.measured for edge in edges] == [edge.weight for edge in edges]
    np.testing.assert_allclose(found.validate().measured, found.validate().predicted, rtol=1e-4)


def test_named_targets_are_the_only_ones(model, saes, texts):
    data = saes[3].collect(texts[:8], verbose=False)
    wanted = np.argsort(-data.firing_counts)[:2].tolist()
    found = find_feature_circuits(
        model, saes, 1, 3, dataset=texts[:8], target_features={3: wanted}, method="gradient",
        **QUICK,
    )  # fmt: skip
    targets = {found.nodes[edge.target].index for edge in found.edges}
    assert targets <= set(wanted) and found.levels[-1] == "layers.3.resid_post"
    with pytest.raises(ValueError, match=r"feature_id must be in \[0, 255\], got 999"):
        find_feature_circuits(
            model, saes, 1, 3, dataset=texts[:8], target_features={3: [999]}, **QUICK
        )


def test_effects_pass_by_coders_of_a_part_of_the_stream(model, texts):
    saes = {layer: trained(model, texts[:6], layer, "mlp") for layer in (1, 2, 3)}
    found = find_feature_circuits(model, saes, dataset=texts[:3], top_k=100, **QUICK)
    steps = {
        found.levels.index(found.nodes[edge.target].site)
        - found.levels.index(found.nodes[edge.source].site)
        for edge in found.edges
    }
    assert steps == {1, 2}
    assert found.validate(n=50).correlation > 0.9


def test_a_model_may_be_left_out_by_coders_that_know_it(saes, texts):
    found = find_feature_circuits(saes=saes, dataset=texts[:4], source_layer=3, top_k=3, **QUICK)
    assert len(found.levels) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_layer": 2}, r"source_layer must be a layer that saes holds, \[1, 3, 5\], got 2"),
        ({"target_layer": 9}, "target_layer must be a layer that saes holds"),
        ({"source_layer": 5, "target_layer": 1}, "source_layer must be before target_layer"),
        ({"method": "magic"}, "method must be one of"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"dataset": None}, "dataset must be texts"),
        ({"dataset": []}, "empty"),
    ],
)
def test_what_does_not_fit_is_an_error(model, saes, texts, change, message):
    with pytest.raises(ValueError, match=message):
        find_feature_circuits(**({"model": model, "saes": saes, "dataset": texts[:4]} | change))


def test_coders_that_do_not_fit_are_an_error(model, saes, texts):
    with pytest.raises(ValueError, match=r"two layers or more, got \[1\]"):
        find_feature_circuits(model, {1: saes[1]}, dataset=texts[:4])
    with pytest.raises(ValueError, match="reads .*layers.1.* does not compute"):
        find_feature_circuits(model, {1: saes[3], 3: saes[1]}, dataset=texts[:4])
    stranger = trained(model, texts[:4], 3)
    stranger.metadata = replace(
        stranger.metadata, model=stranger.metadata.model | {"fingerprint": "x"}
    )
    with pytest.raises(ValueError, match="layer 3 does not fit the model: .*other weights"):
        find_feature_circuits(model, {1: saes[1], 3: stranger}, dataset=texts[:4])
    with pytest.raises(ValueError, match=r"target_features must be of layers of \[3\], got 1"):
        find_feature_circuits(
            model, saes, 1, 3, dataset=texts[:4], target_features={1: [0]}, **QUICK
        )


def test_the_cost_is_known_beforehand(model, saes, texts):
    two, dataset = {layer: saes[layer] for layer in (1, 3)}, texts[:1]
    options = QUICK | {"top_k": 9, "target_features": {3: range(40)}}
    found = find_feature_circuits(model, two, dataset=dataset, method="gradient", **options)
    (part,) = found.origin.parts
    cost = circuit_cost(model, two, dataset=dataset, **options)
    assert cost.n_tokens == found.origin.data[3].codes.n_tokens
    assert cost.fast == part.look.work(np.arange(40), 4)
    assert cost.fast >= np.minimum(4, found.origin.data[3].codes.firing_counts[:40]).sum() > 0
    close = QUICK["n_steps"] * part.look.work(part.effects.targets, QUICK["n_tokens"])
    assert close <= cost.close <= QUICK["n_steps"] * cost.fast
    quick = circuit_cost(model, two, dataset=dataset, method="gradient", **options)
    assert quick.close * QUICK["n_steps"] == cost.close and 0 < cost.seconds < 60
    assert cost.to_dict()["close"] == cost.close
    assert repr(cost).startswith("At most about ")
    assert f"{cost.fast:,} derivatives of a context in the fast pass" in repr(cost)
    with pytest.raises(ValueError, match="n_tokens must be >= 1, got 0"):
        circuit_cost(model, two, dataset=dataset, n_tokens=0)


def test_durations_are_in_minutes_where_they_are_long():
    assert repr(CircuitCost(10, 1, 2, 100.0)).startswith("At most about 100 seconds: ")
    assert repr(CircuitCost(10, 1, 2, 200.0)).startswith("At most about 3 minutes: ")


def planted(threshold: float = 0.0):
    made = planted_circuit(threshold=threshold)
    return made, InterpretableModel(made.model, tokenizer=made.tokenizer)


def expected(made, circuit, earlier: int, later: int, method: str) -> dict[tuple[int, int], float]:
    """The mean over all tokens on which each target fires of what the whole context does to it."""
    corpus, sums, counts = circuit.origin.data[later].corpus, 0.0, 0.0
    for row, owners in zip(corpus.tokens, corpus.owners, strict=True):
        effects = made.effects(row, earlier, later, method).sum(axis=2)
        fires = (made.code(row, later) > 0) & (owners >= 0)[:, None]  # the others are padding
        sums, counts = sums + (effects * fires[..., None]).sum(axis=0), counts + fires.sum(axis=0)
    means = sums / np.maximum(1, counts)[:, None]
    return {
        (source, target): float(means[target, source])
        for target, source in np.argwhere(np.abs(means) > 1e-6).tolist()
    }


def weights_of(circuit, earlier: int, later: int) -> dict[tuple[int, int], float]:
    """The edges between features of two layers whose weights are not the noise of float32."""
    levels = [f"layers.{layer}.resid_post" for layer in (earlier, later)]
    ends = [(e, circuit.nodes[e.source], circuit.nodes[e.target]) for e in circuit.edges]
    return {
        (a.index, b.index): e.weight
        for e, a, b in ends
        if a.kind == "feature" and [a.site, b.site] == levels and abs(e.weight) > 1e-6
    }


ALL = {"top_k": 500, "n_tokens": 10_000, "verbose": False}


@pytest.mark.parametrize("method", ["integrated_gradients", "gradient", "ablation"])
def test_exactly_the_planted_edges_are_found_with_their_weights(method):
    made, model = planted()
    circuit = find_feature_circuits(
        model, made.saes, dataset=made.texts(8), method=method, n_steps=2, **ALL
    )
    for earlier in (0, 1):
        found = weights_of(circuit, earlier, earlier + 1)
        assert found == pytest.approx(
            expected(made, circuit, earlier, earlier + 1, method), rel=1e-4, abs=1e-5
        )
        n, n_before = made.n_features, (earlier + 2) * made.n_features
        level = earlier + 1
        assert set(found) == {(i, i) for i in range(n_before)} | {
            (level * n + e.source, (level + 1) * n + e.target)
            for e in made.edges
            if e.level == level
        }
    if method != "ablation":
        assert circuit.facts["all_features"] == pytest.approx(1, abs=1e-5)
    assert circuit.facts["errors"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", ["integrated_gradients", "gradient", "ablation"])
def test_weights_through_a_threshold_are_those_of_the_method(method):
    made, model = planted(0.25)
    circuit = find_feature_circuits(
        model, made.saes, 0, 1, made.texts(4), method=method, n_steps=40, **ALL
    )
    found, wanted = weights_of(circuit, 0, 1), expected(made, circuit, 0, 1, method)
    assert set(found) == set(wanted)
    assert found == pytest.approx(wanted, rel=0.05 if "integrated" in method else 1e-3, abs=1e-5)


def test_the_methods_differ_where_there_is_a_threshold():
    made, _ = planted(0.25)
    row = [6, 5, 7, 1]
    found = [
        made.effects(row, 0, 1, method).sum()
        for method in ("integrated_gradients", "gradient", "ablation")
    ]
    assert np.ptp(found) > 0.5
