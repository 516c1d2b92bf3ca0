"""Passes in the spelling of TransformerLens: a cache of its names, and functions at its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any

import mlx.core as mx

from mlxterp.analysis.hook_names import Hook, HookNames
from mlxterp.analysis.source import Readable
from mlxterp.attention import AttentionHeads, watched
from mlxterp.hooks import first_array
from mlxterp.sites import Site, SiteTable, UnknownSiteError
from mlxterp.tracing import Captured, Edit

Filter = str | Sequence[str] | Callable[[str], bool] | None
HookFunction = Callable[..., mx.array | None]
FwdHooks = Iterable[tuple[Any, HookFunction]]


class HookCache(Mapping[str, mx.array]):
    """Activations of one pass by the names of TransformerLens, laid out as there.

    A key is a full name (`"blocks.3.attn.hook_pattern"`), a short one (`("pattern", 3)`,
    `("resid_post", -1)`, `"embed"`), or a site of ours (`"layers.3.resid_post"`), in any spelling,
    that the pass held.
    """

    def __init__(
        self,
        names: HookNames,
        hooks: Iterable[Hook],
        captured: Captured,
        calls: Sequence[AttentionHeads],
        batched: bool = True,
    ) -> None:
        self._names = names
        self._hooks = {hook.name: hook for hook in hooks}
        self._captured = captured
        self._calls = calls
        self._batched = batched

    def __getitem__(self, key: Any) -> mx.array:
        hook = self._names.find(key)
        if hook.name not in self._hooks and (hook.site is None or hook.site not in self._captured):
            held = ", ".join(list(self)[:3]) or "nothing"
            raise KeyError(f"{hook.name} is not in the cache; it has {held}, ...")
        found = self._value(hook)
        return found if self._batched else found[0]

    def _value(self, hook: Hook) -> mx.array:
        if hook.site is not None:
            found, tokens = hook.value(self._captured[hook.site]), self._captured.tokens
            if found.ndim == 2 and tokens is not None:  # embeddings of positions, for all rows
                found = mx.broadcast_to(found, (tokens.shape[0], *found.shape))
            return found
        assert hook.of_heads is not None
        calls = [call for call in self._calls if call.layer == hook.layer]
        if len(calls) != 1:
            raise ValueError(f"layer {hook.layer} attended {len(calls)} times: {hook.name} is none")
        return hook.of_heads(calls[0])

    def __contains__(self, key: object) -> bool:
        try:
            hook = self._names.find(key)
        except ValueError:
            return False
        return hook.name in self._hooks or (hook.site is not None and hook.site in self._captured)

    def __iter__(self) -> Iterator[str]:
        return iter(self._hooks)

    def __len__(self) -> int:
        return len(self._hooks)

    def remove_batch_dim(self) -> HookCache:
        """The same without the first axis; raises `ValueError` for a batch of several."""
        rows = self._captured.tokens
        if rows is not None and rows.shape[0] != 1:
            raise ValueError(f"remove_batch_dim needs one text, and the batch has {rows.shape[0]}.")
        hooks = self._hooks.values()
        return HookCache(self._names, hooks, self._captured, self._calls, batched=False)

    def __repr__(self) -> str:
        return f"HookCache({len(self)} activations)"

    def _repr_html_(self) -> str:
        arrays = {Site.from_string(name): self[name] for name in self}
        return SiteTable.of_arrays(f"{len(self)} activations", arrays)._repr_html_()


def run_with_cache(
    model: Readable,
    tokens: Any,
    names_filter: Filter = None,
    stop_at_layer: int | None = None,
    remove_batch_dim: bool = False,
) -> tuple[mx.array, HookCache]:
    """The logits `[B, S, vocab]` of a pass, and what it held by the names of TransformerLens.

    `names_filter` is a name, several, or a function of the full name that says which are held; all
    that have a counterpart where it is None. With `stop_at_layer` the blocks from there on are not
    run, and the stream that would enter it takes the place of the logits. Nothing is computed until
    it is read. Raises `ValueError` for a name without a counterpart, or of a layer that is not run.
    """
    names = HookNames(model, model.tokens(tokens)[0])
    stop = None if stop_at_layer is None else _stop(index(stop_at_layer), model.n_layers)
    hooks = _chosen(names, names_filter, stop)
    capture = dict.fromkeys(hook.site for hook in hooks if hook.site is not None)
    end = (
        None
        if stop is None
        else model.site(max(stop - 1, 0), "resid_post" if stop else "resid_pre")
    )
    if end is not None:
        capture[end] = None
    layers = {hook.layer for hook in hooks if hook.of_heads is not None and hook.layer is not None}
    with watched(model.architecture, layers) if layers else nullcontext([]) as calls:
        done = model.run(tokens, capture=tuple(capture), stop=end is not None)
    cache = HookCache(names, hooks, done, calls)
    output = done.output if end is None else done[end]
    logits = first_array(output)
    assert logits is not None
    return logits, cache.remove_batch_dim() if remove_batch_dim else cache


def _stop(layer: int, n_layers: int) -> int:
    if not -n_layers <= layer <= n_layers:
        raise ValueError(f"stop_at_layer must be {-n_layers} to {n_layers}, got {layer}.")
    return layer + n_layers if layer < 0 else layer


def _chosen(names: HookNames, wanted: Filter, stop: int | None) -> list[Hook]:
    if wanted is None or callable(wanted):
        hooks = names.all(stop)
        return [hook for hook in hooks if wanted is None or wanted(hook.name)]
    hooks = [
        names.find(name) for name in ([wanted] if isinstance(wanted, (str, tuple)) else wanted)
    ]
    for hook in hooks:
        late = hook.layer is not None and stop is not None and hook.layer >= stop
        after = stop is not None and hook.name.startswith("ln_final")
        if late or after:
            raise ValueError(f"{hook.name} is not reached with stop_at_layer={stop}.")
    return hooks


@dataclass(frozen=True)
class HookPoint:
    """What a function at a hook is told: the full `name` of the hook, and its layer."""

    name: str
    _layer: int | None

    def layer(self) -> int:
        """The number of the layer; raises `ValueError` outside of layers."""
        if self._layer is None:
            raise ValueError(f"{self.name} is in no layer")
        return self._layer


def hook_edits(
    model: Readable, fwd_hooks: FwdHooks, example: mx.array | None = None
) -> dict[Site, list[Edit]]:
    """Edits that call `function(value, hook=hook)` at each hook, as `run` and `editing` take them.

    A hook is a name or a function of names. None that is returned leaves the value as it is. Raises
    `ValueError` for a name without a counterpart, and for one that can only be read.
    """
    names = HookNames(model, example)
    edits: dict[Site, list[Edit]] = {}
    for where, function in fwd_hooks:
        if not callable(function):
            raise TypeError(f"a hook is a pair (name, function), not ({where!r}, {function!r})")
        for hook in _chosen(names, where, None):
            if hook.site is None:
                raise UnknownSiteError(
                    f"{hook.name} can be read but not changed: it is inside the attention, "
                    "which is one operation of MLX"
                )
            edits.setdefault(hook.site, []).append(partial(_call, hook, function))
    return edits


def _call(hook: Hook, function: HookFunction, x: mx.array) -> mx.array:
    value = hook.value(x)
    changed = function(value, hook=HookPoint(hook.name, hook.layer))
    if changed is None:
        return x
    if not isinstance(changed, mx.array) or changed.shape != value.shape:
        shape = list(changed.shape) if isinstance(changed, mx.array) else type(changed).__name__
        raise ValueError(
            f"the function at {hook.name} must return an array of {list(value.shape)}, or None, "
            f"not {shape}"
        )
    return hook.array(changed)
