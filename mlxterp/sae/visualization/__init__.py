"""Something to look at: tables as text and HTML, runs and numbers as figures."""

from mlxterp.notebook import Table, fragment, render
from mlxterp.sae.visualization.fonts import drawable, fitting, names, plain, width, write
from mlxterp.sae.visualization.lenses import plot_logit_lens, plot_patching
from mlxterp.sae.visualization.matrices import plot_matrix
from mlxterp.sae.visualization.measures import plot_density, plot_frontier, plot_losses, plot_shares
from mlxterp.sae.visualization.style import (
    COLOURS,
    FONT,
    LESS,
    MORE,
    dress,
    logarithmic,
    new_axis,
    new_figure,
)
from mlxterp.sae.visualization.training import HELD_OUT, TRAINING, plot_training

__all__ = [
    "COLOURS",
    "FONT",
    "HELD_OUT",
    "LESS",
    "MORE",
    "TRAINING",
    "Table",
    "drawable",
    "dress",
    "fitting",
    "fragment",
    "logarithmic",
    "names",
    "new_axis",
    "new_figure",
    "plain",
    "plot_density",
    "plot_frontier",
    "plot_logit_lens",
    "plot_losses",
    "plot_matrix",
    "plot_patching",
    "plot_shares",
    "plot_training",
    "render",
    "width",
    "write",
]
