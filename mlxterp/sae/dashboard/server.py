"""The application behind a dashboard: the files of the page, the bundle, and a live model."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, get_args

from mlxterp.sae.dashboard.asked import (
    LIMITS,
    MOST_BYTES,
    Refused,
    chosen_features,
    label_text,
    steer_request,
    text_request,
)
from mlxterp.sae.dashboard.bundle import Bundle, Comparison
from mlxterp.sae.dashboard.guard import Application, Guard
from mlxterp.sae.dashboard.live import Live
from mlxterp.sae.dashboard.pages import INDEX, TYPES, offline, page_files, to_json
from mlxterp.sae.dashboard.strings import label_entry
from mlxterp.sae.features.analysis import RankBy
from mlxterp.sae.labels.labels import USER
from mlxterp.sae.similarity.directions import needed
from mlxterp.sae.steering.edits import Mode

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

BINARY = "application/octet-stream"


def application(
    bundle: Bundle, live: Live | None, host: str, hosts: Iterable[str] = ()
) -> Application:
    """An ASGI application; raises `ImportError` where Starlette is missing."""
    applications = needed("starlette.applications", "starlette", "serve")
    routing = needed("starlette.routing", "starlette", "serve")
    errors = needed("starlette.exceptions", "starlette", "serve")
    answers = _Answers(bundle, live)
    routes = [
        routing.Route(path, answer, methods=[method])
        for method, path, answer in (
            ("GET", "/api/meta", answers.meta),
            ("GET", "/api/table", answers.table),
            ("GET", "/api/strings", answers.strings),
            ("GET", "/api/labels", answers.labels),
            ("PUT", "/api/labels/{i}", answers.set_label),
            ("GET", "/api/features/{i}", answers.feature),
            ("GET", "/api/circuits/{i}", answers.circuit),
            ("GET", "/api/compare/{i}", answers.comparison),
            ("GET", "/api/compare/{i}/table", answers.matching),
            ("GET", "/api/others/{i}/{what}", answers.other),
            ("GET", "/api/others/{i}/features/{j}", answers.other_feature),
            ("POST", "/api/together", answers.together),
            ("POST", "/api/text", answers.text),
            ("POST", "/api/steer", answers.steer),
            ("GET", "/", answers.index),
            ("GET", "/{name:path}", answers.file),
        )
    ]
    handlers = {Refused: _error, errors.HTTPException: _http_error, Exception: _failure}
    inner = applications.Starlette(routes=routes, exception_handlers=handlers)
    inner.router.redirect_slashes = False
    return Guard(inner, host, hosts)


class _Answers:
    """An answer to each kind of request."""

    def __init__(self, bundle: Bundle, live: Live | None):
        self._bundle, self._live = bundle, live
        self._table = bundle.table_bytes()

    async def index(self, request: Request) -> Response:
        return _file(INDEX)

    async def file(self, request: Request) -> Response:
        return _file(request.path_params["name"])

    async def meta(self, request: Request) -> Response:
        return _json(self._bundle.meta() | {"live": self._abilities()})

    def _abilities(self) -> dict[str, Any]:
        live = self._live
        exact = live is not None and live.data is not None
        return offline() | {
            "text": live is not None,
            "steer": live is not None,
            "labels": True,
            "together": "exact" if exact else "listed",
            "modes": [*get_args(Mode)],
            "rank_by": [*get_args(RankBy)],
            "maximum_known": exact,
            "limits": LIMITS,
        }

    async def table(self, request: Request) -> Response:
        return _answer(self._table, BINARY)

    async def strings(self, request: Request) -> Response:
        return _json({"strings": self._bundle.strings})

    async def labels(self, request: Request) -> Response:
        return _json({"labels": self._bundle.label_entries()})

    async def set_label(self, request: Request) -> Response:
        feature_id = _index(request, "i", self._bundle.n_features, "feature")
        text, labels = label_text(await _body(request)), self._bundle.labels
        try:
            if text:
                labels.set(feature_id, text)
            elif feature_id in labels:
                labels.remove(feature_id, USER)
        except OSError as error:
            raise Refused(503, f"The label cannot be written: {error.strerror}.") from None
        return _json({"label": label_entry(labels, feature_id)})

    async def feature(self, request: Request) -> Response:
        feature_id = _index(request, "i", self._bundle.n_features, "feature")
        return _json(self._bundle.feature(feature_id))

    async def circuit(self, request: Request) -> Response:
        circuits = self._bundle.circuits
        return _json(circuits[_index(request, "i", len(circuits), "circuit")])

    def _comparison(self, request: Request) -> Comparison:
        comparisons = self._bundle.comparisons
        return comparisons[_index(request, "i", len(comparisons), "comparison")]

    async def comparison(self, request: Request) -> Response:
        return _json(self._comparison(request).to_dict())

    async def matching(self, request: Request) -> Response:
        return _answer(self._comparison(request).table_bytes(), BINARY)

    async def other(self, request: Request) -> Response:
        other = self._comparison(request).bundle
        match request.path_params["what"]:
            case "meta":
                return _json(other.meta() | {"live": offline()})
            case "table":
                return _answer(other.table_bytes(), BINARY)
            case "strings":
                return _json({"strings": other.strings})
            case "labels":
                return _json({"labels": other.label_entries()})
        raise Refused(404, "There is no such thing.")

    async def other_feature(self, request: Request) -> Response:
        other = self._comparison(request).bundle
        return _json(other.feature(_index(request, "j", other.n_features, "feature")))

    async def together(self, request: Request) -> Response:
        features = chosen_features(await _body(request), self._bundle.n_features)
        exact = None if self._live is None else await self._live.together(features)
        return _json(self._bundle.together(features) if exact is None else exact)

    async def text(self, request: Request) -> Response:
        live = self._needed()
        asked = text_request(await _body(request), self._bundle.n_features)
        return _json(await live.analyze(asked))

    async def steer(self, request: Request) -> Response:
        responses, live = needed("starlette.responses", "starlette", "serve"), self._needed()
        asked = steer_request(await _body(request), self._bundle.n_features, live.unit)
        events = live.steer(asked)
        first = await anext(events)  # before the answer begins, so that it may be a refusal
        return responses.StreamingResponse(_stream(first, events), media_type="text/event-stream")

    def _needed(self) -> Live:
        if self._live is None:
            raise Refused(404, "There is no language model here: open the dashboard with one.")
        return self._live


async def _stream(first: Any, events: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Server-sent events."""
    yield _event(*first)
    try:
        async for event in events:
            yield _event(*event)
    except Refused as error:
        yield _event("error", {"error": str(error)})
    except Exception:
        logging.getLogger("mlxterp").exception("a generation of the dashboard failed")
        yield _event("error", {"error": "The generation failed."})


def _event(name: str, content: Any) -> bytes:
    return f"event: {name}\ndata: {to_json(content)}\n\n".encode()


async def _body(request: Request) -> bytes:
    """The body of a request, of bounded size and of the only type that no form can send."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "The body must be of type application/json.")
    requests = needed("starlette.requests", "starlette", "serve")
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MOST_BYTES:
                raise Refused(413, f"The body must have up to {MOST_BYTES} bytes.")
            parts.append(part)
    except requests.ClientDisconnect:
        raise Refused(400, "The body is cut short.") from None
    return b"".join(parts)


def _index(request: Request, name: str, n: int, what: str) -> int:
    text = request.path_params[name]
    known = text.isascii() and text.isdecimal() and len(text) <= 12 and int(text) < n
    if not known:
        raise Refused(404, f"There is no such {what}; there are {n}.")
    return int(text)


def _file(name: str) -> Response:
    path = page_files().get(name)
    if path is None:
        raise Refused(404, "There is no such file.")
    return _answer(path.read_bytes(), TYPES[path.suffix])


def _json(value: Any, status: int = 200) -> Response:
    return _answer(to_json(value).encode(), "application/json", status)


def _answer(content: bytes, media_type: str, status: int = 200) -> Response:
    from starlette.responses import Response

    return Response(content, status, media_type=media_type)


async def _error(request: Request, error: Any) -> Response:
    return _json({"error": str(error)}, error.status)


async def _http_error(request: Request, error: Any) -> Response:
    return _json({"error": str(error.detail)}, error.status_code)


async def _failure(request: Request, error: Exception) -> Response:
    logging.getLogger("mlxterp").error("a request of the dashboard failed", exc_info=error)
    return _json({"error": "Something went wrong here; the log has more."}, 500)
