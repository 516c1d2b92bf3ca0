"""What went wrong between us and the Hugging Face Hub, in words that say what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG_IN = "`hf auth login`, or the environment variable HF_TOKEN, logs in"


@contextmanager
def explained(repo: str, revision: str | None = None, push: bool = False) -> Iterator[None]:
    """Turn the client's errors in the block, which pulls or pushes, into Python's own.

    `FileNotFoundError`: no such repository, for this user. `PermissionError`: gated, disabled, a
    token that is not accepted or may not write. `ValueError`: no such revision. `ConnectionError`:
    offline, or the Hub cannot be reached. `OSError`: no space left, or anything else that it said.
    """
    try:
        yield
    except (OSError, RuntimeError, *network_errors()) as error:
        # What fails in the middle of an upload comes wrapped.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        found = _explain(cause, repo, revision, push)
        if found is cause:
            raise
        raise found from None  # the client's own chain is some hundred lines


def network_errors() -> tuple[type[Exception], ...]:
    """What the client raises where no server answers; its HTTP library depends on its version."""
    from huggingface_hub import errors

    return errors.OfflineModeIsEnabled, errors.HfHubHTTPError.__mro__[1]


def is_unreachable(error: BaseException) -> bool:
    """Whether the error means that no answer came, or none but that the Hub is out of order."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, network_errors())


def _explain(error: Any, repo: str, revision: str | None, push: bool) -> Exception:
    from huggingface_hub import constants, errors

    at = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{repo} is gated: accept its conditions at {at}/{repo}, with the account of your "
            f"token. {LOG_IN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{repo} has no revision {revision!r}{_revisions(repo)}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_seen(error, repo)
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, repo)
    if push and isinstance(error, network_errors()):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _first_line(error)
        return ConnectionError(f"Nothing was committed: {at} cannot be reached ({why}).")
    if isinstance(error, (errors.LocalEntryNotFoundError, *network_errors())):
        return unreachable(error, repo, revision)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        cache = Path(constants.HF_HUB_CACHE)
        free = shutil.disk_usage(cache if cache.exists() else cache.anchor).free
        return OSError(
            errno.ENOSPC,
            f"No space is left for the files of {repo}: {free:,} bytes are free at {cache}. "
            "Remove what is not needed, `hf cache ls`, or set HF_HOME to another disk",
        )
    return error


def unreachable(error: BaseException, repo: str, revision: str | None) -> ConnectionError:
    """No answer, and no whole copy in the cache."""
    from huggingface_hub import constants, errors

    what = f"{repo}{f' at {revision!r}' if revision else ''}"
    if constants.HF_HUB_OFFLINE:
        return ConnectionError(
            f"{what} is not in the cache, at least not whole, and HF_HUB_OFFLINE forbids to fetch "
            f"it. Load it once with HF_HUB_OFFLINE=0. The cache is {constants.HF_HUB_CACHE}."
        )
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    return ConnectionError(
        f"{constants.ENDPOINT} cannot be reached or broke off, and {what} is not in the cache, at "
        "least not whole. Files that arrived are kept: try again with a network. "
        f"({_first_line(cause or error)})"
    )


def _revisions(repo: str) -> str:
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_repo_refs(repo)
    except (OSError, *network_errors()):
        return ""
    names = [ref.name for ref in (*found.branches, *found.tags)]
    return f"; there are {names} and the commits" if names else ""


def _not_seen(error: Any, repo: str) -> FileNotFoundError:
    """Private and missing look the same to those who may not see; who asked tells them apart."""
    from huggingface_hub import constants

    if error.response.status_code == 401:
        return FileNotFoundError(
            f"{constants.ENDPOINT} shows no repository {repo} to those who are not logged in: it "
            f"does not exist, or it is private. Check the name; if it is private, {LOG_IN}."
        )
    return FileNotFoundError(
        f"{constants.ENDPOINT} shows no repository {repo} to the account of your token: it does "
        "not exist or, if it is of somebody else, it may be private. Check the name, or ask its "
        "owner for access."
    )


def _answered(error: Any, repo: str) -> OSError:
    status, said = error.response.status_code, error.server_message or _first_line(error)
    asked = error.response.request
    if status == 401 and "authorization" not in asked.headers:
        if asked.method != "POST":
            return _not_seen(error, repo)
        return PermissionError(f"Only who is logged in can push. {LOG_IN}.")
    if status == 401:
        return PermissionError(f"The Hub does not accept your token ({said}). {LOG_IN}.")
    if status == 403:
        return PermissionError(
            f"Your token may not do this with {repo} ({said}). It must be of an account with "
            f"access, and be allowed to write to push. {LOG_IN}."
        )
    if status == 429:
        return OSError(f"The Hub has had too many requests; wait some minutes ({said}).")
    return OSError(f"The Hub answered {status} to a request for {repo}: {said}")


def _first_line(error: BaseException) -> str:
    text = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
