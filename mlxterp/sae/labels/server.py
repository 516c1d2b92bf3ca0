"""A labeller that is a server of chat completions, such as `mlx_lm.server`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlxterp.sae.labels.labelers import Answer, at_least, estimated_tokens, messages_of

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIED = frozenset({408, 409, 429, *range(500, 600)})  # statuses that may pass
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before trying again
LARGEST_ANSWER = 1 << 22  # bytes


class Server:
    """A server of chat completions as OpenAI's, such as `mlx_lm.server`.

    `base_url` is its address up to and with `/v1`. The key is `api_key`, or that in the environment
    as `OPENAI_API_KEY`, which is sent over https alone. A request that fails in a way that may pass
    is made up to `retries` times more, after 0.5 s, 1 s, 2 s, ... or as long as the server asks for
    (30 s at most). The server is waited for `timeout` seconds.

    `options` are more fields of a request, or others in the place of `max_tokens` and
    `temperature`; None leaves a field out. `name` stands for the labeller in its labels.
    """

    def __init__(
        self,
        base_url: str,
        model: str = "default_model",
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 2,
        concurrency: int = 4,
        max_tokens: int = 256,
        options: Mapping[str, Any] | None = None,
        name: str = "",
    ):
        address = urllib.parse.urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                f"base_url must be an address http://... or https://..., got {base_url!r}."
            )
        if timeout <= 0:
            raise ValueError(f"timeout must be > 0, got {timeout}.")
        self.base_url, self.model, self.timeout = base_url.rstrip("/"), model, timeout
        self.retries = at_least("retries", retries, 0)
        self.concurrency = at_least("concurrency", concurrency, 1)
        self.max_tokens = at_least("max_tokens", max_tokens, 1)
        self.name = name or f"{model} at {address.hostname}"
        self._options = dict(options or {})
        if api_key is None and address.scheme == "https":
            api_key = os.environ.get(KEY_VARIABLE)
        self._key = (api_key or "").strip()
        # An answer that points elsewhere must not get the key sent there, and a proxy of the
        # environment cannot reach this machine.
        is_here = address.hostname in ("localhost", "127.0.0.1", "::1")
        proxies = urllib.request.ProxyHandler({} if is_here else None)
        self._opener = urllib.request.build_opener(_NoRedirects, proxies)

    def ask(self, prompts: Sequence[str]) -> list[Answer]:
        """The answers in order, from `concurrency` requests at a time."""
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            return list(pool.map(self._answer, prompts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, prompt: str) -> Answer:
        for attempt in range(self.retries + 1):
            try:
                return self._request(prompt)
            except _Failure as failure:
                if not failure.may_pass or attempt == self.retries:
                    tries = f" ({attempt + 1} tries)" if attempt else ""
                    return Answer(error=self._without_key(f"{failure}{tries}"))
                time.sleep(min(LONGEST_WAIT, max(FIRST_WAIT * 2**attempt, failure.wait)))
        raise AssertionError

    def _request(self, prompt: str) -> Answer:
        body = {
            "model": self.model,
            "messages": messages_of(prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            **self._options,
        }
        body = {field: value for field, value in body.items() if value is not None}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions", json.dumps(body).encode(), headers
        )
        return _read_completion(self._read(request), prompt)

    def _read(self, request: urllib.request.Request) -> bytes:
        """What the server answers; raises `_Failure`."""
        end = time.monotonic() + self.timeout
        late = f"no answer within {self.timeout:g} s"
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                found = b""
                while part := response.read1(1 << 16):
                    found += part
                    if time.monotonic() > end:
                        raise _Failure(late, may_pass=True)
                    if len(found) > LARGEST_ANSWER:
                        raise _Failure(f"the answer has more than {LARGEST_ANSWER:,} bytes")
                if response.length:
                    raise _Failure("the answer is cut short", may_pass=True)
                return found
        except urllib.error.HTTPError as error:
            raise _refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Failure(late, may_pass=True) from None
            raise _Failure(f"not reachable: {reason}", may_pass=True) from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def __repr__(self) -> str:
        return f"Server({self.base_url!r}, {self.model!r}, concurrency={self.concurrency})"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


class _Failure(Exception):
    def __init__(self, reason: str, may_pass: bool = False, wait: float = 0.0):
        super().__init__(reason)
        self.may_pass, self.wait = may_pass, wait


def _refusal(error: urllib.error.HTTPError) -> _Failure:
    """What an answer with a status of failure says."""
    said = b""
    with error, contextlib.suppress(OSError, http.client.HTTPException):
        said = error.read(200)
    wait = error.headers.get("Retry-After") or ""
    return _Failure(
        f"status {error.code}: {said.decode(errors='replace') or error.reason}",
        may_pass=error.code in RETRIED,
        wait=float(wait) if wait.isascii() and wait.isdigit() else 0.0,
    )


def _read_completion(answer: bytes, prompt: str) -> Answer:
    """The text of the first choice; raises `_Failure` where the server wrote something else."""
    try:
        found = json.loads(answer)
        text = found["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        start = answer[:80].decode(errors="replace")
        raise _Failure(f"the server's answer is no chat completion: {start!r}") from None
    if not isinstance(text, str):
        raise _Failure(f"the server's answer has no text but {type(text).__name__}")
    usage = found.get("usage")
    counted = usage.get("total_tokens") if isinstance(usage, dict) else None
    if not isinstance(counted, int) or counted < 0:
        counted = estimated_tokens(prompt) + estimated_tokens(text)
    return Answer(text, n_tokens=counted)
