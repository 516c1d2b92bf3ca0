"""Names of the places in a model where an activation flows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from mlxterp.notebook import fragment

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
COMPONENTS = (
    "resid_pre", "attn_unit", "attn_in", "attn_z", "attn", "attn_out",
    "resid_mid", "mlp_unit", "mlp_in", "mlp", "mlp_out", "resid_post",
)  # fmt: skip
OUTPUT = "__model_output__"

_ALIASES = {
    "residual": "resid_post",
    "resid": "resid_post",
    "output": "resid_post",
    "self_attn": "attn",
    "attention": "attn",
    "ffn": "mlp",
    "feed_forward": "mlp",
    "attn.hook_z": "attn_z",
} | {f"hook_{name}": name for name in (*RESIDUAL, "attn_out", "mlp_out")}


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model: a component of a layer, or (`layer=None`) any other module by its path.

    The components of every layer are `resid_pre`, `attn_in`, `attn`, `attn_out`,
    `resid_mid`, `mlp_in`, `mlp`, `mlp_out` and `resid_post`: `attn` and `mlp` are what
    the modules return, `attn_out` and `mlp_out` what is added to the residual stream, `attn_in`
    and `mlp_in` what the modules receive, after the norm. `attn_unit` and `mlp_unit` are that
    before the gain and bias of the norm, and `attn_z` is what the output projection of the
    attention receives: the joined heads.
    """

    layer: int | None
    component: str

    def __str__(self) -> str:
        return self.component if self.layer is None else f"layers.{self.layer}.{self.component}"

    @classmethod
    def from_string(cls, text: str) -> Site:
        """The site with the canonical name `text`, such as `layers.3.mlp`; no model is asked."""
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", text):
            return cls(int(match[1]), match[2])
        return cls(None, text)


class UnknownSiteError(ValueError, KeyError):
    """A name that no site of the model has; the message gives the nearest existing names."""

    __str__ = Exception.__str__

    @classmethod
    def of(cls, name: object, existing: Iterable[str], why: str = "") -> UnknownSiteError:
        """An error for `name` that lists the nearest of the `existing` names."""
        near = difflib.get_close_matches(str(name), list(existing), n=4, cutoff=0.3)
        hint = f"; the nearest existing: {', '.join(near)}" if near else ""
        return cls(f"no site {str(name)!r} in this model{why}{hint}. See model.sites().")


def canonical_component(name: str) -> str:
    """The component that `name` is one of the usual spellings of, else `name`."""
    return _ALIASES.get(name, name)


def split_layer(text: str, list_path: str) -> tuple[int, str] | None:
    """`(layer, rest)` of a name inside a block, with the list of blocks at `list_path`.

    The list of blocks may be called by its own path, by any end of it, or `layers`, `h` or
    `blocks` as other libraries do; `layers[3]` is read as `layers.3`.
    """
    parts = _dotted(text).split(".")
    for i, part in enumerate(parts):
        if re.fullmatch(r"-?\d+", part) and _is_block_list(".".join(parts[:i]), list_path):
            return int(part), ".".join(parts[i + 1 :])
    return None


def without_output(text: str) -> str:
    """`text` as dots only, without the `.output` that proxies end in."""
    return _dotted(text).removesuffix(".output")


def _dotted(text: str) -> str:
    return re.sub(r"\[(-?\d+|\*)\]", r".\1", text)


def _is_block_list(path: str, list_path: str) -> bool:
    usual = re.fullmatch(r"((model|transformer)\.){0,2}(layers|h|blocks)", path)
    return bool(usual) or f".model.{list_path}".endswith(f".{path}")


@dataclass(frozen=True)
class SiteInfo:
    """What is known of a site before anything is computed."""

    site: Site
    shape: tuple[int | str, ...]
    dtype: str


class SiteTable:
    """The sites of a model with the shapes that flow there; `B` and `S` are batch and positions."""

    def __init__(self, title: str, sites: Mapping[Site, SiteInfo]) -> None:
        self.title = title
        self._sites = dict(sites)

    @classmethod
    def of_arrays(cls, title: str, arrays: Mapping[Site, Any]) -> Self:
        """The sites of captured arrays with the shapes that these have; nothing is computed."""
        return cls(
            title,
            {
                site: SiteInfo(site, tuple(x.shape), str(x.dtype).removeprefix("mlx.core."))
                for site, x in arrays.items()
            },
        )

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, site: object) -> bool:
        return (Site.from_string(site) if isinstance(site, str) else site) in self._sites

    def __getitem__(self, site: str | Site) -> SiteInfo:
        return self._sites[Site.from_string(site) if isinstance(site, str) else site]

    def rows(self) -> list[tuple[str, str, str]]:
        """`(name, layers, shape and type)` of each line; alike sites of all layers share one."""
        lines: dict[tuple[str, str], list[int]] = {}
        for site, info in self._sites.items():
            name = site.component if site.layer is None else f"layers.*.{site.component}"
            shape = f"[{', '.join(map(str, info.shape))}] {info.dtype}"
            layers = lines.setdefault((name, shape), [])
            if site.layer is not None:
                layers.append(site.layer)
        return [(name, _ranges(layers), shape) for (name, shape), layers in lines.items()]

    def __repr__(self) -> str:
        rows = [("site", "layers", "shape"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join([self.title, *lines])

    def groups(self) -> list[tuple[str, list[tuple[str, str, str]], bool]]:
        """The `rows` by where they are, with a name for each group, and whether they are few and
        often wanted: components of layers, modules in them, and what is outside."""
        names = ("Components of layers", "Modules in layers", "Outside of layers")
        found: dict[str, list[tuple[str, str, str]]] = {name: [] for name in names}
        for row in self.rows():
            component = row[0].removeprefix("layers.*.")
            place = 2 if not row[1] else 0 if component in COMPONENTS else 1
            found[names[place]].append(row)
        return [(name, rows, name != names[1]) for name, rows in found.items()]

    def _repr_html_(self) -> str:
        return fragment("sites.html", title=self.title, groups=self.groups())


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
