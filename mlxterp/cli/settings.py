"""The settings of a training run as flags: one for every field of `SAEConfig`."""

from __future__ import annotations

import argparse
import inspect
import re
import types
import typing
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from mlxterp.sae.config import SAEConfig

# Those that a flag cannot give: they are by site.
LEFT_OUT = ("component_weights",)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags; what is not given is up to the recipe."""
    group = parser.add_argument_group("settings", "what is not given is chosen by the recipe")
    hints, texts = typing.get_type_hints(SAEConfig), _texts()
    for field in fields(SAEConfig):
        if field.name in LEFT_OUT:
            continue
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        options: dict[str, Any] = {"default": None, "help": texts.get(field.name, "")}
        group.add_argument(flag, **options, **_how(kind))


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    names = [field.name for field in fields(SAEConfig) if field.name not in LEFT_OUT]
    found = {name: getattr(arguments, name, None) for name in names}
    known = {name: value for name, value in found.items() if value is not None}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in known.items()}


def _how(kind: Any) -> dict[str, Any]:
    """How argparse is to read a value of that type."""
    if get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "metavar": "NAME"}
    if get_origin(kind) is tuple:
        return {"type": get_args(kind)[0], "nargs": "+"}
    return {"type": kind, "metavar": "N" if kind is int else "X"}


def _texts() -> dict[str, str]:
    """The first sentence of the text under each field."""
    source = inspect.getsource(SAEConfig)
    found = re.findall(r'^    (\w+): .+\n    """((?:.|\n)+?)"""', source, flags=re.MULTILINE)
    sentences = {
        name: re.split(r"[.;:](?:\s|$)", " ".join(text.split()))[0] for name, text in found
    }
    return {name: text.replace("%", "%%").replace("`", "") for name, text in sentences.items()}
