"""The page itself, in a real browser without a screen: what is seen is what the bundle holds."""

import re
import shutil
import tempfile
import time

import numpy as np
import pytest

from tests.sae.circuits.examples import nasty, over_dataset, over_prompt
from tests.sae.dashboard.bundles import NASTY, TEXTS
from tests.sae.features.coders import make

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
webdriver = pytest.importorskip("selenium.webdriver")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs the Debian packages chromium and chromium-driver"
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,900",
)  # fmt: skip
LABELS = dict(zip(range(3, 3 + len(NASTY)), NASTY, strict=True)) | {20: "a plain label"}
VIEWS = (
    "#/overview", "#/feature/3", "#/text?t=def add(a, b):", "#/together", "#/steer?f=3:1",
    "#/circuit", "#/compare",
)  # fmt: skip
WAIT = 15


class Page:
    """The page in a browser, found by CSS selectors; waits for what comes a little later."""

    def __init__(self, driver, url: str):
        self.driver, self.url = driver, url

    def open(self, hash: str = "", until: str = "main h1"):
        self.driver.get("about:blank")
        self.driver.get(self.url + hash)
        self.wait(until)

    def run(self, script: str, *arguments):
        return self.driver.execute_script(f"return {script.strip()}", *arguments)

    def all(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def until(self, holds, message: str = ""):
        end = time.monotonic() + WAIT
        while not (found := holds()):
            assert time.monotonic() < end, message or "it did not come to be"
            time.sleep(0.02)
        return found

    def wait(self, selector: str):
        self.until(lambda: self.all(selector), f"there is no {selector}")
        return self.all(selector)[0]

    def text(self, selector: str) -> str:
        return self.run("document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run(
            "[...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def said(self, selector: str, text: str) -> None:
        self.until(lambda: text in self.text(selector), f"{selector} does not say {text}")

    def press(self, *keys: str):
        names = {"Enter": "\ue007", "Escape": "\ue00c", "Down": "\ue015", "Right": "\ue014"}
        for key in keys:
            self.driver.switch_to.active_element.send_keys(names.get(key, key))

    def type(self, selector: str, text: str):
        field = self.wait(selector)
        field.clear()
        field.send_keys(text)

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        yield made
        made.quit()


@pytest.fixture(scope="module")
def dashboard(sae, texts):
    for i, text in LABELS.items():
        sae.labels.set(i, text)
    with sae.dashboard(
        validation_dataset=[*TEXTS, *texts[:6]],
        port=0,
        circuits={"nasty": nasty(), "dataset": over_dataset(), "prompt": over_prompt()},
        compare={"a random one": make("sae", 64)},
        verbose=False,
    ) as made:
        yield made
    for i in LABELS:
        sae.labels.remove(i)


@pytest.fixture
def page(driver, dashboard):
    made = Page(driver, dashboard.url)
    made.problems()
    yield made
    assert made.problems() == []


@pytest.fixture(scope="module")
def saved(dashboard, tmp_path_factory):
    some = range(2, dashboard.bundle.n_features, 3)
    return dashboard.save(tmp_path_factory.mktemp("saved") / "features.html", features=some)


@pytest.fixture
def file(driver, saved):
    """The saved file, with the network cut off."""
    driver.execute_cdp_cmd("Network.enable", {})
    off = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", off)
    made = Page(driver, saved.as_uri())
    made.problems()
    yield made
    on = {**off, "offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", on)
    assert made.problems() == []


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_opens_without_a_complaint(page, view):
    page.open(view)
    assert page.text("#tabs [aria-current]").lower() in view
    assert page.all("main h1") and not page.all("main.problem")


def test_an_address_that_names_nothing_says_so(page):
    page.open("#/feature/99999")
    assert "no feature 99999" in page.text("main")
    page.open("#/elsewhere")
    assert "no view named elsewhere" in page.text("main")


def ids(page) -> list[int]:
    return page.run(
        "[...document.querySelectorAll('.row[data-at]')]"
        ".sort((a, b) => a.dataset.at - b.dataset.at).map(row => Number(row.id.slice(4)))"
    )


def count(page) -> int:
    return int(re.match(r"[\d,]+", page.text(".count"))[0].replace(",", ""))


def test_the_table_has_all_features_but_the_document_few_of_them(page, dashboard):
    page.open("#/overview", ".row[data-at]")
    n = dashboard.bundle.n_features
    assert count(page) == n and ids(page)[:3] == [0, 1, 2] and len(ids(page)) < 60 < n
    page.run("document.querySelector('.table').scrollTop = 1e9")
    page.until(lambda: n - 1 in ids(page))


def test_the_table_is_sorted_by_a_column(page, dashboard):
    page.open("#/overview", ".row[data-at]")
    rates = dashboard.bundle.table["firing_rates"]
    heads = page.all(".row.head button")
    next(head for head in heads if "fires" in head.text).click()
    page.until(lambda: rates[ids(page)[0]] == rates.max())
    shown = rates[ids(page)]
    assert (np.diff(shown) <= 0).all()
    assert "sort=firing_rates" in page.driver.current_url


def test_the_table_is_filtered(page, dashboard):
    table = dashboard.bundle.table
    page.open("#/overview?show=dead", ".count")
    assert count(page) == (table["firing_counts"] == 0).sum()
    page.open("#/overview?show=labelled", ".count")
    assert count(page) == len(LABELS) and set(ids(page)) == set(LABELS)
    page.open("#/overview?from=3&to=4", ".count")
    assert count(page) == ((table["maxima"] >= 3) & (table["maxima"] <= 4)).sum() > 0


def test_search_finds_labels_tokens_and_numbers(page, dashboard):
    page.open("#/overview", ".row[data-at]")
    page.press("/")
    page.press("plain label")
    page.until(lambda: ids(page) == [20])
    page.type("main input[type=search]", "#17")
    page.until(lambda: ids(page) == [17])
    bundle = dashboard.bundle
    word = bundle.strings[bundle.table["peaks"][17, 0]].strip()
    page.type("main input[type=search]", word)
    page.until(lambda: 17 in ids(page) and "q=" in page.driver.current_url)


def test_a_bar_of_the_densities_lists_its_features(page, dashboard):
    page.open("#/overview", ".charts .bar")
    bars = page.run(
        "[...document.querySelectorAll('.charts figure:last-child .bar')]"
        ".map(bar => Number(bar.getAttribute('height')))"
    )
    page.open(f"#/overview?bin={int(np.argmax(bars))}", ".row[data-at]")
    rates = dashboard.bundle.table["firing_rates"]
    shown = rates[ids(page)]
    assert 0 < count(page) < len(rates) and shown.max() <= shown.min() * 10 ** (1 / 8) * 1.001


def test_keys_go_through_the_features_that_were_found(page):
    page.open("#/overview?show=labelled", ".row[data-at]")
    found = ids(page)
    page.press("j", "j", "Enter")
    page.said("main h1", f"Feature {found[1]}")
    page.press("j")
    page.said("main h1", f"Feature {found[2]}")
    page.press("k", "k")
    page.said("main h1", f"Feature {found[0]}")
    page.press("?")
    assert page.wait("dialog[open]")
    page.press("Escape")
    page.until(lambda: not page.all("dialog[open]"))
    page.press("/")
    assert page.run("document.activeElement.getAttribute('role')") == "combobox"
    page.press("17", "Enter")
    page.said("main h1", "Feature 17")


def test_texts_that_would_be_code_are_shown_as_text(page, dashboard):
    page.open("#/overview?show=labelled", ".row[data-at]")
    shown = page.texts(".row .label")
    assert NASTY[0] in shown and NASTY[1] in shown
    page.open("#/feature/3", ".label-text bdi")
    assert page.text(".label-text bdi") == NASTY[0]
    bundle = dashboard.bundle
    nasty_feature = next(
        i for i in range(bundle.n_features)
        if any("<script>" in "".join(e["tokens"]) for e in bundle.feature(i)["examples"])
    )  # fmt: skip
    page.open(f"#/feature/{nasty_feature}", ".strip")
    assert any("<script>" in text for text in page.texts(".strip"))
    for view in ("#/circuit/0", "#/together?f=3,4,5,6,7,8,9,10", "#/text?t=<img src=x>"):
        page.open(view, ".stage, .heatmap")
    assert page.run("document.querySelectorAll('main script, main img').length") == 0


def test_an_example_tells_the_value_that_a_token_has(page, dashboard):
    bundle = dashboard.bundle
    i = int(bundle.table["maxima"].argmax())
    example = bundle.feature(i)["examples"][0]
    page.open(f"#/feature/{i}", ".strip")
    page.until(lambda: page.all(".marker"))
    peak = page.wait(".strip .token.peak")
    webdriver.ActionChains(page.driver).move_to_element(peak).perform()
    page.until(lambda: page.run("!document.getElementById('tip')?.hidden"))
    assert float(page.text("#tip .pair b")) == pytest.approx(
        example["values"][example["peak"]], 0.01
    )
    assert page.run("document.querySelector('.marker').getAttribute('visibility')") == "visible"
    assert page.text(".strip .token.peak") == example["tokens"][example["peak"]]


def test_a_feature_shows_its_tokens_and_neighbours(page, dashboard):
    feature = dashboard.bundle.feature(20)
    page.open("#/feature/20", ".side")
    top = [text for text, _ in feature["sides"][0]["top"]]
    assert page.texts(".side .bar-name")[: len(top)] == top
    links = page.run("[...document.querySelectorAll('.near a')].map(a => a.getAttribute('href'))")
    others = [*feature["similar"], *feature["co_active"]]
    assert links == [f"#/feature/{other['id']}" for other in others]


def test_a_label_is_edited_in_the_page(page, sae):
    page.open("#/feature/30", "#edit-label")
    page.wait("#edit-label").click()
    page.type(".label-edit input", "<i>mine</i>")
    page.press("Enter")
    page.said(".label-text bdi", "<i>mine</i>")
    assert sae.labels[30].text == "<i>mine</i>"
    page.open("#/feature/30", "#edit-label")
    assert page.text(".label-text bdi") == "<i>mine</i>"
    page.wait("#edit-label").click()
    page.type(".label-edit input", "")
    page.press("Enter")
    page.until(lambda: 30 not in sae.labels and page.all(".label-text.none"))


def test_a_text_shows_what_fires_on_each_token(page, sae, model):
    page.open("#/text", "textarea")
    page.type("textarea", "class Adder:")
    page.wait("button.primary").click()
    page.wait(".heatmap")
    tokens = [token for token in page.texts(".strip .token")]
    assert "".join(tokens).endswith("class Adder:")
    codes = np.array(sae.encode_text(model, "class Adder:"))
    at = len(tokens) - 1
    page.all(".strip .token")[at].click()
    page.until(lambda: f"token {at}" in page.text(".result aside h2"))
    first = page.text(".result aside li .feature b")
    assert first == f"#{int(codes[-1].argmax())}"
    page.wait(".result aside .pin").click()
    page.said(".chips", first)
    assert "pin=" in page.driver.current_url
    page.open("#/text" + page.driver.current_url.split("#/text")[1], ".heatmap")
    assert first in page.text(".heatmap .pinned")


def test_steering_writes_both_texts_and_remembers_how(page, sae, model):
    prompt, features = "The function returns", {5: 2.0, 9: -1.0}
    page.open("#/steer?f=5:2,9:-1&n=8", ".steered")
    page.wait("button.primary").click()
    page.until(lambda: page.text(".two > :nth-child(2) .written") and not page.all(".writing"))
    plain = model.generate(prompt, max_tokens=8).text
    edit = sae.steering_edit(features)
    steered = model.generate(prompt, max_tokens=8, edit=edit).text
    assert page.text(".two > :nth-child(1) .written") == plain
    assert page.text(".two > :nth-child(2) .written") == steered != plain
    page.run(
        "[...document.querySelectorAll('.steered input[type=range]')].forEach(range => {"
        "range.value = 1; range.dispatchEvent(new Event('input'));"
        "range.dispatchEvent(new Event('change')) })"
    )
    assert "f=5:1,9:1" in page.run("decodeURIComponent(location.hash)")


def test_a_generation_is_stopped(page):
    page.open("#/steer?f=5:1&n=256", ".steered")
    page.wait("button.primary").click()
    page.until(lambda: page.text(".written"))
    stop = next(button for button in page.all("main button") if button.text == "Stop")
    stop.click()
    page.until(lambda: not page.all(".writing"))
    length = len(page.text(".written"))
    time.sleep(0.3)
    assert len(page.text(".written")) == length and not stop.is_enabled()


def test_the_matrix_has_the_co_occurrences(page, dashboard, sae):
    rates = dashboard.bundle.table["firing_rates"]
    a, b = np.argsort(-rates)[:2].tolist()
    page.open(f"#/together?f={a},{b}&order=id", ".heatmap canvas")
    page.run("document.querySelector('.heatmap canvas').focus()")
    page.press("Right", "Right")
    a, b = sorted((a, b))
    page.said("#tip", f"#{b}")
    pairs = dict(zip(page.texts("#tip .pair span"), page.texts("#tip .pair b"), strict=True))
    codes = sae.features.codes
    both = int(codes.together(a)[b])
    of_each = [int(codes.firing_counts[i]) for i in (a, b)]
    assert pairs["both"] == f"{both:,} tokens"
    assert float(pairs["Jaccard"]) == pytest.approx(both / (sum(of_each) - both), 0.01)


def test_a_circuit_is_pruned_and_walked_through(page):
    page.open("#/circuit/1", ".node")
    circuit = over_dataset()
    assert len(page.all(".node")) == len(circuit.nodes)
    page.run(
        "(range => { range.value = 0.9; range.dispatchEvent(new Event('input')) })"
        "(document.querySelector('main input[type=range]'))"
    )
    page.said("output", f"{round(len(circuit.edges) * 0.1)} of {len(circuit.edges)} edges")
    edges = page.run("document.querySelectorAll('.edge:not([hidden])').length")
    assert edges == round(len(circuit.edges) * 0.1)
    strongest = max(circuit.edges, key=lambda edge: abs(edge.weight))
    page.run("document.querySelectorAll('.node')[arguments[0]].focus()", strongest.source)
    page.press("Right")
    nodes = "[...document.querySelectorAll('.node')].indexOf(document.activeElement)"
    assert page.run(nodes) == strongest.target
    page.press("Enter")
    page.until(lambda: page.all(".node[aria-pressed=true]"))
    assert "node=" in page.driver.current_url


def test_two_coders_are_compared(page, dashboard):
    comparison = dashboard.bundle.comparisons[0]
    page.open("#/compare", ".tile")
    page.until(lambda: len(page.all(".two .card")) == 2)
    assert page.texts(".tile .chance b")[0] == f"{comparison.facts['chance']['mmcs']:.3f}"
    cosines = comparison.arrays["cosines"]
    shown = cosines[ids(page)]
    assert shown[0] == np.nanmax(cosines) and (np.diff(shown[: (cosines > -2).sum()]) <= 0).all()
    partner = comparison.arrays["partners"][ids(page)[0]]
    assert f"Feature {partner}" in page.text(".two .card:last-child")


def test_no_view_is_wider_than_a_small_window(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    for view in VIEWS:
        page.open(view)
        assert page.run("document.documentElement.scrollWidth") <= 700, view
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


CONTRAST = """
(() => {
  const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => (x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const over = (...layers) => {
    for (const layer of layers) { pen.fillStyle = layer; pen.fillRect(0, 0, 1, 1); }
    return pen.getImageData(0, 0, 1, 1).data;
  };
  const card = document.querySelector('.group'), found = [];
  const strip = document.querySelector('.strip'), token = document.createElement('bdi');
  strip.append(token);
  for (const sign of ['more', 'less']) for (let share = .02; share <= 1; share += .02) {
    token.className = `token ${sign} ${share > .55 ? 'strong' : ''}`;
    token.style.setProperty('--share', .12 + .88 * share);
    const style = getComputedStyle(token), paper = getComputedStyle(card).backgroundColor;
    const [a, b] = [light(over(paper, style.backgroundColor)), light(over(style.color))];
    found.push((Math.max(a, b) + .05) / (Math.min(a, b) + .05));
  }
  return Math.min(...found);
})()
"""


def test_tokens_are_readable_whatever_their_value_in_light_and_dark(page):
    page.open("#/feature/20", ".strip")
    papers = []
    for _ in range(2):
        assert page.run(CONTRAST) >= 4.5
        papers.append(page.run("getComputedStyle(document.body).backgroundColor"))
        page.wait("#theme").click()
        time.sleep(0.2)
    assert papers[0] != papers[1]
    page.run("localStorage.clear()")


def test_a_saved_file_works_without_a_network(file, dashboard):
    file.open("#/overview", ".row[data-at]")
    assert count(file) == dashboard.bundle.n_features
    file.open("#/feature/20", ".strip")
    assert file.text(".label-text bdi") == "a plain label"
    example = dashboard.bundle.feature(20)["examples"][0]
    assert "".join(example["tokens"]).strip() in "".join(file.texts(".strip")).replace("… ", "")
    last = max(i for i in range(2, 512, 3) if dashboard.bundle.table["firing_counts"][i])
    file.open(f"#/feature/{last}", ".strip")
    largest = dashboard.bundle.table["maxima"][last]
    assert float(file.text(".example .value")) == pytest.approx(largest, abs=0.006)
    file.open("#/together?f=3,4,5", ".heatmap")
    file.open("#/circuit/1", ".node")
    file.open("#/compare", ".two .card")
    for view in ("#/text", "#/steer"):
        file.open(view)
        assert "needs the model" in file.text("h1") and "sae.dashboard(" in file.text("pre")
    assert file.run("performance.getEntriesByType('resource').length") == 0


def test_a_saved_file_says_which_features_it_has_not(file, dashboard):
    file.open("#/feature/100")
    assert "Feature 100 is not in this file." in file.text("main")
