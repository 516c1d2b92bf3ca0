import numpy as np
import pytest

from mlxterp.sae import SAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.evals.fidelity import Fidelity
from mlxterp.sae.evals.loss import LossRecovered
from mlxterp.sae.metadata import Statistics
from mlxterp.sae.visualization import plot_density, plot_frontier, plot_losses

SITE = Columns(("layers.0.mlp",), (4,))


def heights(ax):
    """The bars of a histogram by the middle of their bin, without empty ones."""
    return {
        bar.get_x() + bar.get_width() / 2: bar.get_height()
        for bar in ax.patches
        if bar.get_height()
    }


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_densities_are_counted_in_bins_of_equal_ratio():
    (ax,) = plot_density(np.array([0, 0, 0.001, 0.0011, 0.3, 1.0])).axes
    found = heights(ax)
    assert sorted(found.values()) == [1, 1, 2]
    assert min(found) == pytest.approx(0.001, rel=0.1) and max(found) <= 1
    edges = np.array([bar.get_x() for bar in ax.patches][1:])
    np.testing.assert_allclose(edges[1:] / edges[:-1], 10 ** (3 / 40), rtol=1e-6)
    assert ax.get_xscale() == "log" and ax.get_title() == "2 of 6 never fire"
    assert ax.xaxis.get_major_formatter()(0.01, None) == "1 %"


@pytest.mark.parametrize("rates", [[], [0.0, 0.0], [1.0], [1e-6], [0.1]])
def test_every_rate_that_there_may_be_is_counted(rates):
    (ax,) = plot_density(np.array(rates)).axes
    assert sum(heights(ax).values()) == np.count_nonzero(rates)


def test_densities_of_several_coders_are_told_apart_by_name():
    (ax,) = plot_density({"small": np.array([0.1, 0]), "large": np.array([0.2, 0.3])}).axes
    assert legend(ax) == ["small (1 of 2 never fire)", "large (0 of 2 never fire)"]
    assert len({patch.get_edgecolor() for patch in ax.patches}) == 2 and not ax.get_title()


@pytest.mark.parametrize("rates", [np.array([1.5]), {"a": [-0.1]}, [np.nan]])
def test_rates_must_be_shares(rates):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        plot_density(rates)


def coder(training=(), validation=()):
    made = SAE(SITE, SITE, 8, "topk", k=2)
    made.statistics = Statistics(training, validation)
    return made


def test_a_frontier_takes_measurements_coders_and_pairs():
    own = coder(({"l0": 5.0, "fvu": 0.5},), ({"l0": 9.0, "fvu": 0.9}, {"l0": 4.0, "fvu": 0.4}))
    (ax,) = plot_frontier(
        {
            "pairs": [(64, 0.1), (8, 0.4), [16, np.float32(0.25)]],
            "fidelity": Fidelity(0.3, 12.0, 10, np.zeros(3)),
            "held out": own,
            "training": [coder(({"l0": 5.0, "fvu": 0.5},))],
        }
    ).axes
    points = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert points == {
        "pairs": [[8, 0.4], [16, 0.25], [64, pytest.approx(0.1)]],
        "fidelity": [[12, 0.3]],
        "held out": [[4, 0.4]],
        "training": [[5, 0.5]],
    }
    assert legend(ax) == [*points]
    assert "L0" in ax.get_xlabel() and "FVU" in ax.get_ylabel() and ax.get_xscale() == "log"
    styles = {(line.get_color(), line.get_marker()) for line in ax.get_lines()}
    assert len(styles) == len({marker for _, marker in styles}) == 4


def test_a_narrow_frontier_is_linear_from_zero():
    (ax,) = plot_frontier({"a": [(8, 0.4), (10, 0.3)]}).axes
    assert ax.get_xscale() == ax.get_yscale() == "linear"
    assert ax.get_xlim()[0] == ax.get_ylim()[0] == 0


@pytest.mark.parametrize(
    "measured",
    [{"a": []}, {"a": "text"}, {"a": [(1, 2, 3)]}, {"a": coder()}, {"a": (float("nan"), 1)}],
)
def test_what_is_no_measurement_is_named(measured):
    with pytest.raises(ValueError, match="'a' must have measurements"):
        plot_frontier(measured)
    with pytest.raises(ValueError, match="at least one name"):
        plot_frontier({})


def test_losses_are_points_on_a_line_for_each_site():
    found = {"all": LossRecovered(2.0, 2.5, 4.0, 10), "one": LossRecovered(2.0, 2.25, 3.0, 10)}
    (ax,) = plot_losses(found).axes
    points = {c.get_label(): c.get_offsets().tolist() for c in ax.collections}
    assert points == {
        "as it is": [[2, 0], [2, 1]],
        "with the coder": [[2.5, 0], [2.25, 1]],
        "mean-ablated": [[4, 0], [3, 1]],
    }
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all", "one"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top


def test_results_of_evals_show_themselves():
    recovered = LossRecovered(2.0, 2.5, 4.0, 10, {"a": LossRecovered(2.0, 2.2, 2.001, 10)})
    assert recovered.table.rows == (
        ("all sites", "2.000", "2.500", "4.000", "75.0%"),
        ("a", "2.000", "2.200", "2.001", "-"),
    )
    assert len(recovered.plot().axes[0].collections[0].get_offsets()) == 2
    measured = Fidelity(0.25, 8.0, 1000, np.array([0, 0.5]), {"a": 0.2, "b": 0.3})
    assert ("FVU of b", "0.3000") in measured.table.rows
    assert measured.plot().axes[0].get_title() == "1 of 2 never fire"
