"""The files of the front end, as they are served and as one file that needs nothing else."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mlxterp.sae.dashboard.bundle import Bundle, Comparison

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
INDEX, PLACE = "index.html", "<!-- bundle -->"
CHUNK = 64  # features of a part
TRIED, SHRINK = 128, 0.95  # features whose size is looked at; what is kept where too many were
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; "
    "img-src data:; font-src data:; base-uri 'none'; form-action 'none'"
)
STYLESHEET = re.compile(r'<link rel="stylesheet" href="([^":]+)"\s*/?>')
SCRIPT = re.compile(r'<script type="module" src="([^":]+)"></script>')
HEAD = re.compile(r"<head(?:\s[^>]*)?>(?:\s*<meta charset=[^>]*>)?")
IMPORT = re.compile(r"""(\b(?:from|import)\s*\(?\s*)(["'])(\.{1,2}/[^"'\n]+)\2""")


def page_directory() -> Path:
    """Where the files of the front end are."""
    return Path(str(resources.files("mlxterp.sae.dashboard").joinpath("page")))


def page_files(directory: Path | None = None) -> dict[str, Path]:
    """All files that are served, by their paths; what is not among them cannot be asked for."""
    directory = page_directory() if directory is None else directory
    found = (path for path in sorted(directory.rglob("*")) if path.suffix in TYPES)
    return {path.relative_to(directory).as_posix(): path for path in found if path.is_file()}


def single_file(
    bundle: Bundle, features: Sequence[int] | None = None, directory: Path | None = None
) -> str:
    """The front end with a bundle in one HTML file, which asks the network for nothing.

    Modules become `data:` URLs of an import map and arrays compressed text; `features` are those
    that have more than their row of the table, all by default.
    """
    files = page_files(directory)
    page = _named(files, INDEX).read_text("utf-8")
    page = STYLESHEET.sub(lambda found: _style(_named(files, found[1])), page)
    script = SCRIPT.search(page)
    if script is None or page.count(PLACE) != 1:
        raise ValueError(f"{files[INDEX]} must have one {PLACE} and one module.")
    modules = {name: path for name, path in files.items() if path.suffix == ".js"}
    page = page.replace(script[0], f'<script type="module">import "page/{script[1]}";</script>')
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head = f"{policy}\n{_import_map(modules)}"
    page = HEAD.sub(lambda found: f"{found[0]}\n{head}", page, count=1)
    return page.replace(PLACE, "\n".join(_elements(bundle, features)))


def fitting_file(bundle: Bundle, max_bytes: int) -> str:
    """`single_file` of all features or, where it would have more than `max_bytes`, of those with a
    label and then those that fire most; raises `ValueError` where not even the table has room."""
    n, ranked = bundle.n_features, _ranked(bundle)
    some = sorted(ranked[:: -(-n // TRIED)])
    bare = len(single_file(bundle, []))
    if bare > max_bytes:
        raise ValueError(f"max_bytes must be >= {bare:,}, the page and its table.")
    each = (len(single_file(bundle, some)) - bare) / len(some)
    fit = min(n, int((max_bytes - bare) / each))
    while True:
        page = single_file(bundle, None if fit == n else sorted(ranked[:fit]))
        if len(page) <= max_bytes:
            return page
        fit = int(SHRINK * fit)


def _ranked(bundle: Bundle) -> list[int]:
    """All features, those with a label first, and of each part those that fire most."""
    labelled = np.isin(np.arange(bundle.n_features), [*bundle.labels])
    counts = bundle.table["firing_counts"].astype(np.int64)
    return np.lexsort((-counts, ~labelled)).tolist()


def _named(files: dict[str, Path], name: str) -> Path:
    if name not in files:
        raise ValueError(f"The page has no file {name!r}; there are {sorted(files)}.")
    return files[name]


def _style(path: Path) -> str:
    text = path.read_text("utf-8")
    if "</style" in text.lower():
        raise ValueError(f"{path} would end its own element.")
    return f"<style>\n{text}</style>"


def _import_map(modules: dict[str, Path]) -> str:
    urls = {}
    for name in modules:
        code = base64.b64encode(_bare(name, modules).encode()).decode()
        urls[f"page/{name}"] = f"data:text/javascript;charset=utf-8;base64,{code}"
    return f'<script type="importmap">{in_script({"imports": urls})}</script>'


def _bare(name: str, modules: dict[str, Path]) -> str:
    """A module whose imports are by names of the import map: in a URL that is all data, there is
    nothing that they could be relative to."""

    def of_map(found: re.Match[str]) -> str:
        target = resolved(Path("/", name).parent, found[3])
        _named(modules, target)
        return f"{found[1]}{found[2]}page/{target}{found[2]}"

    return IMPORT.sub(of_map, modules[name].read_text("utf-8"))


def resolved(directory: Path, specifier: str) -> str:
    """The path of a module from the root of the page, by its relative name in another."""
    parts: list[str] = [part for part in directory.parts if part != "/"]
    for part in specifier.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def in_script(value: Any) -> str:
    """JSON that nothing within a script element can end or misread."""
    text = to_json(value)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def to_json(value: Any) -> str:
    """JSON in ASCII, without spaces."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def parts_of(
    bundle: Bundle, features: Sequence[int] | None = None, prefix: str = ""
) -> Iterator[tuple[str, bytes]]:
    """What the server would answer, by the path of the request; features are joined to chunks."""
    ids = range(bundle.n_features) if features is None else features
    meta = bundle.meta(len(ids)) | {"live": offline()}
    yield f"{prefix}meta", to_json(meta).encode()
    yield f"{prefix}table", bundle.table_bytes(features)
    yield f"{prefix}strings", to_json({"strings": bundle.strings}).encode()
    yield f"{prefix}labels", to_json({"labels": bundle.label_entries()}).encode()
    for start in range(0, len(ids), CHUNK):
        chunk = {str(i): bundle.feature(i) for i in ids[start : start + CHUNK]}
        yield f"{prefix}features/{start // CHUNK}", to_json(chunk).encode()
    for i, circuit in enumerate(bundle.circuits):
        yield f"circuits/{i}", to_json(circuit).encode()
    for i, comparison in enumerate(bundle.comparisons):
        yield f"compare/{i}", to_json(comparison.to_dict()).encode()
        yield f"compare/{i}/table", comparison.table_bytes()
        yield from parts_of(comparison.bundle, partners(comparison, features), f"others/{i}/")


def partners(comparison: Comparison, features: Sequence[int] | None) -> list[int] | None:
    """The features of the other coder that are matched with some of the first."""
    if features is None:
        return None
    found = {int(i) for i in comparison.arrays["partners"][[*features]] if i >= 0}
    return sorted(found)


def offline() -> dict[str, Any]:
    """What can be asked of a page without a server."""
    return {"text": False, "steer": False, "labels": False, "together": "listed"}


def _elements(bundle: Bundle, features: Sequence[int] | None) -> Iterator[str]:
    index = {
        "format_version": 1,
        "ids": features,
        "chunk": CHUNK,
        "others": [
            {"ids": partners(comparison, features), "chunk": CHUNK}
            for comparison in bundle.comparisons
        ],
    }
    yield f'<script type="application/json" id="mlxterp-bundle">{in_script(index)}</script>'
    for name, content in parts_of(bundle, features):
        text = base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
        yield f'<script type="text/plain" data-part="{name}">{text}</script>'
