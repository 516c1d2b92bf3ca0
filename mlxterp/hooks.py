"""Watch and change what modules receive and return, at no cost while nobody does."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import mlx.nn as nn

Before = Callable[[tuple, dict], tuple[tuple, dict]]
After = Callable[[Any], Any]

_active: ContextVar[tuple[Hooks, ...]] = ContextVar("mlxterp_hooks", default=())
_lock = threading.Lock()
_hooked: dict[int, int] = {}  # id of a module -> number of open Hooks that hold it alive


class Hooks:
    """Functions to call around the modules of a model, while open and in this context only.

    A module with hooks has its class swapped for a subclass that consults the hooks open in the
    current context. The original class returns when the last one closes, so the tree of modules,
    ``parameters()`` and ``isinstance`` never notice, and other threads are not affected.
    """

    def __init__(self) -> None:
        self.before: dict[int, Before] = {}
        self.after: dict[int, After] = {}
        self._modules: dict[int, nn.Module] = {}

    def add_before(self, module: nn.Module, function: Before) -> None:
        """Call ``function(args, kwargs)``, which returns both, before each call of ``module``."""
        self._modules[id(module)] = module
        self.before[id(module)] = _chain_before(self.before.get(id(module)), function)

    def add_after(self, module: nn.Module, function: After) -> None:
        """Call ``function(output)``, which returns the output, after each call of ``module``."""
        self._modules[id(module)] = module
        self.after[id(module)] = _chain_after(self.after.get(id(module)), function)

    def __enter__(self) -> Hooks:
        with _lock:
            for key, module in self._modules.items():
                if key not in _hooked:
                    _set_class(module, _hooked_class(type(module)))
                _hooked[key] = _hooked.get(key, 0) + 1
        _active.set((*_active.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        # Not ContextVar.reset: a generator may close its hooks after those opened later.
        _active.set(tuple(hooks for hooks in _active.get() if hooks is not self))
        with _lock:
            for key, module in self._modules.items():
                _hooked[key] -= 1
                if _hooked[key] == 0:
                    del _hooked[key]
                    _set_class(module, original_class(module))


def original_class(module: nn.Module) -> type:
    """The class that a module has while nobody watches it."""
    return getattr(type(module), "_original_class", type(module))


def _set_class(module: nn.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)


def _chain_before(first: Before | None, second: Before) -> Before:
    return second if first is None else lambda args, kwargs: second(*first(args, kwargs))


def _chain_after(first: After | None, second: After) -> After:
    return second if first is None else lambda output: second(first(output))


@functools.cache
def _hooked_class(original: type) -> type:
    call = original.__call__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        active = _active.get()
        if not active:
            return call(self, *args, **kwargs)
        key = id(self)
        for hooks in active:
            if before := hooks.before.get(key):
                args, kwargs = before(args, kwargs)
        output = call(self, *args, **kwargs)
        for hooks in active:
            if after := hooks.after.get(key):
                output = after(output)
        return output

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        # Copies and pickles are of the model itself, not of the model being watched.
        make, (cls, *rest), *state = super(cls_hooked, self).__reduce_ex__(protocol)
        return make, (original if cls is cls_hooked else cls, *rest), *state

    cls_hooked = type(
        original.__name__,
        (original,),
        {
            "__call__": __call__,
            "__reduce_ex__": __reduce_ex__,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_original_class": original,
        },
    )
    return cls_hooked
