"""The notebook form of a pass: a context manager, and proxies that read it by attribute."""

from __future__ import annotations

import difflib
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxterp import tracing
from mlxterp.architecture import Architecture
from mlxterp.attention import Attention, AttentionHeads, complete, watched
from mlxterp.hooks import first_array
from mlxterp.notebook import fragment
from mlxterp.sites import OUTPUT, Site, SiteTable, canonical_component
from mlxterp.tracing import Captured, Plan, make_plan

SHOWN = 200  # characters of a text in a notebook
WEIGHTS = ".attention_weights"

_open: ContextVar[tuple[Trace, ...]] = ContextVar("mlxterp_traces", default=())

_NO_ASSIGNMENT = (
    "the forward pass has run when the body of a trace starts, so that assigning to {name} would "
    "change nothing: give trace(..., interventions={{{site!r}: function}}) or run(..., edit=...)"
)


class Traceable(Protocol):
    """What a trace needs of a model."""

    tokenizer: Any
    architecture: Architecture

    def tokens(self, inputs: Any) -> tuple[mx.array, mx.array | None]: ...


class TraceActivations(Mapping[str, mx.array]):
    """The activations of a trace in call order, by module path or any spelling of a site.

    Before what an attention module returns stand its patterns `[B, H, S, S]`, as
    `<path of the module>.attention_weights`, where it attends once.
    """

    def __init__(
        self,
        captured: Captured,
        keys: dict[str, Site | AttentionHeads],
        architecture: Architecture,
    ) -> None:
        self._captured = captured
        self._keys = keys
        self._architecture = architecture

    def __getitem__(self, name: str | Site) -> mx.array:
        found = self._found(name) if isinstance(name, str) else name
        return found.pattern if isinstance(found, AttentionHeads) else self._captured[found]

    def _found(self, name: str) -> Any:
        if name in self._keys or not name.endswith(WEIGHTS):
            return self._keys.get(name, name)
        module = self._architecture.site(name.removesuffix(WEIGHTS))
        held = (key for key, site in self._keys.items() if site == module)
        return self._keys.get(f"{next(held, '')}{WEIGHTS}", name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def table(self) -> SiteTable:
        """The sites with the shapes of their activations, which are not computed for that."""
        found = [site for site in self._keys.values() if isinstance(site, Site)]
        sites = {site: self._captured[site] for site in found}
        return SiteTable.of_arrays(f"{len(sites)} activations", sites)

    def __repr__(self) -> str:
        return f"TraceActivations({len(self)} sites: {', '.join(list(self)[:3])}, ...)"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class Trace:
    """One forward pass, made on entering the `with` block; nothing is computed until it is read.

    `activations` holds every module's output, or what `capture` names; `tokens [B, S]` is what the
    model received, `output` what it returned, `saved_values` what `.save()` kept. All stay usable
    after the block. Without `capture` it has the `attention` too.
    """

    def __init__(
        self,
        model: Traceable,
        inputs: Any,
        interventions: Mapping[Any, Any] | None = None,
        *,
        capture: Any = None,
        stop: bool = False,
        **kwargs: Any,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.interventions = {} if interventions is None else interventions
        self.tokenizer = model.tokenizer
        self.saved_values: dict[str, mx.array] = {}
        self.activations: Mapping[str, mx.array] = {}
        self.tokens: mx.array | None = None
        self.output: Any = None
        self._attended: list[AttentionHeads] | None = None
        self._capture = capture
        self._stop = stop
        self._kwargs = kwargs

    def __enter__(self) -> Trace:
        tokens, mask = self.model.tokens(self.inputs)
        architecture = self.model.architecture
        capture = () if self._capture is None else self._capture
        plan = make_plan(architecture, capture, self.interventions)
        if self._capture is None:
            plan = Plan(tuple(architecture.all_sites), plan.edits, optional=True)
        whole = self._capture is None
        with watched(architecture) if whole else nullcontext() as self._attended:
            done = tracing.run(
                architecture, tokens, plan, mask=mask, stop=self._stop, **self._kwargs
            )
        self.tokens, self.output = tokens, done.output
        self.activations = TraceActivations(done, self._names(done), architecture)
        _open.set((*_open.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _open.set(tuple(trace for trace in _open.get() if trace is not self))

    def get(self, name: str) -> mx.array | None:
        """What was saved as `name`, or None."""
        return self.saved_values.get(name)

    def get_activation(self, name: str | Site) -> mx.array:
        """The activation at a site in any spelling."""
        return self.activations[name]  # type: ignore[index]

    @property
    def attention(self) -> Attention:
        """What every head did in this pass: `trace.attention[layer].pattern`, also `q k v z`.

        Raises `ValueError` where `capture` was given, and for a model without softmax attention.
        """
        if self._attended is None:
            raise ValueError(
                "this trace holds no attention: it was not entered, or was told what to capture; "
                "leave capture out, or use model.attention(inputs)"
            )
        return complete(self.model.architecture, self._attended)

    def __repr__(self) -> str:
        return f"Trace(saved_values={len(self.saved_values)}, activations={len(self.activations)})"

    def _repr_html_(self) -> str:
        facts, groups = [], []
        if isinstance(self.inputs, str):
            facts.append(("text", _beginning(self.inputs)))
        if self.tokens is not None:
            facts.append(("tokens", str(list(self.tokens.shape))))
        if self.interventions:
            facts.append(("interventions", ", ".join(map(str, self.interventions))))
        saved = {Site.from_string(name): array for name, array in self.saved_values.items()}
        if saved:
            groups.append(("Saved values", SiteTable.of_arrays("", saved).rows(), True))
        if isinstance(self.activations, TraceActivations):
            groups += self.activations.table().groups()
        title = "Trace" if self.tokens is not None else "Trace: not entered yet"
        return fragment("sites.html", title=title, facts=facts, groups=groups)

    def _names(self, done: Captured) -> dict[str, Site | AttentionHeads]:
        known = self.model.architecture.all_sites
        whole = self._capture is None
        calls = self._attended or []
        times = Counter(call.layer for call in calls)
        once = {call.layer: call for call in calls if times[call.layer] == 1}
        names: dict[str, Site | AttentionHeads] = {}
        for site in done:
            path = known.get(site)
            if path is None and whole:
                continue
            name = self._name(site, path)
            if site.component == "attn" and whole and site.layer in once:
                names[f"{name}{WEIGHTS}"] = once[site.layer]
            names[name] = site
        return names

    def _name(self, site: Site, path: str | None) -> str:
        return f"model.{path}" if path else str(site)


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def current_trace(model: Traceable) -> Trace | None:
    """The innermost open trace of `model` in this context."""
    return next((trace for trace in reversed(_open.get()) if trace.model is model), None)


class OutputProxy:
    """The activation at a place, in the trace that is open; computes like an array.

    Reading it outside a trace is a `RuntimeError`.
    """

    def __init__(self, model: Traceable, name: str) -> None:
        self._model = model
        self._name = name
        self._trace = current_trace(model)

    @property
    def value(self) -> mx.array:
        """The activation as an array."""
        trace = self._trace or current_trace(self._model)
        if trace is None:
            raise RuntimeError(
                f"{self._name} has a value only inside a trace: with model.trace(inputs): ..."
            )
        if self._name == OUTPUT and (output := first_array(trace.output)) is not None:
            return output  # which a trace has whether or not it was captured
        return trace.activations[self._name]

    def save(self) -> mx.array:
        """The activation, also kept in the trace's `saved_values`."""
        value = self.value
        trace = self._trace or current_trace(self._model)
        key = OUTPUT if self._name == OUTPUT else f"{self._name}.output"
        if trace is not None:
            trace.saved_values[key] = value
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> mx.array:
        return self.value[index]

    def __iter__(self) -> Iterator[mx.array]:
        # Without it Python would index until an IndexError, which MLX never raises.
        return iter(self.value)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(_NO_ASSIGNMENT.format(name=f"{self._name}.output", site=self._name))

    def __len__(self) -> int:
        return len(self.value)

    def __mlx_array__(self) -> mx.array:
        return self.value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self.value
        # NumPy has no bfloat16.
        value = value.astype(mx.float32) if value.dtype == mx.bfloat16 else value
        return np.array(value, dtype=dtype)

    def __repr__(self) -> str:
        return f"OutputProxy({self._name})"

    __hash__ = None  # type: ignore[assignment]


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[OutputProxy, Any], Any]:
    def forward(self: OutputProxy, other: Any) -> Any:
        return function(self.value, other.value if isinstance(other, OutputProxy) else other)

    return forward


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[OutputProxy, Any], Any]:
    return lambda self, other: function(other, self.value)


def _unary(function: Callable[[Any], Any]) -> Callable[[OutputProxy], Any]:
    return lambda self: function(self.value)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    _operation = getattr(operator, f"__{_name}__")
    setattr(OutputProxy, f"__{_name}__", _binary(_operation))
    setattr(OutputProxy, f"__r{_name}__", _reflected(_operation))
for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
    setattr(OutputProxy, f"__{_name}__", _binary(getattr(operator, f"__{_name}__")))
for _name, _operation in (("neg", operator.neg), ("abs", abs), ("bool", bool), ("float", float)):
    setattr(OutputProxy, f"__{_name}__", _unary(_operation))


class ModuleProxy:
    """A module of a block, or one of its components; `.output` is the activation there."""

    def __init__(self, model: Traceable, name: str, module: nn.Module | None) -> None:
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_module", module)

    @property
    def output(self) -> OutputProxy:
        """The activation here."""
        return OutputProxy(self._model, self._name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self._module, name, None)
        if isinstance(found, nn.Module):
            return ModuleProxy(self._model, f"{self._name}.{name}", found)
        if found is not None:
            return found
        return self._component(name)

    def _component(self, name: str) -> ModuleProxy:
        architecture = self._model.architecture
        try:
            site = architecture.site(f"{self._name}.{canonical_component(name)}")
        except ValueError as error:
            existing = [key for key, _ in self._module.named_modules()] if self._module else []
            near = difflib.get_close_matches(name, existing, n=3)
            hint = f"; the nearest existing: {', '.join(near)}" if near else ""
            raise AttributeError(f"{self._name} has no {name!r}{hint}") from error
        is_input = architecture.path(site) is None
        module = None if is_input else architecture.place(site).module
        return ModuleProxy(self._model, f"{self._name}.{name}", module)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "output":
            raise TypeError(_NO_ASSIGNMENT.format(name=f"{self._name}.output", site=self._name))
        if self._module is None:
            raise AttributeError(f"{self._name} is not a module: it has no attribute to set")
        setattr(self._module, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._module is None:
            raise TypeError(f"{self._name} is not a module: it cannot be called")
        return self._module(*args, **kwargs)

    def __repr__(self) -> str:
        return f"ModuleProxy({self._name})"


class LayerListProxy:
    """The blocks of a model by number, from the end too, or as slices."""

    def __init__(self, model: Traceable) -> None:
        self._model = model
        self._layers = model.architecture.blocks

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"layer {index} does not exist: layers are 0 to {count - 1}")
        return ModuleProxy(self._model, f"layers.{index % count}", self._layers[index])

    def __iter__(self) -> Iterator[ModuleProxy]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"LayerListProxy(length={len(self)})"
