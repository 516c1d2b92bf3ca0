"""Watch and change what modules receive and return, at no cost while nobody does."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Before = Callable[[tuple, dict], tuple[tuple, dict]]
After = Callable[[Any], Any]
Around = Callable[..., Any]  # of the function, and what it is called with
Key = int | str  # of a positional or a named argument

_open: ContextVar[tuple[Hooks, ...]] = ContextVar("mlxterp_open_hooks", default=())
_active: ContextVar[tuple[Hooks, ...]] = ContextVar("mlxterp_hooks", default=())  # which act
_lock = threading.Lock()
_hooked: dict[int, int] = {}  # id of a module -> number of open Hooks that hold it alive
_FUNCTIONS: dict[str, Any] = {
    "rms_norm": mx.fast,
    "layer_norm": mx.fast,
    "scaled_dot_product_attention": mx.fast,
    "softmax": mx,
}
_originals: dict[str, Callable[..., Any]] = {}  # of the functions that are hooked
_hooked_functions: Counter[str] = Counter()


class Hooks:
    """Functions to call around modules and MLX's own, while open and in this context only.

    A module with hooks has its class swapped for a subclass that consults the hooks open in the
    current context. The original class returns when the last one closes, so the tree of modules,
    `parameters()` and `isinstance` never notice, and other threads are not affected. A function
    with hooks, such as `mx.fast.rms_norm`, is likewise replaced until the last one closes.

    Hooks of a `subject` that have `standing` edits are for whoever uses it while they are open:
    they do not act while later hooks of the subject are open, which are to include these edits.
    """

    def __init__(self, subject: Any = None, standing: Any = None) -> None:
        self.subject = subject
        self.standing = standing
        self.before: dict[int, Before] = {}
        self.after: dict[int, After] = {}
        self.around: dict[int | str, Around] = {}
        self._modules: dict[int, nn.Module] = {}

    def add_before(self, module: nn.Module, function: Before) -> None:
        """Call `function(args, kwargs)`, which returns both, before each call of `module`."""
        self._modules[id(module)] = module
        self.before[id(module)] = _chain_before(self.before.get(id(module)), function)

    def add_after(self, module: nn.Module, function: After) -> None:
        """Call `function(output)`, which returns the output, after each call of `module`."""
        self._modules[id(module)] = module
        self.after[id(module)] = _chain_after(self.after.get(id(module)), function)

    def add_around(self, what: nn.Module | str, function: Around) -> None:
        """Call `function(original, *args, **kwargs)` in the place of a module, or of MLX's own
        function of this name; a later one replaces an earlier one."""
        if isinstance(what, nn.Module):
            self._modules[id(what)] = what
        elif what not in _FUNCTIONS:
            raise ValueError(f"function must be one of {', '.join(_FUNCTIONS)}, not {what!r}")
        self.around[what if isinstance(what, str) else id(what)] = function

    def clear(self) -> None:
        """Forget all functions, which often refer back to their owner and would keep it alive."""
        self.before.clear()
        self.after.clear()
        self.around.clear()
        self._modules.clear()

    def __enter__(self) -> Hooks:
        with _lock:
            for key, module in self._modules.items():
                if key not in _hooked:
                    _set_class(module, _hooked_class(type(module)))
                _hooked[key] = _hooked.get(key, 0) + 1
            for name in self._functions():
                if not _hooked_functions[name]:
                    _originals[name] = getattr(_FUNCTIONS[name], name)
                    setattr(_FUNCTIONS[name], name, _hooked_function(name, _originals[name]))
                _hooked_functions[name] += 1
        _set_open((*_open.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        # Not ContextVar.reset: a generator may close its hooks after those opened later.
        _set_open(tuple(hooks for hooks in _open.get() if hooks is not self))
        with _lock:
            for key, module in self._modules.items():
                _hooked[key] -= 1
                if _hooked[key] == 0:
                    del _hooked[key]
                    _set_class(module, original_class(module))
            for name in self._functions():
                _hooked_functions[name] -= 1
                if not _hooked_functions[name]:
                    setattr(_FUNCTIONS[name], name, _originals.pop(name))

    def _functions(self) -> list[str]:
        return [what for what in self.around if isinstance(what, str)]


@contextmanager
def suspended() -> Iterator[None]:
    """Call modules as if no hooks were open, as a hook that runs the model itself must."""
    opened = _open.get()
    _set_open(())
    try:
        yield
    finally:
        _set_open(opened)


def standing(subject: Any) -> Any:
    """The standing edits of the innermost hooks of `subject` that have any; None where none do."""
    found = (hooks.standing for hooks in reversed(_open.get()) if hooks.subject is subject)
    return next((edits for edits in found if edits is not None), None)


def _set_open(opened: tuple[Hooks, ...]) -> None:
    _open.set(opened)
    later = [{id(hooks.subject) for hooks in opened[i:]} for i in range(1, len(opened) + 1)]
    _active.set(
        tuple(
            hooks
            for hooks, subjects in zip(opened, later, strict=True)
            if hooks.standing is None or id(hooks.subject) not in subjects
        )
    )


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
        output = _call_around(active, key, functools.partial(call, self), args, kwargs)
        for hooks in active:
            if after := hooks.after.get(key):
                output = after(output)
        return output

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        # Copies and pickles are of the model itself, not of the model being watched. A `make` other
        # than copyreg's own, because pickle insists that its argument is the class of the object.
        make, (cls, *rest), *state = super(cls_hooked, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
        if cls is cls_hooked:
            make, cls = original.__new__, original
        return make, (cls, *rest), *state

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


def _hooked_function(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _call_around(_active.get(), name, original, args, kwargs)

    return call


def _call_around(
    active: tuple[Hooks, ...], key: int | str, function: Around, args: tuple, kwargs: dict
) -> Any:
    for hooks in active:
        if around := hooks.around.get(key):
            function = functools.partial(around, function)
    return function(*args, **kwargs)


def first_array(value: Any) -> mx.array | None:
    """The array that a module's output stands for: itself, or the first in a tuple or list."""
    if isinstance(value, mx.array):
        return value
    if isinstance(value, (tuple, list)):
        return next((item for item in value if isinstance(item, mx.array)), None)
    return None


def own(array: mx.array) -> mx.array:
    """The same values, without a copy, as another object: models such as gpt2 add to what a module
    returned in place, `x += y`."""
    return array.astype(array.dtype)


def with_first_array(value: Any, array: mx.array) -> Any:
    """`value` with `array` in the place of its first array."""
    if isinstance(value, mx.array):
        return array
    items = list(value)
    items[next(i for i, item in enumerate(items) if isinstance(item, mx.array))] = array
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def array_arguments(args: tuple, kwargs: dict) -> dict[Key, mx.array]:
    """The arguments that are arrays."""
    items = (*enumerate(args), *kwargs.items())
    return {key: value for key, value in items if isinstance(value, mx.array)}


def stream_argument(arrays: Mapping[Key, Any]) -> Key | None:
    """Which argument is the activation: the first array `[B, S, ...]`, else the first of floats."""
    for key, array in arrays.items():
        if array.ndim >= 3:
            return key
    return next((k for k, v in arrays.items() if mx.issubdtype(v.dtype, mx.floating)), None)


def with_argument(args: tuple, kwargs: dict, key: Key, value: Any) -> tuple[tuple, dict]:
    """The arguments with `value` at `key`."""
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: value}
