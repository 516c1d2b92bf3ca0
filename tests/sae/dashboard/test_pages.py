"""One file holds the front end and the data, and asks the network for nothing."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from safetensors.numpy import load

from mlxterp.sae.dashboard import pages
from mlxterp.sae.dashboard.build import build_bundle, compared
from mlxterp.sae.dashboard.pages import (
    in_script,
    page_directory,
    page_files,
    resolved,
    single_file,
)
from mlxterp.sae.similarity.matching import match
from tests.sae.circuits.examples import nasty
from tests.sae.dashboard.bundles import NASTY, collected

PAGE = {
    "index.html": (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>x</title>\n'
        '<link rel="stylesheet" href="look.css">\n</head>\n<body>\n<!-- bundle -->\n'
        '<script type="module" src="main.js"></script>\n</body>\n</html>\n'
    ),
    "look.css": "body { color: red }\n",
    "main.js": (
        'import {a} from "./a.js";\nimport "./parts/b.js";\nconst x = await import("./a.js");\n'
    ),
    "a.js": "export const a = '</script>é';\n",
    "parts/b.js": "import * as a from '../a.js'; export {c} from \"./c.js\";\n",
    "parts/c.js": "export const c = 1;\n",
}


@pytest.fixture
def directory(tmp_path) -> Path:
    for name, text in PAGE.items():
        path = tmp_path / "page" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "page"


@pytest.fixture(scope="module")
def bundle(model):
    data, other = collected(model), collected(model, n_features=30)
    beside = compared("<o>", match(data.coder, other.coder), build_bundle(other))
    made = build_bundle(data, circuits={"</script>": nasty()}, comparisons=[beside])
    for i, text in enumerate(NASTY):
        made.labels.set(i, text)
    return made


class Elements(HTMLParser):
    """The elements of a page, and the text of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.texts, self.open = [], [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open = self.found[-1] if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open:
            self.texts.append((*self.open, data))

    @property
    def parts(self) -> dict[str, bytes]:
        return {
            a["data-part"]: gzip.decompress(base64.b64decode(text, validate=True))
            for _, a, text in self.texts
            if "data-part" in a
        }

    @property
    def modules(self) -> dict[str, str]:
        (found,) = [text for _, a, text in self.texts if a.get("type") == "importmap"]
        start = "data:text/javascript;charset=utf-8;base64,"
        return {
            name: base64.b64decode(url.removeprefix(start), validate=True).decode()
            for name, url in json.loads(found)["imports"].items()
        }

    @property
    def index(self) -> dict:
        return json.loads(next(t for _, a, t in self.texts if a.get("id") == "mlxterp-bundle"))


def test_modules_import_each_other_by_names_of_the_map(bundle, directory):
    modules = Elements(single_file(bundle, [], directory)).modules
    assert set(modules) == {"page/main.js", "page/a.js", "page/parts/b.js", "page/parts/c.js"}
    assert modules["page/main.js"] == (
        'import {a} from "page/a.js";\nimport "page/parts/b.js";\n'
        'const x = await import("page/a.js");\n'
    )
    assert modules["page/parts/b.js"] == (
        "import * as a from 'page/a.js'; export {c} from \"page/parts/c.js\";\n"
    )
    assert modules["page/a.js"] == PAGE["a.js"]


@pytest.mark.parametrize("own", [True, False])
def test_nothing_is_asked_of_a_network(bundle, directory, own):
    page = single_file(bundle, None, directory if own else None)
    elements = Elements(page)
    for _, attributes in elements.found:
        named = {name: v for name, v in attributes.items() if name in ("src", "href", "srcset")}
        assert all(value.startswith(("data:", "#")) for value in named.values()), named
    policies = [a["content"] for _, a in elements.found if a.get("http-equiv")]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none';")
    assert "'self'" not in policies[0] and "http" not in policies[0]
    tags = [tag for tag, _ in elements.found]
    assert tags.index("meta") < tags.index("script")
    for name, text in elements.modules.items():
        assert not re.search(r"""(from|import)\s*\(?\s*["']\.""", text), name
    last = [(a, text) for tag, a, text in elements.texts if tag == "script"][-1]
    assert last[0] == {"type": "module"} and last[1].startswith('import "page/')


def test_the_parts_are_what_the_server_answers(bundle, directory):
    elements = Elements(single_file(bundle, None, directory))
    parts = elements.parts
    assert elements.index["ids"] is None and elements.index["chunk"] == 64
    features = json.loads(parts["features/0"])
    assert features == {str(i): bundle.feature(i) for i in range(40)}
    meta = json.loads(parts["meta"])
    live = meta.pop("live")
    assert meta == bundle.meta() and not live["text"] and live["together"] == "listed"
    assert json.loads(parts["strings"])["strings"] == list(bundle.strings)
    assert json.loads(parts["labels"])["labels"] == bundle.label_entries()
    assert json.loads(parts["circuits/0"]) == bundle.circuits[0]
    assert load(parts["table"])["included"].all()
    comparison = bundle.comparisons[0]
    assert json.loads(parts["compare/0"]) == comparison.to_dict()
    assert "partners" in load(parts["compare/0/table"])
    assert json.loads(parts["others/0/features/0"])["29"] == comparison.bundle.feature(29)
    assert {f"others/0/{name}" for name in ("meta", "table", "strings", "labels")} <= set(parts)


def test_features_are_in_chunks_by_their_rank(bundle, directory, monkeypatch):
    monkeypatch.setattr(pages, "CHUNK", 3)
    chosen = [1, 4, 5, 9, 11, 12, 39]
    elements = Elements(single_file(bundle, chosen, directory))
    index, parts = elements.index, elements.parts
    assert (index["ids"], index["chunk"]) == (chosen, 3)
    for rank, i in enumerate(chosen):
        assert json.loads(parts[f"features/{rank // 3}"])[str(i)] == bundle.feature(i)
    assert load(parts["table"])["included"].sum() == 7
    assert json.loads(parts["meta"])["features"] == {"n": 40, "included": 7}
    partners = bundle.comparisons[0].arrays["partners"][chosen]
    assert index["others"][0]["ids"] == sorted(int(i) for i in partners if i >= 0)


def test_texts_cannot_end_their_element(bundle, directory, model):
    page = single_file(bundle, None, directory)
    plain = Elements(single_file(build_bundle(collected(model)), None, directory))
    here = Elements(page)
    names = [(t, tuple(a)) for t, a in here.found if "data-part" not in a]
    assert names == [(t, tuple(a)) for t, a in plain.found if "data-part" not in a]
    assert "alert(1)" not in page and page.count("</script>") == page.count("<script")
    labels = json.loads(here.parts["labels"])["labels"]
    assert labels["0"]["text"] == NASTY[0] and labels["1"]["text"] == NASTY[1]
    assert labels["3"]["text"] == "\\u202edesrever"


@pytest.mark.parametrize("value", ["</script><!--", "\u2028\u2029", "<![CDATA[ &amp;", "\ud800"])
def test_json_in_a_script_comes_back(value):
    text = in_script({"a": value})
    assert text.isascii() and not set("<>&") & set(text) and json.loads(text) == {"a": value}


@pytest.mark.parametrize(
    ("here", "specifier", "expected"),
    [("/", "./a.js", "a.js"), ("/parts", "../a.js", "a.js"), ("/parts", "./c.js", "parts/c.js"),
     ("/a/b", "../../c/./d.js", "c/d.js"), ("/", "../../x.js", "x.js")],
)  # fmt: skip
def test_relative_names_are_resolved(here, specifier, expected):
    assert resolved(Path(here), specifier) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("main.js", 'import "./gone.js";', "gone.js"),
        ("index.html", PAGE["index.html"].replace("<!-- bundle -->", ""), "bundle"),
        ("index.html", PAGE["index.html"].replace("look.css", "gone.css"), "gone.css"),
        ("index.html", "<head></head><!-- bundle -->", "module"),
        ("look.css", "</STYLE>", "look.css"),
    ],
)
def test_a_page_that_cannot_be_one_file_is_refused(bundle, directory, name, text, message):
    (directory / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        single_file(bundle, [], directory)


def test_only_files_of_a_page_are_listed(directory):
    (directory / "notes.py").write_text("secret")
    (directory.parent / "b.js").write_text("secret")
    assert set(page_files(directory)) == set(PAGE)
    assert "index.html" in page_files(page_directory())


def test_the_same_page_is_written_each_time(bundle, directory):
    assert single_file(bundle, [3], directory) == single_file(bundle, [3], directory)
