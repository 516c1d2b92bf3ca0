"""Edits that stand for a while, whoever calls the model and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mlxterp.architecture import Architecture
from mlxterp.hooks import Hooks, array_arguments
from mlxterp.tracing import Edit, Pass, make_plan, placed


@contextmanager
def editing(
    architecture: Architecture, edits: Mapping[Any, Edit | Sequence[Edit]]
) -> Iterator[None]:
    """Apply edits in every pass of a model while the block is open, in this context alone.

    Passes by a plan, such as those of `run` and `generate`, take these edits into it, before their
    own; the hooks opened here serve calls of the model that have no plan.
    """
    forward = Pass(architecture, make_plan(architecture, edit=edits), stands=True)
    beginning = Hooks()

    def begin(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        inputs = [*array_arguments(args, kwargs).values()]
        cache = kwargs.get("cache", args[1] if len(args) > 1 else None)
        forward.begin(**(placed(inputs[0], cache) if inputs else {}))
        return args, kwargs

    def end(output: Any) -> Any:
        forward.check()
        forward.begin()
        return output

    beginning.add_before(architecture.model, begin)
    forward.hooks.add_after(architecture.model, end)
    try:
        with beginning, forward.hooks:
            yield
    finally:
        beginning.clear()  # or what the edits hold stays until the cycle is collected
        forward.hooks.clear()
