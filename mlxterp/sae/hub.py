"""Coders on the Hugging Face Hub, through its own client: its cache, its environment variables.

`HF_TOKEN` or `hf auth login` says who asks, `HF_HUB_OFFLINE` that only the cache is used,
`HF_ENDPOINT` where the Hub is, and `HF_HOME` where the cache is.
"""

from __future__ import annotations

import glob
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from mlxterp.sae.bound import FEATURES, BoundCoder
from mlxterp.sae.coder import MARKER
from mlxterp.sae.files import Contents, write_directory
from mlxterp.sae.hub_card import CARD_FILE, FIGURE_FILE, HUB_NAME, figure, model_card, public_name
from mlxterp.sae.hub_errors import explained, is_unreachable, network_errors, unreachable
from mlxterp.sae.hub_files import ARRAYS, FACTS, Choice, choose
from mlxterp.sae.labels.labels import LABELS_FILE

PART = re.compile(r"\w[\w.+=, -]*")


def is_name(path: str | Path) -> bool:
    """Whether a path that does not exist is meant as the name of a repository, `user/name`."""
    if not isinstance(path, str) or path.endswith(".mlx") or Path(path).exists():
        return False
    return HUB_NAME.fullmatch(path) is not None


def pull(
    repo: str,
    revision: str | None = None,
    subfolder: str | None = None,
    *,
    features: bool = False,
    token: str | None = None,
) -> Path:
    """The place, in the Hub's cache, of the files of one coder of a repository; those that are not
    there yet are fetched.

    `revision` is a branch, tag or commit. `subfolder` is the directory of the coder, or its file,
    and is needed where the repository holds several; `features` also fetches what was collected.
    Only the coder's own files are fetched. A connection that breaks is taken up again where it
    broke; of a call that is cut off, whole files stay. Offline, the copy in the cache serves.

    Raises what `hub_errors.explained` says, and `ValueError` for a name that is none, and for a
    subfolder without a coder or with several.
    """
    from huggingface_hub import snapshot_download

    check_name(repo)
    with explained(repo, revision):
        names, online = _names(repo, revision, token)
        chosen = choose(repo, names, subfolder, features)
        exact, around = [glob.escape(name) for name in chosen.files], None
        if not online and not features:
            exact, around = _whole(chosen, exact)
        root = snapshot_download(
            repo,
            revision=revision,
            token=token,
            local_files_only=not online,
            allow_patterns=exact,
            ignore_patterns=around,
        )
    return Path(root) / chosen.place


def push(
    coder: BoundCoder,
    contents: Contents,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    card: bool = True,
) -> str:
    """Upload a coder, whose files are `contents`, as one commit, and return the address of that.

    The repository, and the branch `revision`, are made where there are none yet; `private` says
    who may see a new one. With `card` a `README.md` is written from what the coder knows, with a
    figure where matplotlib is installed. An older coder there is replaced whole, other files stay.
    Raises what `hub_errors.explained` says, and `ValueError` for a name that is none, and where
    `private` is asked for and the repository is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_name(repo)
    place = _checked(subfolder)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_directory(Path(scratch) / "coder", _public(contents), marker=MARKER)
        if card:
            _write_card(directory, coder, repo, revision, place.rstrip("/"), license)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        added = {place + path.relative_to(directory).as_posix(): path for path in files}
        with explained(repo, revision, push=True):
            _prepare(api, repo, private, revision)
            commit = api.create_commit(
                repo,
                [
                    *_stale(api, repo, revision, place, set(added), card),
                    *(CommitOperationAdd(name, str(path)) for name, path in added.items()),
                ],
                commit_message=commit_message or f"A coder of {coder.reads}",
                revision=revision,
            )
    return commit.commit_url


def _public(contents: Contents) -> Contents:
    """The files without the directories of this machine: those of the model's name."""
    metadata = contents["metadata.json"]
    model = metadata["model"]
    if not model.get("name"):
        return contents
    named = {**model, "name": public_name(model["name"])}
    return {**contents, "metadata.json": {**metadata, "model": named}}


def check_name(repo: str) -> None:
    """Raises `ValueError` for what cannot be the name of a repository."""
    if not isinstance(repo, str) or not HUB_NAME.fullmatch(repo):
        raise ValueError(f"A repository on the Hub is 'user/name', got {repo!r}.")


def _names(repo: str, revision: str | None, token: str | None) -> tuple[list[str], bool]:
    """The names of all files, and whether they are those on the Hub: those in the cache where it
    cannot be reached."""
    from huggingface_hub import HfApi, constants

    try:
        found = HfApi(token=token).model_info(repo, revision=revision)
    except (OSError, *network_errors()) as error:
        if not is_unreachable(error):
            raise
        names = _cached(repo, revision, error)
        if not constants.HF_HUB_OFFLINE:
            warnings.warn(f"{repo} is from the cache: the Hub cannot be reached.", stacklevel=5)
        return names, False
    names = [file.rfilename for file in found.siblings or ()]
    return names, True


def _cached(repo: str, revision: str | None, cause: BaseException) -> list[str]:
    """The names of the files of the copy in the cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        root = Path(
            snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True)
        )
    except errors.LocalEntryNotFoundError:
        raise unreachable(cause, repo, revision) from None
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _whole(chosen: Choice, exact: list[str]) -> tuple[list[str], list[str] | None]:
    """Patterns of the files that are to be in the cache, and of others that are not, of a coder of
    which only a part may be there; the client knows what the repository has."""
    if chosen.place.endswith(ARRAYS):
        return exact, None
    start = f"{glob.escape(chosen.place)}/" if chosen.place else ""
    return [f"{start}*{suffix}" for suffix in (*ARRAYS, *FACTS)], [f"{start}*/*"]


def _checked(subfolder: str | None) -> str:
    """A subfolder for files, with a slash at its end; raises `ValueError` for one that is not below
    the top."""
    if not subfolder:
        return ""
    parts = subfolder.strip("/").split("/")
    if not all(PART.fullmatch(part) for part in parts):
        raise ValueError(f"subfolder must be names with slashes between them, got {subfolder!r}.")
    return "/".join(parts) + "/"


def _prepare(api: Any, repo: str, private: bool | None, revision: str | None) -> None:
    """Make repository and branch where there are none."""
    api.create_repo(repo, private=private, exist_ok=True)
    if private and api.model_info(repo).private is False:
        raise ValueError(
            f"{repo} is public, and private=True makes only new repositories private. Nothing was "
            "uploaded: change it in its settings, or push to another name."
        )
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _stale(
    api: Any, repo: str, revision: str | None, place: str, added: set[str], card: bool
) -> list[Any]:
    """What deletes the files of an older coder that the new one does not have."""
    from huggingface_hub import CommitOperationDelete

    found = []
    for name in api.list_repo_files(repo, revision=revision):
        own = name[len(place) :] if name.startswith(place) else ""
        if own == LABELS_FILE or own.startswith(f"{FEATURES}/") or (card and own == FIGURE_FILE):
            found.append(name)
    return [CommitOperationDelete(name) for name in sorted(set(found) - added)]


def _write_card(
    directory: Path,
    coder: BoundCoder,
    repo: str,
    revision: str | None,
    subfolder: str,
    license: str | None,
) -> None:
    drawn = figure(coder)
    if drawn is not None:
        drawn.savefig(directory / FIGURE_FILE, dpi=120)
    text = model_card(
        coder,
        repo,
        revision=revision,
        subfolder=subfolder or None,
        license=license,
        figure=FIGURE_FILE if drawn is not None else None,
    )
    (directory / CARD_FILE).write_text(text, encoding="utf-8")
