"""Figures show the pattern that they were given, and keep to themselves."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from mlxterp.visualization import (
    AttentionPage,
    AttentionVisualizationConfig,
    attention_from_trace,
    attention_heatmap,
    get_attention_patterns,
)
from tests.visualization.test_scores import random_pattern

TOKENS = ["<s>", " a$", "\n", "  ", "漢字"]
TEXT = "def add(first, second):"


def image(figure, axis=0):
    figure.draw_without_rendering()
    return figure.axes[axis].get_images()[0]


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 3, 5, 5)])
def test_the_head_that_is_named_is_drawn(shape):
    patterns = random_pattern(*shape)
    figure = attention_heatmap(patterns, TOKENS, head_idx=0 if len(shape) == 2 else 2)
    expected = patterns.reshape(-1, 5, 5)[0 if len(shape) == 2 else 2]
    drawn = image(figure)
    assert isinstance(figure, Figure) and figure.get_size_inches().tolist() == [8, 6]
    np.testing.assert_array_equal(drawn.get_array().filled(0), expected)
    assert drawn.get_array().mask.tolist() == (~np.tri(5, dtype=bool)).tolist()
    assert (drawn.norm.vmin, drawn.norm.vmax) == (0, expected.max())
    ax, bar = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "<s>",
        " a$",
        "⏎",
        "␣␣",
        "漢字",
    ] or (
        "□" in ax.get_yticklabels()[4].get_text()  # where no font has them
    )
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == ("key", "query", "attention")


def test_queries_are_the_last_of_the_keys():
    pattern = random_pattern(2, 5)
    drawn = image(figure := attention_heatmap(pattern, TOKENS, title="the last two"))
    assert drawn.get_array().mask.tolist() == [[False] * 4 + [True], [False] * 5]
    assert len(figure.axes[0].get_yticklabels()) == 2
    assert figure.axes[0].get_title() == "the last two"


def test_the_settings_are_followed_and_axes_are_taken():
    settings = AttentionVisualizationConfig("viridis", False, False, 500, 300)
    figure = attention_heatmap(random_pattern(5, 5), TOKENS, config=settings)
    assert figure.get_size_inches().tolist() == [5, 3] and len(figure.axes) == 1
    assert image(figure).get_cmap().name == "viridis" and not np.ma.is_masked(
        image(figure).get_array()
    )
    mine = Figure()
    ax = mine.subplots()
    assert attention_heatmap(random_pattern(5, 5), TOKENS, ax=ax) is mine
    assert len(ax.get_images()) == 1


@pytest.mark.parametrize(
    ("shape", "tokens", "options", "message"),
    [
        ((3, 3), "abc", {}, r"model.to_str_tokens\('abc'\)"),
        ((3, 3), ["a", "b"], {}, "tokens must be 3, one for each key, not 2"),
        ((2, 1, 1), ["a"], {"head_idx": 2}, r"head_idx must be in \[0, 1\], not 2"),
        ((1, 1, 1, 1, 1), ["a"], {}, "2, 3 or 4 axes, not 5"),
        ((1, 1), ["a"], {"backend": "plotly"}, "one of auto, matplotlib, not 'plotly'"),
    ],
)
def test_what_is_wrong_is_said(shape, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        attention_heatmap(np.ones(shape), tokens, **options)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mlxterp\[plot\]'"):
        attention_heatmap(np.eye(3), [*"abc"])


@pytest.fixture(scope="module")
def trace(demo):
    with demo.trace(TEXT) as trace:
        pass
    return trace


def test_a_grid_has_a_map_for_each_head(demo, trace):
    tokens, patterns = demo.to_str_tokens(TEXT), get_attention_patterns(trace)
    figure = attention_from_trace(trace, tokens, layers=[1, 4])
    *maps, bar = figure.axes
    assert [ax.get_title() for ax in maps] == [f"L{i}H{h}" for i in (1, 4) for h in range(4)]
    for i, (layer, head) in enumerate((layer, head) for layer in (1, 4) for head in range(4)):
        drawn = image(figure, i)
        np.testing.assert_array_equal(drawn.get_array().filled(0), patterns[layer][0, head])
        assert (drawn.norm.vmin, drawn.norm.vmax) == (0, 1)
    assert not figure.get_suptitle() and bar.get_ylabel() == "attention"


def test_a_grid_of_too_many_heads_says_that_it_has_the_first(demo, trace):
    figure = attention_from_trace(trace, demo.to_str_tokens(TEXT))
    assert figure.get_suptitle() == "The first 16 of 24 heads"
    assert [ax.get_title() for ax in figure.axes][15] == "L3H3" and len(figure.axes) == 17


def test_heads_can_be_named_in_either_notation(demo, trace):
    tokens = demo.to_str_tokens(TEXT)
    heads = [(5, 1), (0, 3), (2, 2)]
    settings = AttentionVisualizationConfig(heads_per_row=2, show_colorbar=False)
    figure = attention_from_trace(trace, tokens, heads=heads, head_notation="dot", config=settings)
    assert [ax.get_title() for ax in figure.axes if ax.get_images()] == ["5.1", "0.3", "2.2"]
    single = attention_from_trace(trace, tokens, heads=heads, mode="single")
    assert single.axes[0].get_title() == "L5H1"
    page = attention_from_trace(trace, tokens, heads=heads, mode="interactive")
    assert isinstance(page, AttentionPage) and '"heads": [3]' in page
    for options, message in (
        ({"mode": "film"}, "mode must be one of grid, single, interactive"),
        ({"head_notation": "HL"}, "head_notation must be one of LH, dot"),
        ({"heads": [(1, 4)]}, r"heads must be .* \{1: 4\}, not \[\(1, 4\)\]"),
        ({"layers": 8}, "layers must be of"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_from_trace(trace, tokens, **options)


def test_nothing_global_changes():
    before = dict(matplotlib.rcParams)
    attention_heatmap(random_pattern(5, 5), TOKENS).draw_without_rendering()
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
