"""Directions between two kinds of prompts, to steer with, to read, or to take away."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np

from mlxterp.analysis.contrasts import Method, Separation, contrast, separation
from mlxterp.analysis.site_rows import Position, as_texts, rows_at, vector_site
from mlxterp.analysis.source import Readable
from mlxterp.notebook import fragment
from mlxterp.sae.files import read_arrays, read_json, write_directory
from mlxterp.sae.steering.places import Phase, Places, Positions
from mlxterp.sites import Site

FILE, ARRAYS = "steering_vector.json", "vector.safetensors"
# Where the stream is read or written; what is left of a direction nowhere here is nowhere in it.
STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
WRITTEN = ("resid_pre", "attn_out", "mlp_out", "resid_post")
Edit = Callable[..., mx.array]


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector:
    """A direction `vector [d]` in the activations at one `site`, float32.

    What it was made of stands beside it: the name of the `model`, the `method`, the `position`, the
    number of prompts, and how well it separates those that it was not made of; `separation` is None
    where there are too few prompts, and for what is computed of other vectors. Vectors of one site
    can be added, subtracted and scaled: `2 * a - b`.
    """

    site: Site
    vector: mx.array
    model: str = ""
    method: str = ""
    position: Position | None = None
    n_positive: int = 0
    n_negative: int = 0
    separation: Separation | None = None

    def __post_init__(self) -> None:
        vector = mx.array(self.vector).astype(mx.float32)
        if vector.ndim != 1 or not mx.isfinite(vector).all().item():
            raise ValueError(f"vector must be finite and of shape [d], got {list(vector.shape)}.")
        object.__setattr__(self, "vector", vector)

    @property
    def norm(self) -> float:
        """The length of the vector, in units of the activation."""
        return float(np.linalg.norm(np.array(self.vector, np.float64)))

    @property
    def unit(self) -> SteeringVector:
        """The same direction at norm 1; raises `ValueError` for a vector of zeros."""
        if not self.norm:
            raise ValueError("this vector is zero: it has no direction.")
        return self / self.norm

    def project(self, x: mx.array) -> mx.array:
        """How far activations `[..., d]` lie along the direction: `x . vector / |vector|`, `[...]`
        in float32, in units of the activation."""
        self._check(x)
        return x.astype(mx.float32) @ self.unit.vector

    def edit(
        self,
        strength: float = 1.0,
        positions: Positions = None,
        normalize: bool = False,
        phase: Phase | None = None,
    ) -> dict[str, Edit]:
        """`{site: x + strength * vector}`, for `run`, `trace`, `generate` and `editing`.

        At strength 1 a negative prompt is moved by the mean difference to the positive ones. With
        `normalize` every token keeps the norm that it had. All positions are edited, those of
        special tokens too, or only `positions`: several absolute ones or a slice, negative ones
        from the end of each prompt; `phase` limits it to the prompt ("prefill") or to what
        `generate` adds ("decode"). Raises `ValueError` for bad arguments, and in the pass for an
        activation of another width.
        """
        if not np.isfinite(strength):
            raise ValueError(f"strength must be finite, got {strength}.")
        step, places = strength * self.vector, Places.of(positions, phase)

        def add(x: mx.array) -> mx.array:
            y = x.astype(mx.float32) + step
            return y * (_norms(x) / mx.maximum(_norms(y), 1e-12)) if normalize else y

        return {str(self.site): partial(self._edited, add, places)}

    def ablate(
        self,
        everywhere: bool = True,
        positions: Positions = None,
        phase: Phase | None = None,
        components: Sequence[str] = WRITTEN,
    ) -> dict[str, Edit]:
        """Edits `x - (x . u) u` with `u = vector / |vector|`: nothing is left of the direction.

        `everywhere` takes it from all that enters the residual stream, so that no layer can write
        or read it, otherwise from the site of the vector alone. What enters the stream are the
        `components` of all layers; give ("resid_pre", "resid_post") for a model whose blocks add
        more than one attention and one MLP. `positions` and `phase` are those of `edit`. Raises
        `ValueError` for `everywhere` with a vector of another site than the stream, and in the pass
        for a component that the model does not have.

        Reference: Arditi et al. 2024, arXiv 2406.11717.
        """
        unit, places = self.unit.vector, Places.of(positions, phase)

        def remove(x: mx.array) -> mx.array:
            x = x.astype(mx.float32)
            return x - (x @ unit)[..., None] * unit

        if everywhere and self.site.component not in STREAM:
            raise ValueError(
                f"everywhere=True is for directions of the residual stream, {', '.join(STREAM)}, "
                f"and this one is of {self.site}: give everywhere=False."
            )
        names = [f"layers.*.{name}" for name in components] if everywhere else [str(self.site)]
        return dict.fromkeys(names, partial(self._edited, remove, places))

    def _edited(self, change: Edit, places: Places, x: mx.array, context: Any = None) -> mx.array:
        self._check(x)
        mask = places.mask(context)
        if mask is False:
            return x
        y = change(x).astype(x.dtype)
        return y if mask is True else mx.where(mask, y, x)

    def _check(self, x: mx.array) -> None:
        if x.ndim == 0 or x.shape[-1] != self.vector.size:
            raise ValueError(
                f"the vector has width {self.vector.size}, and the activation is {list(x.shape)}."
            )

    def _combined(self, other: Any, function: Callable) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if other.site != self.site or other.vector.size != self.vector.size:
            raise ValueError(
                f"vectors must be of one site and width: {self.site} and {other.site}."
            )
        model = self.model if self.model == other.model else ""
        return SteeringVector(self.site, function(self.vector, other.vector), model, "computed")

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._combined(other, operator.add)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._combined(other, operator.sub)

    def __mul__(self, factor: float) -> SteeringVector:
        if isinstance(factor, SteeringVector):
            return NotImplemented
        # Above along a direction is below along its opposite.
        kept = self.separation if factor > 0 else None
        return replace(self, vector=self.vector * float(factor), separation=kept)

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SteeringVector:
        return self * (1 / factor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def save(self, path: str | Path) -> Path:
        """Write a directory with the vector and what is known of it; `load` reads it."""
        return write_directory(
            path, {FILE: self.to_dict(), ARRAYS: {"vector": self.vector}}, marker=FILE
        )

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read what `save` wrote; raises `ValueError` naming the file and what is wrong with it."""
        file = Path(path) / FILE
        about = read_json(file, ("site", "width", *_ABOUT, "separation"))
        width, measured = about["width"], about["separation"]
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"{file}: width must be a whole number >= 1, got {width!r}.")
        if not isinstance(about["site"], str):
            raise ValueError(f"{file}: site must be a name, got {about['site']!r}.")
        try:
            separation = None if measured is None else Separation(**measured)
        except TypeError as error:
            raise ValueError(f"{file}: separation is not what it should be: {error}.") from None
        vector = read_arrays(Path(path) / ARRAYS, {"vector": (width,)})["vector"]
        known = {name: about[name] for name in _ABOUT}
        return cls(Site.from_string(about["site"]), vector, **known, separation=separation)

    def to_dict(self) -> dict[str, Any]:
        """What is known of the vector, which is not in it, as plain values."""
        return {
            "site": str(self.site),
            "width": self.vector.size,
            "norm": self.norm,
            **{name: getattr(self, name) for name in _ABOUT},
            "separation": None if self.separation is None else asdict(self.separation),
        }

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("site", str(self.site)), ("norm", f"{self.norm:.4g}")]
        if self.method:
            at = "" if self.position is None else f" at {self.position}"
            facts.append(("method", f"{self.method}{at}"))
        if self.n_positive:
            facts.append(("prompts", f"{self.n_positive} positive, {self.n_negative} negative"))
        if self.separation is not None:
            facts.append(("separation", repr(self.separation)))
        return facts

    def __repr__(self) -> str:
        return f"SteeringVector({', '.join(f'{name}: {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        return fragment("facts.html", title="SteeringVector", facts=self._facts())


_ABOUT = ("model", "method", "position", "n_positive", "n_negative")


def steering_vector(
    model: Readable,
    positive: Iterable[Any],
    negative: Iterable[Any],
    layer: int | str | Site,
    component: str | None = None,
    position: Position = -1,
    method: Method = "mean",
    seed: int = 0,
) -> SteeringVector:
    """The direction from the activations of `negative` prompts to those of `positive` ones.

        mean  mean(p_i) - mean(n_i)
        pca   u * mean((p_i - n_i) . u)    where u holds most of the squared differences of pairs

    Prompts are texts, or rows of token ids; as many positive as negative ones count as pairs. The
    site is `resid_post` of a layer, another `component`, or any spelling of a site. The `position`
    is the last real token of each prompt, another one, or "mean" over all but special tokens.
    Whether the vector says something of other prompts is its `separation`, measured in five folds
    of vectors of the others, where there are two prompts of each kind or more. Raises `ValueError`
    for no prompts, for "pca" without pairs, and for a site or position that does not exist.

    References: Rimsky et al. 2023, arXiv 2312.06681; Turner et al. 2023, arXiv 2308.10248 (a single
    pair); Zou et al. 2023, arXiv 2310.01405 (pca).
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    up, down = as_texts("positive", positive), as_texts("negative", negative)
    if method == "pca" and len(up) != len(down):
        raise ValueError(
            f"method='pca' needs pairs: {len(up)} positive and {len(down)} negative prompts."
        )
    site = vector_site(model, layer, component)
    rows = rows_at(model, [*up, *down], [site], position)[site]
    p, n = rows[: len(up)], rows[len(up) :]
    return SteeringVector(
        site,
        mx.array(contrast(p, n, method).astype(np.float32)),
        model.name,
        method,
        position if isinstance(position, str) else int(position),
        len(up),
        len(down),
        separation(p, n, method, seed),
    )


def _norms(x: mx.array) -> mx.array:
    return mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True)
