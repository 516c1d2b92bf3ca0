"""Only pages of the server itself are answered."""

import asyncio

import pytest

from mlxterp.sae.dashboard.guard import Guard


async def inner(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"secret"})


def answer(headers, host="127.0.0.1", hosts=(), method="GET"):
    """The status, the headers and the body of an answer."""
    scope = {
        "type": "http", "method": method, "path": "/",
        "headers": [(n.encode(), v.encode("latin-1")) for n, v in headers],
    }  # fmt: skip
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(inner, host, hosts)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


OWN = [
    "127.0.0.1", "127.0.0.1:8080", "localhost:8080", "LOCALHOST:1", "[::1]:8080", "localhost",
]  # fmt: skip
FOREIGN = [
    "evil.com", "evil.com:8080", "127.0.0.1.evil.com", "localhost.evil.com", "evil-localhost", "",
    "192.168.1.4:8080", "[::2]", "127.0.0.1:8080:8080", "127.0.0.1@evil.com", "localhost/evil",
    " localhost", "localhost\t", "0.0.0.0", "127.0.0.1,evil.com", "localh\xf6st", "localhost:",
    "localhost:99999999", "[::1", "::1",
]  # fmt: skip


@pytest.mark.parametrize("host", OWN)
def test_the_servers_own_names_are_answered(host):
    assert answer([("host", host)])[::2] == (200, b"secret")
    assert answer([("host", host), ("origin", f"http://{host}")])[0] == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_refused(host):
    status, _, content = answer([("host", host)])
    assert status == 403 and b"secret" not in content


def test_one_name_must_be_given():
    assert answer([])[0] == 403
    assert answer([("host", "localhost"), ("host", "localhost")])[0] == 403
    assert answer([("host", "localhost"), ("host", "evil.com")])[0] == 403


@pytest.mark.parametrize(
    "origin",
    ["http://evil.com", "null", "http://localhost:8081", "http://localhost.evil.com:8080", "",
     "http://127.0.0.1:8080", "file://", "http://localhost:8080/", "localhost:8080"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_origins_are_refused(origin, method):
    asked = [("host", "localhost:8080"), ("origin", origin)]
    assert answer(asked, method=method)[0] == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "what?"])
def test_requests_that_a_browser_says_are_of_another_site_are_refused(site):
    asked = [("host", "localhost"), ("sec-fetch-site", site)]
    assert answer(asked)[0] == 403
    assert answer([*asked, ("sec-fetch-mode", "no-cors")])[0] == 403
    assert answer([*asked, ("sec-fetch-mode", "navigate")], method="POST")[0] == 403
    # A link to the page may be followed from anywhere.
    assert answer([*asked, ("sec-fetch-mode", "navigate")])[0] == 200


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_requests_of_the_page_itself_are_answered(site):
    assert answer([("host", "localhost"), ("sec-fetch-site", site)])[0] == 200


def test_a_server_for_others_goes_by_numbers_and_by_names_that_it_was_given():
    named = {"host": "0.0.0.0", "hosts": ["Lab.example"]}
    for host in ("192.168.1.4:8080", "lab.example", "[fe80::1]:8080", "localhost"):
        assert answer([("host", host)], **named)[0] == 200
    for host in ("evil.com", "lab.example.evil.com", "999.1.1.1"):
        assert answer([("host", host)], **named)[0] == 403


def test_every_answer_forbids_what_is_not_its_own():
    for asked in ([("host", "localhost")], [("host", "evil.com")]):
        headers = answer(asked)[1]
        policy = headers[b"content-security-policy"].decode()
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
        assert headers[b"x-content-type-options"] == b"nosniff"
        assert not [name for name in headers if name.startswith(b"access-control")]


def test_sockets_of_other_protocols_are_left_alone():
    reached: list[str] = []

    async def noted(scope, receive, send):
        reached.append(scope["type"])

    asyncio.run(Guard(noted, "127.0.0.1")({"type": "websocket"}, None, None))
    assert not reached
