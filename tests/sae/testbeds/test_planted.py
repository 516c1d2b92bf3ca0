import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae.testbeds.planted import PlantedCircuit, planted_circuit
from tests.sae.testbeds.reference import forward

TOKENS = [3, 5, 7, 3, 0, 6, 2, 3, 4, 7]
FEW = [3, 6, 4]
NEIGHBOURS = [(0, 1), (1, 2)]
LAYERS = [*NEIGHBOURS, (0, 2)]
# One feature of each path, by hand: 2 words, 2 features, 2 layers.
STARTS = [[1, 0], [0.5, 2]]
MLP = [[[1, 0.5], [0, 2]], [[0.5, 0], [0.25, 1]]]
RESIDUAL = [[[0, 0.25], [0, -0.5]], [[0, 0], [0.5, 0]]]
ATTENTION = [[[0, 0], [0.5, 0]], [[0, 2], [0, 0]]]

WRONG = np.ones((4, 4))
RANGE = r"must be 0 or in \[0.0009765625, 256.0\]"


@pytest.fixture(scope="module", params=[0.0, 0.25], ids=["no threshold", "threshold"])
def circuit(request) -> PlantedCircuit:
    return planted_circuit(threshold=request.param)


def values_by_edges(circuit: PlantedCircuit, tokens: list[int]) -> np.ndarray:
    """The values of all features, from the list of edges alone."""
    shape = (circuit.n_layers + 1, len(tokens), circuit.n_features)
    values = np.zeros(shape)
    values[0] = [circuit.starts[token] for token in tokens]
    for level, t, target in np.ndindex(circuit.n_layers, *shape[1:]):
        sums = {"mlp": -circuit.threshold, "residual": 0.0, "attention": 0.0}
        for edge in circuit.edges:
            if (edge.level, edge.target) == (level, target):
                column = values[level, :, edge.source]
                seen = np.mean(column[: t + 1]) if edge.path == "attention" else column[t]
                sums[edge.path] += edge.weight * seen
        sums["mlp"] = max(sums["mlp"], 0)
        values[level + 1, t, target] = sum(sums.values())
    return values


def captured(circuit: PlantedCircuit, tokens: list[int], component: str) -> dict[int, mx.array]:
    """`[S, width]` at a component of every layer of the model."""
    model = InterpretableModel(circuit.model, circuit.tokenizer)
    sites = [f"layers.{layer}.{component}" for layer in range(circuit.n_layers)]
    held = model.run(tokens, capture=sites)
    return {layer: held[site][0] for layer, site in enumerate(sites)}


def pre_activations(circuit: PlantedCircuit, tokens: list[int], source: int, target: int):
    """The pre-activations after a layer `[B, S, features]`, by codes `[B, S, features]` put in
    after an earlier one: the model itself goes on from there."""
    model = InterpretableModel(circuit.model, circuit.tokenizer)
    sae, read = circuit.saes[source], circuit.saes[target]
    there, after = (f"layers.{layer}.resid_post" for layer in (source, target))

    def go_on(codes: mx.array) -> mx.array:
        rows = [tokens] * len(codes)
        held = model.run(rows, capture=after, edit={there: lambda x: sae.decode(codes)}, stop=True)
        return held[after] @ read.W_enc.T

    return go_on


def effects_by_gradients(circuit, tokens, source, target, starts) -> np.ndarray:
    """Mean slopes at the codes `start * code`, times the code: a row of a batch for each target."""
    go_on = pre_activations(circuit, tokens, source, target)
    code = circuit.code(tokens, source)
    shape = len(tokens), circuit.saes[target].n_features
    each = mx.eye(shape[0] * shape[1]).reshape(-1, *shape)
    slopes_at = mx.grad(lambda codes: (go_on(codes) * each).sum())
    slopes = np.zeros((len(each), *code.shape))
    for start in starts:
        codes = np.broadcast_to(start * code, slopes.shape).astype(np.float32)
        slopes += np.array(slopes_at(mx.array(codes))) / len(starts)
    return (slopes * code).reshape(*shape, *code.shape)


def effects_by_ablation(circuit, tokens, source, target) -> np.ndarray:
    """What the pre-activations lose without each feature: a row of a batch for each."""
    go_on = pre_activations(circuit, tokens, source, target)
    code = circuit.code(tokens, source)
    others = 1 - np.eye(code.size).reshape(-1, *code.shape)
    codes = np.concatenate([code[None], others * code]).astype(np.float32)
    pre = np.array(go_on(mx.array(codes)), np.float64)
    return np.moveaxis(pre[0] - pre[1:], 0, -1).reshape(*pre.shape[1:], *code.shape)


def test_values_worked_by_hand():
    circuit = planted_circuit(STARTS, MLP, RESIDUAL, ATTENTION, threshold=0.5)
    # Level 1, token 0 (word 1): MLP max(0.5 + 1 - 0.5, 0), max(4 - 0.5, 0); residual 0.5, -1;
    # attention 0, 0.25. Token 1 (word 0): MLP 0.5, 0; attention 0, 0.5 * (0.5 + 1) / 2.
    level_1 = [[1.5, 2.75], [0.5, 0.375]]
    # Level 2, token 0: MLP 0.25, 0.375 + 2.75 - 0.5; residual 0, 0.75; attention 5.5, 0.
    # Token 1: MLP 0, 0.125 + 0.375 - 0.5; residual 0, 0.25; attention 2 * (2.75 + 0.375) / 2.
    level_2 = [[5.75, 3.375], [3.125, 0.25]]
    values = circuit.values([1, 0])
    np.testing.assert_array_equal(values, [[[0.5, 2], [1, 0]], level_1, level_2])
    np.testing.assert_array_equal(circuit.model(mx.array([[1, 0]]))[0], level_2)


def test_edges_alone_give_the_values(circuit):
    expected = values_by_edges(circuit, TOKENS)
    np.testing.assert_allclose(circuit.values(TOKENS), expected, rtol=1e-12)
    assert {edge.path for edge in circuit.edges} == {"mlp", "residual", "attention"}


def test_the_forward_pass_in_float64_has_these_values(circuit):
    values, held = circuit.values(TOKENS), forward(circuit.model, TOKENS)
    for layer in range(circuit.n_layers):
        code = held[f"layers.{layer}.resid_post"] @ np.array(circuit.saes[layer].W_enc).T
        np.testing.assert_allclose(code, circuit.code(TOKENS, layer), atol=1e-6)
    np.testing.assert_allclose(held["logits"][:, : circuit.n_features], values[-1], atol=1e-6)


def test_logits_are_the_features_of_the_last_level(circuit):
    logits = np.array(circuit.model(mx.array([TOKENS])))[0]
    features = logits[:, : circuit.n_features]
    np.testing.assert_allclose(features, circuit.values(TOKENS)[-1], atol=2e-6)
    assert (logits[:, circuit.n_features :] == 0).all()
    assert logits.shape[1] == len(circuit.starts) > circuit.n_features


def test_saes_have_these_codes_and_no_error(circuit):
    for layer, x in captured(circuit, TOKENS, "resid_post").items():
        code = circuit.saes[layer].encode(x)
        np.testing.assert_allclose(code, circuit.code(TOKENS, layer), rtol=1e-6, atol=1e-7)
        assert code.shape[1] == (layer + 2) * circuit.n_features
        np.testing.assert_allclose(circuit.saes[layer].decode(code), x, rtol=1e-6, atol=1e-6)


def test_transcoders_are_the_mlps(circuit):
    values = circuit.values(TOKENS)
    reads, writes = (captured(circuit, TOKENS, name) for name in ("mlp_in", "mlp_out"))
    assert any(np.array(write).any() for write in writes.values())
    for layer, coder in circuit.transcoders.items():
        code = coder.encode(reads[layer])
        expected = np.maximum(values[layer] @ circuit.mlp[layer].T - circuit.threshold, 0)
        np.testing.assert_allclose(code, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(coder.decode(code), writes[layer], rtol=1e-6, atol=1e-6)


def test_coders_know_their_sites(circuit):
    for layer in range(circuit.n_layers):
        assert circuit.saes[layer].reads.names == (f"layers.{layer}.resid_post",)
        assert circuit.transcoders[layer].reads.names == (f"layers.{layer}.mlp_in",)
        assert circuit.transcoders[layer].writes.names == (f"layers.{layer}.mlp_out",)


@pytest.mark.parametrize(("source", "target"), LAYERS)
def test_gradients_are_those_in_the_model(circuit, source, target):
    expected = effects_by_gradients(circuit, FEW, source, target, [1.0])
    found = circuit.effects(FEW, source, target, "gradient")
    # Where a neuron is exactly at its threshold, rounding moves a slope a little away from 1/2.
    np.testing.assert_allclose(found, expected, atol=1e-3 if circuit.threshold else 1e-5)
    assert np.abs(found).max() > 0.5


@pytest.mark.parametrize(("source", "target"), LAYERS)
def test_integrated_gradients_are_those_in_the_model(source, target):
    circuit = planted_circuit()
    expected = effects_by_gradients(circuit, FEW, source, target, [0.1, 0.5, 0.9])
    found = circuit.effects(FEW, source, target)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=(2, 3)), circuit.code(FEW, target), rtol=1e-12)


@pytest.mark.parametrize(("source", "target"), NEIGHBOURS)
def test_integrated_gradients_know_a_threshold(source, target):
    circuit, n = planted_circuit(threshold=0.25), 200
    expected = effects_by_gradients(circuit, FEW, source, target, (np.arange(n) + 0.5) / n)
    found = circuit.effects(FEW, source, target)
    np.testing.assert_allclose(found, expected, atol=0.01)  # a step contains the threshold
    np.testing.assert_allclose(found.sum(axis=(2, 3)), circuit.code(FEW, target), rtol=1e-12)
    assert np.abs(found - circuit.effects(FEW, source, target, "gradient")).max() > 0.1


@pytest.mark.parametrize(("source", "target"), NEIGHBOURS)
def test_ablations_are_those_in_the_model(circuit, source, target):
    expected = effects_by_ablation(circuit, FEW, source, target)
    found = circuit.effects(FEW, source, target, "ablation")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() > 0.5


def test_a_feature_that_is_cancelled_has_the_slope_of_a_neuron_at_zero():
    residual = np.zeros((3, 2, 2))
    residual[1, 0, 1] = -1
    circuit = planted_circuit([[1, 1], [0, 0]], [np.eye(2)] * 3, residual)
    assert circuit.values([0])[2].tolist() == [[0, 1]]
    expected = effects_by_gradients(circuit, [0], 0, 2, [1.0])
    assert expected[0, -2, 0].tolist() == pytest.approx([0, 0, 0.5, -0.5])
    for method in ("gradient", "integrated_gradients"):
        np.testing.assert_allclose(circuit.effects([0], 0, 2, method), expected, atol=1e-5)


def test_texts_are_those_of_the_tokenizer():
    circuit = planted_circuit()
    texts = circuit.texts(3, length=5, seed=2)
    assert texts == circuit.texts(3, length=5, seed=2) != circuit.texts(3, length=5, seed=3)
    for text in texts:
        assert len(circuit.tokenizer.encode(text)) == 5
    model = InterpretableModel(circuit.model, circuit.tokenizer)
    logits = np.array(model.run(texts[0]).output)[0]
    expected = circuit.values(circuit.tokenizer.encode(texts[0]))[-1]
    np.testing.assert_allclose(logits[:, :4], expected, atol=2e-6)


def test_what_is_not_given_is_the_default_or_nothing():
    assert (
        planted_circuit(residual=np.zeros((3, 4, 4))).mlp.tolist() == planted_circuit().mlp.tolist()
    )
    circuit = planted_circuit([[1.0], [2.0]], [[[3.0]]])
    assert not circuit.residual.any() and not circuit.attention.any()
    (edge,) = circuit.edges
    assert (edge.level, edge.source, edge.target, edge.weight, edge.path) == (0, 0, 0, 3.0, "mlp")
    assert repr(circuit) == "PlantedCircuit(1 layers, 1 features a level, 2 words, 1 edges)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mlp": WRONG}, r"mlp must have shape \[n_layers, n_features, n_features\], got \[4, 4\]"),
        ({"mlp": np.ones((2, 4, 3))}, r"mlp must have shape .*, got \[2, 4, 3\]"),
        ({"mlp": np.ones((0, 4, 4))}, r"mlp must have shape .*, got \[0, 4, 4\]"),
        ({"residual": WRONG}, r"residual must have shape \[3, 4, 4\], got \[4, 4\]"),
        ({"attention": WRONG}, r"attention must have shape \[3, 4, 4\], got \[4, 4\]"),
        ({"starts": np.ones((4, 3))}, r"starts must have shape \[>= 4, 4\], got \[4, 3\]"),
        ({"starts": np.ones((3, 4))}, r"starts must have shape \[>= 4, 4\], got \[3, 4\]"),
        ({"starts": -np.eye(4)}, r"starts must be >= 0, got -1"),
        ({"mlp": -np.ones((3, 4, 4))}, "mlp must be >= 0, got -1"),
        ({"attention": np.full((3, 4, 4), -2)}, "attention must be >= 0, got -2"),
        ({"threshold": -0.5}, "threshold must be >= 0, got -0.5"),
        ({"threshold": np.nan}, "threshold must be >= 0, got nan"),
        ({"mlp": np.full((3, 4, 4), np.inf)}, "mlp must be finite, got inf"),
        ({"residual": np.full((3, 4, 4), np.nan)}, "residual must be finite, got nan"),
        ({"threshold": 0.5}, rf"Feature 1 of level 1 {RANGE}, got -0.25 at token 0 of \[0\]"),
        ({"starts": 300 * np.eye(4)}, f"Feature 0 of level 0 {RANGE}, got 300 at token 0"),
        ({"starts": 1e-4 * np.eye(4)}, f"Feature 0 of level 0 {RANGE}, got 0.0001 at token 0"),
    ],
)
def test_circuits_that_no_coder_can_describe_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        planted_circuit(**given)


def test_a_text_that_makes_a_value_negative_is_an_error():
    # Alone, word 1 gets 1 by attention and loses 0.5; behind others the mean is smaller.
    circuit = planted_circuit(
        np.eye(2), np.zeros((1, 2, 2)), [[[0, 0], [0, -0.5]]], [[[0, 0], [0, 1]]]
    )
    assert circuit.values([1])[1].tolist() == [[0, 0.5]]
    with pytest.raises(ValueError, match=r"Feature 1 of level 1 .* got -0.25 at token 3 of \[0"):
        circuit.code([0, 0, 0, 1], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FEW, 0, 1, "shapley"), r"method must be one of \['gradient', .*\], got 'shapley'"),
        ((FEW, 1, 1), r"must be ascending, in \[0, 2\], got 1 and 1"),
        ((FEW, -1, 1), "got -1 and 1"),
        ((FEW, 1, 3), "got 1 and 3"),
        ((FEW, 0, 2, "ablation"), "target_layer must be 1, the next layer, with 'ablation'"),
        (([[0, 1]], 0, 1), r"tokens must be one sequence of token ids, got \[\[0, 1\]\]"),
        (([], 0, 1), r"tokens must be one sequence of token ids, got \[\]"),
        (([0.5], 0, 1), r"tokens must be one sequence of token ids, got \[0.5\]"),
        (([0, 8], 0, 1), r"tokens must be in \[0, 7\], got \[0, 8\]"),
        (([-1], 0, 1), r"tokens must be in \[0, 7\], got \[-1\]"),
    ],
)
def test_effects_that_are_not_known_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        planted_circuit().effects(*arguments)


def test_integrated_gradients_through_two_thresholds_are_an_error():
    with pytest.raises(ValueError, match=r"target_layer must be 1, .* threshold of 0.25, got 2"):
        planted_circuit(threshold=0.25).effects(FEW, 0, 2)


def test_a_layer_that_is_not_there_is_an_error():
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=rf"layer must be in \[0, 2\], got {layer}"):
            planted_circuit().code(FEW, layer)
