"""Generations side by side, and what a strength sweep says: numbers, text that is safe, figure."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.steering.edits import steering_edit
from mlxterp.sae.steering.report import Comparison, Response, SteeringReport, compare

NASTY = "<script>alert('x')</script>\x1b[31m\u202e\x00\n & שלום 🎉 \ufffd"
PROMPT = "The function returns"
STRENGTHS = (1.0, 0.0, 2.0)


def response(name, effects, others=(0.1, 0.0, 0.25)):
    n = len(effects)
    return Response(
        name, np.array(effects), np.array(others[:n]), np.arange(n) / 10, np.arange(n) + 5.0
    )


def report(**changed):
    made = SteeringReport(
        features={3: 1.0, 8: -0.5},
        strengths=STRENGTHS,
        targets=(" class", NASTY),
        n_tokens=1234,
        logprob=-7.5,
        perplexity=20.25,
        steered=response("steered", [1.0, 0.0, 3.0]),
        random=(response("random 1", [0.5, 0.0, 0.7]), response("random 2", [-0.1, 0.0, 0.1])),
        difference=response("difference of means", [0.4, 0.0, 0.9]),
    )
    return replace(made, **changed)


def is_safe(page):
    hidden = {"\x1b", "\u202e", "\x00"}
    return "<script" not in page and not hidden & set(page) and "שלום 🎉" in page


def test_generations_are_those_of_the_model_with_each_edit(sae, model):
    prompts = (PROMPT, "Raise")
    found = compare(sae, model, 11, prompts, (0.0, 9.0), max_tokens=4, unit="activation")
    edit = steering_edit(sae, 11, 9.0, unit="activation")
    for prompt, (plain, nothing, steered) in zip(prompts, found.texts, strict=True):
        assert plain == nothing == model.generate(prompt, max_tokens=4).text
        assert steered == model.generate(prompt, max_tokens=4, edit=edit).text
    assert found.names == ("plain", "0", "9")
    assert found.prompts == prompts
    assert any(steered != plain for plain, _, steered in found.texts)


def test_any_edits_can_be_compared_by_name(sae, model):
    edits = {"nothing": {}, "removed": {sae.site: mx.zeros_like}}
    found = compare(sae, model, edits, PROMPT, max_tokens=3)
    assert found.names == ("plain", "nothing", "removed")
    ((plain, nothing, removed),) = found.texts
    assert plain == nothing != removed
    assert removed == model.generate(PROMPT, max_tokens=3, edit=edits["removed"]).text


def test_sampling_is_that_of_generate(sae, model):
    sampling = {"temperature": 2.0, "seed": 3}
    found = compare(sae, model, {"again": {}}, PROMPT, max_tokens=6, sampling=sampling)
    assert set(found.texts[0]) == {model.generate(PROMPT, max_tokens=6, **sampling).text}
    assert found.texts[0][0] != model.generate(PROMPT, max_tokens=6).text


def test_the_method_compares_in_units_of_the_largest_value(sae, model, monkeypatch):
    maxima = np.full(sae.n_features, 4.0)
    found = sae.compare_generations(11, PROMPT, (2.0,), max_tokens=4, maxima=maxima)
    same = compare(sae, model, 11, PROMPT, (8.0,), max_tokens=4, unit="activation")
    assert found.names == ("plain", "2")
    assert found.texts == same.texts


def test_a_comparison_shows_every_text_even_of_the_same_prompt_twice():
    found = Comparison(("a", "a"), ("plain", "0.5"), (("x\n", "y"), ("z", NASTY)))
    lines = repr(found).splitlines()
    assert lines[:3] == ["After 'a'", "  plain  'x\\n'", "  0.5    'y'"]
    assert lines[4] == "  plain  'z'"
    assert len(lines) == 6
    assert json.loads(json.dumps(found.to_dict()))["texts"] == [["x\n", "y"], ["z", NASTY]]


def test_text_with_markup_and_control_characters_is_shown_safely():
    found = Comparison((NASTY,), ("plain", "<b>"), ((NASTY, "y"),))
    page = found._repr_html_()
    assert is_safe(page)
    assert "<b>" not in page
    assert not {"\x1b", "\u202e", "\x00"} & set(repr(found))
    assert is_safe(report()._repr_html_())
    assert not {"\x1b", "\u202e", "\x00"} & set(repr(report()))


@pytest.mark.parametrize(
    ("effects", "monotone"),
    [([1.0, 0.0, 3.0], True), ([1.0, 0.0, 0.9], False), ([0.0, 0.0, 3.0], False),
     ([1.0, 3.0, 0.0], False)],
)  # fmt: skip
def test_monotone_means_a_gain_with_every_step_whatever_their_order(effects, monotone):
    assert report(steered=response("steered", effects)).is_monotone is monotone


def test_slopes_are_those_of_least_squares():
    found = report()
    slopes = [np.polyfit(STRENGTHS, r.effects, 1)[0] for r in (found.steered, *found.random)]
    np.testing.assert_allclose([found.slope, *found.random_slopes], slopes, rtol=1e-12)


def test_specificity_is_the_effect_on_targets_against_that_on_others():
    specificity = report().steered.specificity
    np.testing.assert_allclose(specificity[[0, 2]], [10.0, 12.0])
    assert np.isnan(specificity[1])


def test_the_table_has_the_figures_of_every_strength():
    rows = report().table.rows
    assert rows[0] == (
        "1", "+1.000", "10.00", "0.000", "5.00", "+0.200 ± 0.300", "0.000", "5.00",
        "+0.400", "0.000", "5.00",
    )  # fmt: skip
    assert [row[0] for row in rows] == ["1", "0", "2"]
    assert len(report(random=(), difference=None).table.header) == 5
    first, second = repr(report()).splitlines()[:2]
    assert first.startswith("Steering with 3, 8: ' class'  ")
    assert second == (
        "plain: log-probability -7.50, perplexity 20.25 (1,234 tokens); slope +1.50 nats per unit "
        "of strength, random directions +0.20 ± 0.15"
    )


def test_one_strength_has_no_slope():
    one = {"steered": response("steered", [1.0]), "random": (), "difference": None}
    found = report(strengths=(1.0,), **one)
    assert found.to_dict()["slope"] is None
    assert "slope" not in repr(found)


def test_everything_is_in_plain_values():
    found = json.loads(json.dumps(report().to_dict(), allow_nan=False))
    assert found["features"] == {"3": 1.0, "8": -0.5}
    assert found["steered"] == {
        "name": "steered", "effects": [1.0, 0.0, 3.0], "specificity": [10.0, None, 12.0],
        "kl": [0.0, 0.1, 0.2], "perplexities": [5.0, 6.0, 7.0],
    }  # fmt: skip
    assert [r["name"] for r in found["random"]] == ["random 1", "random 2"]
    assert found["difference"]["effects"] == [0.4, 0.0, 0.9]
    assert found["monotone"] is True
    assert report(difference=None).to_dict()["difference"] is None


def test_the_figure_has_a_line_for_each_direction_by_strength_and_by_cost():
    by_strength, by_cost = report().plot().axes
    lines = {line.get_label(): line for line in by_strength.lines}
    assert list(lines) == ["random directions", "difference of means", "steered"]
    assert len(by_strength.lines) == len(by_cost.lines) == 4
    shown = [text.get_text() for text in by_strength.get_legend().get_texts()]
    assert shown == list(lines)
    assert lines["steered"].get_xdata().tolist() == [0.0, 1.0, 2.0]
    assert lines["steered"].get_ydata().tolist() == [0.0, 1.0, 3.0]
    (cost,) = [line for line in by_cost.lines if line.get_label() == "steered"]
    assert cost.get_xdata().tolist() == [0.1, 0.0, 0.2]
    assert report(random=(), difference=None).plot()._repr_png_().startswith(b"\x89PNG")
