"""Take the pictures of the explorer in docs/: one screenshot a tab, `OUT/explorer-TAB.webp`, from its own server.

    python -m tools.record_explorer_pictures OUT MODEL OTHER RUN

MODEL and OTHER are the two models of the map, the comparison, the stages and the sliders; RUN is the run of `train-vae`
whose training is shown. Needs Chromium on the path, and Playwright (`pip install playwright`).
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = {"width": 1280, "height": 880}
QUALITY = 82
PATIENCE_MILLISECONDS = 300_000
SETTLED_MILLISECONDS = 2000
"""After the last thing that can be waited for: pictures that are still being drawn."""
DARK = ("architecture", "training")
TABS = {"map": "#map-decoded", "compare": "#compare-decoded-b", "architecture": "#architecture-output",
        "sliders": "#slider-edited"}  # fmt: skip
"""View of MODEL -> the canvas that is drawn last."""


@contextmanager
def explorer(*arguments: str) -> Iterator[str]:
    """The address of a server of its own."""
    command = [sys.executable, "-m", "ldm_vae.cli", "explore", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            yield next(line.strip() for line in server.stdout or () if line.startswith("http://"))
        finally:
            server.terminate()


def take(browser: Any, address: str, tab: str, out: Path) -> None:
    page = browser.new_page(viewport=SIZE, color_scheme="dark" if tab in DARK else "light")
    page.set_default_timeout(PATIENCE_MILLISECONDS)
    page.goto(f"{address}#{tab}")
    if tab in TABS:
        page.wait_for_selector(f"{TABS[tab]}[data-drawn]")
    if tab in ("map", "compare"):  # what the whole map says is measured in the background
        page.wait_for_function("() => explorer.state.description.models.every((model) => model.round_trip)")
    touch(page, tab)
    page.wait_for_timeout(SETTLED_MILLISECONDS)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=tab != "training")))
    picture.convert("RGB").save(out / f"explorer-{tab}.webp", quality=QUALITY, method=6)
    page.close()


def touch(page: Any, tab: str) -> None:
    """What a visitor would do: a path and a locked point, the round-trip error, a stage, a slider."""
    if tab == "map":
        page.keyboard.down("Shift")
        for number, (across, down) in enumerate([(0.25, 0.3), (0.45, 0.62), (0.75, 0.45)]):
            page.mouse.move(*place(page, "#map-plot", across, down), steps=10)
            if number == 0:
                page.mouse.down()
        page.mouse.up()
        page.keyboard.up("Shift")
        page.wait_for_selector("#path-card:not([hidden])")
        page.mouse.click(*place(page, "#map-plot", 0.6, 0.68))
    elif tab == "compare":
        page.check("#compare-heat")
        page.mouse.move(*place(page, "#compare-plot-a", 0.68, 0.5), steps=3)
    elif tab == "architecture":
        page.click("[data-stage]:nth-child(3)")
    elif tab == "sliders":
        page.fill("[data-channel='0']", "1")
        page.fill("[data-channel='1']", "-0.5")


def place(page: Any, selector: str, across: float, down: float) -> tuple[float, float]:
    box = page.locator(selector).bounding_box()
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("model", "other", "run"):
        parser.add_argument(name)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu"]  # it opens no page but ours
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments, timeout=PATIENCE_MILLISECONDS)
        with explorer(args.model, "--compare", args.other) as address:
            for tab in TABS:
                take(browser, address, tab, args.out)
        with explorer(args.run) as address:
            take(browser, address, "training", args.out)
        browser.close()


if __name__ == "__main__":
    main()
