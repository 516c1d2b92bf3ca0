"""A server in a thread of its own, so that notebooks and scripts go on."""

from __future__ import annotations

import atexit
import errno
import socket
import threading
import time
import warnings
from typing import Any

from mlxterp.sae.dashboard.guard import Application
from mlxterp.sae.similarity.directions import needed

SECONDS_TO_START, SECONDS_TO_STOP = 15.0, 5.0
CONNECTIONS = 128
HEADER_BYTES = 1 << 15


class Running:
    """An application that answers at `url` until `stop`.

    Where the port is taken another one is, with a warning. Raises `ValueError` for a port and a
    host that there is none of, and `ImportError` where uvicorn is missing.
    """

    def __init__(self, application: Application, host: str = "127.0.0.1", port: int = 8080):
        if type(port) is not int or not 0 <= port <= 65535:
            raise ValueError(f"port must be in [0, 65535], got {port!r}.")
        uvicorn = needed("uvicorn", extra="serve")
        self._socket = _bound(host, port)
        self.host, self.port = host, self._socket.getsockname()[1]
        config = uvicorn.Config(
            application, log_config=None, log_level="critical", access_log=False, lifespan="off",
            ws="none", http="h11", server_header=False, limit_concurrency=CONNECTIONS,
            h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=1,
            proxy_headers=False,
        )  # fmt: skip
        self._server: Any = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="mlxterp-dashboard", daemon=True
        )
        self._thread.start()
        atexit.register(self.stop)
        self._await_start()

    def _await_start(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"The server did not start at {self.url}.")
            time.sleep(0.01)

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    @property
    def is_alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Return when the server has been stopped."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # a join without an end would let no Ctrl-C through

    def stop(self) -> None:
        """End the server; what is being answered has a second to come to its end."""
        atexit.unregister(self.stop)
        self._server.should_exit = True
        self._thread.join(SECONDS_TO_STOP)
        self._socket.close()


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the port, or at a free one where that is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"host must be an address of this machine, got {host!r}: {error}"
        ) from None
    family, address = found[0], found[4]
    try:
        try:
            return _at_port(family, address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        made = _at_port(family, address, 0)
    except OSError as error:
        raise ValueError(f"{host!r}, port {port}, cannot be served: {error.strerror}.") from None
    own = made.getsockname()[1]
    warnings.warn(f"Port {port} is taken: the dashboard is at port {own}.", stacklevel=4)
    return made


def _at_port(family: int, address: Any, port: int) -> socket.socket:
    # Named, the protocol lets asyncio switch off Nagle's algorithm, which would delay each answer.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address[0], port, *address[2:]))
    except OSError:
        made.close()
        raise
    return made
