"""Run a model while capturing, editing or differentiating what flows through its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxterp.architecture import Architecture
from mlxterp.hooks import (
    Hooks,
    Key,
    array_arguments,
    first_array,
    own,
    standing,
    stream_argument,
    suspended,
    with_argument,
    with_first_array,
)
from mlxterp.interventions import takes_context
from mlxterp.places import Place
from mlxterp.sites import Site, SiteTable

Edit = Callable[..., mx.array]
Spelling = str | Site


@dataclass(frozen=True)
class EditContext:
    """Where an edit takes place: `positions [S]` are absolute, `mask [B, S]` is True at real
    tokens, `step` counts the generated tokens (0 in the prompt), `phase` is prefill or decode.
    `positions` is None where a cache was given that does not count its tokens. `prompt_end` is the
    position after the prompt, padding included, None where a cache may hold a part of it."""

    site: Site
    positions: mx.array | None = None
    step: int = 0
    phase: str = "prefill"
    mask: mx.array | None = None
    prompt_end: int | None = None

    @property
    def layer(self) -> int | None:
        """The layer of the site."""
        return self.site.layer


class Captured(Mapping[Site, mx.array]):
    """Activations `[B, S, ...]` by site, in call order, looked up by any spelling of the site.

    `output` is what the model returned (None where the run was stopped early), `tokens` its
    input and `mask [B, S]` True at real tokens.
    """

    def __init__(
        self,
        activations: dict[Site, mx.array],
        architecture: Architecture,
        output: Any = None,
        tokens: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> None:
        self._activations = activations
        self._architecture = architecture
        self.output = output
        self.tokens = tokens
        self.mask = mask

    def __getitem__(self, site: Spelling | int) -> mx.array:
        site = self._architecture.site(site)
        if site not in self._activations:
            held = ", ".join(map(str, self._activations)) or "nothing"
            raise KeyError(f"{site} was not captured; captured: {held}")
        return self._activations[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site}: {list(x.shape)}" for site, x in self._activations.items())
        return f"{type(self).__name__}({shapes})"

    def _repr_html_(self) -> str:
        return SiteTable.of_arrays("Captured", self._activations)._repr_html_()


class Stop(BaseException):
    """Ends a forward pass after its last captured site; no `except Exception` may swallow it."""


@dataclass(frozen=True)
class Plan:
    """What to hold and what to change in a pass; a site that may be missing is `optional`."""

    capture: tuple[Site, ...] = ()
    edits: Mapping[Site, tuple[Edit, ...]] = field(default_factory=dict)
    optional: bool = False

    def __bool__(self) -> bool:
        return bool(self.capture or self.edits)


def make_plan(
    architecture: Architecture,
    capture: Spelling | Iterable[Spelling] = (),
    edit: Mapping[Any, Edit | Sequence[Edit]] | None = None,
) -> Plan:
    """Resolve every spelling, and put the edits after those that stand, see `editing`.

    Raises `UnknownSiteError` for a name that no site has.
    """
    if isinstance(capture, str) or not isinstance(capture, Iterable):
        capture = (capture,)
    if not isinstance(edit, Mapping | None):
        raise TypeError(f"edits must be given as {{site: function}}, not {type(edit).__name__}")
    sites = dict.fromkeys(site for where in capture for site in architecture.expand(where))
    edits: dict[Site, tuple[Edit, ...]] = dict(standing(architecture) or {})
    for where, functions in (edit or {}).items():
        added = functions if isinstance(functions, (list, tuple)) else (functions,)
        for site in architecture.expand(where):
            edits[site] = edits.get(site, ()) + tuple(_with_context(site, f) for f in added)
    return Plan(tuple(sites), edits)


@dataclass
class _Visits:
    """The sites that one module's input, or its output, is edited for and captured for."""

    edits: list[tuple[Site, Place]] = field(default_factory=list)
    captures: list[tuple[Site, Place]] = field(default_factory=list)
    argument: Key | None = None
    keep: bool = False  # the input, because a later site of the block is a sum with it


class Pass:
    """One forward pass after another: its hooks, and what the current one holds."""

    def __init__(
        self, architecture: Architecture, plan: Plan, stop: bool = False, stands: bool = False
    ) -> None:
        self.hooks = Hooks(architecture, standing=plan.edits if stands else None)
        self._architecture = architecture
        self._plan = plan
        self._stops = stop
        self.begin()
        self._add_hooks()
        if stop:
            self._add_stop()

    def begin(self, **about: Any) -> None:
        """Forget what the last pass held; edits of the next are told `about` in their context."""
        self.activations: dict[Site, mx.array] = {}
        self._about = about
        self._edited: set[Site] = set()
        self._streams: dict[int, mx.array] = {}
        self._calls = 0

    def call(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's output, or None where the pass was stopped."""
        output = None
        with self.hooks:
            try:
                output = model(*args, **kwargs)
            except Stop as stop:
                if stop.args[0] is not self:
                    raise
        self.check()
        return output

    def check(self) -> None:
        """Raise where the pass did not reach a site, so that nothing is silently left out."""
        missed = set(self._plan.capture) - set(self.activations)
        if self._plan.optional:
            missed = self._architecture.replaced(missed)
        if not self._stops:
            missed = {*missed, *(set(self._plan.edits) - self._edited)}
        if missed:
            raise RuntimeError(
                f"the forward pass did not reach {', '.join(sorted(map(str, missed)))}. If the "
                "model was changed after InterpretableModel wrapped it, wrap it again; if a part "
                "of it was compiled before, compile a function that calls model.run instead"
            )

    def _add_hooks(self) -> None:
        modules: dict[int, nn.Module] = {}
        inputs: dict[int, _Visits] = {}
        outputs: dict[int, _Visits] = {}
        for sites, is_edit in ((self._plan.edits, True), (self._plan.capture, False)):
            for site in sites:
                place = self._architecture.place(site)
                key = id(place.module)
                modules[key] = place.module
                visits = (inputs if place.is_input else outputs).setdefault(key, _Visits())
                visits.argument = place.argument
                (visits.edits if is_edit else visits.captures).append((site, place))
                if place.stream is not None:
                    modules[id(place.stream)] = place.stream
                    stream = inputs.setdefault(id(place.stream), _Visits())
                    stream.argument, stream.keep = place.argument, True
        for visits in (*inputs.values(), *outputs.values()):
            visits.edits.sort(key=_depth)
        for key, visits in inputs.items():
            self.hooks.add_before(modules[key], self._input_hook(visits, key))
        for key, visits in outputs.items():
            self.hooks.add_after(modules[key], self._output_hook(visits))

    def _input_hook(
        self, visits: _Visits, module: int
    ) -> Callable[[tuple, dict], tuple[tuple, dict]]:
        def before(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            arrays = array_arguments(args, kwargs)
            key = visits.argument if visits.argument in arrays else stream_argument(arrays)
            if key is None:
                return args, kwargs
            array = arrays[key]
            changed = self._visit(array, visits)
            if visits.keep:
                self._streams[module] = own(changed)
            return (args, kwargs) if changed is array else with_argument(args, kwargs, key, changed)

        return before

    def _output_hook(self, visits: _Visits) -> Callable[[Any], Any]:
        def after(output: Any) -> Any:
            array = first_array(output)
            if array is None:
                return output
            changed = self._visit(array, visits)
            return output if changed is array else with_first_array(output, changed)

        return after

    def _visit(self, array: mx.array, visits: _Visits) -> mx.array:
        """`array` after the edits of all sites here; what they capture is seen after them."""
        for site, place in visits.edits:
            array = place.edited(array, self._stream(place), partial(self._edit, site))
        for site, place in visits.captures:
            self.activations[site] = own(place.value(array, self._stream(place)))
        return array

    def _stream(self, place: Place) -> mx.array | None:
        return None if place.stream is None else self._streams[id(place.stream)]

    def _edit(self, site: Site, value: mx.array) -> mx.array:
        self._edited.add(site)
        context = EditContext(site, **self._about)
        for function in self._plan.edits[site]:
            try:
                with suspended():
                    edited = function(value, context)
            except Exception as error:
                error.add_note(f"while editing {site} ({context.phase}, step {context.step})")
                raise
            value = _checked(site, edited, value)
        return value

    def _add_stop(self) -> None:
        ends = self._architecture.survey().ends
        places = [id(self._architecture.place(site).module) for site in self._plan.capture]
        if not all(key in ends for key in places):
            return  # a module that only some inputs reach: when it is called last is not known
        end = max((ends[key] for key in places), key=lambda end: end.position)

        def after(output: Any) -> Any:
            self._calls += 1
            if self._calls == end.call:
                raise Stop(self)
            return output

        self.hooks.add_after(end.module, after)


def _depth(visit: tuple[Site, Place]) -> int:
    """What a module returns comes before what a norm makes of it, and that before the sum; what a
    norm makes comes before what its gain makes of that."""
    site, place = visit
    if place.stream is not None:
        return 2
    return 1 if site.component in ("attn_out", "mlp_out", "attn_in", "mlp_in") else 0


def _checked(site: Site, edited: Any, value: mx.array) -> mx.array:
    if not isinstance(edited, mx.array):
        raise TypeError(f"the edit of {site} must return an array, not {type(edited).__name__}")
    if edited.shape != value.shape:
        raise ValueError(
            f"the edit of {site} must return the shape it was given, {list(value.shape)}: "
            f"it returned {list(edited.shape)}"
        )
    return edited


def _with_context(site: Site, function: Any) -> Edit:
    if not isinstance(function, Callable):
        raise TypeError(f"the edit of {site} must be a function, not {type(function).__name__}")
    return function if takes_context(function) else lambda value, context: function(value)


def run(
    architecture: Architecture,
    tokens: mx.array,
    plan: Plan,
    *,
    mask: mx.array | None = None,
    stop: bool = False,
    **kwargs: Any,
) -> Captured:
    """One forward pass by `plan`; other arguments go to the model."""
    if stop and not plan.capture:
        raise ValueError(
            "stop=True ends the pass after the last captured site: name it in capture="
        )
    forward = Pass(architecture, plan, stop)
    if plan.edits:
        forward.begin(mask=mask, **placed(tokens, kwargs.get("cache")))
    try:
        output = forward.call(architecture.model, tokens, **kwargs)
    finally:
        forward.hooks.clear()  # or the cycle keeps every captured array until it is collected
    return Captured(forward.activations, architecture, output, tokens, mask)


def placed(tokens: mx.array, cache: Any) -> dict[str, Any]:
    """What an `EditContext` says of the places of `tokens`, as far as the cache tells."""
    offset = 0 if cache is None else cache_offset(cache)
    if tokens.ndim < 2 or offset is None:
        return {}
    end = offset + tokens.shape[1]
    return {"positions": mx.arange(offset, end), "prompt_end": end if cache is None else None}


def cache_offset(cache: Any) -> int | None:
    """How many tokens an mlx-lm prompt cache has seen, where one of its layers counts them."""
    for layer in cache if isinstance(cache, (list, tuple)) else [cache]:
        offset = getattr(layer, "offset", None)
        if offset is None and (parts := getattr(layer, "caches", None)):
            offset = cache_offset(parts)
        if isinstance(offset, int):
            return offset
    return None


@dataclass(frozen=True)
class Gradients:
    """A metric, the activations at some sites and the derivative of the metric by each of them."""

    value: mx.array
    activations: Captured
    gradients: Captured


def gradients(
    architecture: Architecture,
    tokens: mx.array,
    plan: Plan,
    metric: Callable[..., mx.array],
    *,
    mask: mx.array | None = None,
    **kwargs: Any,
) -> Gradients:
    """Differentiate `metric(logits)` (or of logits and `Captured`) by the captured activations."""
    takes_captured = takes_context(metric)

    def forward(deltas: Sequence[mx.array]) -> tuple[mx.array, list[mx.array]]:
        edits = dict(plan.edits)
        for site, delta in zip(plan.capture, deltas, strict=True):
            edits[site] = (*edits.get(site, ()), lambda x, context, delta=delta: x + delta)
        done = run(architecture, tokens, Plan(plan.capture, edits), mask=mask, **kwargs)
        value = metric(done.output, done) if takes_captured else metric(done.output)
        if not isinstance(value, mx.array):
            raise TypeError(f"metric must return an array, not {type(value).__name__}")
        if value.size != 1:
            raise ValueError(f"metric must return a scalar, not the shape {list(value.shape)}")
        return value.reshape(()), [done[site] for site in plan.capture]

    if not plan.capture:
        raise ValueError("gradients needs at least one site to differentiate by: sites=[]")
    shapes = run(architecture, tokens, plan, mask=mask, **kwargs)
    zeros = [mx.zeros_like(shapes[site]) for site in plan.capture]
    (value, activations), slopes = mx.value_and_grad(forward)(zeros)
    both = (
        Captured(dict(zip(plan.capture, arrays, strict=True)), architecture, None, tokens, mask)
        for arrays in (activations, slopes)
    )
    return Gradients(value, *both)
