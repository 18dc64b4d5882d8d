"""The exported page: what its file holds and refuses, and that a browser without a network decodes what torch does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_vae.applications.explorer import export
from ldm_vae.applications.explorer.answers import PageModels, open_page_model, path_strip
from ldm_vae.applications.explorer.explored import ExploreConfig
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.vector import AutoencoderVector
from ldm_vae.errors import UserError
from tests.applications.explorer.browser import (
    canvas_pixels,
    chromium,
    drawn,
    image_pixels,
    opened,
    point_of,
    wait_drawn,
)
from tests.applications.explorer.models import open_explored, open_two

IMAGES = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> PageModels:
    """A VAE and a plain autoencoder of random weights, on synthetic images."""
    folder = tmp_path_factory.mktemp("vectors")
    for seed, name in enumerate(("vae", "ae")):
        torch.manual_seed(seed)
        AutoencoderVector(deterministic=name == "ae").save_pretrained(folder / name)
    both = open_two(folder / "vae", folder / "ae", ExploreConfig(data="synthetic", count=IMAGES, device="cpu"))
    return PageModels(*(open_page_model(key, explored) for key, explored in zip("ab", both)))


@pytest.fixture(scope="module")
def page_file(models, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert export.export_page(models, path) == path.stat().st_size < export.MAXIMUM_BYTES
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(page_file, browser) -> Iterator:
    """The page of both models, from the disk and without a network, for the tests that leave it as it is."""
    with opened(browser, page_file.as_uri(), offline=True) as page:
        wait_drawn(page, "#map-decoded")
        yield page


def data_of(path: Path) -> dict:
    """What the page carries."""
    return json.loads(re.search(r'id="exported">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def decoded(model, x: float, y: float) -> np.ndarray:
    """uint8 (3, h, w), by torch."""
    return model.explored.decode(model.plane.latent_at(torch.tensor([[x, y]])))[0].numpy()


def nearly(picture: np.ndarray, expected: np.ndarray) -> bool:
    """Within one level: sums of 32-bit floats in another order round differently at the half between two levels."""
    return picture.shape == expected.shape and int(np.abs(picture.astype(int) - expected.astype(int)).max()) <= 1


def test_the_decoder_agrees_with_torch(models, page):
    generator = torch.Generator().manual_seed(0)
    points = {model.key: 3 * torch.randn(50, 2, generator=generator) for model in models.all}
    for model in models.all:
        values = page.evaluate(
            """([model, points]) => {
                const decoder = new explorer.Decoder(JSON.parse(exported.textContent).decoders[model]);
                return points.map((point) => Array.from(decoder.decode(point))); }""",
            [model.key, points[model.key].tolist()],
        )
        with torch.no_grad():
            expected = model.explored.autoencoder.decode(points[model.key][:, :, None, None]).sample[:, 0].flatten(1)
        assert expected.std() > 0.1
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=0)


def test_hovering_shows_what_torch_decodes_there(models, page):
    first = models.all[0]
    page.click("#tab-map")
    area = page.locator("#map-plot").bounding_box()
    found = set()
    for across, down in ((0.3, 0.3), (0.7, 0.4), (0.5, 0.8)):
        before = drawn(page, "#map-decoded")
        page.mouse.move(area["x"] + across * area["width"], area["y"] + down * area["height"])
        wait_drawn(page, "#map-decoded", before)
        x, y = point_of(page, "#map-decoded")
        found.add((x, y))
        assert nearly(canvas_pixels(page, "#map-decoded"), decoded(first, x, y))
        index = int(page.get_attribute("#map-nearest", "data-index"))
        assert index == first.plane.nearest(x, y)[0]
        original = first.explored.images[index].numpy().astype(int)
        assert np.abs(image_pixels(page, "#map-nearest") - original).mean() < 8  # of a lossy sprite
    assert len(found) == 3


def test_both_models_are_compared_with_one_cursor(models, page):
    page.click("#tab-compare")
    wait_drawn(page, "#compare-decoded-b")
    before = drawn(page, "#compare-decoded-b")
    area = page.locator("#compare-plot-a").bounding_box()
    page.mouse.move(area["x"] + area["width"] / 3, area["y"] + area["height"] / 3)
    wait_drawn(page, "#compare-decoded-b", before)
    for model in models.all:
        shown = canvas_pixels(page, f"#compare-decoded-{model.key}")
        assert nearly(shown, decoded(model, *point_of(page, f"#compare-decoded-{model.key}")))
        assert page.inner_text(f"#compare-share-{model.key}").startswith(f"{100 * model.round_trip.share:.0f} %")


def test_a_path_is_a_strip_of_decoded_points(models, page):
    points = [[-1.0, 0.5], [-1.0, 0.5], [0.4, 0.7], [1.0, -1.0]]
    address = page.evaluate("(points) => explorer.source.path('b', points, 7)", points)
    page.evaluate("(address) => { document.getElementById('path-strip').src = address; }", address)
    expected = path_strip(models.all[1].explored, models.all[1].plane, torch.tensor(points), 7).numpy()
    assert nearly(image_pixels(page, "#path-strip"), expected)


def shown_tabs(page) -> list[str]:
    return [tab.inner_text() for tab in page.get_by_role("tab").all() if tab.is_visible()]


def test_only_the_tabs_that_work_are_shown(page):
    assert shown_tabs(page) == ["Map", "Compare"]


def test_one_model_whose_names_are_hostile(models, browser, tmp_path):
    name = "</script><script>document.title='broken'</script><!-- <b id=bold>"
    explored = models.all[0].explored
    named = replace(explored, name=name, ids=(name,) * IMAGES, label_names=(name,), labels=explored.labels * 0)
    model = open_page_model("a", named)
    model.round_trip = models.all[0].round_trip
    export.export_page(PageModels(model), tmp_path / "page.html")
    with opened(browser, (tmp_path / "page.html").as_uri(), offline=True) as page:
        wait_drawn(page, "#map-decoded")
        assert shown_tabs(page) == ["Map"]
        assert page.title().startswith(name)
        assert page.inner_text("#title") == name
        assert page.locator("#bold").count() == 0


def test_a_page_runs_and_loads_nothing_but_itself(page_file, browser):
    with opened(browser, page_file.as_uri(), forgiven="Content Security Policy") as page:
        wait_drawn(page, "#map-decoded")
        refused = page.evaluate(
            """async () => {
                const refused = [];
                document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
                const script = document.createElement("script");
                script.textContent = "document.title = 'ran'";
                document.body.append(script);
                await fetch("http://127.0.0.1:9/").catch(() => {});
                await new Promise((resolve) => setTimeout(resolve, 200));
                return refused; }"""
        )
        assert page.title() != "ran"
        assert set(refused) == {"script-src-elem", "connect-src"}


def test_many_images_are_thinned_evenly(models, page_file, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "MAXIMUM_IMAGES", 10)
    export.export_page(models, tmp_path / "page.html")
    few, all_of_them = data_of(tmp_path / "page.html"), data_of(page_file)
    assert few["description"]["images"]["count"] == len(few["maps"]["b"]["x"]) == 10
    assert all_of_them["description"]["images"]["count"] == len(all_of_them["maps"]["b"]["x"]) == IMAGES
    assert set(few["maps"]["a"]["id"]) < set(all_of_them["maps"]["a"]["id"])
    assert few["maps"]["a"]["id"] == few["maps"]["b"]["id"]


def test_nothing_is_written_over_unasked(models, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(UserError, match="there already; give another name, or --overwrite"):
        export.export_page(models, path)
    assert path.read_text() == "mine"
    export.export_page(models, path, overwrite=True)
    assert path.stat().st_size > 4_000_000
    with pytest.raises(UserError, match="is a folder"):
        export.export_page(models, tmp_path, overwrite=True)


def test_a_page_that_is_too_large_is_refused(models, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "MAXIMUM_BYTES", 1_000_000)
    with pytest.raises(UserError, match=r"would have \d+\.\d MB, more than 1; give a smaller count"):
        export.export_page(models, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_no_page_can_run_is_refused(tmp_path):
    torch.manual_seed(0)
    build_autoencoder(AutoencoderConfig(preset="pico")).save_pretrained(tmp_path / "spatial")
    explored = open_explored(tmp_path / "spatial", ExploreConfig(data="synthetic", count=4, size=32, device="cpu"))
    with pytest.raises(UserError, match=r"AutoencoderWavelet, and a page .* leave out export"):
        export.export_page(PageModels(open_page_model("a", explored)), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
