"""Whether a coder fits a language model, and what is to be expected where it does not quite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.metadata import Metadata
from mlxterp.sae.source import ActivationSource, find_site

MEASURE = "sae.evaluate(model=..., dataset=...) says how well the coder does"
# What converters add to the name of a model whose weights are the same but for their type.
OF_CONVERTERS = re.compile(
    r"[-_.]((mlx|hf|bf16|fp16|fp32|f16|f32|awq|gptq|dwq|gguf|(mx|nv)fp\d+)\w*"
    r"|(int)?\d+(\.\d+)?[-_]?bits?|q\d\w*)$"
)
ALIASES = {"gpt2": "gpt2-small"}


@dataclass(frozen=True)
class Compatibility:
    """Whether a coder fits a model and a site: true or false, and why not.

    `doubts` are what may matter and cannot be told from what the coder knows of its model; with
    them it counts as compatible.
    """

    reasons: tuple[str, ...]
    doubts: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons

    def __repr__(self) -> str:
        if self.reasons:
            return "not compatible: " + "; ".join((*self.reasons, *self.doubts))
        return "compatible" + (", but " if self.doubts else "") + "; ".join(self.doubts)


def compatibility(
    coder: SparseCoder,
    metadata: Metadata,
    model: ActivationSource,
    layer: Any = None,
    component: str | None = None,
) -> Compatibility:
    """Whether a coder fits a model, and the site if one is named.

    Sites and their widths, the number of layers and the fingerprint of the weights are compared
    with those of training, as far as they are known; where only the name of the model is known, as
    for coders of other libraries, that is, and how the weights are quantised.
    """
    if layer is None and component is not None:
        raise ValueError(f"component={component!r} says nothing without layer=...")
    reasons = [*_sites(coder, model)]
    columns = coder.reads.union(coder.writes)
    trained = metadata.model
    layers, here = trained.get("n_layers"), getattr(model, "n_layers", None)
    if None not in (layers, here) and layers != here:
        reasons.append(f"the model has layers: {here}, the one that it was trained on: {layers}")
    doubts = []
    if trained.get("fingerprint") is None:
        doubts = [*_by_name(trained, model)]
    elif trained["fingerprint"] != model.fingerprint:
        reasons.append(_other_weights(trained, model))
    if layer is not None:
        try:
            site = str(find_site(model, layer, component))
        except ValueError as error:
            reasons.append(str(error))
        else:
            if site not in columns.names:
                reasons.append(f"it is of {', '.join(columns.names)}, not of {site}")
    return Compatibility(tuple(reasons), tuple(doubts))


def _sites(coder: SparseCoder, model: ActivationSource) -> list[str]:
    columns, reasons = coder.reads.union(coder.writes), []
    for name, width in zip(columns.names, columns.widths, strict=True):
        try:
            found = model.width(name)
        except ValueError as error:
            reasons.append(str(error))
        else:
            if found != width:
                reasons.append(f"{name} has width {found} in the model, {width} in the coder")
    return reasons


def _other_weights(trained: Mapping[str, Any], model: ActivationSource) -> str:
    """Why fingerprints differ, as far as that can be told."""
    name, now = trained.get("name"), _precision(model).get("quantization")
    said = f"it was trained on other weights ({name})"
    if "quantization" not in trained or trained["quantization"] == now:
        return said
    how = f"they were {_form(trained['quantization'])} in training and are {_form(now)} here"
    if _same_name(name, model.name):
        return (
            f"going by the names the weights are of the same model ({name}), but {how}, which "
            f"changes codes: {MEASURE}"
        )
    return f"{said}, and {how}"


def _by_name(trained: Mapping[str, Any], model: ActivationSource) -> list[str]:
    """What the name of a model leaves open; nothing where not even that is known."""
    name, quantization = trained.get("name"), _precision(model).get("quantization")
    if not name:
        return []
    doubts = []
    if not _same_name(name, model.name):
        doubts.append(
            f"it knows its model by name only ({name}), and this one is called {model.name}: if "
            "they are not the same, its features mean nothing here"
        )
    if quantization is not None and trained.get("quantization") != quantization:
        doubts.append(
            f"the model is {_form(quantization)}, and the coder does not say that it was trained "
            f"on such weights: {MEASURE}"
        )
    return doubts


def _precision(model: ActivationSource) -> Mapping[str, Any]:
    return getattr(model, "precision", None) or {}


def _form(quantization: str | None) -> str:
    return "not quantised" if quantization is None else f"quantised ({quantization})"


def _same_name(one: Any, other: Any) -> bool:
    return _stem(str(one)) == _stem(str(other))


def _stem(name: str) -> str:
    """The name of a model without owner and directories, and without what converters add."""
    stem = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removeprefix("meta-")
    while (shorter := OF_CONVERTERS.sub("", stem)) != stem:
        stem = shorter
    return ALIASES.get(stem, stem)
