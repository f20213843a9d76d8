"""The studio's page in a real Chromium: what a visitor sees, types and presses."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import Pipeline
from tests.studio_server import CALIBRATION, PATIENCE_S, Studio, running, shapes_config, until

CHROMIUM = os.environ.get("STUDIO_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CANVAS = """() => {
  const canvas = document.getElementById("canvas");
  const copy = document.createElement("canvas");
  Object.assign(copy, { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
}"""


def missing(what: str) -> None:
    """Skip, and say so; but not where the page's tests must run."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing: the studio's page cannot be tested (docs/contributing.md)")
    pytest.skip(f"{what} is missing, so the studio's page is not tested (docs/contributing.md)")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    pipeline = Pipeline.from_config(shapes_config())
    with running(pipeline, tmp_path_factory.mktemp("stage"), calibration=str(CALIBRATION)) as studio:
        yield studio


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright")
    if CHROMIUM is None:
        missing("Chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, stage: Studio) -> Iterator[Open]:
    """Opens pages, each in a context of its own; nothing may be in the console, or be asked of another host."""
    said: list[str] = []
    contexts = []

    def new(path: str = "/", **options: Any) -> Any:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if foreign(request.url) else None)
        page.goto(f"{stage.url}{path}")
        return page

    def foreign(url: str) -> bool:
        return not url.startswith((stage.url, f"ws://127.0.0.1:{stage.port}", "blob:"))

    yield new
    for context in contexts:
        context.close()
    stage.end_sessions()
    assert said == []


def look(page: Any, script: str) -> Any:
    return page.evaluate(script)


def wait(page: Any, script: str) -> Any:
    """Until the script is true, which is asked as the browser's tools do: the page forbids eval."""
    ends = time.monotonic() + PATIENCE_S
    while not (found := page.evaluate(script)):
        assert time.monotonic() < ends, f"{script} has not come about: {page.inner_text('body')}"
        page.wait_for_timeout(20)
    return found


def picture(page: Any) -> np.ndarray:
    """What is on the canvas, [H, W, 3]."""
    return np.array(page.evaluate(CANVAS), np.int64).reshape(80, 128, 4)[..., :3]


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def coloured(page: Any, channel: int) -> int:
    """Pixels of the canvas in which that colour leads by far."""
    frame = picture(page)
    others = np.delete(frame, channel, -1).max(-1)
    return int((frame[..., channel] - others > 60).sum())


def test_the_picture_moves_and_obeys(open_page: Open) -> None:
    page = open_page()
    wait(page, "studio.player.shown > 9")
    before = picture(page)
    assert coloured(page, 0) > 300  # a red ball is there
    wait(page, "studio.player.shown > 40")
    assert np.abs(picture(page) - before).max() > 80  # and moves
    rate, fps = look(page, "[studio.player.rate(), studio.player.fps]")
    assert rate == pytest.approx(fps, rel=0.35)
    say(page, "It turns blue.")
    (latency,) = wait(page, "studio.state.latencies.length && studio.state.latencies")
    assert 0 < latency < PATIENCE_S
    assert page.inner_text("#caption") == "It turns blue."
    until(lambda: coloured(page, 2) > 150 and coloured(page, 0) < 150, "a blue ball")
    assert page.inner_text("#timeline li.now span") == "It turns blue."
    assert "fps" in page.inner_text("#numbers") and f"{latency:.2f} s" in page.inner_text("#numbers")
    assert look(page, "document.querySelectorAll('#heads g').length") == 24


def test_everything_has_a_key(open_page: Open, stage: Studio) -> None:
    page = open_page()
    wait(page, "studio.player.shown > 0")
    page.keyboard.press("/")
    page.keyboard.type("It turns blue.")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    wait(page, "studio.state.latencies.length == 1")
    page.keyboard.press("Space")
    wait(page, "studio.state.paused")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    stands = look(page, "studio.player.shown")
    page.wait_for_timeout(300)
    assert look(page, "studio.player.shown") == stands
    page.keyboard.press(".")
    wait(page, f"studio.player.shown > {stands} && !studio.player.waiting.length")
    (room,) = stage.house.parts.lobby.rooms.values()
    assert room.showing is not None
    until(lambda: look(page, "studio.player.shown") == room.showing.made)
    page.keyboard.press("s")
    wait(page, "document.querySelectorAll('#saved button').length == 4")
    with page.expect_download() as download:
        page.click("text=Video (mp4)")
    (made,) = stage.house.folders.saved.glob("*.mp4")
    assert Path(download.value.path()).read_bytes() == made.read_bytes()
    assert download.value.suggested_filename == made.name
    page.select_option("#policy", "paper")
    page.keyboard.press("Escape")
    page.focus("body")
    page.keyboard.press("r")
    wait(page, "studio.player.take == 1 && studio.player.shown > 0 && !studio.state.paused")
    assert look(page, "document.getElementById('policy').value") == "paper"  # any restart is with what was chosen


def test_a_reload_and_a_second_tab_and_a_guest(open_page: Open, stage: Studio) -> None:
    page = open_page()
    wait(page, "studio.player.shown > 0")
    say(page, "It turns blue.")
    wait(page, "studio.state.latencies.length == 1")
    page.reload()
    wait(page, "studio.player.shown > 21")
    assert page.inner_text("#timeline").count("turns blue") == 1  # it is the same session
    other = open_page()
    wait(other, "studio.player.shown > 0")
    say(other, "It turns green.")
    wait(other, "studio.state.latencies.length == 1")
    assert "green" not in page.inner_text("#timeline") and "blue" not in other.inner_text("#timeline")
    guest = open_page(f"/#watch={look(page, 'studio.state.watch')}", viewport={"width": 390, "height": 844})
    wait(guest, "studio.player.shown > 21")
    assert not guest.is_visible("#say") and "You are watching" in guest.inner_text("header")
    assert wait(page, "document.getElementById('audience').textContent") == "2 viewers"
    assert look(guest, "document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
    late = open_page(color_scheme="dark")
    assert "number 1 of 1 in the line" in until(
        lambda: late.inner_text("#veil-text") if "line" in late.inner_text("#veil-text") else ""
    )


def test_errors_are_sentences(open_page: Open) -> None:
    page = open_page()
    wait(page, "studio.player.shown > 0")
    page.select_option("#policy", "paper")
    page.click("text=Restart with these")
    wait(page, "studio.player.take == 1")
    page.keyboard.press("Escape")
    page.focus("body")
    page.keyboard.press("s")
    text = wait(page, "!document.getElementById('alert').hidden && document.querySelector('#alert span').textContent")
    assert text.startswith("save: ")
    page.click("#alert button")
    assert not page.is_visible("#alert")
    say(page, "<img src=x onerror=alert(1)>")
    wait(page, "document.getElementById('timeline').textContent.includes('<img src=x onerror=alert(1)>')")
    assert look(page, "document.querySelectorAll('#timeline img').length") == 0
