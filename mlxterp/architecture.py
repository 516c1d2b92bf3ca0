"""The sites of one model: which modules they stand for, found by structure and by data flow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from operator import index
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxterp.dataflow import Call, Flow, Trait, find_blocks, outside_blocks, survey
from mlxterp.hooks import Key
from mlxterp.places import RECEIVED, Place, place_in, why_missing
from mlxterp.probing import BATCH, LENGTH, Branch
from mlxterp.sites import (
    COMPONENTS,
    OUTPUT,
    Site,
    SiteInfo,
    SiteTable,
    UnknownSiteError,
    canonical_component,
    split_layer,
    without_output,
)


class Architecture:
    """The blocks and sites of `model`; the wiring is found by a dry run when first needed."""

    def __init__(
        self,
        model: nn.Module,
        layer_attr: str = "layers",
        embedding_path: str | None = None,
        norm_path: str | None = None,
        lm_head_path: str | None = None,
    ) -> None:
        self.model = model
        self.blocks = find_blocks(model, layer_attr)
        named = model.named_modules()
        self.modules: dict[str, nn.Module] = dict(reversed(named))
        self._paths = {id(module): path for path, module in self.modules.items()}
        self.block_paths = [
            self._paths.get(id(b), f"{layer_attr}.{i}") for i, b in enumerate(self.blocks)
        ]
        self.list_path = self.block_paths[0].rpartition(".")[0]
        self._layers = {path: layer for layer, path in enumerate(self.block_paths)}
        self._given = {
            argument: self._module(path, argument)
            for argument, path in (
                ("embedding_path", embedding_path),
                ("norm_path", norm_path),
                ("lm_head_path", lm_head_path),
            )
            if path is not None
        }
        self._flow: Flow | None = None
        self._known: dict[str, Site] = {}
        self._places: dict[Site, Place] = {}

    def survey(self, example: mx.array | None = None) -> Flow:
        """The wiring of the model; a model of other inputs than tokens needs one `example`."""
        if self._flow is None:
            if example is None or mx.issubdtype(example.dtype, mx.integer):
                inputs = mx.zeros((BATCH, LENGTH), dtype=mx.int32)
            else:
                inputs = mx.zeros((BATCH, *example.shape[1:]), dtype=example.dtype)
            try:
                self._flow = survey(self.model, self.blocks, inputs)
            except Exception as error:
                error.add_note(
                    f"in the dry run on {inputs.dtype} {list(inputs.shape)} that finds the sites: "
                    "run a model of other inputs than tokens on an example first"
                )
                raise
        return self._flow

    @cached_property
    def table(self) -> dict[Site, SiteInfo]:
        """Every site that a pass goes through, in call order."""
        flow = self.survey()
        table: dict[Site, SiteInfo] = {}
        for call in flow.calls:
            if call.output is None:
                continue
            site = self._site_of_path(self._paths[id(call.module)])
            table.pop(site, None)
            self._enter(table, site, call.output)
            if site.component == "resid_post" and site.layer is not None:
                self._enter_parts(table, site.layer, call)
        return table

    def site(self, where: int | str | Site, component: str | None = None) -> Site:
        """The one site that `where` (and `component`) spells; see `Site` for the names."""
        if not isinstance(where, (str, Site)):
            if not hasattr(where, "__index__"):
                raise TypeError(f"a site is a layer number, a name or a Site, not {where!r}")
            where = f"layers.{index(where)}.{component or 'resid_post'}"
        elif component is not None:
            raise ValueError(f"component is for a layer number, not for {where!r}: {component!r}")
        name = str(where)
        if name not in self._known:
            self._known[name] = self._resolve(name)
        return self._known[name]

    def expand(self, where: str | Site | int) -> list[Site]:
        """The sites that `where` spells, of which a glob such as `layers.*.mlp` has several."""
        if not isinstance(where, str) or "*" not in where:
            return [self.site(where)]
        sites = list(dict.fromkeys(self._unglob(where.replace("[*]", ".*"))))
        if not sites:
            raise self._unknown(where)
        return sites

    def place(self, site: Site) -> Place:
        """Where `site` is read and written; raises `ValueError` where the block has no such sum."""
        if site not in self._places:
            self._places[site] = self._place(site)
        return self._places[site]

    def _place(self, site: Site) -> Place:
        if site.layer is None:
            return Place(self.modules["" if site.component == OUTPUT else site.component])
        if site.component not in COMPONENTS:
            return Place(self.modules[f"{self.block_paths[site.layer]}.{site.component}"])
        block = self.blocks[site.layer]
        if site.component == "resid_post":
            return Place(block)
        if reason := self._missing(site):
            raise ValueError(f"{site} does not exist in this model: {reason}")
        return place_in(site.component, block, self.survey().blocks[site.layer])

    @cached_property
    def all_sites(self) -> dict[Site, str | None]:
        """The sites of the dry run and the modules it did not reach, with their paths."""
        modules = (self._site_of_path(path) for path in self.modules)
        return {site: self.path(site) for site in (*self.table, *modules)}

    def path(self, site: Site) -> str | None:
        """The dotted path of the module whose output `site` is; None for any other site."""
        if site.layer is not None and site.component in ("resid_mid", "attn_out", "mlp_out"):
            return None
        place = self.place(site)
        return None if place.is_input else self._paths[id(place.module)]

    def replaced(self, sites: set[Site]) -> set[Site]:
        """Those of `sites` whose module was in the dry run and is in the model no more."""
        known = {site for site in sites if site in self.table}
        if not known:
            return known
        present = {id(module) for _, module in self.model.named_modules()}
        return {site for site in known if id(self.place(site).module) not in present}

    def width(self, site: Site) -> int:
        """The last dimension of the activation at `site`."""
        if site not in self.table:
            raise ValueError(f"the dry run did not reach {site}, so that its width is not known")
        return int(self.table[site].shape[-1])

    def sites(self, title: str) -> SiteTable:
        """All sites as a table."""
        return SiteTable(title, self.table)

    @cached_property
    def embedding(self) -> nn.Module | None:
        """The module that turns token ids into vectors."""
        if "embedding_path" in self._given:
            return self._given["embedding_path"]
        for call in self.survey().calls:
            if any(mx.issubdtype(array.dtype, mx.integer) for array in call.inputs.values()):
                return call.module if "weight" in call.module else None
        return None

    @cached_property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block; None where it is no module."""
        if "norm_path" in self._given:
            return self._given["norm_path"]
        previous = None
        for call in self.survey().calls:
            reads_last = previous is not None and previous in call.inputs.values()
            if call.block is None and reads_last:
                return call.module
            previous = call.output if call.module is self.blocks[-1] else previous
        return None

    @cached_property
    def head(self) -> nn.Module | None:
        """The module that makes logits of a hidden state; None where it is the embedding."""
        if "lm_head_path" in self._given:
            return self._given["lm_head_path"]
        last = [call for call in outside_blocks(self.survey()) if "weight" in call.module][-1:]
        for call in last:
            makes_logits = call.output is not None and call.output.shape[-1] == self.vocab_size
            if makes_logits and call.module is not self.embedding:
                return call.module
        return None

    @cached_property
    def vocab_size(self) -> int | None:
        """The number of rows of the embedding, which token ids must stay below."""
        return None if self.embedding is None else self.embedding["weight"].shape[0]

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.width(Site(len(self.blocks) - 1, "resid_post"))

    def _module(self, path: str, argument: str) -> nn.Module:
        if path not in self.modules:
            raise UnknownSiteError.of(path, self.modules, f", given as {argument}")
        return self.modules[path]

    def _enter(self, table: dict[Site, SiteInfo], site: Site, array: Trait) -> None:
        shape = tuple(
            "B" if (axis, size) == (0, BATCH) else "S" if axis and size == LENGTH else size
            for axis, size in enumerate(array.shape)
        )
        table[site] = SiteInfo(site, shape, str(array.dtype).removeprefix("mlx.core."))

    def _enter_parts(self, table: dict[Site, SiteInfo], layer: int, call: Call) -> None:
        """Enter the components that are no module's output, and put all in their order."""
        stream = self._stream(layer)
        array = call.inputs[stream] if stream in call.inputs else cast(Trait, call.output)
        entries = {s: table.pop(s) for s in list(table) if s.layer == layer}
        for component in COMPONENTS:
            site = Site(layer, component)
            if site not in entries and not self._missing(site):
                self._enter(entries, site, array)
        self._correct_inputs(entries, layer)
        order = {name: i for i, name in enumerate(COMPONENTS)}
        table.update(sorted(entries.items(), key=lambda item: order.get(item[0].component, -1)))

    def _correct_inputs(self, entries: dict[Site, SiteInfo], layer: int) -> None:
        """Give what modules of the block receive its shape."""
        for site in [s for s in entries if s.component in RECEIVED]:
            module = self.place(site).module
            call = next(c for c in self.survey().calls if c.module is module)
            if call.stream is not None:
                self._enter(entries, site, call.stream)

    def _stream(self, layer: int) -> Key | None:
        return self.survey().blocks[layer].stream

    def _missing(self, site: Site) -> str:
        """Why layer `site.layer` has no such component; empty where it has."""
        return why_missing(site.component, self.survey().blocks[site.layer or 0])

    def _resolve(self, name: str) -> Site:
        if inside := split_layer(name, self.list_path):
            return self._resolve_inside(name, *inside)
        for text in dict.fromkeys((name, without_output(name))):
            if (path := self._find_path(text)) is not None:
                return self._site_of_path(path)
        if name in (OUTPUT, "output", "logits"):
            return Site(None, OUTPUT)
        raise self._unknown(name)

    def _resolve_inside(self, name: str, layer: int, rest: str) -> Site:
        count = len(self.blocks)
        if not -count <= layer < count:
            raise UnknownSiteError(
                f"no layer {layer} in this model: {name!r} asks for it, and layers are "
                f"0 to {count - 1} (or -{count} to -1, from the end)"
            )
        layer %= count
        for text in dict.fromkeys((rest, rest.removesuffix("output").removesuffix("."))):
            site = self._component(layer, text)
            if site is not None:
                return site
        raise self._unknown(name, layer)

    def _component(self, layer: int, rest: str) -> Site | None:
        base = self.block_paths[layer]
        if rest and f"{base}.{rest}" in self.modules:
            return self._site_of_path(f"{base}.{rest}")
        name = canonical_component(rest or "resid_post")
        if name in COMPONENTS:
            site = Site(layer, name)
            if reason := self._missing(site):
                raise UnknownSiteError(f"{site} does not exist in this model: {reason}")
            return site
        head, _, tail = rest.partition(".")
        branch = canonical_component(head)
        wired: Branch | None = getattr(self.survey().blocks[layer], branch, None)
        if tail and branch in ("attn", "mlp") and wired is not None:
            path = f"{base}.{wired.path}.{tail}"
            return self._site_of_path(path) if path in self.modules else None
        return None

    def _site_of_path(self, path: str) -> Site:
        if not path:
            return Site(None, OUTPUT)
        parts = path.split(".")
        starts = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        base = next((start for start in starts if start in self._layers), None)
        if base is None:
            return Site(None, path)
        layer, rest = self._layers[base], path[len(base) + 1 :]
        block = self.survey().blocks[layer]
        for name, branch in (("attn", block.attn), ("mlp", block.mlp)):
            if branch is not None and branch.path == rest:
                return Site(layer, name)
        return Site(layer, rest or "resid_post")

    def _find_path(self, text: str) -> str | None:
        """The path of a module outside the blocks, which may be spelt without its first parts."""
        for candidate in (text, text.removeprefix("model."), f"model.{text}"):
            if candidate and candidate in self.modules:
                return candidate
        ends = [
            p
            for p in self.modules
            if p.endswith(f".{text}") and split_layer(p, self.list_path) is None
        ]
        return ends[0] if len(ends) == 1 else None

    def _unglob(self, pattern: str) -> Iterator[Site]:
        """The sites of `pattern`, in which a `*` is any layer, or any part of a path."""
        head, _, tail = pattern.partition("*")
        if split_layer(f"{head}0", self.list_path) == (0, ""):
            layers, rest = range(len(self.blocks)), tail.removeprefix(".")
        elif inside := split_layer(pattern, self.list_path):
            layers, rest = [self.site(inside[0]).layer], inside[1]
        else:
            yield from (site for site in self.table if fnmatchcase(str(site), pattern))
            return
        if "*" in rest:
            yield from (
                s for s in self.table if s.layer in layers and fnmatchcase(s.component, rest)
            )
            return
        yield from self._in_layers(layers, rest)

    def _in_layers(self, layers: Iterable[int | None], rest: str) -> Iterator[Site]:
        """`rest` in all layers that have it; raises what a single layer would where none has."""
        missing: UnknownSiteError | None = None
        found = False
        for layer in layers:
            try:
                yield self.site(f"layers.{layer}.{rest}" if rest else f"layers.{layer}")
                found = True
            except UnknownSiteError as error:
                missing = missing or error
        if missing and not found:
            raise missing

    def _unknown(self, name: str, layer: int | None = None) -> UnknownSiteError:
        names = [str(site) for site in self.table if layer is None or site.layer == layer]
        return UnknownSiteError.of(name, names)
