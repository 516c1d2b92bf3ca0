"""How much of a behaviour comes back where only some features are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from mlxterp.sae.circuits.behavior.ablation import Kept, Prompt
from mlxterp.sae.circuits.behavior.edges import Place
from mlxterp.sae.circuits.behavior.targets import Target
from mlxterp.sae.circuits.given import check_choice

Errors = Literal["kept", "nodes", "removed"]


@dataclass(frozen=True, eq=False)
class Restoration:
    """A number that a model computes from a prompt where some features of coders are kept, of codes
    of the `shapes [S, n_features]` by layer.

    Errors are kept, kept where they are among the places, or removed.
    """

    prompt: Prompt
    target: Target
    shapes: Mapping[int, tuple[int, ...]]
    _nothing: dict[Errors, float] = field(default_factory=dict, init=False)

    @cached_property
    def value(self) -> float:
        """The number in the plain model."""
        return float(self.prompt.measured(self.target, {})[0])

    def whole(self, errors: Errors) -> float:
        """How far the number is above that with no features kept."""
        check_choice("errors", errors, get_args(Errors))
        if errors not in self._nothing:
            self._nothing[errors] = self._run((), errors, complement=False)
        return self.value - self._nothing[errors]

    def share(self, places: Iterable[Place], errors: Errors, complement: bool = False) -> float:
        """The share of the behaviour that comes back with these features alone, or with all others;
        nan where it does not depend on features."""
        whole = self.whole(errors)
        above = self._run(places, errors, complement) - self._nothing[errors]
        return above / whole if whole else math.nan

    def _run(self, places: Iterable[Place], errors: Errors, complement: bool) -> float:
        kept = {
            layer: Kept(np.full(shape, complement), np.full(shape[0], complement))
            for layer, shape in self.shapes.items()
        }
        for layer, position, feature_id in places:
            if feature_id < 0:
                kept[layer].errors[position] = not complement
            else:
                kept[layer].features[position, feature_id] = not complement
        if errors != "nodes":
            for own in kept.values():
                own.errors[:] = errors == "kept"
        return float(self.prompt.measured(self.target, self.prompt.keeping(kept))[0])
