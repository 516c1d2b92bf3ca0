"""The page holds the values that it was given, does no harm, and can be used without a mouse."""

import base64
import json
import re
from html import unescape

import numpy as np
import pytest

from mlxterp.visualization import (
    AttentionPage,
    InteractiveAttentionConfig,
    display_interactive_attention,
    get_attention_patterns,
    interactive_attention,
    interactive_attention_from_trace,
    save_interactive_attention,
)
from tests.pages import NASTY
from tests.visualization.test_scores import random_pattern

TOKENS = ["<s>", " def", NASTY, "</script><script>alert(2)</script>", "  ", "x"]
PATTERNS = {2: random_pattern(2, 3, 6, 6, seed=1), 0: random_pattern(1, 2, 6, 6, seed=2)}


def content_of(page):
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def values_of(layer):
    values = np.frombuffer(base64.b64decode(layer["data"]), "<u2") / 65535
    return values.reshape(len(layer["heads"]), layer["n_queries"], layer["n_keys"])


def test_the_page_holds_the_values():
    content = content_of(interactive_attention(PATTERNS, TOKENS))
    assert [layer["layer"] for layer in content["layers"]] == [0, 2]
    for layer in content["layers"]:
        pattern = PATTERNS[layer["layer"]][0]
        assert layer["heads"] == [*range(len(pattern))]
        np.testing.assert_allclose(values_of(layer), pattern, atol=0.6 / 65535)
    assert content["tokens"][0] == "<s>" and "⏎" in content["tokens"][2]


def test_heads_that_are_named_are_the_only_ones():
    page = interactive_attention(PATTERNS, TOKENS, heads=[(2, 2), (2, 0)])
    (layer,) = content_of(page)["layers"]
    assert (layer["layer"], layer["heads"]) == (2, [2, 0])
    np.testing.assert_allclose(values_of(layer), PATTERNS[2][0, [2, 0]], atol=1e-5)


def test_the_page_is_whole_and_asks_for_nothing():
    title = '<b>"T" & </title>'
    page = interactive_attention(PATTERNS, TOKENS, InteractiveAttentionConfig(title))
    assert page.startswith("<!DOCTYPE html>") and "default-src 'none'" in page
    assert not re.search(r"https?:|//\w+\.|@import|url\(|\bsrc=|\bhref=|fetch\(|import\(", page)
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page)) == 2
    assert "<b>" not in page and "alert(2)</script>" not in page
    assert page.count("&lt;b&gt;") == 2
    page.encode("utf-8")


def test_a_notebook_gets_a_frame_of_its_own(tmp_path, monkeypatch):
    page = interactive_attention(PATTERNS, TOKENS)
    assert isinstance(page, str) and re.fullmatch(r"AttentionPage\(\d+ kB of HTML\)", repr(page))
    shown = page._repr_html_()
    inner = re.fullmatch(
        r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts" [^<>]*></iframe>', shown
    )
    assert unescape(inner[1]) == page
    seen = []
    monkeypatch.setattr("mlxterp.visualization.interactive.show", seen.append)
    assert display_interactive_attention(PATTERNS, TOKENS) is None and seen == [page]


def test_a_page_is_saved(demo, tmp_path):
    text = "def add(first, second):"
    path = save_interactive_attention(PATTERNS, TOKENS, tmp_path / "page.html")
    assert path.read_text("utf-8") == interactive_attention(PATTERNS, TOKENS)
    with demo.trace(text) as trace:
        pass
    tokens = demo.to_str_tokens(text)
    page = interactive_attention_from_trace(trace, tokens, layers=[3])
    assert isinstance(page, AttentionPage)
    assert page == interactive_attention(get_attention_patterns(trace, 3), tokens)
    assert page == interactive_attention_from_trace(demo.attention(text, 3), tokens)
    hidden = InteractiveAttentionConfig(show_layer_flow=False, heatmap_size=500, colorscale="Reds")
    other = interactive_attention(PATTERNS, TOKENS, hidden)
    assert 'aria-labelledby="flow-title" hidden' in other and "--map: 500px" in other
    assert "165 15 21" in other


@pytest.mark.parametrize(
    ("patterns", "options", "message"),
    [
        ({}, {}, "at least one layer"),
        ({0: -PATTERNS[0]}, {}, r"must be in \[0, 1\]; that of layer 0 is in \[-1, -?0\]"),
        ({0: 2 * PATTERNS[0]}, {}, r"must be in \[0, 1\]"),
        (PATTERNS | {1: random_pattern(1, 1, 4, 6)}, {}, "the same queries and keys"),
        (PATTERNS, {"heads": [(1, 0)]}, r"heads must be \(layer, head\)"),
        (PATTERNS, {"heads": []}, r"heads must be \(layer, head\)"),
        (
            PATTERNS,
            {"config": InteractiveAttentionConfig(colorscale="jet")},
            "must be one of Blues",
        ),
        (PATTERNS, {"config": InteractiveAttentionConfig(heatmap_size=9)}, "heatmap_size must be"),
    ],
)
def test_what_cannot_be_shown_is_said(patterns, options, message):
    with pytest.raises(ValueError, match=message):
        interactive_attention(patterns, TOKENS, **options)


def test_too_much_for_a_browser_is_refused():
    with pytest.raises(ValueError, match="a page of 64 MB can show: name layers, or heads"):
        interactive_attention({0: np.zeros((1, 8, 2048, 2048), np.float32)}, ["a"] * 2048)
