"""Harvesting to disk: what is there already is kept, what is missing or damaged is made."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from mlxterp.sae import processes
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.files import sync, write_file
from mlxterp.sae.harvest import NormLimits, harvest
from mlxterp.sae.shards import UNFINISHED, DamagedShard, ShardWriter, read_shard
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.store import (
    CORPUS_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    POSITIONS,
    Layout,
    Store,
    all_parts,
    read_corpus,
    read_index,
)
from mlxterp.version import __version__

logger = logging.getLogger("mlxterp")

SHARD_TOKENS = 1 << 16
SHARD_BYTES = 512 << 20
WRITES_AHEAD = 2


@dataclass(frozen=True)
class HarvestPlan:
    """What a harvest will take: tokens, bytes on the disk and those that are free, seconds."""

    n_tokens: int
    n_bytes: int
    n_free: int
    seconds: float

    def __repr__(self) -> str:
        minutes = max(1, round(self.seconds / 60))
        return (
            f"{self.n_tokens:,} tokens to harvest: {self.n_bytes / 1e9:,.1f} GB of "
            f"{self.n_free / 1e9:,.1f} GB that are free, about {minutes} min"
        )


@dataclass(eq=False)
class Cache:
    """The activations of a corpus, to be kept in a directory of their own in `cache_dir`.

    Its name says the sites and, by a hash, model, text and everything else that they depend on.
    Once it has been written there the `corpus` is the one on the disk, mapped into memory.
    """

    source: ActivationSource
    corpus: Corpus
    layout: Layout
    cache_dir: Path
    outlier_norm: float
    drop_outliers: bool
    verbose: bool = False

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the activations depend on."""
        corpus, columns = self.corpus, self.layout.columns
        return {
            "model": {"name": self.source.name, "fingerprint": self.source.fingerprint},
            "sites": columns.to_list(),
            "precision": self.layout.precision,
            "corpus": {
                "fingerprint": corpus.fingerprint,
                "n_contexts": len(corpus),
                "context": corpus.context,
                "bos_id": corpus.bos_id,
                "special": sorted(corpus.special),
                "separate": corpus.separate,
            },
            "outlier_norm": self.outlier_norm,
            "drop_outliers": self.drop_outliers,
        }

    @property
    def path(self) -> Path:
        """The directory."""
        model = self.source.fingerprint
        known = {**self.identity, "model": model, "format_version": FORMAT_VERSION}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        sites = re.sub(r"[^\w.-]+", "-", "+".join(self.layout.columns.names))[:80]
        return self.cache_dir / f"{sites}-{digest[:12]}"

    @property
    def contexts_per_shard(self) -> int:
        """How many contexts a shard holds."""
        most = min(SHARD_TOKENS, SHARD_BYTES // self.layout.row_bytes)
        return max(1, most // self.corpus.context)

    @property
    def shards(self) -> dict[str, np.ndarray]:
        """The contexts in each file."""
        n = len(self.corpus)
        starts = range(0, n, self.contexts_per_shard)
        return {
            f"{number:06d}.safetensors": np.arange(start, min(start + self.contexts_per_shard, n))
            for number, start in enumerate(starts)
        }

    def open(self) -> Store:
        """The store, complete: harvested as far as it is not there yet.

        The processes that `mlx.launch` started each harvest shards of their own. Raises `OSError`
        where the disk cannot hold it; what has been harvested is kept and need not be again.
        """
        with contextlib.suppress(ValueError):  # unfinished, or damaged
            return self._opened()
        if processes.rank() == 0:
            self._prepare()
        processes.wait_for_all()
        limits = self._limits()
        mine = list(self.shards)[processes.rank() :: processes.count()]
        noted = {name: self._noted(name) for name in mine}
        missing = [name for name, found in noted.items() if found is None]
        if missing:
            plan = self._plan(len(missing))
            self.corpus = self._written()
            noted |= self._harvest(missing, limits, plan.n_tokens)
        processes.wait_for_all()
        if processes.rank() == 0:
            others = [name for name in self.shards if name not in noted]
            noted |= {name: self._noted(name) for name in others}
            self._write_index(limits, dict(sorted(noted.items())))
        processes.wait_for_all()
        return self._opened()

    def _opened(self) -> Store:
        store = Store.open(self.path)
        if not store.chunks:
            n = self.corpus.n_tokens
            raise ValueError(f"None of the {n:,} activations is finite, or none is no outlier.")
        self.corpus = self._written()  # raises where it is damaged
        return store

    def _written(self) -> Corpus:
        """The corpus on the disk."""
        return read_corpus(self.path / CORPUS_FILE, self.identity["corpus"])

    def remake(self, damaged: Path) -> Store:
        """The store with one of its shards harvested again."""
        damaged.unlink(missing_ok=True)
        logger.warning("%s is damaged and is harvested again.", damaged)
        return self.open()

    def _noted(self, name: str) -> dict[str, Any] | None:
        """The numbers that were noted in a shard; `None` where it has to be made."""
        try:
            return read_shard(self.path / name, all_parts(self.layout))[1]
        except DamagedShard as reason:
            if (self.path / name).exists():
                logger.warning("%s It is harvested again.", reason)
            return None

    def _prepare(self) -> None:
        """Everything but the shards."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(f"*{UNFINISHED}"):
            left.unlink()
        with contextlib.suppress(ValueError):  # a new one, or damaged
            read_index(self.path)
            if self._written().fingerprint == self.identity["corpus"]["fingerprint"]:
                return
        if self.corpus.fingerprint != self.identity["corpus"]["fingerprint"]:
            raise DamagedShard(self.path / CORPUS_FILE, "was damaged while it was in use.")
        arrays = {"tokens": self.corpus.tokens, "owners": self.corpus.owners}
        scratch = self.path / f"{CORPUS_FILE}{UNFINISHED}"
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, scratch)
        sync(scratch)
        os.replace(scratch, self.path / CORPUS_FILE)
        self._write_index(self._measure(), {})

    def _limits(self) -> NormLimits:
        noted = read_index(self.path)["norm_limits"]
        limits = (math.inf if limit is None else limit for limit in noted["limits"])
        return NormLimits(tuple(limits), noted["drop"])

    def _measure(self) -> NormLimits:
        columns = self.layout.columns
        return NormLimits.measure(
            self.source, self.corpus, columns, self.outlier_norm, self.drop_outliers
        )

    def _write_index(self, limits: NormLimits, shards: dict[str, Any]) -> None:
        noted = {"limits": limits.limits, "drop": limits.drop}
        index = {
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "identity": self.identity,
            "norm_limits": noted,
            "shards": shards,
        }
        scratch = self.path / f"{INDEX_FILE}{UNFINISHED}"
        scratch.unlink(missing_ok=True)
        write_file(scratch, index)
        os.replace(scratch, self.path / INDEX_FILE)
        sync(self.path)

    def _plan(self, n_missing: int) -> HarvestPlan:
        """What is to come, and say it; raises `OSError` where it does not fit on the disk."""
        started = time.perf_counter()
        self._measure()  # a few thousand tokens from everywhere
        rate = (time.perf_counter() - started) / min(len(self.corpus), self.corpus.rows_per_forward)
        n_contexts = min(n_missing * self.contexts_per_shard, len(self.corpus))
        n_tokens = round(self.corpus.n_tokens * n_contexts / len(self.corpus))
        row_bytes = self.layout.row_bytes + 8
        free = shutil.disk_usage(self.path).free
        plan = HarvestPlan(n_tokens, n_tokens * row_bytes, free, rate * n_contexts)
        logger.info("%r", plan)
        if self.verbose:
            tqdm.write(repr(plan), file=sys.stderr)
        if plan.n_bytes > free:
            raise OSError(
                errno.ENOSPC,
                f"{self.path} needs {plan.n_bytes:,} bytes for {n_tokens:,} tokens, and {free:,} "
                "are free. Lower max_samples, or take precision='int8' or another cache_dir",
            )
        return plan

    def _harvest(self, names: list[str], limits: NormLimits, n_tokens: int) -> dict[str, Any]:
        """Make some shards; the numbers that are noted in each."""
        shards = self.shards
        with (
            tqdm(total=n_tokens, desc="harvesting", unit="tok", unit_scale=True,
                 disable=not self.verbose) as bar,
            _in_background() as later,
        ):  # fmt: skip
            return {
                name: self._harvest_shard(self.path / name, shards[name], limits, later, bar)
                for name in names
            }

    def _harvest_shard(
        self, path: Path, contexts: np.ndarray, limits: NormLimits, later: Later, bar: Any
    ) -> dict[str, int]:
        # Mapped again for each shard: what is read of a mapping stays in memory while it lasts.
        corpus, layout = self._written(), self.layout
        most = len(contexts) * corpus.context
        writer = ShardWriter(path, all_parts(layout), layout.chunk_rows, most)
        noted = {"n_tokens": 0, "n_not_finite": 0, "n_outliers": 0}
        try:
            for found in harvest(self.source, corpus, layout.columns, contexts, limits):
                parts = layout.encode(found.computed, found.rows)
                later(writer.add, {**parts, POSITIONS: found.positions})
                del parts  # the writer's, and gone when it has written them
                noted["n_tokens"] += len(found.positions)
                noted["n_not_finite"] += found.n_not_finite
                noted["n_outliers"] += found.n_outliers
                bar.update(len(found.positions))
                bar.set_postfix_str(f"{bar.n * layout.row_bytes / 1e9:,.2f} GB", refresh=False)
            later(writer.finish, noted)
        except BaseException:
            writer.abort()
            raise
        return noted


Later = Callable[..., None]


@contextlib.contextmanager
def _in_background() -> Iterator[Later]:
    """Calls made by a thread, in order, some of them waiting; a later one raises an error."""
    pending: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(1) as thread:

        def later(function: Callable[..., None], *arguments: Any) -> None:
            while len(pending) >= WRITES_AHEAD:
                pending.popleft().result()
            pending.append(thread.submit(function, *arguments))

        yield later  # after an error too, what is waiting is still written
        while pending:
            pending.popleft().result()
