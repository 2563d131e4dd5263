# SPDX-License-Identifier: Apache-2.0
"""The page in a browser: it opens without a word or a request, sorts, filters, and fits phone and paper."""

from __future__ import annotations

import json

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from vlmprune.evaluation.report import write_report


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    return write_report(run_folder, out=tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(browser, page):
    """The page, freshly loaded at desktop width."""
    device(browser, 1400, 900)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def device(browser, width, height, scheme="light"):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def visible(browser):
    """(spec, accuracy) of the rows shown, in order."""
    script = """return [...document.querySelectorAll('#board tbody tr')].filter(row => row.offsetHeight)
        .map(row => [row.dataset.spec, row.dataset.model,
                     Number(row.querySelector('td[data-label^=accuracy]').dataset.sort)])"""
    return [tuple(row) for row in browser.execute_script(script)]


def test_it_opens_without_errors_and_without_requests(opened, page):
    assert "vlmprune" in opened.title
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


def test_pictures_are_drawn(opened):
    sizes = opened.execute_script(
        "return [...document.images].map(image => {image.loading = 'eager'; return image.complete ? "
        "image.naturalWidth : -1})"
    )
    assert len(sizes) > 10
    opened.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.images].map(i => i.decode())).then(() => done())"
    )
    assert min(opened.execute_script("return [...document.images].map(image => image.naturalWidth)")) >= 288


def test_what_a_model_answers_is_shown_and_never_run(opened):
    assert "owned" not in opened.title
    shown = opened.find_element(By.TAG_NAME, "body").get_attribute("textContent")
    assert '<script>document.title="owned"</script>' in shown
    assert len(opened.find_elements(By.TAG_NAME, "script")) == 1


def test_only_the_script_of_the_page_may_run(opened):
    """The policy stands even where escaping failed."""
    opened.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; "
        "document.body.append(s);const d = document.createElement('div'); document.body.append(d); "
        "d.innerHTML = '<img src=x onerror=\"document.title = 2\">'"
    )
    assert "vlmprune" in opened.title
    assert any("Content Security Policy" in entry["message"] for entry in opened.get_log("browser"))


def test_a_heading_sorts_both_ways(opened):
    heading = opened.find_element(By.XPATH, "//th[contains(., 'accuracy')]")
    heading.find_element(By.TAG_NAME, "button").click()
    scores = [score for *_, score in visible(opened)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 3
    assert heading.get_attribute("aria-sort") == "descending"
    heading.find_element(By.TAG_NAME, "button").click()
    assert [score for *_, score in visible(opened)] == sorted(scores)


def test_rows_without_a_value_stay_last(opened):
    heading = opened.find_element(By.XPATH, "//th[contains(., 'vs random')]")
    for _ in range(2):
        heading.find_element(By.TAG_NAME, "button").click()
        cells = opened.find_elements(By.CSS_SELECTOR, '#board td[data-label^="vs random"]')
        empty = [cell.get_attribute("data-sort") == "" for cell in cells]
        assert empty == sorted(empty) and any(empty) and not all(empty)


def test_filters_narrow_all_parts_together(opened):
    whole = visible(opened)
    Select(opened.find_element(By.ID, "filter-keep")).select_by_visible_text("9")
    Select(opened.find_element(By.ID, "filter-model")).select_by_visible_text("model-b")
    left = visible(opened)
    assert set(left) < set(whole)
    assert {model for _, model, _ in left} == {"model-b"}
    assert all(spec == "dense" or spec.endswith("@9") for spec, *_ in left) and (
        "dense" in {spec for spec, *_ in left}
    )
    opened.find_element(By.ID, "filter-text").send_keys("FASTER")
    assert [spec for spec, *_ in visible(opened)] == [
        "dense",
        "fastervlm@9",
    ]  # what it is compared with stays
    assert opened.find_element(By.ID, "shown").text.startswith("2 of")
    for selector in ("#flips article", "#families tbody tr"):
        shown = [item for item in opened.find_elements(By.CSS_SELECTOR, selector) if item.is_displayed()]
        assert {item.get_attribute("data-spec") for item in shown} <= {"fastervlm@9"}
    opened.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    WebDriverWait(opened, 20).until(
        lambda page: visible(page) == whole
    )  # the fields go back first, the rows a moment later


def test_single_seeds_are_shown_on_demand(opened):
    assert not any("seed=" in spec for spec, *_ in visible(opened))
    opened.find_element(By.ID, "filter-seed").click()
    assert sum("seed=" in spec for spec, *_ in visible(opened)) == 2 * 2 * 3


def test_an_empty_gallery_says_so(opened):
    none = opened.find_element(By.CSS_SELECTOR, "#flips .none")
    assert not none.is_displayed()
    opened.find_element(By.ID, "filter-text").send_keys("no such method")
    assert none.text == "None of the 48 flips shown here passes the filters."
    opened.find_element(By.ID, "filter-text").clear()
    opened.find_element(By.ID, "filter-text").send_keys("zooprune")
    assert not none.is_displayed()  # every method has its share


def test_columns_are_explained_without_pointing_at_them(opened):
    heads = [
        head.text.replace("\n", " ")
        for head in opened.find_elements(By.CSS_SELECTOR, "#board thead th button")
    ]
    terms = opened.find_elements(By.CSS_SELECTOR, "#table .meanings dt")
    assert [term.text for term in terms] == heads and len(heads) > 10
    meanings = opened.find_elements(By.CSS_SELECTOR, "#table .meanings dd")
    assert all(meaning.is_displayed() and len(meaning.text) > 10 for meaning in meanings)


def test_paper_shows_the_table_as_a_table(browser, page):
    """On A4, where a phone would get cards: rows are rows, headings are there, bars keep their colours."""
    device(browser, 700, 1000)  # what margins leave of A4 upright at 96 dots per inch
    browser.get(page.as_uri())
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        script = """
            const style = (selector) => getComputedStyle(document.querySelector(selector));
            const bar = style('.bar i');
            return [style('#board tr').display, style('#board thead').display, bar.backgroundColor,
                    bar.printColorAdjust, style('.filters').display, style('#board td').display,
                    style('#board thead button').display,
                    [...document.querySelectorAll('#board thead th[data-title]')]
                        .map(head => getComputedStyle(head, '::before').content)]"""
        row, head, colour, adjust, filters, cell, button, titles = browser.execute_script(script)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert (row, head, cell, filters) == ("table-row", "table-header-group", "table-cell", "none")
    assert button == "none" and '"accuracy, %"' in titles  # a button would not be repeated on the next page
    assert adjust == "exact" and colour not in ("rgba(0, 0, 0, 0)", "transparent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 820])
def test_nothing_scrolls_sideways_on_a_small_screen(browser, page, width, scheme):
    device(browser, width, 844, scheme)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    if width < 500:  # on a phone not even the tables do
        assert browser.execute_script(
            "const boxes = [...document.querySelectorAll('.scroll')];return boxes.every(box => "
            "box.scrollWidth <= box.clientWidth + 1)"
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page(browser, page, scheme):
    """Contrast of 4.5 to 1 for body text, hints and badges, as WCAG asks."""
    device(browser, 1400, 900, scheme)
    browser.get(page.as_uri())
    script = """
        const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = (color) => rgb(color).map(v => linear(v / 255))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const page = light(getComputedStyle(document.body).backgroundColor);
        const inks = ['body', '.hint', '.badge.good', '.badge.bad', '.badge.best', '.rows small', 'nav a',
                      '.banner', '.meanings dd'];
        return inks.map(selector => {
            const item = document.querySelector(selector); if (!item) return [selector, 99];
            const text = light(getComputedStyle(item).color);
            return [selector, (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05)]; })"""
    contrast = dict(browser.execute_script(script))
    assert {name: value for name, value in contrast.items() if value < 4.5} == {}
