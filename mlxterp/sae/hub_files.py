"""Which files of a repository with one coder, or with hundreds, make the coder that is wanted."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

ARRAYS = (".safetensors", ".npz", ".pt", ".pth")
FACTS = (".json", ".yaml", ".yml")
FEATURES = "features"
FINAL = "checkpoints/final.safetensors"  # where one format has its arrays, below its facts
OF_DIRECTORIES = ("ae", "sae_weights")  # pickled files whose format reads the directory of them
LISTED = 8  # names in an error
PARTS_OF_ONE = re.compile(r"W_(enc|dec)_#\.safetensors")  # the layers of one cross-layer transcoder
OF_LANGUAGE_MODELS = re.compile(
    r"tokenizer.*\.(json|model)|generation_config\.json|.+\.index\.json|adapter_config\.json"
)


@dataclass(frozen=True)
class Choice:
    """The coder at `place`, a directory of the repository (`""` for all of it) or one file, and the
    names of its `files`."""

    place: str
    files: tuple[str, ...]


def choose(repo: str, files: Iterable[str], subfolder: str | None, features: bool) -> Choice:
    """The files of the coder in a `subfolder`, or of the only one that there is.

    Without a `subfolder` a coder at the top is taken, or the only one anywhere; a `subfolder` may
    also be that of one coder further down, or a file where a directory holds a coder in each. With
    `features` what was collected on our own coders is among the files. Raises `ValueError`, with
    the nearest names, where there is none or more than one.
    """
    held = _Held.of(files)
    if not held.arrays:
        what = "a language model" if held.models else "no coder"
        raise ValueError(f"{repo} holds {what}: it has no arrays of a coder ({_list(ARRAYS)}).")
    wanted = (subfolder or "").strip("/")
    below = [place for place in held.places if not wanted or place.startswith(f"{wanted}/")]
    if wanted in held.places or wanted in held.arrays:
        place = wanted
    elif len(below) == 1:
        place = below[0]
    elif wanted and wanted in map(_home, held.arrays):
        place = wanted  # several files that may be parts of one coder, as it is named
    else:
        raise ValueError(_unclear(repo, held.places, below, wanted))
    if place in held.arrays:
        return Choice(place, _of_file(held, place))
    return Choice(place, _of_folder(held, place, features))


@dataclass(frozen=True)
class _Held:
    """All files, those with arrays of coders, and the places of coders: directories, or files that
    stand for themselves, as where a directory has a numbered one for each coder."""

    files: tuple[str, ...]
    arrays: frozenset[str]
    places: tuple[str, ...]
    models: bool

    @classmethod
    def of(cls, files: Iterable[str]) -> _Held:
        known = tuple(files)
        models = {
            _folder(name)
            for name in known
            if OF_LANGUAGE_MODELS.fullmatch(PurePosixPath(name).name)
        }
        found = [name for name in known if name.endswith(ARRAYS) and _folder(name) not in models]
        found = [name for name in found if not _is_beside(name)]
        places = {}
        for folder in dict.fromkeys(map(_home, found)):
            inside = [name for name in found if _home(name) == folder]
            apart = _is_many(inside) or (len(inside) == 1 and _stands_alone(inside[0]))
            places |= dict.fromkeys(inside if apart else [folder])
        return cls(known, frozenset(found), tuple(sorted(places, key=_natural)), bool(models))


def _folder(name: str) -> str:
    folder, _, _ = name.rpartition("/")
    return folder


def _home(name: str) -> str:
    """The directory of the coder that a file with arrays is of."""
    return name[: -len(FINAL)].rstrip("/") if f"/{name}".endswith(f"/{FINAL}") else _folder(name)


def _is_beside(name: str) -> bool:
    """Whether a file holds no coder but what was collected on one, or a step of its training."""
    parts = PurePosixPath(name).parts[:-1]
    return FEATURES in parts or ("checkpoints" in parts and not f"/{name}".endswith(f"/{FINAL}"))


def _is_many(names: Sequence[str]) -> bool:
    alike = Counter(_without_digits(name) for name in names)
    return any(
        n > 1 and not PARTS_OF_ONE.fullmatch(PurePosixPath(name).name) for name, n in alike.items()
    )


def _stands_alone(name: str) -> bool:
    """Whether the file by itself is what its format reads, and not the directory."""
    path = PurePosixPath(name)
    return path.suffix in (".pt", ".pth") and path.stem not in OF_DIRECTORIES


def _without_digits(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _of_folder(held: _Held, folder: str, features: bool) -> tuple[str, ...]:
    start = f"{folder}/" if folder else ""
    inside = [
        name
        for name in held.files
        if _folder(name) == folder and (name in held.arrays or name.endswith(FACTS))
    ]
    inside += [name for name in held.arrays if name == f"{start}{FINAL}"]
    if features:
        inside += [name for name in held.files if name.startswith(f"{start}{FEATURES}/")]
    return tuple(inside)


def _of_file(held: _Held, file: str) -> tuple[str, ...]:
    """The file, and the facts beside it but for those that are numbered for other coders."""
    folder, stem = _folder(file), PurePosixPath(file).name.partition(".")[0]
    facts = [n for n in held.files if _folder(n) == folder and n.endswith(FACTS)]
    alike = Counter(map(_without_digits, facts))
    own = [n for n in facts if alike[_without_digits(n)] == 1 or _is_of(n, stem)]
    return (file, *own)


def _is_of(name: str, stem: str) -> bool:
    return re.match(rf"{re.escape(stem)}(?!\d)", PurePosixPath(name).name) is not None


def _unclear(repo: str, places: Sequence[str], below: Sequence[str], wanted: str) -> str:
    if below:
        where = f" in {wanted!r}" if wanted else ""
        return (
            f"{repo} holds {len(below):,} coders{where}: name one of them, such as "
            f"subfolder={below[0]!r}. There are {_list(below)}."
        )
    near = difflib.get_close_matches(wanted, places, n=LISTED, cutoff=0.4) or places
    what = "the nearest of" if near is not places else "there are"
    return f"{repo} has no coder in subfolder={wanted!r}; {what} {_list(near, len(places))}."


def _list(names: Sequence[str], n: int | None = None) -> str:
    """Up to so many names as is good for an error, and how many more there are of `n`."""
    shown = [repr(name) if name else "the top" for name in names[:LISTED]]
    more = (len(names) if n is None else n) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
