"""Where text comes from: lists, files, data sets on the Hub."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import importlib
import json
import lzma
import os
import re
import reprlib
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Document = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray
"""Text, the messages of a chat, or token ids."""

COLUMNS = (
    "text", "content", "messages", "conversations", "conversation", "input_ids", "tokens",
)  # fmt: skip
ROLES = {"human": "user", "gpt": "assistant"}
ROWS = (".jsonl", ".json", ".parquet")
TEXT = (
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py", ".c", ".h", ".cc", ".cpp",
    ".cu", ".metal", ".swift", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh", ".sql",
)  # fmt: skip
TABLES = (".csv", ".tsv", ".arrow", ".feather", ".xlsx")
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ROWS_AT_ONCE = 64
BUFFER = 1 << 20


def read(source: Any, column: str | None = None) -> Iterator[Document]:
    """The documents of whatever a user may call a dataset.

    A `Path`, or a string that is a path or a glob: `read_files`; another string: the name of a data
    set on the Hub, `read_huggingface`; anything else is gone through: documents, or rows that hold
    them in `column`. Raises `ValueError` where it is none of these or has no such column.
    """
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        return read_files(source, column)
    if isinstance(source, str):
        if not _is_hub_name(source):
            raise ValueError(
                f"dataset must be documents, a path or the name of a data set on the Hub; "
                f"{reprlib.repr(source)} is no path that exists and no such name. If it is a text, "
                "put it in a list."
            )
        return read_huggingface(source, column=column)
    if isinstance(source, Mapping) or hasattr(source, "columns"):
        names = list(getattr(source, "columns", source))
        raise ValueError(
            f"dataset must be documents, not a {type(source).__name__} of {names}: pass one of "
            f"them{f', such as dataset[{names[0]!r}]' if names else ''}."
        )
    if not isinstance(source, Iterable) or isinstance(source, (bytes, bytearray)):
        raise ValueError(
            "dataset must be documents, a path or the name of a data set on the Hub, not "
            f"{reprlib.repr(source)}."
        )
    rows: Any = source
    return _documents(((f"item {i}", row) for i, row in enumerate(rows)), column)


def _is_path(text: str) -> bool:
    if os.path.exists(text):
        return True
    if "\n" in text:
        return False
    # What looks like a file is not looked up on the Hub: a spelling mistake is likelier.
    named = len(text.split()) == 1 and _suffix(Path(text)) in (*ROWS, *TEXT, *TABLES)
    return named or text.startswith(("/", "~", "./", "../")) or bool(_matches(text))


def _matches(pattern: str) -> list[str]:
    return glob.glob(os.path.expanduser(pattern), recursive=True)


def _is_hub_name(text: str) -> bool:
    hub = importlib.import_module("huggingface_hub.utils")
    try:
        hub.validate_repo_id(text)
    except hub.HFValidationError:
        return False
    return True


def read_files(
    paths: str | Path | Iterable[str | Path], column: str | None = None
) -> Iterator[Document]:
    """The documents of files, in an order that is always the same.

    One document is a line of `.jsonl`, an item of the list in a `.json`, a row of `.parquet`, and
    all of any other file, which must be UTF-8; all but parquet may be compressed (`.gz`, `.bz2`,
    `.xz`, from Python 3.14 on `.zst`). Rows hold the document in `column`, see `find_column`. A
    directory stands for the files of known kinds in it and below, hidden ones left out, and a glob
    (`data/**/*.parquet`) for those it matches, both sorted. Raises at once `FileNotFoundError`
    where there is no file and `ValueError` or `ImportError` for kinds that cannot be read; then,
    while reading, `ValueError` naming the place of what is damaged or no document.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files = [file for path in paths for file in _expand(path)]
    if not files:
        raise ValueError("paths must name at least one file, not [].")
    for file in files:
        _check_kind(file)
    return (found for file in files for found in _documents(_rows(file, column), column))


def _expand(path: str | Path) -> list[Path]:
    """The files that a path, a directory or a glob stands for."""
    whole = Path(path).expanduser()
    if whole.is_dir():
        found = [p for p in whole.rglob("*") if p.is_file() and _is_known(p.relative_to(whole))]
        if not found:
            raise FileNotFoundError(
                f"{whole} holds no file of a known kind: {', '.join((*ROWS, *TEXT))}. "
                "Others are read as text where they are named one by one or by a glob."
            )
        return sorted(found)
    matches = [whole] if whole.exists() else map(Path, _matches(str(path)))
    found = sorted(match for match in matches if not match.is_dir())
    if not found:
        raise FileNotFoundError(
            f"{whole} does not exist, and as a glob it matches no file, seen from {Path.cwd()}."
        )
    return found


def _is_known(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and _suffix(path) in (*ROWS, *TEXT)


def _suffix(path: Path) -> str:
    """What a file holds, whether or not it is compressed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in (*COMPRESSED, ".zst") else suffix


def _check_kind(path: Path) -> None:
    """Raises what would go wrong for any file of this kind, before the first document."""
    kind = _suffix(path)
    if kind in TABLES:
        raise ValueError(f"{path} is a table: turn it into .parquet or .jsonl, or pass its texts.")
    if path.suffix.lower() == ".zst" and sys.version_info < (3, 14):
        raise ImportError(f"{path} needs Python 3.14 to be unpacked: run 'zstd -d {path}' before.")
    if kind == ".parquet":
        if path.suffix.lower() != kind:
            raise ValueError(f"{path} must be unpacked first: parquet is compressed within.")
        _required("pyarrow")


def _required(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing: pip install 'mlxterp[data]'") from error


def _rows(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """What a file holds, each with its place."""
    kind = _suffix(path)
    if kind == ".parquet":
        return (yield from _parquet_rows(path, column))
    unpack, errors = _unpacker(path)
    with _damage_named(path, *errors), unpack(path, "rb") as file:
        if kind == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield (place := f"{path}, line {number}"), _parse(_decode(line, place), place)
        elif kind == ".json":
            yield from _items(path, _decode(file.read(), str(path)))
        else:
            yield str(path), _decode(file.read(), str(path))


def _unpacker(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """What opens a file, and what that raises where the file is damaged."""
    if path.suffix.lower() == ".zst":
        zstd = importlib.import_module("compression.zstd")
        return zstd.open, (EOFError, zstd.ZstdError)
    errors = (EOFError, zlib.error, lzma.LZMAError)
    return COMPRESSED.get(path.suffix.lower(), open), errors


@contextlib.contextmanager
def _damage_named(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (OSError, *kinds) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not the file's contents
            raise
        raise ValueError(f"{path} is damaged or cut short: {error}.") from error


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8 text, at byte {error.start}: convert it, or leave it out."
        ) from error


def _parse(text: str, place: str, remedy: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        what = f"{error.msg} at {line}column {error.colno}"
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        what = str(error)
    raise ValueError(f"{place} is not JSON: {what}.{remedy}")


def _items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    items = _parse(text, str(path), " Where each line is a document, name the file .jsonl.")
    if not isinstance(items, list):
        what = f"an object of {list(items)}" if isinstance(items, dict) else reprlib.repr(items)
        raise ValueError(f"{path} must hold a list of documents, not {what}.")
    for index, item in enumerate(items):
        yield f"{path}, item {index}", item


def _parquet_rows(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """The rows, of the one column only."""
    arrow, parquet = _required("pyarrow"), _required("pyarrow.parquet")
    # Without these two pyarrow holds the whole file in memory, or whole row groups.
    bounded = {"pre_buffer": False, "buffer_size": BUFFER}
    damage = _damage_named(path, arrow.ArrowException)
    with damage, parquet.ParquetFile(path, **bounded) as file:
        names = file.schema_arrow.names
        chosen = find_column(names, column, str(path))
        index = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[chosen]):
            for value in batch.column(chosen).to_pylist():
                yield f"{path}, row {index}", {chosen: value}
                index += 1


def read_huggingface(
    name: str,
    *,
    subset: str | None = None,
    split: str = "train",
    column: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Iterator[Document]:
    """The documents of a data set on the Hub, or of a local copy in a directory `name`.

    With `streaming` nothing is stored; without, the whole split is loaded first, and kept. Raises
    at once `ValueError` for a name, subset or split that does not exist, and `ConnectionError`
    where the Hub is not reached; `OSError` where reading breaks off.
    """
    datasets = _required("datasets")
    if name in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
        raise ValueError(f"{name} is a kind of file, not a data set: pass the path of the files.")
    options = {"split": split, "streaming": streaming, "revision": revision}
    try:
        dataset = datasets.load_dataset(name, subset, **options)
    except Exception as error:
        raise _explained(error, name, subset, split) from error
    if dataset.column_names:  # else only the first row tells
        column = find_column(dataset.column_names, column, name)
        dataset = dataset.select_columns([column])
    return _documents(_numbered(dataset, name), column)


def _explained(error: Exception, name: str, subset: str | None, split: str) -> Exception:
    """What went wrong in `load_dataset`, and what to do about it."""
    text = str(error)
    lists = re.findall(r"\[[^\]]*\]", text)
    if text.startswith(("BuilderConfig", "Config name")) and lists:
        return ValueError(f"subset of {name} must be one of {lists[-1]}, not {subset!r}.")
    if text.startswith(("Bad split", "Unknown split")) and lists:
        parts = " Parts of a split need streaming=False." if "[" in split else ""
        return ValueError(f"split of {name} must be one of {lists[-1]}, not {split!r}.{parts}")
    if type(error).__name__ == "DatasetNotFoundError":
        return ValueError(
            f"{name} cannot be read from the Hub: {text} Check the spelling of name and revision; "
            "where access is restricted, log in ('hf auth login'). A text belongs in a list."
        )
    if isinstance(error, ConnectionError):
        offline = "Offline" in text
        return ConnectionError(
            f"{name} cannot be read from the Hub: "
            + (
                "HF_HUB_OFFLINE is set. Unset it"
                if offline
                else "there is no connection. Try later"
            )
            + f", or download it ('hf download --repo-type dataset {name} --local-dir DIR') and "
            "pass its files ('DIR/**/*.parquet')."
        )
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"{name} cannot be opened ({type(error).__name__}): {text}")


def _numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    count = 0
    try:
        for row in rows:
            yield f"{name}, row {count}", row
            count += 1
    except Exception as error:
        raise OSError(
            f"{name} broke off after {count:,} documents ({type(error).__name__}): {error}"
        ) from error


def _documents(rows: Iterable[tuple[str, Any]], column: str | None) -> Iterator[Document]:
    """The document in each row; the first row decides which column that is."""
    for where, row in rows:
        if isinstance(row, Mapping):
            column = find_column(list(row), column, where)
            row = row[column]
        yield document(row, where)


def find_column(names: Sequence[str], wanted: str | None, where: str) -> str:
    """The column that holds the documents: the one `wanted`, the first known one, or the only one.

    Known are, in this order, `text`, `content`, `messages`, `conversations`, `conversation`,
    `input_ids` and `tokens`. Raises `ValueError` listing the columns otherwise.
    """
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{where} has no column {wanted!r}; it has {list(names)}.")
        return wanted
    if set(names) in ({"role", "content"}, {"from", "value"}):
        alone = "content" if "content" in names else "value"
        raise ValueError(
            f"{where} is one message of a chat, not a document: put the messages of each chat in a "
            f"list of their own, or read each alone with column={alone!r}."
        )
    for name in (*COLUMNS, *names[: len(names) == 1]):
        if name in names:
            return name
    raise ValueError(f"{where}: column must say which one holds the documents: {list(names)}.")


def document(value: Any, where: str) -> Document:
    """Check one document: text, messages (also ShareGPT's, turned into these) or token ids.

    Raises `ValueError` naming `where` it comes from and what is allowed.
    """
    if isinstance(value, mx.array):
        value = np.array(value)
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, np.ndarray):
        if value.ndim == 1 and value.dtype.kind in "iu" and (not value.size or value.min() >= 0):
            return value
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        if all(isinstance(item, Mapping) for item in value):
            return [_message(item, where) for item in value]
        kinds = set(map(type, value))
        whole = all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds)
        if whole and min(value) >= 0:
            return value
    kind = type(value).__name__
    raise ValueError(
        f"{where} must be text, a list of messages such as {{'role': 'user', 'content': 'Hi'}}, or "
        f"a list of token ids (whole numbers from 0 on), not {reprlib.repr(value)} ({kind})."
    )


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} is text with half a character ({value[error.start]!a}) at {error.start}: "
            "repair it or leave it out."
        ) from error
    return value


def _message(item: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if "from" in item and "role" not in item:
        item = {"role": ROLES.get(str(item["from"]), item["from"]), "content": item.get("value")}
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise ValueError(
                f"{where} has a message whose {key!r} must be text: {reprlib.repr(dict(item))}."
            )
    return item
