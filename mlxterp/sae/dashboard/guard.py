"""Keeps a local server from answering pages of other origins, and answers from being misused."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Callable[..., Awaitable[Any]], Callable[..., Awaitable[Any]]], Any]

LOCAL = ("127.0.0.1", "localhost", "::1")
AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9.-]{1,253}))(?::([0-9]{1,5}))?")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuses requests that name another host than the server's own, or come from a page of one.

    A page of another origin that has its name point here (DNS rebinding) sends that name as Host; a
    form or script of one sends its Origin. Hosts are those of this machine, those named, and on a
    server that others may reach any address given as a number, which no name can be bound to.
    """

    def __init__(self, application: Application, host: str, hosts: Iterable[str] = ()):
        self._application = application
        own = host.strip("[]").lower()
        self._hosts = {*LOCAL, own, *(name.lower() for name in hosts)}
        self._numbers = own not in LOCAL
        if self._numbers:
            self._hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        reason = self._refused(scope)
        if reason:
            await _refuse(reason, _with_headers(send))
        else:
            await self._application(scope, receive, _with_headers(send))

    def _refused(self, scope: Scope) -> str:
        found: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            found.setdefault(name.lower(), []).append(value.decode("latin-1"))
        hosts, origins = found.get(b"host", []), found.get(b"origin", [])
        if len(hosts) != 1 or not self._known(hosts[0]):
            return "This server does not go by that name."
        own = {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"}
        if any(origin.lower() not in own for origin in origins):
            return "Pages of other origins are not answered."
        sites = found.get(b"sec-fetch-site", [])
        navigates = found.get(b"sec-fetch-mode") == ["navigate"] and scope["method"] == "GET"
        if any(site not in ("same-origin", "none") for site in sites) and not navigates:
            return "Pages of other origins are not answered."
        return ""

    def _known(self, authority: str) -> bool:
        found = AUTHORITY.fullmatch(authority.lower())
        if found is None:
            return False
        name = found[1] or found[2]
        return name in self._hosts or (self._numbers and _is_number(name))


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Any) -> Any:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return sending


async def _refuse(reason: str, send: Any) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
