"""Activations on disk: a directory of shards, an index, and the tokens that they belong to."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.files import read_json
from mlxterp.sae.shards import Chunk, DamagedShard, Part, Rows, read_header, read_shard
from mlxterp.sae.shuffle import Span

INDEX_FILE, CORPUS_FILE = "index.json", "corpus.safetensors"
FORMAT_VERSION = 1
CHUNK_BYTES = 1 << 20
MOST_CHUNK_ROWS = 1024
READERS = 4  # a disk is faster when it is asked for several chunks at once
POSITIONS = "positions"

Precision = Literal["bfloat16", "float16", "float32", "int8"]
SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}


@dataclass(frozen=True)
class Layout:
    """How the activations of some sites are kept: as 16 or 32-bit floats, or as 8-bit integers
    with a scale for each token and site, `x = scale * q` with `scale = max |x| / 127`."""

    columns: Columns
    precision: Precision = "bfloat16"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            choices = get_args(Precision)
            raise ValueError(f"precision must be one of {choices}, got {self.precision!r}.")

    @property
    def parts(self) -> dict[str, Part]:
        """What is kept of every token, but for its position."""
        sites = zip(self.columns.names, self.columns.widths, strict=True)
        found = {name: Part(SAFETENSORS[self.precision], width) for name, width in sites}
        if self.precision == "int8":
            found |= {_scale(name): Part("F32") for name in self.columns.names}
        return found

    @property
    def row_bytes(self) -> int:
        """The size of one token."""
        return sum(part.itemsize for part in self.parts.values())

    @property
    def chunk_rows(self) -> int:
        """How many tokens are read together."""
        return max(1, min(MOST_CHUNK_ROWS, CHUNK_BYTES // self.row_bytes))

    def encode(self, activations: mx.array, taken: Any = slice(None)) -> Rows:
        """The parts of activations `[n, width]`, or of those rows that are to be taken."""
        rows: Rows = {}
        for name, columns in self.columns.slices.items():
            x = activations[:, columns]
            if self.precision == "int8":
                scale = mx.abs(x.astype(mx.float32)).max(axis=-1) / 127
                q = mx.round(x / mx.where(scale == 0, 1, scale)[:, None]).astype(mx.int8)
                rows |= {name: np.asarray(q)[taken], _scale(name): np.asarray(scale)[taken]}
            elif self.precision == "bfloat16":
                rows[name] = np.asarray(x.astype(mx.bfloat16).view(mx.uint16))[taken]
            else:
                rows[name] = np.asarray(x.astype(getattr(mx, self.precision)))[taken]
                if self.precision == "float16" and not np.isfinite(rows[name]).all():
                    raise ValueError(
                        f"precision='float16' holds values up to 65,504, and some activations of "
                        f"{name} are larger: take 'bfloat16'."
                    )
        return rows

    def n_not_finite(self, rows: Rows) -> int:
        """How many rows have a value that is not finite."""
        finite = np.ones(len(next(iter(rows.values()))), bool)
        for array in rows.values():
            bits = self.precision == "bfloat16"
            whole = array & 0x7F80 != 0x7F80 if bits else np.isfinite(array)
            finite &= whole.reshape(len(whole), -1).all(axis=1)
        return int((~finite).sum())

    def decode(self, rows: Rows) -> mx.array:
        """Activations `[n, width]` from their parts; float32 where they were integers."""
        sites = {name: mx.array(rows[name]) for name in self.columns.names}
        for name, x in sites.items():
            if self.precision == "int8":
                sites[name] = x.astype(mx.float32) * mx.array(rows[_scale(name)])[:, None]
            elif self.precision == "bfloat16":
                sites[name] = x.view(mx.bfloat16)
        return self.columns.join(sites)


def _scale(site: str) -> str:
    return f"{site}/scale"


class Store:
    """Activations on disk, `[n_tokens, width]`, to be read chunk by chunk."""

    def __init__(
        self, path: Path, layout: Layout, chunks: Sequence[Chunk], index: dict[str, Any] | None
    ):
        self.path, self.layout, self.chunks, self.index = path, layout, list(chunks), index
        self.ends = list(itertools.accumulate(chunk.n_rows for chunk in self.chunks))
        self._checked: set[int] = set()
        self._not_finite: dict[int, int] = {}

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """A finished store, or the only one in a directory of them.

        Raises `ValueError` for what is none, is not finished or was written by a later version, and
        `DamagedShard`, a kind of it, where a shard is missing or cut short.
        """
        path = find_store(Path(path))
        index = read_index(path)
        layout = layout_of(index)
        if not index["shards"]:
            raise ValueError(
                f"{path} is not finished: harvest into it again, with the same arguments, and it "
                "will be."
            )
        chunks = []
        for name, noted in index["shards"].items():
            found, metadata = read_shard(path / name, all_parts(layout))
            if metadata != noted:
                raise DamagedShard(path / name, f"is not the one of the index: {metadata}.")
            chunks += found
        return cls(path, layout, chunks, index)

    @classmethod
    def of_directory(cls, path: Path, site: str) -> Store:
        """The store at a path or, where it is none, all `.npy` and `.safetensors` arrays
        `[n, width]` there, in the order of their names; raises `ValueError` for other arrays."""
        if is_store(path):
            return cls.open(path)
        files = sorted(f for f in path.glob("*") if f.suffix in (".npy", ".safetensors"))
        arrays = [array for file in files for array in _arrays_in(file)]
        if not arrays:
            raise ValueError(f"{path} holds no .npy or .safetensors files.")
        kinds = {(dtype, shape[1:]) for _, dtype, shape, _ in arrays}
        dtype, shape = arrays[0][1:3]
        known = {name: precision for precision, name in SAFETENSORS.items() if name != "I8"}
        if len(kinds) != 1 or len(shape) != 2 or dtype not in known:
            raise ValueError(
                f"The arrays in {path} must all be [n_tokens, width], of one width and one of the "
                f"types {[*known]}; got {sorted(map(str, kinds))}."
            )
        precision: Any = known[dtype]
        layout = Layout(Columns((site,), shape[1:]), precision)
        step, row_bytes = layout.chunk_rows, layout.row_bytes
        chunks = [
            Chunk(file, min(step, shape[0] - row), {site: offset + row * row_bytes})
            for file, _, shape, offset in arrays
            for row in range(0, shape[0], step)
        ]
        return cls(path, layout, chunks, None)

    @property
    def columns(self) -> Columns:
        """The sites."""
        return self.layout.columns

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return self.ends[-1]

    @property
    def n_skipped(self) -> int:
        """Tokens whose activation was not finite, and was left out; of arrays of others, rows that
        are not finite, as far as they have been read."""
        return self._noted("n_not_finite") + sum(self._not_finite.values())

    @property
    def n_outliers(self) -> int:
        """Tokens whose activation was an outlier, whether left out or not."""
        return self._noted("n_outliers")

    def _noted(self, name: str) -> int:
        return sum(shard[name] for shard in self.index["shards"].values()) if self.index else 0

    @cached_property
    def corpus(self) -> Corpus | None:
        """The tokens, of which only what is looked at is read; `None` where none were kept."""
        if self.index is None:
            return None
        return read_corpus(self.path / CORPUS_FILE, self.index["identity"]["corpus"])

    def read(self, number: int, into: Rows | None = None) -> Rows:
        """A chunk's parts. The first time the checksum is looked at; without one, rows that are not
        finite are counted. Raises `DamagedShard`."""
        chunk = self.chunks[number]
        if number in self._checked or chunk.checksum is None:
            rows = chunk.read(self.layout.parts, into)
            if number not in self._checked and (n := self.layout.n_not_finite(rows)):
                self._not_finite[number] = n
            self._checked.add(number)
            return rows
        positions = Part("I64").empty(chunk.n_rows)
        parts = all_parts(self.layout)
        given = None if into is None else {**into, POSITIONS: positions}
        rows = chunk.read(parts, given, check=True)
        self._checked.add(number)
        return {name: rows[name] for name in self.layout.parts}

    def read_spans(self, spans: Sequence[Span]) -> Rows:
        """The rows of some spans, one after another, in one array for each part."""
        ends = list(itertools.accumulate(map(len, spans), initial=0))
        rows = {name: part.empty(ends[-1]) for name, part in self.layout.parts.items()}

        def read(span: Span, start: int) -> None:
            into = {name: array[start : start + len(span)] for name, array in rows.items()}
            if len(span) == self.chunks[span.chunk].n_rows:
                self.read(span.chunk, into)
                return
            for name, array in self.read(span.chunk).items():
                into[name][:] = array[span.start : span.end]

        with ThreadPoolExecutor(READERS) as threads:
            list(threads.map(read, spans, ends))
        return rows

    def positions(self, number: int) -> np.ndarray:
        """Where a chunk's rows are in the flattened tokens of the corpus, `[n]`."""
        return self.chunks[number].read({POSITIONS: Part("I64")})[POSITIONS]

    def documents(self, number: int) -> np.ndarray:
        """The documents that a chunk's rows are from, `[n]`."""
        assert self.corpus is not None
        return self.corpus.owners.reshape(-1)[self.positions(number)]

    def position(self, row: int) -> int:
        """Where a row is in the flattened tokens; for the end, where they end."""
        assert self.corpus is not None
        if row >= self.n_tokens:
            return self.corpus.tokens.size
        number = bisect.bisect_right(self.ends, row)
        return int(self.positions(number)[row - self.ends[number]])

    def document_start(self, row: int) -> int:
        """The first row of the document that a row belongs to, or the next one's, if nearer."""
        if self.corpus is None:
            return row
        number = bisect.bisect_right(self.ends, row)
        # A document longer than a few chunks is cut.
        near = range(max(0, number - 8), min(len(self.chunks), number + 9))
        owners = np.concatenate([self.documents(i) for i in near])
        first = self.ends[near[0]] - self.chunks[near[0]].n_rows
        starts = first + 1 + np.flatnonzero(np.diff(owners))
        starts = starts[(starts > 0) & (starts < self.n_tokens)]
        return int(starts[np.abs(starts - row).argmin()]) if len(starts) else row

    def verify(self) -> None:
        """Read everything and compare it with the checksums; raises `DamagedShard`."""
        self._checked.clear()
        for number in range(len(self.chunks)):
            self.read(number)


def _arrays_in(file: Path) -> list[tuple[Path, str, tuple[int, ...], int]]:
    """File, type, shape and offset of each array."""
    if file.suffix == ".npy":
        array: Any = np.load(file, mmap_mode="r", allow_pickle=False)
        kinds = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
        if not array.flags.c_contiguous:
            raise ValueError(f"{file} must be in C order, row after row.")
        return [(file, kinds.get(array.dtype, str(array.dtype)), array.shape, array.offset)]
    header, start, _ = read_header(file)
    tensors = sorted((name, t) for name, t in header.items() if name != "__metadata__")
    return [(file, t["dtype"], tuple(t["shape"]), start + t["data_offsets"][0]) for _, t in tensors]


def read_corpus(path: Path, facts: dict[str, Any]) -> Corpus:
    """The tokens of a store, mapped: only what is looked at is read. Raises `DamagedShard`."""
    header, start, size = read_header(path)
    shape = (facts["n_contexts"], facts["context"])
    if size != start + 2 * 4 * math.prod(shape):
        raise DamagedShard(path, f"is cut short: it has {size:,} bytes.")
    tokens, owners = (
        np.memmap(path, np.int32, "r", start + header[name]["data_offsets"][0], shape)
        for name in ("tokens", "owners")
    )
    special = frozenset(facts["special"])
    return Corpus(tokens, owners, facts["bos_id"], special, facts["separate"])


def all_parts(layout: Layout) -> dict[str, Part]:
    """What a shard keeps of every token."""
    return {**layout.parts, POSITIONS: Part("I64")}


def is_store(path: Path) -> bool:
    """Whether there is a store at a path, or a directory of them."""
    return any(path.glob(INDEX_FILE)) or any(path.glob(f"*/{INDEX_FILE}"))


def find_store(path: Path) -> Path:
    """The directory itself, or the only store in it; raises `ValueError` otherwise."""
    if (path / INDEX_FILE).is_file():
        return path
    found = sorted(index.parent for index in path.glob(f"*/{INDEX_FILE}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{path} holds several sets of activations; open one of {[*map(str, found)]}."
        )
    raise ValueError(f"{path} holds no activations: there is no {INDEX_FILE}.")


def read_index(path: Path) -> dict[str, Any]:
    """The index of a store; raises `ValueError` where it is damaged or of a later version."""
    index = read_json(path / INDEX_FILE, ("format_version", "identity", "shards", "norm_limits"))
    if index["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {index['format_version']}; this version of mlxterp reads "
            f"{FORMAT_VERSION}. Update mlxterp, or harvest again."
        )
    return index


def layout_of(index: dict[str, Any]) -> Layout:
    """How the activations of a store are kept."""
    identity = index["identity"]
    names = tuple(site["site"] for site in identity["sites"])
    widths = tuple(site["width"] for site in identity["sites"])
    return Layout(Columns(names, widths), identity["precision"])
