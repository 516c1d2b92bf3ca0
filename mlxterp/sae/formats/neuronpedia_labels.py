"""The explanations that Neuronpedia exports, as labels of features."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxterp.sae.labels.labels import FeatureLabels, Label

SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
LONGEST_LINE = 1 << 20
LONGEST_TEXT = 10_000
LARGEST_LIST = 1 << 28  # bytes of a file that is one list
MOST_OF_EACH = 100  # explanations of a feature


def read_labels(path: str | Path, labels: FeatureLabels) -> FeatureLabels:
    """Add the explanations in files of Neuronpedia to the labels of a coder, and write these.

    `path` is a file, `batch-0.jsonl.gz` or the list that its API gives, or a folder with such files
    or with folders `explanations...` of them. A label's source is "neuronpedia:" with the model and
    the method that explained; one's own labels still come first. Raises `ValueError`, naming the
    file, for what is no explanation or of a feature that the coder does not have; nothing is added
    then.
    """
    path, found = Path(path), []
    for file in _files(path):
        for number, row in enumerate(_rows(file), 1):
            try:
                found.append(_label(row, labels.n_features))
            except ValueError as error:
                raise ValueError(f"{file}, entry {number}: {error}.") from None
            if len(found) > MOST_OF_EACH * labels.n_features:
                raise ValueError(f"{file}: there are more than {MOST_OF_EACH} for each feature.")
    for feature_id, label in found:
        labels.add(feature_id, label)
    labels.write()
    return labels


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {path}.")
    if path.is_file():
        return [path]
    folders = sorted(path.glob("explanations*/")) or [path]
    files = [
        file
        for folder in folders
        for file in folder.iterdir()
        if re.fullmatch(r"batch-\d+\.jsonl(\.gz)?", file.name)
    ]
    if not files:
        raise ValueError(f"{path} holds no files of explanations, batch-0.jsonl.gz and so on.")
    return sorted(files, key=lambda file: (str(file.parent), int(re.findall(r"\d+", file.name)[0])))


def _rows(file: Path) -> Iterator[Any]:
    """The objects in a file, one after the other."""
    if not file.name.endswith(SUFFIXES):
        raise ValueError(f"A file of explanations ends in {', '.join(SUFFIXES)}, got {file}.")
    try:
        if file.suffix == ".json":
            if file.stat().st_size > LARGEST_LIST:
                raise ValueError(f"it has more than {LARGEST_LIST:,} bytes")
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, list):
                raise ValueError("it holds no list")
            yield from content
            return
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            while line := lines.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise ValueError(f"it has a line of more than {LONGEST_LINE:,} bytes")
                if line.strip():
                    yield json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None


def _label(row: Any, n_features: int) -> tuple[int, Label]:
    """The feature that an explanation is of, and the label that it is."""
    if not isinstance(row, dict) or not isinstance(row.get("description"), str):
        raise ValueError("an explanation is an object with a 'description'")
    index, text = row.get("index"), " ".join(row["description"].split())
    if not re.fullmatch(r"\d{1,18}", str(index)) or int(str(index)) >= n_features:
        raise ValueError(f"'index' must be below {n_features}, got {index!r}")
    if not 0 < len(text) <= LONGEST_TEXT:
        raise ValueError(f"'description' must have 1 to {LONGEST_TEXT:,} characters")
    names = (row.get(key) for key in ("explanationModelName", "typeName"))
    known = ", ".join(name[:100] for name in names if isinstance(name, str) and name)
    kept = {key: row[key] for key in ("modelId", "layer") if isinstance(row.get(key), str)}
    return int(str(index)), Label(text, f"neuronpedia: {known or 'unknown'}", settings=kept)
