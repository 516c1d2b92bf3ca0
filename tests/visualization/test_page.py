"""The page in a real browser: what is seen is what it was given, by mouse and by keys."""

from functools import partial

import numpy as np
import pytest

from mlxterp.visualization import interactive_attention, save_interactive_attention
from tests.sae.dashboard.test_page import Page, driver, pytestmark  # noqa: F401
from tests.visualization.test_interactive import PATTERNS, TOKENS


@pytest.fixture
def page(request, tmp_path):
    path = save_interactive_attention(PATTERNS, TOKENS, tmp_path / "page.html")
    page = Page(request.getfixturevalue("driver"), path.as_uri())
    page.open(until="#heads button")
    yield page
    assert page.problems() == []


def value_shown(page):
    return float(page.text("#readout b").replace("< ", ""))


def test_heads_are_chosen_by_keys(page):
    assert page.text("#map-title") == "L0H0" and "2 layers, 5 heads, 6 tokens" in page.text(
        "#facts"
    )
    page.driver.find_element("css selector", "#heads button[tabindex='0']").send_keys("\ue014")
    assert page.text("#map-title") == "L0H1"
    page.press("Down", "Right")
    assert page.text("#map-title") == "L2H2"
    page.press("Right", "Down")  # there is nothing further
    assert page.text("#map-title") == "L2H2"
    pressed = page.all("#heads button[aria-pressed='true']")
    assert [button.get_attribute("aria-label") for button in pressed] == ["layer 2, head 2"]


def test_pointing_at_a_cell_shows_its_value(page):
    from selenium.webdriver.common.action_chains import ActionChains

    field = page.wait("#map")
    width = field.size["width"]
    for query, key in ((5, 1), (3, 3), (1, 4)):
        x, y = ((i + 0.5) * width / 6 - width / 2 for i in (key, query))
        ActionChains(page.driver).move_to_element_with_offset(field, x, y).perform()
        assert value_shown(page) == pytest.approx(PATTERNS[0][0, 0, query, key], abs=6e-4)
        assert f"({query}) to" in page.text("#readout") and f"({key})" in page.text("#readout")
    ActionChains(page.driver).move_to_element(page.wait("h1")).perform()
    assert "Point at a cell" in page.text("#readout")
    page.run("document.getElementById('map').focus()")
    page.press("Right", "Right")
    assert value_shown(page) == pytest.approx(PATTERNS[0][0, 0, 5, 2], abs=6e-4)


def test_a_token_shows_what_it_attends_to_and_what_attends_to_it(page):
    words = page.all("#tokens button")
    words[4].click()
    titles = "[...document.querySelectorAll('#tokens button')].map(e => e.title)"
    shown = [float(title.replace("< ", "")) for title in page.run(titles)]
    np.testing.assert_allclose(shown, PATTERNS[0][0, 0, 4], atol=6e-4)
    page.all("input[value='key']")[0].click()
    shown = [float(title.replace("< ", "")) for title in page.run(titles)]
    np.testing.assert_allclose(shown, PATTERNS[0][0, 0, :, 4], atol=6e-4)
    assert page.text("#flow-title").startswith("What attends to it in each layer")
    assert len(page.all("#layers canvas")) == 2
    assert page.run("mean(1, 5)") == pytest.approx(PATTERNS[2][0, :, 5, 4].mean(), abs=1e-4)
    page.press("Escape")
    assert not page.all("#tokens button[aria-pressed='true']")


def test_tokens_are_text_whatever_they_say(page):
    shown = page.texts("#tokens button")
    assert shown[3] == TOKENS[3] and shown[1] == " def" and len(shown) == 6
    assert page.run("document.scripts.length") == 2


def test_it_is_dark_where_the_reader_wants_that(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    cell = (
        "[...document.querySelector('#map canvas').getContext('2d').getImageData(0, 0, 1, 1).data]"
    )
    emulate = partial(page.driver.execute_cdp_cmd, "Emulation.setEmulatedMedia")
    assert page.run(ground) == "rgb(255, 255, 255)" and page.run("accent()") == ["0", "90", "160"]
    emulate({"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    assert page.run(ground) == "rgb(22, 24, 28)"
    page.until(lambda: page.run("accent()") == ["86", "180", "233"])
    assert page.run(cell) == [86, 180, 233, 255]
    emulate({"features": []})


def test_it_works_in_the_frame_of_a_notebook(page, tmp_path):
    path = tmp_path / "notebook.html"
    frame = interactive_attention(PATTERNS, TOKENS)._repr_html_()
    path.write_text(f'<!DOCTYPE html><meta charset="utf-8">{frame}', "utf-8")
    page.driver.get(path.as_uri())
    page.driver.switch_to.frame(page.wait("iframe"))
    page.wait("#heads button")
    assert page.text("#map-title") == "L0H0" and len(page.all("#heads button")) == 5
    assert page.run("document.documentElement.scrollHeight <= innerHeight + 1")
    page.driver.switch_to.default_content()


def test_queries_that_are_the_last_of_the_keys_have_their_tokens(page, tmp_path):
    late = {0: PATTERNS[0][:, :, 4:]}
    page.driver.get(save_interactive_attention(late, TOKENS, tmp_path / "late.html").as_uri())
    page.run("document.getElementById('map').focus()")
    assert "(5) to" in page.text("#readout") and page.texts("#queries span")[1] == TOKENS[5]
    page.press("Right")
    assert value_shown(page) == pytest.approx(PATTERNS[0][0, 0, 5, 1], abs=6e-4)
    page.all("#tokens button")[5].click()
    assert page.run("weight(0, 1, 3)") == pytest.approx(PATTERNS[0][0, 1, 5, 3], abs=1e-4)
    page.all("#tokens button")[2].click()  # which is no query
    assert page.run("weight(0, 1, 1)") == 0
