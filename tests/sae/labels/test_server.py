import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlxterp.loading import DEMO
from mlxterp.sae.labels import server as label_server
from mlxterp.sae.labels.labelers import Answer
from mlxterp.sae.labels.server import Server


def completion(text="label: x", **more) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}], **more}).encode()


class StandIn:
    """A server that answers every prompt as its first word says, and notes what it was asked."""

    def __init__(self):
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.running = self.most_running = 0
        stand_in, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    stand_in.asked[prompt] += 1
                    stand_in.bodies.append(body)
                    stand_in.headers.append(dict(self.headers))
                    stand_in.running += 1
                    stand_in.most_running = max(stand_in.running, stand_in.most_running)
                try:
                    getattr(self, prompt.split()[0])(prompt)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with lock:
                        stand_in.running -= 1

            def do_GET(self):
                stand_in.asked["GET"] += 1
                self._send(completion("redirected"))

            def _send(self, content, status=200, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def good(self, prompt):
                time.sleep(0.05)
                self._send(completion(f"label: {prompt}", usage={"total_tokens": 7}))

            def broken(self, prompt):
                self._send(b"out of memory", 500)

            def recovers(self, prompt):
                ok = stand_in.asked[prompt] == 3
                self._send(completion() if ok else b"busy", 200 if ok else 503)

            def limited(self, prompt):
                ok = stand_in.asked[prompt] == 2
                self._send(completion() if ok else b"", 200 if ok else 429, Retry_After="7")

            def refused(self, prompt):
                self._send(f"wrong key {self.headers['Authorization']}".encode(), 401)

            def stuck(self, prompt):
                self.send_response(500)
                self.send_header("Content-Length", "100")
                self.end_headers()
                time.sleep(0.6)

            def nested(self, prompt):
                self._send(b"[" * 200_000)

            def nonsense(self, prompt):
                self._send(b"<html>hello</html>")

            def empty(self, prompt):
                self._send(b'{"choices": []}')

            def textless(self, prompt):
                self._send(completion(None))

            def listed(self, prompt):
                self._send(b"[1, 2]")

            def silent(self, prompt):
                time.sleep(0.6)

            def slow(self, prompt):
                self.send_response(200)
                self.end_headers()
                for _ in range(20):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)

            def hangs_up(self, prompt):
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"{")

            def large(self, prompt):
                self._send(b" " * (label_server.LARGEST_ANSWER + 10))

            def elsewhere(self, prompt):
                self._send(b"", 302, Location="/v1/other")

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def stand_in():
    server = StandIn()
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that were waited before trying again, which are not waited."""
    found: list[float] = []
    sleep = time.sleep

    def noted(seconds):
        if threading.current_thread().name.startswith("ThreadPoolExecutor"):
            found.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(label_server.time, "sleep", noted)
    return found


def test_a_server_is_asked_as_chat_completions_are(stand_in):
    server = Server(stand_in.url + "/", "tiny", api_key="k-123", max_tokens=9)
    assert server.ask(["good one"]) == [Answer("label: good one", n_tokens=7)]
    (body,), (headers,) = stand_in.bodies, stand_in.headers
    assert body == {
        "model": "tiny", "max_tokens": 9, "temperature": 0,
        "messages": [{"role": "user", "content": "good one"}],
    }  # fmt: skip
    assert headers["Authorization"] == "Bearer k-123"


def test_fields_of_a_request_are_added_replaced_and_left_out(stand_in):
    options = {"max_tokens": None, "max_completion_tokens": 9, "temperature": 1}
    Server(stand_in.url, "tiny", options=options).ask(["good one"])
    (body,) = stand_in.bodies
    assert "max_tokens" not in body and body["temperature"] == 1
    assert body["max_completion_tokens"] == 9 and body["model"] == "tiny"


def test_servers_have_the_name_of_their_model_and_host_or_another():
    assert Server("http://localhost:80/v1", "tiny").name == "tiny at localhost"
    assert Server("http://localhost:80/v1", "tiny", name="mine").name == "mine"


def test_answers_come_in_order_from_several_requests_at_a_time(stand_in):
    prompts = [f"good {i}" for i in range(9)]
    answers = Server(stand_in.url, concurrency=3).ask(prompts)
    assert [answer.text for answer in answers] == [f"label: {prompt}" for prompt in prompts]
    assert stand_in.most_running == 3


@pytest.mark.parametrize(
    ("prompt", "reason", "tries"),
    [
        ("broken", r"status 500: out of memory \(3 tries\)", 3),
        ("refused", "status 401: wrong key", 1),
        ("nonsense", "no chat completion: '<html>hello</html>'", 1),
        ("empty", "no chat completion", 1),
        ("nested", "no chat completion", 1),
        ("listed", "no chat completion", 1),
        ("textless", "no text but NoneType", 1),
        ("hangs_up", "the answer is cut short", 3),
        ("large", "more than .* bytes", 1),
        ("elsewhere", "status 302", 1),
    ],
)
def test_each_way_to_fail_has_its_reason(stand_in, waits, prompt, reason, tries):
    (answer,) = Server(stand_in.url).ask([prompt])
    assert answer.text == "" and re.search(reason, answer.error)
    assert stand_in.asked[prompt] == tries and stand_in.asked["GET"] == 0
    assert waits == [0.5, 1.0][: tries - 1]


@pytest.mark.parametrize("prompt", ["silent", "slow"])
def test_late_answers_are_not_waited_for(stand_in, waits, prompt):
    started = time.monotonic()
    (answer,) = Server(stand_in.url, timeout=0.15, retries=1).ask([prompt])
    assert answer.error == "no answer within 0.15 s (2 tries)"
    assert time.monotonic() - started < 0.9 and stand_in.asked[prompt] == 2


def test_a_refusal_that_is_not_finished_is_not_waited_for(stand_in, waits):
    (answer,) = Server(stand_in.url, timeout=0.15, retries=0).ask(["stuck"])
    assert answer.error == "status 500: Internal Server Error"


def test_failures_that_pass_are_tried_again(stand_in, waits):
    assert [a.text for a in Server(stand_in.url).ask(["recovers"])] == ["label: x"]
    assert stand_in.asked["recovers"] == 3 and waits == [0.5, 1.0]


def test_a_server_that_asks_for_patience_gets_it(stand_in, waits, monkeypatch):
    assert [a.text for a in Server(stand_in.url).ask(["limited"])] == ["label: x"]
    assert waits == [7.0]
    monkeypatch.setattr(label_server, "LONGEST_WAIT", 3.0)
    assert Server(stand_in.url).ask(["limited again"])[0].text == "label: x"
    assert waits == [7.0, 3.0]


def test_one_failure_leaves_the_other_answers(stand_in, waits):
    answers = Server(stand_in.url).ask(["good 1", "nonsense", "broken", "good 2"])
    assert [bool(answer.error) for answer in answers] == [False, True, True, False]


def test_nobody_listening_is_a_reason(stand_in, waits):
    stand_in.close()
    (answer,) = Server(stand_in.url, retries=1).ask(["good"])
    assert answer.error.startswith("not reachable: ") and "refused" in answer.error
    assert waits == [0.5]


def test_the_key_is_never_shown(stand_in, waits):
    server = Server(stand_in.url, api_key="k-secret")
    (answer,) = server.ask(["refused"])
    assert "k-secret" not in answer.error and "***" in answer.error
    assert "k-secret" not in repr(server) + server.name


def test_the_key_of_the_environment_is_sent_over_https_alone(stand_in, monkeypatch):
    monkeypatch.setenv(label_server.KEY_VARIABLE, "k-env")
    Server(stand_in.url).ask(["good"])
    assert "Authorization" not in stand_in.headers[0]
    assert Server("https://example.invalid/v1")._key == "k-env"
    assert Server("https://example.invalid/v1", api_key="mine\n")._key == "mine"


def test_a_proxy_is_not_asked_for_this_machine(stand_in, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Server(stand_in.url).ask(["good"])[0].error == ""


def test_the_real_server_of_mlx_lm_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    run = "import mlxterp; from mlx_lm.server import main; main()"
    options = ["--model", str(DEMO), "--port", str(port), "--chat-template", template]
    process = subprocess.Popen(
        [sys.executable, "-c", run, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        server = Server(f"http://127.0.0.1:{port}/v1", retries=6, max_tokens=8)
        answers = server.ask(["import os\nimport", "def f("])
    finally:
        process.terminate()
        process.wait()
    assert all(answer.text and not answer.error and answer.n_tokens > 0 for answer in answers)


def test_bad_settings_are_named():
    url = "http://localhost/v1"
    for options, message in (
        ({"timeout": 0}, "timeout must be > 0, got 0"),
        ({"retries": -1}, "retries must be >= 0, got -1"),
        ({"concurrency": 0}, "concurrency must be >= 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Server(url, **options)
    for address in ("localhost:8080", "file:///etc/hosts", "http://"):
        with pytest.raises(ValueError, match="base_url must be an address"):
            Server(address)
