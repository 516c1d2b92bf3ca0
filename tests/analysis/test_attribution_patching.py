"""Estimates by derivatives are what a small step does, add up, and agree with real patching."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import interventions as iv
from mlxterp.analysis.attribution_patching import attribution_patching
from mlxterp.analysis.patching import activation_patching
from mlxterp.analysis.patching_result import Verification, correlation
from mlxterp.model import InterpretableModel
from mlxterp.sae.testbeds import planted_circuit
from tests.pages import checked
from tests.tiny_models import build

A, B = [1, 2, 3, 4, 5, 6], [9, 2, 8, 4, 5, 6]
DIFFERENCE = {"metric": "logit_diff", "answers": (3, 5)}
# What the bundled model goes on with, and the same with one token changed.
PAIRS = [
    ("for name in names:\n    print(", "for value in values:\n    print(", "name", "value"),
    ("if value is None:\n    value =", "if name is None:\n    name =", " value", " name"),
    ("x = [1, 2, 3", "x = (1, 2, 3", "]\n", ")\n"),
    ("a = {name", "a = [name", "}", "]\n"),
    ("print('hello", 'print("hello', "',", '",'),
    ("def get(self, name):\n    return self.get(", "def get(self, value):\n    return self.get(",
     "name", "value"),
    ("import json\n\ndata = json.load(file)\nprint(",
     "import json\n\ntext = json.load(file)\nprint(", "data", "text"),
    # Here the first MLP makes too large a change of what it adds for a derivative to foretell.
    ("return len(names)\n\nfor name in names:\n    print(",
     "return len(value)\n\nfor name in names:\n    print(", "name", "value"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


def heads_of(component):
    return {"heads": "each"} if component == "heads" else {}


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox", "llama_quantized"])
@pytest.mark.parametrize("component", ["output", "mlp"])
def test_it_is_the_slope_of_a_small_step(model_type, component, direction):
    model = InterpretableModel(build(model_type))
    found = attribution_patching(
        model, A, B, component, positions="each", direction=direction, steps=None, **DIFFERENCE
    )
    source, base = (A, B) if direction == "denoising" else (B, A)
    sites = f"layers.*.{component}"
    there, here = (model.run([ids], capture=sites) for ids in (source, base))

    def value(edit):
        logits = model.run([base], edit=edit).output[0, -1]
        return (logits[3] - logits[5]).item()

    step = 1e-2
    for layer, position in [(0, 2), (1, 0), (1, 5), (2, 5)]:
        site = f"layers.{layer}.{component}"
        at = (mx.arange(6) == position)[:, None]
        move = step * mx.where(at, there[site] - here[site], 0)
        ahead, behind = (value({site: iv.add_vector(v)}) for v in (move, -move))
        slope = (ahead - behind) / 2 / step
        assert found.effects[layer, position] == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_heads_add_up_to_what_their_attention_adds(model):
    heads = attribution_patching(model, A, B, "attn", heads="each", positions="each", **DIFFERENCE)
    whole = attribution_patching(model, A, B, "attn", positions="each", **DIFFERENCE)
    assert heads.recovered.shape == (3, 4, 6)
    np.testing.assert_allclose(heads.recovered.sum(axis=1), whole.recovered, atol=0.02)
    groups = attribution_patching(
        model, A, B, "attn", heads=[(0, 2), (1, 3)], positions=[range(6)], **DIFFERENCE
    )
    np.testing.assert_allclose(
        groups.recovered[:, 0, 0], heads.recovered[:, [0, 2]].sum(axis=(1, 2)), atol=0.02
    )


@pytest.mark.parametrize("component", ["output", "mlp", "heads"])
@pytest.mark.parametrize("metric", [DIFFERENCE, {"metric": "l2"}])
def test_along_the_way_all_positions_add_up_to_the_whole_site(model, component, metric):
    name = "attn" if component == "heads" else component
    more = {"heads": [range(4)]} if component == "heads" else {}
    parts = attribution_patching(model, A, B, name, positions="each", steps=64, **more, **metric)
    whole = activation_patching(model, A, B, name, **more, **metric)
    assert parts.recovered.shape == (*whole.recovered.shape, 6)
    gap = np.abs(parts.recovered.sum(axis=-1) - whole.recovered).max()
    more["steps"] = None
    ends = attribution_patching(model, A, B, name, positions="each", **more, **metric)
    assert gap < 2
    assert gap < 0.2 * np.abs(ends.recovered.sum(axis=-1) - whole.recovered).max()


def test_one_step_at_the_middle_and_batches_of_steps(model):
    one, two, four = (
        attribution_patching(model, A, B, "mlp", steps=n, batch_rows=2, **DIFFERENCE)
        for n in (1, 2, 4)
    )
    whole = attribution_patching(model, A, B, "mlp", steps=4, **DIFFERENCE)
    np.testing.assert_allclose(four.recovered, whole.recovered, atol=0.01)
    source, base = (model.run([ids], capture="layers.1.mlp")["layers.1.mlp"] for ids in (A, B))

    def metric(logits):
        return logits[0, -1, 3] - logits[0, -1, 5]

    middle = (source + base) / 2
    slope = model.gradients([B], "layers.1.mlp", metric, edit={"layers.1.mlp": lambda x: middle})
    expected = (slope.gradients["layers.1.mlp"] * (source - base)).sum().item()
    assert one.effects[1] == pytest.approx(expected, rel=1e-3)
    assert not np.allclose(one.recovered, two.recovered, atol=0.01)


@pytest.fixture(scope="module")
def linear():
    """A model whose logits are linear in all that its attention and MLPs return."""
    rng = np.random.default_rng(0)
    circuit = planted_circuit(
        rng.integers(1, 3, (6, 3)), rng.integers(0, 3, (3, 3, 3)) / 4, None,
        rng.integers(0, 2, (3, 3, 3)),
    )  # fmt: skip
    return InterpretableModel(circuit.model, circuit.tokenizer)


@pytest.mark.parametrize("component", ["attn", "mlp", "heads"])
def test_where_all_is_linear_the_estimate_is_exact(linear, component):
    name = "attn" if component == "heads" else component
    given = (linear, [0, 1, 2, 3], [4, 1, 5, 3], name)
    more = {"positions": "each", "metric": "logit_diff", "answers": (0, 1), **heads_of(component)}
    estimate, real = attribution_patching(*given, **more), activation_patching(*given, **more)
    assert np.abs(real.recovered).max() > 5
    np.testing.assert_allclose(estimate.recovered, real.recovered, atol=0.05)


@pytest.mark.parametrize("component", ["mlp", "attn", "heads", "output"])
def test_it_agrees_with_real_patching_on_the_bundled_model(demo, component):
    name = "attn" if component == "heads" else component
    found = []
    for clean, corrupted, *answers in PAIRS:
        more = {"positions": "each", "metric": "logit_diff", "answers": answers}
        more |= heads_of(component)
        estimate = demo.attribution_patching(clean, corrupted, name, **more)
        real = demo.activation_patching(clean, corrupted, name, **more)
        assert real.clean > real.corrupted + 1
        found.append(correlation(estimate.recovered, real.recovered))
    assert min(found) > 0.99


def test_verify_patches_the_strongest_really(demo):
    clean, corrupted, *answers = PAIRS[0]
    more = {"positions": "each", "metric": "logit_diff", "answers": answers}
    estimate = demo.attribution_patching(clean, corrupted, ["attn", "mlp"], **more)
    real = demo.activation_patching(clean, corrupted, ["attn", "mlp"], **more)
    found = estimate.verify(top=7)
    order = np.argsort(-np.abs(estimate.recovered), axis=None)[:7]
    np.testing.assert_allclose(found.estimated, estimate.recovered.ravel()[order])
    np.testing.assert_allclose(found.measured, real.recovered.ravel()[order], atol=0.05)
    assert found.correlation == pytest.approx(np.corrcoef(found.estimated, found.measured)[0, 1])
    assert repr(found).startswith("Estimates patched really: recovered (%), correlation 0.9")
    assert len(repr(found).split("\n")) == 2 + 7
    assert checked(found._repr_html_()).cells[0] == ["", "estimated", "measured"]
    assert len(json.loads(json.dumps(found.to_dict()))["measured"]) == 7
    assert len(found.plot().axes[0].lines[0].get_xdata()) == 7
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        estimate.verify(top=0)


def test_texts_of_other_lengths(model):
    longer = [7, *A]
    estimate = attribution_patching(
        model, longer, B, "mlp", positions="each", align="end", **DIFFERENCE
    )
    start = attribution_patching(
        model, A[:4], B, "mlp", positions="each", align="start", steps=8, **DIFFERENCE
    )
    assert estimate.recovered.shape == (3, 6)
    np.testing.assert_array_equal(start.recovered[:, 4:], 0)
    assert np.abs(start.recovered[:, :4]).max() > 0.1


@pytest.mark.parametrize("metric", ["l2", "mse", "cosine", "kl"])
def test_a_distance_has_no_slope_where_it_is_zero(model, metric):
    with pytest.raises(ValueError, match="is a distance from the clean run and has no slope there"):
        attribution_patching(model, A, B, metric=metric, direction="noising", steps=None)
    found = attribution_patching(model, A, B, metric=metric, direction="noising", steps=2)
    assert np.isfinite(found.recovered).all()
    assert np.isfinite(attribution_patching(model, A, B, metric=metric).recovered).all()


def test_steps_must_be_some(model):
    with pytest.raises(ValueError, match="steps must be at least 1, or None, got 0"):
        attribution_patching(model, A, B, steps=0)


def test_runs_that_do_not_differ(model):
    assert np.isnan(attribution_patching(model, A, A).recovered).all()


def test_correlations():
    assert correlation(np.array([1.0, 2, np.nan]), np.array([3.0, 5, 0])) == pytest.approx(1)
    assert correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert np.isnan(correlation(np.array([1.0, 1]), np.array([1.0, 2])))
    assert np.isnan(Verification((), np.zeros(0)).correlation)
