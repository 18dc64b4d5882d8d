"""A real headless Chromium for the tests of the explorer's page: found, opened, and watched while it shows a page.

Owns no test. Without a browser, or without Playwright, who asks for one is skipped with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MILLISECONDS = 120_000
"""Of every wait: a busy machine takes its time, and a page that never comes fails all the same."""
WITHOUT_REQUEST = ("file:", "data:", "blob:")
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/")


@contextmanager
def exploring(*words: str) -> Iterator[str]:
    """`ldm-vae explore` in a process of its own; its address."""
    command = [sys.executable, "-m", "ldm_vae.cli", "explore", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = next((found[0] for line in process.stdout if (found := ADDRESS.search(line))), None)
        assert address, "it printed no address"
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 0


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of the system, or Playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with api.sync_playwright() as playwright:
        installed = [path for name in NAMES if (path := shutil.which(name))]
        path = (installed or [playwright.chromium.executable_path])[0]
        if not Path(path).is_file():
            pytest.skip("there is no Chromium; install it, or run `playwright install chromium`")
        flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else list(FLAGS)
        browser = playwright.chromium.launch(executable_path=path, args=flags, timeout=PATIENCE_MILLISECONDS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, address: str, forgiven: str = "", **options: Any) -> Iterator[Page]:
    """A page that is shown, 1280 x 800 unless `options` (of Playwright's `new_context`) say another.

    When it is closed, nothing may have gone wrong: no error in the console (what the page's policy forbids is one),
    none in a script, and no request to anywhere but `address`. What says `forgiven` was provoked.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(PATIENCE_MILLISECONDS)
    context.add_init_script(COUNT_REQUESTS)
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda told: troubles.append(f"console: {told.text}") if told.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(f"script: {error}"))
    allowed = (*WITHOUT_REQUEST, address.split("#")[0])
    page.on("request", lambda sent: troubles.append(f"sent: {sent.url}") if not sent.url.startswith(allowed) else None)
    try:
        page.goto(address)
        yield page
        assert [trouble for trouble in troubles if not forgiven or forgiven not in trouble] == []
    finally:
        context.close()


COUNT_REQUESTS = """
window.requestsUnderWay = 0;
const unwatched = window.fetch;
window.fetch = async (...sent) => {
  window.requestsUnderWay += 1;
  try { return await unwatched(...sent); } finally { window.requestsUnderWay -= 1; }
};"""
"""Before anything of the page runs: how many of its questions wait for an answer."""
READ_CANVAS = """
(canvas) => {
  const {data, width, height} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return [width, height, Array.from(data)];
}"""
READ_IMAGE = """
async (image) => {
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [canvas.width, canvas.height, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];
}"""


def canvas_pixels(page: Page, selector: str) -> np.ndarray:
    """What a canvas holds, uint8 (3, h, w); no pixels before it is drawn."""
    return _opaque(*page.eval_on_selector(selector, READ_CANVAS))


def image_pixels(page: Page, selector: str) -> np.ndarray:
    """What an image shows once it is loaded, uint8 (3, h, w)."""
    return _opaque(*page.eval_on_selector(selector, READ_IMAGE))


def _opaque(width: int, height: int, values: list[int]) -> np.ndarray:
    picture = np.array(values, np.uint8).reshape(height, width, 4)
    if (picture[:, :, 3] != 255).any():
        return np.empty((3, 0, 0), np.uint8)  # not drawn yet
    return picture[:, :, :3].transpose(2, 0, 1)


def point_of(page: Page, selector: str) -> tuple[float, float]:
    """The point that a canvas of the explorer shows the decoded picture of."""
    x, y = page.eval_on_selector(selector, "canvas => [canvas.dataset.x, canvas.dataset.y]")
    return float(x), float(y)


def drawn(page: Page, selector: str) -> int:
    """How many pictures a canvas of the explorer has shown."""
    return int(page.get_attribute(selector, "data-drawn") or 0)


def wait_drawn(page: Page, selector: str, before: int = 0) -> None:
    """Until the canvas has shown more pictures than `before`."""
    page.wait_for_function(
        "([selector, before]) => Number(document.querySelector(selector)?.dataset.drawn || 0) > before",
        arg=[selector, before],
    )


def at(page: Page, plot: str, across: float, down: float) -> tuple[float, float]:
    """The place in the window of a share of a plot."""
    area = page.locator(plot).bounding_box()
    return area["x"] + across * area["width"], area["y"] + down * area["height"]


def hover(page: Page, plot: str, across: float, down: float, canvas: str) -> tuple[float, float]:
    """Move the mouse over a plot and wait for the picture; the point that it shows."""
    page.mouse.move(*at(page, plot, across + 0.02, down))
    page.wait_for_timeout(50)
    before = drawn(page, canvas)
    page.mouse.move(*at(page, plot, across, down))
    wait_drawn(page, canvas, before)
    settle(page, canvas)
    return point_of(page, canvas)


def settle(page: Page, canvas: str) -> None:
    """Until no question is under way, and no newer picture has come for a while."""
    page.wait_for_function(
        """(selector) => new Promise((resolve) => {
            const canvas = document.querySelector(selector), before = canvas.dataset.drawn;
            const isQuiet = () => window.requestsUnderWay === 0 && canvas.dataset.drawn === before;
            setTimeout(() => resolve(isQuiet()), 400); })""",
        arg=canvas,
    )


def wait_pixels(page: Page, read: Callable[[Page, str], np.ndarray], selector: str, expected: Any) -> None:
    """Until a picture is exactly the expected one; the test fails where it never is."""
    expected, end = np.asarray(expected), time.monotonic() + 60
    while True:
        found = read(page, selector)
        if found.shape == expected.shape and (found == expected).all():
            return
        assert time.monotonic() < end, f"{selector}: {found.shape} shown, {expected.shape} expected, or other pixels"
        page.wait_for_timeout(100)


def wait_text(page: Page, selector: str, part: str) -> None:
    page.wait_for_function(
        "([selector, part]) => document.querySelector(selector).innerText.includes(part)", arg=[selector, part]
    )


def set_range(page: Page, selector: str, value: float) -> None:
    """Move a slider as a hand does: the value, then what follows from it."""
    page.eval_on_selector(
        selector, "(range, value) => { range.value = value; range.dispatchEvent(new Event('input')); }", value
    )
