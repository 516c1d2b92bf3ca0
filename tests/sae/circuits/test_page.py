import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from mlxterp.sae.circuits.circuit import Circuit, Edge
from tests.sae.circuits.examples import LEVELS, NASTY, nasty, over_dataset, over_prompt, small

MAKERS = (small, over_dataset, over_prompt, nasty)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of scripts and titles."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.text = [], {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        tag, attributes = self.found[-1] if self.found else ("", {})
        if tag in ("script", "title"):
            self.text.setdefault(attributes.get("id", tag), data)


def page_of(circuit: Circuit, tmp_path, **options) -> str:
    return circuit.save_html(tmp_path / "new" / "page.html", **options).read_text(encoding="utf-8")


def content_of(page: str) -> dict:
    return json.loads(Elements(page).text["content"])


@pytest.mark.parametrize("make", MAKERS)
def test_a_page_asks_the_network_for_nothing(make, tmp_path):
    page = page_of(make(), tmp_path)
    elements = Elements(page).found
    for _, attributes in elements:
        assert not {"src", "href", "data", "action", "srcset"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]
    assert "@import" not in page and "url(" not in page
    (policy,) = [a["content"] for tag, a in elements if a.get("http-equiv")]
    assert policy.startswith("default-src 'none';")


def test_texts_are_never_markup(tmp_path):
    circuit = nasty()
    page = page_of(circuit, tmp_path)
    tags = [tag for tag, _ in Elements(page).found]
    assert tags == [tag for tag, _ in Elements(page_of(
        replace(circuit, nodes=tuple(replace(n, label="x") for n in circuit.nodes),
                tokens=("x",) * 6, facts={"x": "x"}), tmp_path)).found]  # fmt: skip
    data = page.split('id="content">')[1].split("</script>")[0]
    assert not set("<>&'") & set(data)
    names = [node["name"] for node in content_of(page)["nodes"]]
    assert NASTY[0] in names[0] and "\u202e" not in page and "\x00" not in page
    assert "49" not in Elements(page).text["title"]


def test_the_page_holds_nodes_and_edges_with_their_numbers(tmp_path):
    content = content_of(page_of(small(), tmp_path, feature_labels={12: {91: "Capital cities"}}))
    assert [node["text"] for node in content["nodes"]] == [
        "42 French words", "7", "5", "91 Capital cities", "error",
    ]  # fmt: skip
    assert content["nodes"][0]["numbers"] == [["site", LEVELS[0]], ["value", "1.5"]]
    edge = content["edges"][2]
    assert (edge["source"], edge["target"], edge["weight"]) == (2, 3, 0.5)
    assert dict(edge["numbers"]) == {
        "weight": "0.5", "share": "1", "consistency": "0.8", "n": "12", "measured": "0.25",
    }  # fmt: skip
    assert [heading["text"] for heading in content["headings"]] == list(LEVELS)


def test_no_more_edges_than_asked_for_are_on_the_page(tmp_path):
    page = page_of(small(), tmp_path, n=1)
    assert len(content_of(page)["edges"]) == 2 and "part of" in page
    with pytest.raises(ValueError, match="n must be >= 1"):
        page_of(small(), tmp_path, n=0)


def test_weights_that_are_no_numbers_are_valid_content(tmp_path):
    circuit = replace(small(), edges=(Edge(0, 2, float("nan")), Edge(1, 2, float("inf"))))
    content = content_of(page_of(circuit, tmp_path))
    assert [edge["weight"] for edge in content["edges"]] == [0, 0]
    assert [dict(edge["numbers"])["weight"] for edge in content["edges"]] == ["nan", "inf"]


def test_an_empty_circuit_has_a_page(tmp_path):
    assert content_of(page_of(Circuit((), (), LEVELS), tmp_path))["edges"] == []


def test_a_page_replaces_a_file_whole(tmp_path):
    page_of(small(), tmp_path)
    page_of(over_prompt(), tmp_path)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match="path must be that of a file"):
        small().save_html(tmp_path)


PROBE = """<script>
const said = {alerts: 0, shown: () => groups.filter(g => !g.hasAttribute("hidden")).length};
window.alert = () => said.alerts++;
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
said.all = said.shown();
boxes[0].focus(); press("ArrowRight"); said.focused = boxes.indexOf(document.activeElement);
document.activeElement.click();
said.chosen = $("side").querySelector("h2").textContent;
said.listed = [...$("side").querySelectorAll("li b")].map(b => b.textContent);
said.near = groups.filter(g => g.classList.contains("near")).length;
$("prune").value = 3; $("prune").dispatchEvent(new Event("input"));
said.pruned = said.shown(); said.kept = $("kept").textContent;
press("Escape"); said.pressed = boxes.filter(b => b.getAttribute("aria-pressed") === "true").length;
said.elements = document.querySelectorAll("img, b").length;
document.title = JSON.stringify(said);
</script></body>"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize("make", [small, nasty])
def test_in_a_browser_nodes_are_chosen_and_edges_pruned(make, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    path = make().save_html(tmp_path / "page.html")
    path.write_text(path.read_text("utf-8").replace("</body>", PROBE), "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    said = json.loads(Elements(done.stdout).text["title"])
    assert said["alerts"] == 0 and said["all"] == len(make().edges)
    assert said["pressed"] == 0
    if make is small:
        assert (said["focused"], said["chosen"]) == (2, "L10/5")
        assert said["listed"] == ["−3", "+2", "−1", "+0.5"] and said["near"] == 4
        assert said["pruned"] == 2 and said["kept"] == "|weight| ≥ 2: 2 of 5 edges"
