import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from mlxterp.sae import SAE, ActivationDataset, SAEConfig, SAETrainer, load_sae
from mlxterp.sae.coder import Columns
from mlxterp.sae.features.data import CoActive
from mlxterp.sae.features.examples import Example, Interval
from mlxterp.sae.features.logit_effects import LogitEffects
from mlxterp.sae.features.view import FeatureView
from mlxterp.sae.similarity.nearest import Neighbour
from mlxterp.sae.visualization import width
from tests.fakes import SITE, FakeSource
from tests.pages import NASTY, checked

EXAMPLES = (
    Example(("<script>", "alert('x')", "&\n"), (0.5, 2.0, 0.0), 1),
    Example(("a", "b"), (4.0, 0.0), 0),
)


def view(**changes) -> FeatureView:
    values = {
        "feature_id": 3,
        "label": "<i>tags</i> \u202eback",
        "firing_rate": 0.0123,
        "mean": 1.5,
        "maximum": 4.0,
        "histogram": np.array([0, 2, 0, 8, 1, 0]),
        "bin_edges": np.array([0.5, 0.7, 1, 1.4, 2, 2.8, 4]),
        "examples": EXAMPLES,
        "intervals": (Interval(2.0, 4.0, 0.25, EXAMPLES[1:]), Interval(0.0, 2.0, 0.75, ())),
        "random": EXAMPLES[:1],
        "logits": LogitEffects((("<b>up", 2.0),), (("</div>", -1.0),)),
        "similar": (Neighbour(7, 0.91),),
        "co_active": (CoActive(9, 12, 0.5),),
    }
    return FeatureView(**{**values, **changes})


def test_text_shows_everything_and_the_marked_peaks():
    assert repr(view()).splitlines() == [
        r"Feature 3: <i>tags</i> \u202eback",
        "  on 1.23% of tokens, mean 1.50, maximum 4.00  ▂ █▁",
        "  raises  '<b>up'",
        "  lowers  '</div>'",
        """    2.00  "<script>«alert('x')»&\\n\"""",
        "    4.00  '«a»b'",
        "  similar features (cosine)   7 (0.91)",
        "  fire together (Jaccard)     9 (0.50)",
    ]


def test_html_escapes_everything_that_comes_from_text():
    html = view()._repr_html_()
    for bad in ("<script", "<b>", "<i>", "\u202e", "</div>up"):
        assert bad not in html
    assert "&lt;script&gt;" in html and "&lt;b&gt;up" in html and "alert(&#39;x&#39;)" in html
    assert "&amp;⏎" in html and r"&lt;i&gt;tags&lt;/i&gt; \u202eback" in html
    assert html.count("<div") == html.count("</div>")


def test_html_shades_tokens_by_their_share_of_the_maximum():
    parts = checked(view()._repr_html_()).parts
    assert [share for _, share, _ in parts][:5] == [0.12, 0.5, 0.0, 1.0, 0.0]
    assert [classes for *_, classes in parts][:5] == [
        {"more"}, {"more", "strong", "peak"}, set(), {"more", "strong", "peak"}, set(),
    ]  # fmt: skip


def test_html_draws_the_histogram_over_what_occurs():
    heights = re.findall(r"height: ([\d.]+)%; min-height", view()._repr_html_())
    assert heights == ["25.0", "0.0", "100.0", "12.5"]
    assert "8 tokens between 1.4 and 2" in view()._repr_html_()


def test_the_character_that_holds_the_peak_is_outlined_whole():
    peaks = {0: "a", 2: "👍", 4: "b"}
    for peak, character in peaks.items():
        example = Example(("a", "👍", "", "", "b"), (0.0, 1.0, -3.0, 0.0, 2.0), peak)
        html = view(examples=(example,), intervals=(), random=())._repr_html_()
        assert [text for text, _, names in checked(html).parts if "peak" in names] == [character]
        assert example.token == character


def test_a_feature_that_never_fires_says_so():
    empty = view(
        label=None, examples=(), intervals=(), random=(), logits=None, similar=(), co_active=(),
        histogram=np.zeros(6, int),
    )  # fmt: skip
    assert repr(empty) == "Feature 3\n  not active on any of these tokens"
    assert "Not active on any of these tokens" in empty._repr_html_()
    assert isinstance(empty.plot(), Figure)


def test_a_view_becomes_plain_values_and_a_figure():
    plain = view().to_dict()
    assert plain["examples"][1]["values"] == (4.0, 0.0) and plain["similar"] == [[7, 0.91]]
    assert plain["co_active"] == [{"feature_id": 9, "count": 12, "score": 0.5}]
    (patch,) = view().plot().axes[0].patches
    np.testing.assert_array_equal(patch.get_data().values, [2, 0, 8, 1])


def drawn_texts(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_a_card_is_a_page_with_figures_and_shaded_examples():
    figure = view(label=None).card()
    page, histogram, effects = figure.axes
    assert figure.get_size_inches()[0] == pytest.approx(8.27)
    np.testing.assert_array_equal(histogram.patches[0].get_data().values, [2, 0, 8, 1])
    assert [bar.get_width() for bar in effects.patches] == [2.0, -1.0]
    texts = drawn_texts(figure)
    assert texts[0] == "Feature 3"
    assert texts[1:4] == [
        "fires on 1.23 % of tokens, mean 1.50, maximum 4.00",
        "similar features (cosine)  7 (0.91)",
        "fire together (Jaccard)  9 (0.50)",
    ]
    at = [texts.index(name) for name in ("strongest", "2.00 to 4.00: 25.0% of the activations")]
    assert texts[at[0] : at[1]] == [
        "strongest", "2.00", "<script>", "alert('x')", "&⏎", "4.00", "a", "b",
    ]  # fmt: skip
    assert "0.00 to 2.00: 75.0% of the activations" not in texts  # nothing to show there
    assert texts[texts.index("any of them, at random") + 1] == "2.00"


def test_a_card_shades_each_token_by_its_share_where_it_stands():
    page = view(intervals=(), random=()).card().axes[0]
    shades = [box for box in page.patches if box.get_fill()]
    assert [box.get_alpha() for box in shades] == pytest.approx(
        [0.65 * share for share in (0.125, 0.5, 1.0)]
    )
    texts = {text.get_text(): text.get_position() for text in page.texts}
    for text, box in zip(("<script>", "alert('x')", "a"), shades, strict=True):
        assert texts[text][0] == pytest.approx(box.get_x())
        assert box.get_y() < texts[text][1] < box.get_y() + box.get_height()
    start, end = texts["alert('x')"][0], texts["&⏎"][0]
    assert end - start == pytest.approx(shades[1].get_width()) == 8 * width("alert('x')")
    peaks = [box.get_x() for box in page.patches if not box.get_fill()]
    assert peaks == [texts["alert('x')"][0], texts["a"][0]]


def test_a_card_keeps_the_peak_where_a_text_is_too_long_for_a_line():
    tokens = tuple(f" word{i}" for i in range(300))
    example = Example(tokens, tuple(float(i == 150) for i in range(300)), 150)
    page = view(examples=(example,), intervals=(), random=()).card().axes[0]
    shown = [text.get_text() for text in page.texts if text.get_text().startswith("word")]
    at = shown.index("word150")
    assert shown == [f"word{i}" for i in range(150 - at, 150 - at + len(shown))]
    assert at > len(shown) - at - 1 > 0  # more before the peak
    page.figure.draw_without_rendering()
    edge = page.get_window_extent().x1
    assert all(text.get_window_extent().x1 <= edge for text in page.texts)


def test_a_card_holds_any_text():
    example = Example((NASTY, "b"), (2.0, -1.0), 0)
    effects = LogitEffects(((NASTY, 2.0),), (("b", -1.0),))
    figure = view(label=NASTY, examples=(example,), random=(), intervals=(), logits=effects).card()
    assert figure._repr_png_()
    shown = "".join(drawn_texts(figure))
    assert "$x_{$" in shown and not {"\x07", "\u202e", "\ud83d"} & set(shown)
    nothing = view(examples=(), intervals=(), random=(), logits=None, histogram=np.zeros(6, int))
    assert len(nothing.card().axes) == 2


def test_html_of_any_text_is_harmless():
    example = Example((NASTY, "b"), (2.0, -1.0), 0)
    html = view(label=NASTY, examples=(example,), random=(example,))._repr_html_()
    page = checked(html)
    assert page.text.count("<script>alert(1)</script>") == 3
    assert [names for text, _, names in page.parts if text == "b"][0] == {"less"}
    for shown in (example, Interval(0.0, 2.0, 0.5, (example,))):
        assert [share for _, share, _ in checked(shown._repr_html_()).parts] == [1.0, 0.5]


def test_a_feature_of_the_session_is_shown_without_further_arguments(sae):
    data = sae.collect(verbose=False)
    feature = int(np.argmax(data.firing_counts))
    shown = sae.visualize_feature(feature)
    assert shown.feature_id == feature and len(shown.examples) == 10
    assert shown.firing_rate == data.firing_rates[feature]
    values = [example.value for example in shown.examples]
    assert values == pytest.approx(sorted(values, reverse=True)) and values[-1] > 0
    assert len(shown.logits.top) == len(shown.logits.bottom) == 10
    assert shown.logits.top[0][1] > 0 > shown.logits.bottom[0][1]
    cosines = np.array(sae.W_dec @ sae.W_dec[feature])
    cosines[feature] = -2
    assert shown.similar[0][0] == int(np.argmax(cosines))
    assert shown.co_active == data.co_active(feature, 10)
    assert repr(shown).startswith(f"Feature {feature}\n  on ") and "«" in repr(shown)
    assert shown._repr_html_().startswith("<div")


def test_a_feature_is_shown_on_other_texts(sae, model, texts, monkeypatch):
    monkeypatch.setattr(sae, "path", None)  # where another test has saved it
    feature = int(np.argmax(sae.statistics.firing_rates))
    before = sae.collect(verbose=False)
    shown = sae.visualize_feature(feature_id=feature, dataset=texts[5:7], model=model, top_k=20)
    assert 0 < len(shown.examples) <= 20
    found = sae.features
    assert sae.visualize_feature(feature, dataset=texts[5:7]).examples == shown.examples[:10]
    assert sae.features is found is not before  # not collected again


@pytest.mark.parametrize("feature", [-1, 512])
def test_an_unknown_feature_is_an_error(sae, feature):
    with pytest.raises(ValueError, match=rf"feature_id must be in \[0, 511\], got {feature}"):
        sae.visualize_feature(feature)


def test_a_loaded_coder_asks_for_a_dataset(sae, model, tmp_path):
    columns = sae.reads
    loaded = load_sae(SAE(columns, columns, 9, k=2).save(tmp_path / "sae.mlx"))
    with pytest.raises(ValueError, match=r"pass dataset="):
        loaded.visualize_feature(1)
    with pytest.raises(ValueError, match="pass dataset=, a list of texts"):
        loaded.visualize_feature(1, model=model)


def test_logits_are_left_out_where_the_coder_does_not_write_the_stream():
    narrow = Columns((SITE,), (6,))
    source = FakeSource(head=1.0)
    source.d_model = 9
    source.width = lambda site: 6
    dataset = ActivationDataset.from_texts(source, ["abc"], SITE)
    view = SAE(narrow, narrow, 12, k=2).visualize_feature(0, model=source, dataset=dataset)
    assert view.logits is None and "raises" not in repr(view)


def test_special_characters_of_real_text_are_escaped():
    texts = ["<script>alert(1)</script>" * 3]
    source = FakeSource(head=1.0)
    config = SAEConfig(expansion_factor=4, k=4, num_epochs=2, validation_split=0, batch_size=16)
    sae = SAETrainer(config).fit(ActivationDataset.from_texts(source, texts, SITE))
    for feature in range(24):
        html = sae.visualize_feature(feature, top_k=1)._repr_html_()
        assert "<script" not in html
