"""All features as points of a plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.similarity.directions import Directions, Side, directions_of, needed
from mlxterp.sae.visualization import COLOURS, FONT, dress, new_axis, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Method = Literal["pca", "umap"]

CAPTION = "For display only: what is near in the plane need not be near, nor what is far far."
ROUNDS = 30
MORE_AXES = 14  # than are asked for, so that the subspace iteration converges quickly
UMAP_AXES = 50
NAMED = len(COLOURS) - 1


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """The `points` `[n_features, 2]` of the directions of features, by `method`.

    `explained` are the shares of the directions' variance along both axes, `None` for UMAP. A map
    is for display: distances in it are no evidence that features are alike. Cosines are.
    """

    points: np.ndarray
    method: Method
    by: Side
    explained: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "points": self.points.tolist(),
            "method": self.method,
            "by": self.by,
            "explained": None if self.explained is None else [*self.explained],
        }

    def __repr__(self) -> str:
        explained = ""
        if self.explained is not None:
            explained = f", {sum(self.explained):.1%} of the variance"
        return f"FeatureMap({len(self.points):,} features, {self.method}{explained}; display only)"

    def plot(
        self,
        values: Sequence[Any] | np.ndarray | None = None,
        label: str = "",
        ax: Axes | None = None,
    ) -> Figure:
        """A matplotlib figure of the points, coloured by `values` `[n_features]`.

        Whole numbers and strings are kinds, such as the labels of clusters: the six with the most
        features have a colour of their own, and -1 and the rest are grey. Other numbers, such as
        firing rates, are a scale. `label` says what they are. Raises `ValueError` for another
        length, and `ImportError` where matplotlib is missing.
        """
        ax = new_axis() if ax is None else ax
        if values is None:
            _points(ax, self.points, color=COLOURS[0])
        else:
            found = np.asarray(values)
            if found.shape != (len(self.points),):
                raise ValueError(f"values must be {len(self.points)}, got shape {found.shape}.")
            draw = _scaled if found.dtype.kind == "f" else _kinds
            draw(ax, self.points, found, label)
        shares = ["", ""] if self.explained is None else [f" ({x:.1%})" for x in self.explained]
        names = [f"{self.method} {i}{share}" for i, share in enumerate(shares, 1)]
        figure = dress(ax, names[0], names[1], CAPTION)
        ax.title.set_color("0.35")
        return figure


def feature_map(
    coder: SparseCoder,
    method: Method = "pca",
    *,
    by: Side = "decoder",
    site: str | None = None,
    seed: int = 0,
) -> FeatureMap:
    """Points for the directions of all features, of norm 1: alike directions are near each other.

    `"pca"` are the two axes along which they vary most. `"umap"` keeps neighbourhoods, from their
    50 main axes, and invents distances between them. Raises `ValueError` for another method, and
    `ImportError` where UMAP is asked for and umap-learn is missing.

    Reference: McInnes et al. 2018, arXiv 1802.03426, for UMAP.
    """
    if method not in ("pca", "umap"):
        raise ValueError(f"method must be 'pca' or 'umap', got {method!r}.")
    own = directions_of(coder, by, site)
    if method == "pca":
        points, explained = principal(own, 2, seed)
        return FeatureMap(points, method, by, (float(explained[0]), float(explained[1])))
    umap = needed("umap", "umap-learn", "umap")
    points, _ = principal(own, UMAP_AXES, seed)
    # More than one job would make the result depend on chance.
    fit = umap.UMAP(n_components=2, metric="euclidean", random_state=seed, n_jobs=1)
    return FeatureMap(np.asarray(fit.fit_transform(points), np.float32), method, by, None)


def principal(own: Directions, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `[n_features, n]` along the axes of the largest variance, and their shares of it.

    By subspace iteration (Halko et al. 2009, arXiv 0909.4061), which needs no matrix but the rows.
    """
    width, count = own.sites.width, own.n_features
    mean = _pull(own, np.ones((count, 1), np.float32), width)[:, 0] / count
    m = min(n + MORE_AXES, width)
    axes = np.random.default_rng(seed).standard_normal((width, m))
    found = np.zeros((count, m), np.float32)
    for _ in range(ROUNDS):
        axes = np.linalg.qr(axes)[0]
        found = _project(own, axes) - (mean @ axes).astype(np.float32)
        axes = _pull(own, found, width) - np.outer(mean, found.sum(axis=0, dtype=np.float64))
    _, sizes, turn = np.linalg.svd(found.astype(np.float64), full_matrices=False)
    points = np.zeros((count, n), np.float32)
    kept = min(n, m, count)
    points[:, :kept] = (found @ turn.T)[:, :kept]
    # The sign of an axis is free: the feature that is farthest along it is above 0.
    far = points[np.abs(points).argmax(axis=0), np.arange(n)]
    squares = sum(float(np.square(np.array(rows)).sum()) for _, _, rows in own.blocks())
    total = max(squares - count * float(mean @ mean), 1e-12)
    explained = np.zeros(n)
    explained[:kept] = np.square(sizes[:kept]) / total
    return points * np.where(far < 0, -1, 1).astype(np.float32), explained


def _project(own: Directions, axes: np.ndarray) -> np.ndarray:
    """The products `[n_features, m]` of all directions with axes `[width, m]`."""
    wanted = mx.array(axes.astype(np.float32))
    return np.concatenate([np.array(rows @ wanted[columns]) for _, columns, rows in own.blocks()])


def _pull(own: Directions, values: np.ndarray, width: int) -> np.ndarray:
    """The sum `[width, m]` of all directions times their values `[n_features, m]`."""
    found = np.zeros((width, values.shape[1]))
    for ids, columns, rows in own.blocks():
        found[columns] += np.array(rows.T @ mx.array(values[ids]))
    return found


def _points(ax: Axes, points: np.ndarray, **style: Any) -> Any:
    size = 14 if len(points) < 3000 else 4
    return ax.scatter(points[:, 0], points[:, 1], s=size, linewidths=0, **style)


def _scaled(ax: Axes, points: np.ndarray, values: np.ndarray, label: str) -> None:
    figure: Any = ax.get_figure()
    bar = figure.colorbar(_points(ax, points, c=values, cmap="viridis"), ax=ax)
    write(bar.ax.yaxis.label, label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)


def _kinds(ax: Axes, points: np.ndarray, values: np.ndarray, label: str) -> None:
    values = values.astype(str)
    kinds, counts = np.unique(values[values != "-1"], return_counts=True)
    shown = kinds[np.argsort(-counts, kind="stable")][:NAMED].tolist()
    rest = ~np.isin(values, shown)
    if rest.any():
        _points(ax, points[rest], color=COLOURS[-1], alpha=0.4, label="others")
    for kind, colour in zip(shown, COLOURS, strict=False):
        _points(ax, points[values == kind], color=colour, label=f"{label} {kind}".strip())
    ax.legend()
