"""What circuits are looked for in: coders that fit a model and each other, and options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from operator import index
from typing import Any, Literal, cast

import numpy as np

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.coder import Block, SparseCoder, check_sized
from mlxterp.sae.forward_order import precedes
from mlxterp.sae.source import ActivationSource, FreezableSource
from mlxterp.sites import Site

Method = Literal["integrated_gradients", "gradient", "ablation"]


def fitting(
    model: ActivationSource | None, coders: Mapping[int, BaseSAE], whole: bool = False
) -> ActivationSource:
    """The model that is given, or that the coders know.

    Raises `ValueError` for coders that do not fit it, and where nothing that a later coder reads is
    computed from what an earlier one writes; with `whole` all of it must be.
    """
    source = next(iter(coders.values())).known_model(model)
    for layer, coder in coders.items():
        check_sized(coder, f"In circuits, layer {layer}")
        fits = coder.is_compatible(source)
        if not fits:
            raise ValueError(f"The coder of layer {layer} does not fit the model: {fits!r}.")
    for a, b in combinations(coders, 2):
        sites = product(coders[a].writes.names, coders[b].reads.names)
        if not (all if whole else any)(precedes(source, *pair) for pair in sites):
            raise ValueError(
                f"The coder of layer {b} reads {coders[b].reads}, which the model does not compute "
                f"from {'all of ' if whole else ''}{coders[a].writes}, which that of layer {a} "
                "writes."
            )
    return source


def freezable(source: ActivationSource) -> FreezableSource:
    """The model as one whose attention can be read; raises `ValueError` where it cannot."""
    if not (hasattr(source, "frozen") and hasattr(source, "attention")):
        raise ValueError(
            f"The attention of {source.name} cannot be read and held: an InterpretableModel can."
        )
    return cast(FreezableSource, source)


def token_ids(source: ActivationSource, prompt: str | Sequence[int]) -> list[int]:
    """The tokens of a text, or of ids; raises `ValueError` where there are none."""
    ids = any_ids(source, prompt)
    if not ids:
        raise ValueError(f"prompt must be a text, or ids, of at least one token, got {prompt!r}.")
    return ids


def any_ids(source: ActivationSource, prompt: str | Sequence[int]) -> list[int]:
    """The tokens of a text, or of ids, of which there may be none."""
    ids = source.encode_batch([prompt])[0] if isinstance(prompt, str) and prompt else prompt
    return [] if isinstance(ids, str) else np.asarray(ids).reshape(-1).tolist()


def whole(name: str, value: Any) -> int:
    """A whole number; raises `ValueError` for anything else."""
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}.") from None


def place(name: str, value: Any, count: int) -> int:
    """A number from the start, or from the end where it is below 0; raises `ValueError`."""
    if not -count <= whole(name, value) < count:
        raise ValueError(f"{name} must be in [{-count}, {count - 1}], got {value}.")
    return index(value) % count


def check_one_pass(source: ActivationSource, coders: Mapping[int, SparseCoder]) -> None:
    """Raises `ValueError` for a coder some of whose features read a site after they have written an
    earlier one."""
    for layer, coder in coders.items():
        for block in coder.blocks:
            ends = product(coder.writes.names[block.sites], read_by(coder, block))
            if any(precedes(source, *pair) for pair in ends if pair[0] != pair[1]):
                raise ValueError(
                    f"The coder of layer {layer} reads several sites before it can write the first "
                    "of them, so that its code is not known within one pass: it cannot be spliced. "
                    "find_feature_circuits takes it."
                )


def pairs(coders: Mapping[int, SparseCoder]) -> Iterator[tuple[int, int, list[int]]]:
    """The layers of two coders between whose features there can be an effect, and those between
    them: nothing gets past a coder of the whole residual stream."""
    layers = [*coders]
    for i, j in combinations(range(len(layers)), 2):
        if not any(whole_stream(coders[layer]) for layer in layers[i + 1 : j]):
            yield layers[i], layers[j], layers[i + 1 : j]


def whole_stream(coder: SparseCoder) -> bool:
    """Whether all that comes later goes through what the coder writes."""
    components = (Site.from_string(name).component for name in coder.writes.names)
    return any(component.startswith("resid") for component in components)


def read_by(coder: SparseCoder, block: Block) -> list[str]:
    """The sites that a block reads."""
    start, stop = block.reads.start, block.reads.stop
    parts = coder.reads.slices.items()
    return [name for name, part in parts if start <= part.start and part.stop <= stop]


def site_of(coder: SparseCoder) -> str:
    """What the level of a coder is called in a circuit: the sites that it writes."""
    return ", ".join(coder.writes.names)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises `ValueError` for a value that is not one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def check_counts(**counts: int | None) -> None:
    """Raises `ValueError` for a number below 1; None stands for no limit."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}.")
