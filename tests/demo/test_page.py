# SPDX-License-Identifier: Apache-2.0
"""The page of the demo: who may reach it, and, in a browser, what a user does with it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from headless import browser  # noqa: F401 (a fixture)
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.demo import page as module
from vlmprune.demo.page import launch
from vlmprune.demo.playground import EXAMPLES, Playground
from vlmprune.errors import UnsupportedError, VlmPruneError
from vlmprune.testing.tiny import picture


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UnsupportedError, match=re.escape('pip install -e ".[demo]"')):
        module.page(Playground(None, None))


def test_without_gradio_no_model_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(Playground, "load", lambda *_, **__: pytest.fail("a model was read"))
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 2 and "Gradio, which is not installed" in done.output


class Launched:
    """A page that was launched, and how."""

    local_url, share_url = "http://127.0.0.1:7860/", None

    def block_thread(self):
        self.waited = True


@pytest.mark.parametrize(
    ("words", "host", "share"),
    [
        ([], "127.0.0.1", False),
        (["--share"], "127.0.0.1", True),
        (["--host", "0.0.0.0", "--port", "80"], "0.0.0.0", False),
    ],
)
def test_the_command_serves_this_machine_alone_unless_asked(monkeypatch, words, host, share):
    made, asked = Launched(), {}

    def stand_in(playground, *arguments):
        asked.update(zip(("host", "port", "share"), arguments, strict=True), name=playground.name)
        return made

    monkeypatch.setattr(module, "launch", stand_in)
    monkeypatch.setattr(module, "gradio", lambda: None)
    done = CliRunner().invoke(app, ["demo", "--copies", "1", *words])
    assert done.exit_code == 0, done.output
    assert asked == {"name": "tiny", "host": host, "share": share, "port": 80 if "--port" in words else None}
    assert "Open http://127.0.0.1:7860/ (Ctrl-C ends it)" in done.output and made.waited


def test_a_model_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(module, "gradio", lambda: None)
    done = CliRunner().invoke(app, ["demo", "--model", "./nowhere"])
    assert done.exit_code == 2 and "the folder './nowhere' does not exist" in done.output


# --- with Gradio ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    """The page of the bundled model, served on a free port; its address."""
    pytest.importorskip("gradio")
    made = launch(Playground.load("tiny"))
    yield made.local_url
    made.close()


@pytest.mark.slow
def test_making_the_page_writes_nothing_beside_the_code(served):
    # Gradio writes a stub file for each class of a user that inherits from one of its inputs
    assert [path.name for path in Path(module.__file__).parent.glob("*.pyi")] == []


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_sentence(served):
    port = int(re.search(r":(\d+)", served)[1])
    with pytest.raises(VlmPruneError, match=rf"cannot be served on 127.0.0.1, port {port} .*another --port"):
        launch(Playground(None, None), port=port)


@pytest.fixture
def opened(browser, served):  # noqa: F811
    browser.get("about:blank")  # what the page before this one says while it is left is not of this one
    browser.get_log("performance"), browser.get_log("browser")
    browser.set_window_size(1400, 1000)
    browser.get(served)
    wait(browser, lambda: browser.find_elements(By.ID, "ask"))
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#picture img"))  # it opens with a picture
    yield browser
    assert severe(browser) == []


def wait(driver, condition, seconds=180):
    # what is looked at may be replaced meanwhile
    waiting = WebDriverWait(driver, seconds, ignored_exceptions=[StaleElementReferenceException])
    try:
        return waiting.until(lambda _: condition())
    except TimeoutException:
        pytest.fail(f"not within {seconds} s; the page shows {text(driver)!r}, console: {severe(driver)}")


def severe(driver):
    """What the console calls an error."""
    return [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]


def text(driver):
    return driver.execute_script("return document.querySelector('#answers').innerText").strip()


def specs(driver):
    script = "return [...document.querySelectorAll('.vp-card code')].map(code => code.innerText)"
    return driver.execute_script(script)


def marked(driver):
    return driver.find_elements(By.CSS_SELECTOR, ".vp-right, .vp-wrong")


def click(driver, selector):
    (element, *_) = wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, selector))
    driver.execute_script("arguments[0].click()", element)  # also where another element covers it meanwhile


def ask(driver, question):
    box = driver.find_element(By.CSS_SELECTOR, "#question textarea, #question input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(question or Keys.DELETE)
    click(driver, "#ask")


def remove(driver):
    """Take the picture away; the page opens with one."""
    click(driver, "button[aria-label='Remove Image']")
    wait(driver, lambda: not driver.find_elements(By.CSS_SELECTOR, "#picture img"))


def upload(driver, path):
    (place, *_) = wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
    place.send_keys(str(path))
    wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "#picture img"))


@pytest.mark.slow
def test_upload_ask_slide_and_switch(opened, tmp_path):
    ask(opened, "what does the purple sign say ?")
    wait(opened, lambda: specs(opened))
    assert marked(opened)  # a question of the benchmark
    picture(seed=3).save(tmp_path / "mine.png")
    remove(opened)
    upload(opened, tmp_path / "mine.png")
    ask(opened, "what color is the ball ?")
    kept = ["random@0.125", "divprune@0.125", "fastervlm@0.125", "fastv@0.125"]
    wait(opened, lambda: specs(opened) == ["dense", *kept] and not marked(opened))
    assert text(opened).count("18 of 144") == 4
    # slide
    slider = opened.find_element(By.CSS_SELECTOR, "#keep input[type=number]")
    slider.send_keys(Keys.CONTROL, "a")
    slider.send_keys("50", Keys.TAB)
    click(opened, "#ask")
    wait(opened, lambda: text(opened).count("72 of 144") == 4)
    # switch: remove one method, type a whole spec
    box = opened.find_element(By.CSS_SELECTOR, "#methods input")
    box.send_keys(Keys.BACKSPACE)
    wait(opened, lambda: "fastv@0.5" not in specs(opened))
    box.send_keys("debias+fastervlm@9", Keys.ENTER)
    wait(opened, lambda: specs(opened)[-1:] == ["debias+fastervlm@9"] and "9 of 144" in text(opened))


@pytest.mark.slow
def test_an_error_is_a_sentence_and_the_page_goes_on(opened, tmp_path):
    remove(opened)
    ask(opened, "what is it ?")
    wait(opened, lambda: text(opened) == "there is no picture; upload one, or click an example")
    picture().save(tmp_path / "mine.png")
    upload(opened, tmp_path / "mine.png")
    ask(opened, "")
    wait(opened, lambda: text(opened).startswith("the question is empty"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    remove(opened)
    upload(opened, tmp_path / "broken.png")
    ask(opened, "what is it ?")
    wait(opened, lambda: "cannot be read as a picture" in text(opened))
    remove(opened)
    upload(opened, tmp_path / "mine.png")
    box = opened.find_element(By.CSS_SELECTOR, "#methods input")
    box.send_keys("nosuch", Keys.ENTER)
    ask(opened, "what is it ?")
    wait(opened, lambda: "method 'nosuch' is unknown" in text(opened))
    assert specs(opened)[0] == "dense" and len(specs(opened)) == 6


@pytest.mark.slow
def test_an_example_is_answered_by_a_click_and_marked(opened):
    rows = wait(opened, lambda: opened.find_elements(By.CSS_SELECTOR, "tbody tr"))
    assert len(rows) == len(EXAMPLES)
    rows[2].click()
    wait(opened, lambda: specs(opened))
    box = opened.find_element(By.CSS_SELECTOR, "#question textarea, #question input")
    assert box.get_attribute("value") == "how many green objects are there ?"
    marks = [e.get_attribute("class") for e in opened.find_elements(By.CSS_SELECTOR, ".vp-answer")]
    assert marks[0] == "vp-answer vp-right"


@pytest.mark.slow
def test_the_page_asks_no_other_machine(opened, served):
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith(("data:", "blob:", served))} == set()


@pytest.mark.slow
def test_the_blocks_of_the_docs_page_run(monkeypatch, capsys):
    gradio = pytest.importorskip("gradio")
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self: print("launched"))
    page = Path(__file__).parents[2] / "docs" / "demo.md"
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["launched", "dense 144 x k l"]
    assert [line.split()[:2] for line in lines[2:]] == [
        ["fastervlm@0.25", "36"],
        ["fastv(layer=2)@0.25", "36"],
    ]
