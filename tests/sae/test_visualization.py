import math
import re
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from mlxterp.sae import SAE, ActivationDataset, SAEConfig, SAETrainer
from mlxterp.sae.analysis import Example, LogitEffects
from mlxterp.sae.coder import Columns
from mlxterp.sae.visualization import FeatureView, plot_training
from tests.fakes import SITE, FakeSource

VIEW = FeatureView(
    feature_id=3,
    firing_rate=0.0123,
    examples=(
        Example(("<script>", "alert('x')", "&\n"), (0.5, 2.0, 0.0), 1),
        Example(("a", "b"), (4.0, 0.0), 0),
    ),
    logits=LogitEffects((("<b>up", 2.0),), (("</div>", -1.0),)),
)


def test_text_shows_rate_logits_and_the_marked_peaks():
    assert repr(VIEW).splitlines() == [
        "Feature 3, on 1.23% of tokens",
        "  raises  '<b>up'",
        "  lowers  '</div>'",
        """    2.00  "<script>«alert('x')»&\\n\"""",
        "    4.00  '«a»b'",
    ]


def test_html_escapes_everything_that_comes_from_text():
    html = VIEW._repr_html_()
    assert "<script" not in html and "<b>" not in html and "&lt;script&gt;" in html
    assert "&lt;b&gt;up" in html and "alert(&#39;x&#39;)" in html and "&amp;⏎" in html
    assert html.count("<div") == html.count("</div>")


def test_html_shades_tokens_by_their_share_of_the_largest_value():
    html = VIEW._repr_html_()
    shades = [float(shade) for shade in re.findall(r"140, 0, ([\d.]+)\)", html)]
    assert shades == [0.12, 0.5, 0.0, 1.0, 0.0]
    assert html.count("outline") == 2


def test_a_feature_without_examples_says_so():
    empty = FeatureView(3, None, (), None)
    assert repr(empty) == "Feature 3\n  not active on any of these tokens"
    assert "Not active on any of these tokens" in empty._repr_html_()


def test_a_feature_of_the_session_is_shown_without_further_arguments(sae):
    feature = int(np.argmax(sae.statistics.firing_rates))
    view = sae.visualize_feature(feature)
    assert view.feature_id == feature and len(view.examples) == 10
    assert view.firing_rate == sae.statistics.firing_rates[feature]
    values = [example.value for example in view.examples]
    assert values == pytest.approx(sorted(values, reverse=True)) and values[-1] > 0
    assert len(view.logits.top) == len(view.logits.bottom) == 10
    assert view.logits.top[0][1] > 0 > view.logits.bottom[0][1]
    assert repr(view).startswith(f"Feature {feature}, on ") and "«" in repr(view)
    assert view._repr_html_().startswith("<div")


def test_a_feature_is_shown_on_other_texts(sae, model, texts):
    feature = int(np.argmax(sae.statistics.firing_rates))
    view = sae.visualize_feature(model=model, feature_id=feature, dataset=texts[:3], top_k=2)
    assert 0 < len(view.examples) <= 2
    joined = "".join("".join(example.tokens) for example in view.examples)
    assert any(example.tokens[0] in text for text in texts[:3] for example in view.examples), joined


@pytest.mark.parametrize("feature", [-1, 512])
def test_an_unknown_feature_is_an_error(sae, feature):
    with pytest.raises(ValueError, match=rf"feature_id must be in \[0, 511\], got {feature}"):
        sae.visualize_feature(feature)


def test_a_loaded_coder_asks_for_a_dataset(sae, model, tmp_path):
    from mlxterp.sae import load_sae

    loaded = load_sae(sae.save(tmp_path / "sae.mlx"))
    with pytest.raises(ValueError, match=r"pass model="):
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


TRAINING = [
    {"step": s, "tokens": 1000 * s, "loss": 1 / s, "fvu": 2 / s, "l0": 8.0, "dead": 0.01 * s}
    for s in range(1, 41)
]
VALIDATION = [{"step": s, "tokens": 1000 * s, "fvu": 0.1, "l0": 9.0, "dead": 0.2} for s in (20, 40)]


def lines(ax) -> dict[str, list[tuple[float, float]]]:
    """The curves of a panel, without gaps, by their label."""
    return {
        line.get_label(): [(x, y) for x, y in zip(*line.get_data(), strict=True) if y == y]
        for line in ax.get_lines()
    }


def test_four_panels_show_training_and_held_out_figures_over_tokens():
    figure = plot_training(TRAINING, VALIDATION)
    loss, fvu, l0, dead = figure.axes
    assert lines(loss) == {"training": [(1000 * s, 1 / s) for s in range(1, 41)]}
    assert lines(fvu)["held out"] == [(20_000, 0.1), (40_000, 0.1)]
    assert lines(l0)["held out"] == [(20_000, 9.0), (40_000, 9.0)]
    assert lines(dead) == {"training": [(1000 * s, 0.01 * s) for s in range(1, 41)]}
    words = [ax.get_ylabel() for ax in figure.axes]
    for word, text in zip(("loss", "FVU", "L0", "dead"), words, strict=True):
        assert word in text
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "", "tokens", "tokens"]
    assert [text.get_text() for text in fvu.get_legend().get_texts()] == ["training", "held out"]


def test_curves_can_be_told_apart_without_colour():
    training, held_out = plot_training(TRAINING, VALIDATION).axes[1].get_lines()
    assert training.get_linestyle() != held_out.get_linestyle()
    assert training.get_marker() != held_out.get_marker()


def test_only_loss_and_fvu_of_a_large_span_are_logarithmic():
    assert [ax.get_yscale() for ax in plot_training(TRAINING).axes] == [
        "log", "log", "linear", "linear",
    ]  # fmt: skip
    short = plot_training(TRAINING[5:10]).axes
    assert [ax.get_yscale() for ax in short] == ["linear"] * 4
    assert all(ax.get_ylim()[0] == 0 for ax in short)


def test_a_few_dead_features_look_few():
    *_, dead = plot_training([{"tokens": 1, "dead": 0.001}, {"tokens": 2, "dead": 0.002}]).axes
    assert dead.get_ylim() == (0, 0.05)


@pytest.mark.parametrize(
    "training, validation",
    [([], []), ([], VALIDATION), (TRAINING, []), (TRAINING[:1], []), ([{"step": 1}], [{}])],
)
def test_any_reports_can_be_drawn(training, validation):
    figure = plot_training(training, validation)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert (figure.axes[1].get_legend() is None) == (validation in ([], [{}]))


def test_missing_keys_and_values_that_are_not_finite_leave_gaps():
    odd = [
        {"tokens": 1, "fvu": 0.5}, {"tokens": 2, "fvu": math.nan}, {"tokens": 3, "fvu": None},
        {"tokens": 4, "fvu": math.inf}, {"tokens": 5}, {"fvu": 0.1}, {"tokens": 7, "fvu": 0.25},
    ]  # fmt: skip
    loss, fvu, *_ = plot_training(odd).axes
    assert lines(loss) == {} and lines(fvu) == {"training": [(1, 0.5), (7, 0.25)]}
    assert len(fvu.get_lines()[0].get_xdata()) == 5
    assert math.isfinite(fvu.get_ylim()[1])


def test_a_figure_of_the_users_own_is_drawn_on():
    own = Figure()
    axes = own.subplots(1, 4)
    assert plot_training(TRAINING, VALIDATION, axes) is own
    assert [len(ax.get_lines()) for ax in axes] == [1, 2, 2, 1]
    with pytest.raises(ValueError, match="axes must be 4, got 3"):
        plot_training(TRAINING, axes=axes[:3])


def test_drawing_leaves_no_figure_open():
    plot_training(TRAINING, VALIDATION)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mlxterp\[plot\]'"):
        plot_training(TRAINING)
