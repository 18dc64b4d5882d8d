"""The shipped digits in a real browser: the command of the README, and the file that it exports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.applications.explorer.browser import (
    canvas_pixels,
    chromium,
    exploring,
    hover,
    opened,
    point_of,
    settle,
    wait_drawn,
    wait_text,
)

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shipped_digits_are_explored(tmp_path, record_property):
    """The command of the README, and its page in one file: the same point decodes to the same digit in both."""
    pair = [str(CHECKPOINTS / name) for name in ("digits-vae-2d", "digits-ae-2d")]
    if not all(Path(path).is_dir() for path in pair):
        pytest.skip("the digits are not in this checkout")
    words = [pair[0], "--compare", pair[1], "--device", "cpu"]
    path = tmp_path / "digits.html"
    command = [sys.executable, "-m", "ldm_vae.cli", "explore", *words, "--export", str(path)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    pictures = []
    with chromium() as browser, exploring(*words) as address, opened(browser, address) as page:
        wait_drawn(page, "#map-decoded")
        point = hover(page, "#map-plot", 0.45, 0.55, "#map-decoded")
        pictures.append(canvas_pixels(page, "#map-decoded"))
        page.click("#tab-compare")
        shares = [page.locator(f"#compare-share-{key}") for key in "ab"]
        for key in "ab":
            wait_text(page, f"#compare-share-{key}", "%")
        shares = [int(re.match(r"(\d+) %", share.inner_text())[1]) for share in shares]
        assert shares[0] > shares[1], "the plane of the VAE is filled, that of the plain autoencoder has holes"
    shutil.copy(path, tmp_path / "mailed.html")
    mailed = f"{(tmp_path / 'mailed.html').as_uri()}#map?x={point[0]}&y={point[1]}&model=a"
    with chromium() as browser, opened(browser, mailed, offline=True) as page:
        wait_drawn(page, "#map-decoded")
        settle(page, "#map-decoded")
        assert point_of(page, "#map-decoded") == point
        pictures.append(canvas_pixels(page, "#map-decoded"))
        milliseconds = page.evaluate(
            """() => { const decoder = new explorer.Decoder(JSON.parse(exported.textContent).decoders.a);
                       for (let turn = 0; turn < 50; turn += 1) decoder.decode([turn / 50, 0]);
                       const start = performance.now();
                       for (let turn = 0; turn < 100; turn += 1) decoder.decode([turn / 100, 1]);
                       return (performance.now() - start) / 100; }"""
        )
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= 1
    figure = f"{path.stat().st_size / 1e6:.1f} MB, {milliseconds:.1f} ms a decode, round trips {shares} %"
    record_property("figure", figure)
    print(figure)
