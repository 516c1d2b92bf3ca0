"""A dashboard from a coder, on a real socket of this machine."""

import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import warnings

import numpy as np
import pytest

from mlxterp.sae.dashboard.dashboard import Dashboard, open_dashboard
from mlxterp.sae.dashboard.reading import open_bundle
from mlxterp.sae.labels.labels import FeatureLabels
from tests.sae.dashboard.bundles import TEXTS, collected

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def dashboard(sae):
    with sae.dashboard(validation_dataset=TEXTS, port=0, map_method=None, verbose=False) as made:
        yield made


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as found:
        return found.read()


def test_a_coder_shows_what_it_knows(dashboard, sae):
    meta = json.loads(get(dashboard.url + "api/meta"))
    assert meta["coder"]["n_features"] == sae.n_features and meta["live"]["steer"]
    assert meta["training"] and 0 < meta["numbers"]["fidelity"]["fvu"] < 1
    assert meta["numbers"]["loss"]["clean"] > 0
    assert meta["data"]["n_tokens"] == meta["numbers"]["fidelity"]["n_tokens"]
    feature = json.loads(get(dashboard.url + "api/features/3"))
    assert feature == dashboard.bundle.feature(3)


def test_the_address_is_that_of_this_machine_alone(dashboard):
    assert dashboard.url == f"http://127.0.0.1:{dashboard.port}/"
    assert repr(dashboard) == f"Dashboard(SAE of layers.2.resid_post, at {dashboard.url})"
    assert f'href="{dashboard.url}"' in dashboard._repr_html_()


def test_labels_that_are_set_in_the_page_are_the_coders(dashboard, sae):
    asked = urllib.request.Request(
        dashboard.url + "api/labels/5", json.dumps({"text": "<b>"}).encode(),
        {"Content-Type": "application/json"}, method="PUT",
    )  # fmt: skip
    urllib.request.urlopen(asked, timeout=10).close()
    assert sae.labels[5].text == "<b>"
    sae.labels.remove(5)


def test_foreign_names_are_refused_on_the_socket_too(dashboard):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(dashboard.url, Host="evil.com")
    assert refused.value.code == 403
    refused.value.close()


RAW = [
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET http://evil.com/ HTTP/1.1\r\nHost: evil.com\r\n\r\n", b"OPTIONS * HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST /api/text HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
    b"POST /api/text HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /api/text HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{}",
    b"POST /api/text HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /api/meta HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: \x00\x01\r\n\r\n", b"\xff" * 1000,
]  # fmt: skip


def test_bytes_that_are_no_requests_leave_the_server_up(dashboard):
    for raw in RAW * 5:
        with socket.create_connection(("127.0.0.1", dashboard.port), timeout=10) as connection:
            connection.settimeout(5)
            try:
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                answered = connection.recv(4096)
            except OSError:  # it has hung up already
                continue
            assert b" 500 " not in answered.split(b"\r\n")[0] and b"root:" not in answered
            assert b"Traceback" not in answered
    assert json.loads(get(dashboard.url + "api/meta"))["format_version"] == 1


def test_two_people_who_steer_at_once_get_their_own(dashboard, sae):
    strongest = np.argsort(-dashboard.bundle.table["maxima"])[:2].tolist()

    def steer(feature: int) -> dict:
        asked = {
            "prompt": "def f(", "features": [{"id": feature, "strength": 3}], "max_tokens": 10,
        }  # fmt: skip
        request = urllib.request.Request(
            dashboard.url + "api/steer", json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as found:
            last = found.read().decode().strip().split("\n\n")[-1]
        assert last.startswith("event: end")
        return json.loads(last.partition("data: ")[2])

    alone = [steer(feature) for feature in strongest]
    found: dict[int, dict] = {}
    threads = [
        threading.Thread(target=lambda i=i, f=f: found.update({i: steer(f)}))
        for i, f in enumerate(strongest * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(4)] == alone * 2
    assert alone[0]["steered"] != alone[1]["steered"] and alone[0]["plain"] == alone[1]["plain"]


def test_a_port_that_is_taken_is_told_and_another_one_used(dashboard):
    other = Dashboard(dashboard.bundle)
    with pytest.warns(UserWarning, match=f"Port {dashboard.port} is taken"):
        other.start(port=dashboard.port)
    with other:
        assert other.port != dashboard.port and get(other.url)


def test_a_dashboard_stops_and_starts_again(dashboard):
    other = Dashboard(dashboard.bundle)
    assert repr(other).endswith("not served)") and "<a" not in other._repr_html_()
    with other.start(port=0):
        url = other.url
        assert other.start() is other and other.url == url
        waiting = threading.Thread(target=other.wait)
        waiting.start()
        assert get(url) and waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()
    with pytest.raises(urllib.error.URLError):
        get(url)
    with pytest.raises(ValueError, match="start"):
        other.url
    other.stop()
    with other.start(port=0):
        assert get(other.url)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"port": -1}, "port"), ({"port": 70_000}, "port"), ({"port": "80"}, "port"),
     ({"port": 0, "host": "no.such.host.invalid"}, "host"),
     ({"port": 0, "host": "192.0.2.1"}, "192.0.2.1")],
)  # fmt: skip
def test_addresses_that_cannot_be_are_refused(dashboard, options, message):
    with pytest.raises(ValueError, match=message):
        Dashboard(dashboard.bundle).start(**options)


def test_a_bundle_is_saved_and_opened_from_its_path(dashboard, sae, model, tmp_path):
    path = dashboard.save_bundle(tmp_path / "features.mlxdash")
    with open_dashboard(path).start(port=0) as served:
        meta = json.loads(get(served.url + "api/meta"))
        assert not meta["live"]["text"] and meta["title"] == "SAE of layers.2.resid_post"
    with open_dashboard(path, model, sae, sae.features).start(port=0) as served:
        assert json.loads(get(served.url + "api/meta"))["live"]["maximum_known"]
    with pytest.raises(ValueError, match="coder"):
        open_dashboard(path, model)
    with pytest.raises(ValueError, match="40"):
        open_dashboard(path, model, collected(model).coder)
    with pytest.raises(ValueError, match=r"dashboard\.json"):
        open_dashboard(tmp_path)


def test_a_saved_file_holds_the_features_asked_for(dashboard, tmp_path):
    path = dashboard.save(tmp_path / "new" / "page.html", features=[7, 3, 7])
    text = path.read_text("utf-8")
    assert '"ids":[3,7]' in text and [p.name for p in path.parent.iterdir()] == ["page.html"]
    for wrong in ([], [-1], [dashboard.bundle.n_features]):
        with pytest.raises(ValueError, match="features"):
            dashboard.save(path, features=wrong)
    with pytest.raises(ValueError, match="max_bytes"):
        dashboard.save(path, features=range(50), max_bytes=len(text) + 100)
    with pytest.raises(ValueError, match="directory"):
        dashboard.save(tmp_path)
    assert path.read_text("utf-8") == text


def test_a_saved_file_has_those_that_matter_most_where_not_all_fit(dashboard, tmp_path, sae):
    rare = int(np.argmin(dashboard.bundle.table["firing_counts"]))
    sae.labels.set(rare, "rare")
    bare = dashboard.save(tmp_path / "bare.html", features=[0]).stat().st_size
    path = dashboard.save(tmp_path / "some.html", max_bytes=bare + 100_000)
    sae.labels.remove(rare)
    text = path.read_text("utf-8")
    ids = json.loads(text.partition('id="mlxterp-bundle">')[2].partition("</script>")[0])["ids"]
    assert bare + 50_000 < len(text) <= bare + 100_000 and rare in ids
    counts = dashboard.bundle.table["firing_counts"]
    assert min(counts[[i for i in ids if i != rare]]) >= np.sort(counts)[::-1][len(ids)]
    whole = dashboard.save(tmp_path / "all.html")
    assert '"ids":null' in whole.read_text("utf-8")
    with pytest.raises(ValueError, match="max_bytes"):
        dashboard.save(path, max_bytes=1000)


def test_coders_are_compared(sae, model, tmp_path):
    other = collected(model, n_features=30)
    other.coder._features = other
    compare = {"random": other.coder}
    made = sae.dashboard(port=None, compare=compare, map_method=None, verbose=False)
    (comparison,) = made.bundle.comparisons
    assert comparison.name == "random" and comparison.bundle.n_features == 30
    assert open_bundle(made.save_bundle(tmp_path / "b.mlxdash")).comparisons[0].name == "random"


def test_nothing_is_measured_without_texts(sae):
    made = sae.dashboard(port=None, map_method=None, max_evaluated=0, verbose=False)
    assert made.bundle.facts["numbers"] == {"fidelity": None, "loss": None}
    with pytest.raises(ValueError, match="not being served"):
        made.url
    assert isinstance(made.bundle.labels, FeatureLabels)


def test_a_script_that_ends_takes_the_server_with_it(dashboard, tmp_path):
    path = dashboard.save_bundle(tmp_path / "features.mlxdash")
    code = (
        "import urllib.request\n"
        "from mlxterp.sae.dashboard.dashboard import open_dashboard\n"
        f"served = open_dashboard({str(path)!r}).start(port=0)\n"
        "print(urllib.request.urlopen(served.url).status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "200", "")


@pytest.mark.slow
def test_a_script_that_ends_in_the_middle_of_a_generation_ends_quietly():
    code = (
        "import json, threading, urllib.request\n"
        "from mlxterp import InterpretableModel\n"
        "from mlxterp.sae.dashboard.build import build_bundle\n"
        "from mlxterp.sae.dashboard.dashboard import Dashboard\n"
        "from mlxterp.sae.dashboard.live import Live\n"
        "from tests.sae.dashboard.bundles import collected\n"
        "model = InterpretableModel.demo()\n"
        "data = collected(model)\n"
        "made = Dashboard(build_bundle(data), Live(data.coder, model, data)).start(port=0)\n"
        "asked = {'prompt': 'a', 'features': [{'id': 1}], 'max_tokens': 256}\n"
        "kind = {'Content-Type': 'application/json'}\n"
        "body = json.dumps(asked).encode()\n"
        "asked = urllib.request.Request(made.url + 'api/steer', body, kind)\n"
        "print(urllib.request.urlopen(asked).read(12).decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "event: piece", "")


def test_a_missing_server_names_the_extra(dashboard, monkeypatch):
    for module in ("starlette.applications", "uvicorn"):
        with monkeypatch.context() as patched, warnings.catch_warnings():
            patched.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=r"mlxterp\[serve\]"):
                Dashboard(dashboard.bundle).start(port=0)
