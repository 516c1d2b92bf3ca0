import mlx.core as mx
import numpy as np
import pytest

from mlxterp.model import InterpretableModel
from mlxterp.sae.circuits.graph.readouts import logits_above_mean, pre_activations
from mlxterp.sae.circuits.graph.replacement import Replacement
from tests.sae.circuits.frozen_llama import FrozenLlama, Numbers, cross_layer, transcoder
from tests.tiny_models import build

IDS = [0, 4, 9, 3, 7, 9, 5, 4]
TARGETS = [3, 17, 40]


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"), Numbers())


CODERS = {
    "transcoders": lambda model: [transcoder(model, 0), transcoder(model, 2)],
    "with skip": lambda model: [transcoder(model, 1, skip=True), transcoder(model, 2, skip=True)],
    "cross-layer": lambda model: [cross_layer(model, [0, 1, 2])],
    "cross-layer without a layer": lambda model: [cross_layer(model, [0, 2])],
    "one": lambda model: [transcoder(model, 1)],
}


@pytest.fixture(params=CODERS)
def replacement(request, model) -> Replacement:
    return Replacement(model, CODERS[request.param](model), IDS)


def readings(r: Replacement) -> list:
    """Logits and the pre-activations of all features."""
    found = [(logits_above_mean(r.source, TARGETS), len(TARGETS))]
    for i, coder in enumerate(r.coders):
        for block in coder.blocks:
            of = r.features[r.features[:, 0] == i]
            of = of[(of[:, 2] >= block.features.start) & (of[:, 2] < block.features.stop)]
            found.append((pre_activations(r.source, coder, block, of[:, 1], of[:, 2]), len(of)))
    return found


def test_parts_and_bias_add_up_to_the_values(replacement):
    r = replacement
    for run, n in readings(r):
        rows = r.rows(run, n)
        assert rows.shape == (n, r.n_sources)
        np.testing.assert_allclose(rows.sum(axis=1) + r.bias(run), r.clean(run), atol=1e-5)
        assert np.abs(r.bias(run)).max() > 0.01


def test_parts_are_the_effects_of_actual_interventions(replacement):
    r = replacement
    every = list(range(r.n_sources))
    for run, n in readings(r):
        np.testing.assert_allclose(r.gains(run, every), r.rows(run, n).T, atol=5e-6)
        np.testing.assert_allclose(
            r.gains(run, [5], -0.5), -0.5 * r.rows(run, n)[:, [5]].T, atol=5e-6
        )


def test_sources_together_have_the_sum_of_their_effects(replacement):
    r = replacement
    (run, _), *_ = readings(r)
    alone = r.gains(run, [1, 9, r.n_sources - 1])
    together = r.gains(run, [(1, 9, r.n_sources - 1), (1,)])
    np.testing.assert_allclose(together, [alone.sum(axis=0), alone[0]], atol=5e-6)


def test_many_interventions_are_made_in_several_passes(model, monkeypatch):
    r = Replacement(model, [transcoder(model, 1)], IDS)
    (run, _), *_ = readings(r)
    whole = r.gains(run, list(range(20)))
    monkeypatch.setattr("mlxterp.sae.circuits.graph.replacement.TOKENS_PER_PASS", 3 * len(IDS))
    np.testing.assert_allclose(r.gains(run, list(range(20))), whole, atol=1e-6)


def test_in_the_model_as_it_is_effects_are_those_of_edits(model):
    r = Replacement(model, [transcoder(model, 0)], IDS)
    run = logits_above_mean(model, TARGETS)
    number = 4
    ((site, (position, vector)),) = r.writes(number).items()

    def more(x):
        x[:, position] += vector
        return x

    logits = [model.run([IDS], edit=e).output[0, -1] for e in ({r.held[site].name: more}, {})]
    expected, plain = (np.array(x[mx.array(TARGETS)] - x.mean()) for x in logits)
    found = r.gains(run, [number], frozen=False)[0]
    np.testing.assert_allclose(found, expected - plain, atol=1e-6)
    assert np.abs(found - r.gains(run, [number])[0]).max() > 1e-3


ARRAYS = ("W_enc", "b_enc", "b_dec", "W_skip")


def described(coder, plain: FrozenLlama) -> tuple[list, dict[int, np.ndarray]]:
    """The features of a coder that fire, as what they write by layer, and the errors by layer."""
    a = {name: np.array(coder[name], np.float64) for name in ARRAYS if name in coder}
    layers = layers_of(coder)
    biases = zip(layers, np.split(a["b_dec"], len(layers)), strict=True)
    errors, found = {n: plain.layers[n].mlp_out - b for n, b in biases}, []
    for i, (block, W_dec) in enumerate(zip(coder.blocks, coder.decoder_blocks(), strict=True)):
        x, of, later = plain.layers[layers[i]].mlp_in, block.features, layers[i:]
        pre = x @ a["W_enc"][of].T + a["b_enc"][of]
        z = np.where(pre >= np.sort(pre, axis=1)[:, [-coder.k]], np.maximum(pre, 0), 0)
        z[0] = 0  # the token that begins the text
        W_dec = np.split(np.array(W_dec, np.float64), len(later), axis=1)
        rows = dict(zip(later, W_dec, strict=True))
        for n in later:
            errors[n] = errors[n] - z @ rows[n] - (x @ a["W_skip"].T if "W_skip" in a else 0)
        found += [
            (t, of.start + f, {n: z[t, f] * rows[n][f] for n in later}) for t, f in np.argwhere(z)
        ]
    return sorted(found, key=lambda one: one[:2]), errors


def layers_of(coder) -> list[int]:
    return [int(name.split(".")[1]) for name in coder.writes.names]


def independent(model, r: Replacement) -> list[np.ndarray]:
    """All parts in NumPy: of the logits, and of the features by coder, by source."""
    plain, n_tokens = FrozenLlama(model.model, IDS), len(IDS)
    sources, errors, skips = [], {}, {}
    for coder in r.coders:
        found, own = described(coder, plain)
        sources += [(t, {n + 1: row for n, row in rows.items()}) for t, _, rows in found]
        errors |= own
        if coder.has_skip:
            skips[layers_of(coder)[0]] = np.array(coder.W_skip, np.float64)
    errors |= {n: plain.layers[n].mlp_out for n in range(3) if n not in errors}
    sources += [(t, {n + 1: e[t]}) for n, e in errors.items() for t in range(n_tokens)]
    sources += [(t, {0: plain.embeddings[t]}) for t in range(n_tokens)]
    assert len(sources) == r.n_sources
    effects = []
    for t, rows in sources:
        changes = {n: np.zeros_like(plain.embeddings) for n in rows}
        for n, row in rows.items():
            changes[n][t] = row
        effects.append(plain.effects(changes, skips))
    parts = [np.stack([x[-1][TARGETS] - x[-1].mean() for _, x in effects], axis=1)]
    for i, coder in enumerate(r.coders):
        of, W_enc = r.features[r.features[:, 0] == i], np.array(coder.W_enc, np.float64)
        for block, layer in zip(coder.blocks, layers_of(coder), strict=False):
            own = of[(of[:, 2] >= block.features.start) & (of[:, 2] < block.features.stop)]
            read = np.stack([x[layer][own[:, 1]] for x, _ in effects])
            parts.append(np.einsum("snd,nd->ns", read, W_enc[own[:, 2]]))
    return parts


def test_parts_are_those_of_an_independent_computation(model, replacement):
    expected = independent(model, replacement)
    for (run, n), parts in zip(readings(replacement), expected, strict=True):
        found = replacement.rows(run, n)
        np.testing.assert_allclose(found, parts, rtol=1e-6, atol=5e-6)
        assert np.abs(parts).max() > 0.1


def test_no_feature_fires_at_special_tokens(replacement):
    assert (replacement.features[:, 1] > 0).all() and len(replacement.features)


def test_an_mlp_without_a_coder_is_all_error(model):
    r = Replacement(model, [transcoder(model, 1)], IDS)
    assert r.error_sites == ("layers.1.mlp_out", "layers.0.mlp", "layers.2.mlp")
    written = model.run([IDS], capture="layers.2.mlp")["layers.2.mlp"][0]
    assert np.array_equal(r.held[3].errors, written)
    assert not np.array(r.held[3].bias).any()


def test_a_quantised_model_is_as_exact():
    model = InterpretableModel(build("llama_quantized"), Numbers())
    r = Replacement(model, [transcoder(model, 0), transcoder(model, 1, skip=True)], IDS)
    for run, n in readings(r):
        rows = r.rows(run, n)
        np.testing.assert_allclose(rows.sum(axis=1) + r.bias(run), r.clean(run), atol=2e-5)
        np.testing.assert_allclose(r.gains(run, [3, 40]), rows[:, [3, 40]].T, atol=2e-5)


@pytest.mark.parametrize("size", [1, 40_000, 1 << 26])
def test_how_many_derivatives_are_taken_at_once_does_not_matter(model, monkeypatch, size):
    monkeypatch.setattr("mlxterp.sae.circuits.graph.replacement.ENTRIES_PER_PASS", size)
    r = Replacement(model, [transcoder(model, 1)], IDS)
    assert 1 <= r.rows_per_pass <= 16
    run, n = readings(r)[1]
    rows = r.rows(run, n)
    np.testing.assert_allclose(rows.sum(axis=1) + r.bias(run), r.clean(run), atol=1e-5)


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "qwen3", "gpt2", "gpt_oss", "olmoe", "cohere"]
)
def test_other_architectures_are_as_exact(model_type):
    model = InterpretableModel(build(model_type), Numbers())
    r = Replacement(model, [transcoder(model, 0, skip=True), transcoder(model, 2)], IDS)
    some = np.random.default_rng(0).permutation(r.n_sources)[:12].tolist()
    for run, n in readings(r):
        rows, largest = r.rows(run, n), np.abs(r.clean(run)).max()
        error = np.abs(rows.sum(axis=1) + r.bias(run) - r.clean(run)).max() / largest
        gains = np.abs(r.gains(run, some) - rows[:, some].T).max() / largest
        assert error < 1e-5 and gains < 1e-5
