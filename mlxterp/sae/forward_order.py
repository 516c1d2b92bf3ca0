"""Which site comes before which in a forward pass: found by changing one and looking at others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxterp.sae.source import ActivationSource
from mlxterp.sites import COMPONENTS

TOKENS = (0, 1)
SHOWN = 8


def depends(source: ActivationSource, start: Any, sites: Sequence[Any]) -> list[Any]:
    """Those of the sites whose activation changes when that at `start` does."""
    tokens = mx.array([TOKENS])

    def nudge(x: mx.array) -> mx.array:
        noise = mx.random.normal(x.shape, key=mx.random.key(0))
        size = mx.sqrt(x.astype(mx.float32).square().mean())
        return x + (noise * mx.maximum(size, 1e-3)).astype(x.dtype)

    plain = source.run(tokens, capture=sites)
    nudged = source.run(tokens, capture=sites, edit={start: nudge})
    return [
        site
        for site in sites
        if str(site) != str(start) and not mx.array_equal(plain[site], nudged[site], equal_nan=True)
    ]


def precedes(source: ActivationSource, start: Any, target: Any) -> bool:
    """Whether a forward pass computes `target` from `start`.

    Two names of one activation depend on each other; then their order in a block counts.
    """
    if not depends(source, start, [target]):
        return False
    if not depends(source, target, [start]):
        return True
    places = [_component(site) for site in (start, target)]
    return all(p in COMPONENTS for p in places) and (
        COMPONENTS.index(places[0]) < COMPONENTS.index(places[1])
    )


def check_before(source: ActivationSource, start: Any, target: Any) -> None:
    """Raises `ValueError` unless `target` depends on `start`, and says what would be valid."""
    if str(start) == str(target):
        raise ValueError(
            f"The source and the target are both {start}: give another one, or train an SAE, which "
            "writes what it reads."
        )
    if precedes(source, start, target):
        return
    usual = [site for site in source.sites() if _component(site) in COMPONENTS]
    later = [site for site in depends(source, start, usual) if precedes(source, start, site)]
    alike = [site for site in usual if _component(site) == _component(start)]
    earlier = [site for site in alike if precedes(source, site, target)]
    raise ValueError(
        f"{target} does not depend on {start}: the source must come before the target in the "
        f"forward pass. Targets of {start}: {_listed(later)}. Sources for {target}: "
        f"{_listed(earlier)}."
    )


def _component(site: Any) -> str:
    return getattr(site, "component", str(site))


def _listed(sites: Sequence[Any]) -> str:
    names = [str(site) for site in sites]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
