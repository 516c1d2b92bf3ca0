"""What is answered to which request, and that nothing asked can break the server."""

import asyncio
import json
import random

import pytest
from safetensors.numpy import load

from mlxterp.sae.dashboard.asked import MOST_BYTES
from mlxterp.sae.dashboard.build import build_bundle, compared
from mlxterp.sae.dashboard.live import Live
from mlxterp.sae.dashboard.pages import page_directory
from mlxterp.sae.dashboard.server import application
from mlxterp.sae.similarity.matching import match
from tests.sae.circuits.examples import over_prompt
from tests.sae.dashboard.bundles import NASTY, collected

testclient = pytest.importorskip("starlette.testclient")

HERE = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def bundle(model):
    data, other = collected(model), collected(model, n_features=30)
    beside = compared("other", match(data.coder, other.coder), build_bundle(other))
    return build_bundle(data, circuits=[over_prompt()], comparisons=[beside])


@pytest.fixture(scope="module")
def app(bundle, model):
    data = collected(model)
    live = Live(data.coder, model, data)
    return application(bundle, live, "127.0.0.1")


@pytest.fixture(scope="module")
def client(app):
    return testclient.TestClient(app, HERE, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def offline(bundle):
    return testclient.TestClient(application(bundle, None, "127.0.0.1"), HERE)


def test_the_page_is_at_the_root(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.text == page_directory().joinpath("index.html").read_text("utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


def test_meta_says_what_can_be_asked(client, offline, bundle):
    live = client.get("/api/meta").json()["live"]
    assert live["text"] and live["steer"] and live["labels"] and live["together"] == "exact"
    assert live["modes"][0] == "add" and live["limits"]["max_tokens"] == 256
    found = offline.get("/api/meta").json()
    assert not found["live"]["text"] and found["live"]["together"] == "listed"
    assert {k: v for k, v in found.items() if k != "live"} == json.loads(json.dumps(bundle.meta()))


def test_data_are_those_of_the_bundle(client, bundle):
    assert client.get("/api/features/7").json() == bundle.feature(7)
    assert client.get("/api/strings").json()["strings"] == list(bundle.strings)
    assert client.get("/api/circuits/0").json() == bundle.circuits[0]
    table = load(client.get("/api/table").content)
    assert table["firing_rates"].tolist() == bundle.table["firing_rates"].tolist()
    comparison = bundle.comparisons[0]
    assert client.get("/api/compare/0").json() == comparison.to_dict()
    partners = load(client.get("/api/compare/0/table").content)["partners"]
    assert partners.tolist() == comparison.arrays["partners"].tolist()
    other = comparison.bundle
    assert client.get("/api/others/0/features/3").json() == other.feature(3)
    assert client.get("/api/others/0/meta").json()["coder"]["n_features"] == 30
    assert client.get("/api/others/0/strings").json()["strings"] == list(other.strings)
    assert client.get("/api/others/0/labels").json() == {"labels": {}}
    assert len(load(client.get("/api/others/0/table").content)["means"]) == 30


def test_nasty_tokens_arrive_as_text(client, bundle):
    content = client.get("/api/strings").content
    assert content.isascii() and b"\\u2028" in content.replace(b"\\\\", b"\\")
    strings = client.get("/api/strings").json()["strings"]
    joined = "".join(strings)
    for character in "\u2028\u2029\u202e\x00\x1b\n":
        assert character not in joined
    assert any("م" in text for text in strings) and "🙂" in joined


@pytest.mark.parametrize(
    "path",
    ["/api/features/40", "/api/features/-1", "/api/features/1.0", "/api/features/x",
     "/api/features/٣", "/api/features/" + "9" * 400, "/api/circuits/1", "/api/compare/1",
     "/api/others/1/meta", "/api/others/0/secrets", "/api/others/0/features/30", "/api", "/api/",
     "/api/nothing", "/nothing.js", "/api/features/1/2"],
)  # fmt: skip
def test_what_there_is_not_is_not_found(client, path):
    found = client.get(path)
    assert found.status_code == 404 and found.json()["error"]


@pytest.mark.parametrize(
    "path",
    ["/../bundle.py", "/%2e%2e/bundle.py", "/..%2fbundle.py", "//etc/passwd", "/%2fetc/passwd",
     "/....//bundle.py", "/./index.html", "/vendor/../../bundle.py", "/%00", "/index.html%00.js",
     "/\\..\\bundle.py", "/__init__.py", "/..%5cbundle.py", "/index.html/"],
)  # fmt: skip
def test_no_path_leads_out_of_the_page(app, path):
    status, content = asyncio.run(ask(app, "GET", path.encode()))
    assert status == 404 and b"import" not in content


def test_a_link_out_of_the_page_is_no_way_either(client, tmp_path, monkeypatch):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("page")
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr("mlxterp.sae.dashboard.pages.page_directory", lambda: tmp_path / "page")
    assert client.get("/index.html").text == "page"
    assert client.get("/../secret.txt").status_code == 404


def test_methods_and_types_are_those_that_there_are(client):
    assert client.post("/api/meta").status_code == 405
    assert client.get("/api/text").status_code == 404
    assert client.delete("/api/labels/1").status_code == 405
    content = json.dumps({"text": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        found = client.post("/api/text", content=content, headers={"content-type": kind})
        assert found.status_code == 415 and found.json()["error"]
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/api/text", content=content, headers=kind).status_code == 200


def test_large_bodies_are_refused_before_they_are_read_whole(app):
    read = 0

    async def receive():
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b" " * 65_536, "more_body": read < 20}

    status, _ = asyncio.run(ask(app, "POST", b"/api/text", receive=receive))
    assert status == 413 and read <= MOST_BYTES // 65_536 + 1


def test_a_body_that_is_cut_short_is_no_failure(app, caplog):
    async def receive():
        return {"type": "http.disconnect"}

    status, content = asyncio.run(ask(app, "POST", b"/api/text", receive=receive))
    assert status == 400 and b"cut short" in content and not caplog.text


def test_foreign_pages_get_nothing(client):
    for headers in ({"host": "evil.com"}, {"origin": "http://evil.com"}):
        for method, path in (("GET", "/api/meta"), ("POST", "/api/text"), ("GET", "/")):
            assert client.request(method, path, headers=headers).status_code == 403


def test_a_text_is_analysed(client):
    found = client.post("/api/text", json={"text": "def f(x):", "features": [2]}).json()
    assert len(found["tokens"]) == len(found["by_token"]) and found["pinned"][0]["id"] == 2
    refused = client.post("/api/text", json={"text": "a", "rank_by": "attribution", "position": 50})
    assert refused.status_code == 400 and "position" in refused.json()["error"]


def test_a_generation_is_streamed(client):
    asked = {"prompt": "def f(x):", "features": [{"id": 2, "strength": 3}], "max_tokens": 4}
    found = client.post("/api/steer", json=asked)
    assert found.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in found.text.strip().split("\n\n")]
    assert {event[0] for event in events[:-1]} == {"event: piece"} and events[-1][0] == "event: end"
    texts = json.loads(events[-1][1].removeprefix("data: "))
    pieces = [json.loads(event[1].removeprefix("data: ")) for event in events[:-1]]
    for side in ("plain", "steered"):
        assert texts[side] == "".join(p["text"] for p in pieces if p["side"] == side)


def test_a_generation_that_fails_says_so(client, app, monkeypatch, caplog):
    def broken(self, asked):
        def pieces():
            yield type("Piece", (), {"text": "a"})
            raise RuntimeError("secret")

        return {"plain": pieces()}

    monkeypatch.setattr(Live, "_streams", broken)
    asked = {"prompt": "a", "features": [{"id": 2}]}
    found = client.post("/api/steer", json=asked).text
    assert found.strip().split("\n\n")[-1].startswith("event: error") and "secret" not in found
    assert "secret" in caplog.text


def test_what_breaks_inside_is_logged_and_not_told(client, bundle, monkeypatch, caplog):
    monkeypatch.setattr(type(bundle), "feature", lambda self, i: 1 / 0)
    found = client.get("/api/features/1")
    assert found.status_code == 500 and "zero" not in found.text and "zero" in caplog.text


def test_co_occurrences_are_exact_with_data_and_listed_without(client, offline):
    assert client.post("/api/together", json={"features": [1, 2]}).json()["exact"]
    assert not offline.post("/api/together", json={"features": [1, 2]}).json()["exact"]


@pytest.mark.parametrize("path", ["/api/text", "/api/steer"])
def test_what_needs_a_model_says_so(offline, path):
    found = offline.post(path, json={"text": "a"})
    assert found.status_code == 404 and "model" in found.json()["error"]


def test_labels_are_set_and_removed(client, bundle):
    for text in NASTY:
        put = client.put("/api/labels/9", json={"text": text})
        found = client.get("/api/labels")
        assert put.status_code == 200 and found.json()["labels"]["9"] == put.json()["label"]
        assert "<script" not in text or put.json()["label"]["text"] == text
    assert bundle.labels[9].source == "user"
    assert client.put("/api/labels/9", json={"text": ""}).json() == {"label": None}
    assert client.put("/api/labels/9", json={"text": " "}).json() == {"label": None}
    assert client.get("/api/labels").json() == {"labels": {}}
    assert client.put("/api/labels/40", json={"text": "a"}).status_code == 404


def test_a_label_that_cannot_be_written_is_told(client, bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(bundle.labels, "path", tmp_path / "file" / "labels.json")
    found = client.put("/api/labels/9", json={"text": "a"})
    assert found.status_code == 503 and "label" in found.json()["error"]


async def ask(app, method, path, body=b"", headers=None, receive=None):
    """The status and the body of an answer to a request that no client would make."""
    if headers is None:
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    given = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    sent = []

    async def one():
        return given.pop(0) if given else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path.decode("latin-1"), "raw_path": path, "root_path": "",
        "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "server": None,
    }  # fmt: skip
    await app(scope, receive or one, send)
    content = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], content


def test_ten_thousand_malformed_requests_get_an_error_each(app, client):
    rng = random.Random(0)
    bodies = [
        b'{"text": "a", "top_k": 3}', b'{"prompt": "a", "features": [{"id": 1}]}',
        b'{"features": [1, 2]}', b'{"text": "label"}', b"",
    ]  # fmt: skip
    paths = [
        b"/api/text", b"/api/steer", b"/api/together", b"/api/labels/3", b"/api/features/3", b"/",
        b"/api/others/0/features/3", b"/api/compare/0", b"/index.html",
    ]  # fmt: skip

    def mutated(data: bytes) -> bytes:
        data = bytearray(data or b"x")
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        return bytes(data)

    async def attack() -> dict[int, int]:
        found: dict[int, int] = {}
        for i in range(10_000):
            # All but what goes to the model as it is asked for, which takes its time.
            method, path = (
                rng.choice(["GET", "POST", "POST", "PUT", "HEAD", "X"]),
                rng.choice(paths),
            )
            path = mutated(path) if i % 3 == 0 else path
            data = mutated(rng.choice(bodies)) if i % 3 else b'{"text": 3}'
            if data in bodies or method == "PUT":
                data = b"{" + data
            status, content = await ask(app, method, path, data)
            assert status < 400 or method == "HEAD" or json.loads(content)["error"]
            found[status] = found.get(status, 0) + 1
        return found

    found = asyncio.run(attack())
    assert set(found) <= {200, 400, 404, 405}, found
    assert found[400] > 500 and found[404] > 500 and found[405] > 500
    assert client.get("/api/features/3").status_code == 200
