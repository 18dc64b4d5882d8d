"""The explorer's page in a real browser, shown by a real `ldm-vae explore`: what people see is what the model does.

A spatial VAE in its run, whose map is a projection, beside a plain autoencoder of one vector, whose map is its latents.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch

from ldm_vae.applications.explorer import answers, stages
from ldm_vae.applications.explorer.answers import PageModels, open_page_model
from ldm_vae.applications.explorer.explored import ExploreConfig
from ldm_vae.applications.explorer.plane import measure_round_trip
from ldm_vae.autoencoder.vector import AutoencoderVector
from tests.applications.explorer.browser import (
    at,
    canvas_pixels,
    chromium,
    drawn,
    exploring,
    hover,
    image_pixels,
    opened,
    point_of,
    set_range,
    settle,
    wait_drawn,
    wait_pixels,
    wait_text,
)
from tests.applications.explorer.models import open_two
from tests.applications.explorer.served import DIRECTION, PREVIEW_STEP, small_explored

TABS = ("map", "compare", "architecture", "sliders", "training")


@dataclass(frozen=True)
class Shown:
    """A server that is running, and the same models opened here."""

    address: str
    models: PageModels

    @property
    def first(self):
        return self.models.all[0]

    @property
    def second(self):
        return self.models.all[1]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory, image_folder) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("shown")
    trained = small_explored(folder, image_folder)[0]
    torch.manual_seed(0)
    AutoencoderVector(deterministic=True).save_pretrained(folder / "vector")
    config = ExploreConfig(data=str(image_folder), count=24, directions=str(folder), device="cpu")
    both = open_two(trained.path, folder / "vector", config)
    models = PageModels(*(open_page_model(key, explored) for key, explored in zip("ab", both)))
    words = ["--compare", str(folder / "vector"), "--data", config.data, "--count", "24", "--directions", str(folder)]
    with exploring(trained.path, *words, "--device", "cpu") as address:
        yield Shown(address, models)


@pytest.fixture(scope="module")
def watched(shown, browser) -> Iterator:
    with opened(browser, shown.address) as page:
        wait_drawn(page, "#map-decoded")
        yield page


@pytest.fixture
def page(watched):
    """The page of both models at its first tab, nothing locked, looking at the first model."""
    watched.click("#tab-map")
    watched.select_option("#model", "a")
    if watched.is_visible("#map-unlock"):
        watched.click("#map-unlock")
    return watched


def decoded(model, x: float, y: float) -> torch.Tensor:
    return model.explored.decode(model.plane.latent_at(torch.tensor([[x, y]])))[0]


def test_hovering_shows_what_the_model_decodes_there(shown, page):
    found = []
    for across, down in ((0.3, 0.3), (0.7, 0.5), (0.4, 0.8)):
        x, y = hover(page, "#map-plot", across, down, "#map-decoded")
        found.append((x, y))
        wait_pixels(page, canvas_pixels, "#map-decoded", decoded(shown.first, x, y))
        x0, x1, y0, y1 = page.evaluate(
            """() => { const {xaxis, yaxis} = document.getElementById("map-plot")._fullLayout;
                       return [...xaxis.range, ...yaxis.range]; }"""
        )
        assert x0 < x < x1
        assert y0 < y < y1
        nearest = shown.first.plane.nearest(x, y)[0]
        assert int(page.get_attribute("#map-nearest", "data-index")) == nearest
        assert shown.first.explored.ids[nearest] in page.inner_text("#map-nearest-text")
        wait_pixels(page, image_pixels, "#map-nearest", shown.first.explored.images[nearest])
    (x0, y0), (x1, y1), (x2, y2) = found
    assert x0 < x2 < x1, "to the right, x rises"
    assert y0 > y1 > y2, "down the screen, y falls"


def test_the_mode_shows_the_nearest_image_through_the_model(shown, page):
    x, y = hover(page, "#map-plot", 0.6, 0.6, "#map-decoded")
    page.select_option("#map-mode", "nearest")
    mean = shown.first.explored.mean[shown.first.plane.nearest(x, y)[0]]
    wait_pixels(page, canvas_pixels, "#map-decoded", shown.first.explored.decode(mean[None])[0])
    page.select_option("#map-mode", "inverse")
    wait_pixels(page, canvas_pixels, "#map-decoded", decoded(shown.first, x, y))


def test_another_model_is_looked_at(shown, page):
    page.select_option("#model", "b")
    wait_text(page, "#map-plane-note", "latent space itself")
    x, y = hover(page, "#map-plot", 0.35, 0.6, "#map-decoded")
    wait_pixels(page, canvas_pixels, "#map-decoded", decoded(shown.second, x, y))


def test_points_that_come_late_are_not_those_of_another_model(shown, browser):
    held = []
    with opened(browser, "about:blank", forgiven="sent: http://127.0.0.1") as page:
        page.route("**/api/map?model=b", lambda route: held.append(route))
        page.goto(shown.address)
        wait_drawn(page, "#map-decoded")
        page.select_option("#model", "b")
        while not held:
            page.wait_for_timeout(20)
        page.select_option("#model", "a")
        with page.expect_response("**/api/map?model=b"):
            held[0].continue_()
        page.wait_for_timeout(300)
        x, y = hover(page, "#map-plot", 0.3, 0.3, "#map-decoded")
        away = float(page.inner_text("#map-nearest-text").split("), ")[1].split()[0])
        assert away == pytest.approx(shown.first.plane.nearest(x, y)[1], rel=0.1)


def test_a_click_locks_and_escape_lets_go(shown, page):
    x, y = hover(page, "#map-plot", 0.4, 0.4, "#map-decoded")
    page.mouse.click(*at(page, "#map-plot", 0.4, 0.4))
    wait_text(page, "#map-lock", "Locked at")
    assert f"x={x}" in page.url
    before = drawn(page, "#map-decoded")
    page.mouse.move(*at(page, "#map-plot", 0.7, 0.7))
    settle(page, "#map-decoded")
    assert point_of(page, "#map-decoded") == (x, y)
    wait_pixels(page, canvas_pixels, "#map-decoded", decoded(shown.first, x, y))
    page.keyboard.press("Escape")
    assert page.inner_text("#map-lock") == ""
    page.mouse.move(*at(page, "#map-plot", 0.6, 0.7))
    wait_drawn(page, "#map-decoded", before)
    settle(page, "#map-decoded")
    assert point_of(page, "#map-decoded") != (x, y)


def test_a_drawn_path_becomes_a_strip(shown, page):
    start = hover(page, "#map-plot", 0.3, 0.4, "#map-decoded")
    page.click("#map-path")
    with page.expect_response(lambda response: "/api/path" in response.url) as answered:
        page.mouse.move(*at(page, "#map-plot", 0.3, 0.4))
        page.mouse.down()
        for step in range(1, 6):
            page.mouse.move(*at(page, "#map-plot", 0.3 + 0.08 * step, 0.4 + 0.02 * step))
        page.mouse.up()
    page.click("#map-path")
    asked = parse_qs(urlsplit(answered.value.url).query)
    points = [[float(value) for value in pair.split(",")] for pair in asked["points"][0].split(";")]
    frames = int(asked["frames"][0])
    assert len(points) >= 2
    assert points[0] == pytest.approx(start, abs=1e-3)
    expected = answers.path_strip(shown.first.explored, shown.first.plane, torch.tensor(points), frames)
    page.wait_for_selector("#path-strip", state="visible")
    wait_pixels(page, image_pixels, "#path-strip", expected)
    assert expected.shape[2] == 32 * frames
    assert f"{frames} frames" in page.inner_text("#path-text")
    page.keyboard.press("Escape")
    page.fill("#map-frames", "5")
    page.press("#map-frames", "Tab")
    page.wait_for_timeout(500)
    assert not page.is_visible("#path-strip"), "a path that is gone does not come back"


def test_both_models_follow_one_cursor(shown, page):
    page.click("#tab-compare")
    for moved, other in (("a", "b"), ("b", "a")):
        wait_drawn(page, f"#compare-decoded-{other}")
        hover(page, f"#compare-plot-{moved}", 0.3, 0.6, f"#compare-decoded-{other}")
        deviations = []
        for model in shown.models.all:
            x, y = point_of(page, f"#compare-decoded-{model.key}")
            wait_pixels(page, canvas_pixels, f"#compare-decoded-{model.key}", decoded(model, x, y))
            point, center, spread = (torch.tensor(pair) for pair in ((x, y), model.plane.center, model.plane.spread))
            deviations.append((point - center) / spread)
        torch.testing.assert_close(*deviations, atol=0.01, rtol=0)


def test_the_shares_say_how_much_of_the_map_means_something(shown, page):
    page.click("#tab-compare")
    for model in shown.models.all:
        share = measure_round_trip(model.explored, model.plane).share
        wait_text(page, f"#compare-share-{model.key}", f"{100 * share:.0f} %")
    page.check("#compare-heat")
    page.uncheck("#compare-heat")


def test_a_stage_shows_its_activations(shown, page):
    page.click("#tab-architecture")
    page.uncheck("#sample-toggle")
    page.wait_for_selector("#stages [data-stage]")
    found = stages.stages_of(shown.first.explored)
    names = page.eval_on_selector_all(
        "#stages [data-stage]", "(buttons) => buttons.map((button) => button.dataset.stage)"
    )
    assert names == [stage.name for stage in found]
    for stage in (found[0], found[1], found[-2]):
        page.click(f'#stages [data-stage="{stage.name}"]')
        mosaic = torch.as_tensor(stages.measure_activation(shown.first.explored, 0, stage.name, 0.0, 0).mosaic)
        expected = mosaic.permute(2, 0, 1) if mosaic.ndim == 3 else mosaic.expand(3, -1, -1)
        page.wait_for_selector(f'#activation[data-stage="{stage.name}"]')
        wait_pixels(page, image_pixels, "#activation", expected)
        assert " × ".join(map(str, stage.shape_out)) in page.inner_text("#activation-facts")


def test_noise_and_sampling_change_what_comes_out(shown, page):
    page.click("#tab-architecture")
    explored = shown.first.explored
    page.check("#sample-toggle")
    set_range(page, "#noise", 3)
    noisy = answers.edited_reconstruction(explored, 0, noise=3.0, sample=True)
    wait_pixels(page, canvas_pixels, "#architecture-output", noisy)
    set_range(page, "#noise", 1)
    wait_pixels(page, canvas_pixels, "#architecture-output", answers.edited_reconstruction(explored, 0))
    page.uncheck("#sample-toggle")
    mean = answers.edited_reconstruction(explored, 0, sample=False)
    wait_pixels(page, canvas_pixels, "#architecture-output", mean)
    assert (mean != noisy).any()


def test_the_toggle_switches_between_vae_and_plain(shown, page):
    page.click("#tab-architecture")
    page.wait_for_selector("#noise:enabled")
    page.click("#kind-toggle")
    page.wait_for_selector("#noise:disabled")
    assert page.input_value("#model") == "b"
    last = stages.stages_of(shown.second.explored)[-2].name
    page.wait_for_selector(f'#stages [data-stage="{last}"]')
    wait_pixels(page, canvas_pixels, "#architecture-output", answers.edited_reconstruction(shown.second.explored, 0))
    page.click("#kind-toggle")
    page.wait_for_selector("#noise:enabled")
    assert page.input_value("#model") == "a"


def test_sliders_move_the_picture_and_reset_brings_it_back(shown, page):
    page.click("#tab-sliders")
    explored = shown.first.explored
    still = answers.edited_reconstruction(explored, 0, sample=False)
    wait_pixels(page, canvas_pixels, "#slider-edited", still)
    wait_pixels(page, image_pixels, "#slider-original", explored.images[0])
    set_range(page, 'input[data-channel="1"]', 2)
    moved = answers.edited_reconstruction(explored, 0, sample=False, offsets={1: 2.0})
    wait_pixels(page, canvas_pixels, "#slider-edited", moved)
    set_range(page, f'input[data-direction="{DIRECTION}"]', -1.5)
    both = answers.edited_reconstruction(explored, 0, sample=False, offsets={1: 2.0}, directions={DIRECTION: -1.5})
    wait_pixels(page, canvas_pixels, "#slider-edited", both)
    assert len({picture.numpy().tobytes() for picture in (still, moved, both)}) == 3
    page.click("#slider-reset")
    wait_pixels(page, canvas_pixels, "#slider-edited", still)
    page.select_option("#model", "b")
    page.wait_for_selector('input[data-channel="2"]', state="detached")
    assert page.locator("input[data-channel]").count() == 2
    assert page.locator("input[data-direction]").count() == 0, "they were fitted to another encoder"


def test_the_training_of_a_run_is_shown(shown, page):
    page.click("#tab-training")
    training = answers.training_of(shown.first.explored.path)
    page.wait_for_selector(".panel-plot .main-svg")
    assert page.locator(".panel-plot").count() == len(training.curves) > 0
    assert "the rate fell" in page.inner_text("#training-findings")
    assert image_pixels(page, "#preview")[:, 0, 0].tolist() == [200, 100, 0]
    assert str(PREVIEW_STEP) in page.inner_text("#preview-text")
    page.select_option("#model", "b")
    wait_text(page, "#training-lead", "without the run that trained it")
    assert not page.is_visible("#training-panels")


def test_the_page_is_used_by_keys_alone(shown, page):
    page.focus("#tab-map")
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#panel-training")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#panel-map")
    assert not page.is_visible("#panel-training")
    page.focus("#map-plot")
    settle(page, "#map-decoded")
    before = point_of(page, "#map-decoded")
    shows = drawn(page, "#map-decoded")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    wait_drawn(page, "#map-decoded", shows)
    settle(page, "#map-decoded")
    x, y = point_of(page, "#map-decoded")
    assert (x, y) != before
    wait_pixels(page, canvas_pixels, "#map-decoded", decoded(shown.first, x, y))
    page.keyboard.press("Enter")
    wait_text(page, "#map-lock", "Locked at")
    page.keyboard.press("Escape")
    assert page.inner_text("#map-lock") == ""


def test_dark_and_light(shown, page):
    def brightness() -> float:
        color = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3

    page.emulate_media(color_scheme="light")
    light = brightness()
    page.emulate_media(color_scheme="dark")
    assert light > 200 > 60 > brightness()
    page.emulate_media(color_scheme="light")
    assert brightness() == light


def test_a_phone_shows_every_tab_without_scrolling_sideways(shown, browser):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with opened(browser, shown.address, **phone) as page:
        wait_drawn(page, "#map-decoded")
        before = drawn(page, "#map-decoded")
        page.locator("#map-plot").scroll_into_view_if_needed()
        page.touchscreen.tap(*at(page, "#map-plot", 0.4, 0.4))
        wait_drawn(page, "#map-decoded", before)
        settle(page, "#map-decoded")
        wait_pixels(page, canvas_pixels, "#map-decoded", decoded(shown.first, *point_of(page, "#map-decoded")))
        for name in TABS:
            page.tap(f"#tab-{name}")
            page.wait_for_selector(f"#panel-{name}", state="visible")
            page.wait_for_timeout(300)
            width = page.evaluate("() => document.documentElement.scrollWidth")
            assert width <= 360, f"{name} is {width} pixels wide"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_thousand_points_move_smoothly(shown, browser, record_property):
    """Frames a second while 20,000 points are zoomed and moved; printed, and far from standing still."""
    rng = np.random.default_rng(0)
    x0, x1, y0, y1 = shown.first.plane.bounds
    points = {
        "x": rng.uniform(x0, x1, 20_000).round(4).tolist(),
        "y": rng.uniform(y0, y1, 20_000).round(4).tolist(),
        "label": rng.integers(0, 10, 20_000).tolist(),
        "id": [str(number) for number in range(20_000)],
    }
    with opened(browser, "about:blank", forgiven="sent: http://127.0.0.1") as page:
        page.route("**/api/map*", lambda route: route.fulfill(json=points))
        page.goto(shown.address)
        wait_drawn(page, "#map-decoded")
        page.evaluate(
            """() => { window.frames_shown = 0;
                       const count = () => { window.frames_shown += 1; requestAnimationFrame(count); };
                       requestAnimationFrame(count); }"""
        )
        page.mouse.move(*at(page, "#map-plot", 0.5, 0.5))
        started, before = time.monotonic(), page.evaluate("() => window.frames_shown")
        for step in range(60):
            if step % 20 < 10:
                page.mouse.wheel(0, -40 if step < 30 else 40)
            elif step % 20 == 10:
                page.mouse.down()
            else:
                page.mouse.move(*at(page, "#map-plot", 0.5 + 0.02 * (step % 10), 0.5))
            if step % 20 == 19:
                page.mouse.up()
        seconds = time.monotonic() - started
        rate = (page.evaluate("() => window.frames_shown") - before) / seconds
        text = f"20,000 points zoomed and moved at {rate:.0f} frames/s over {seconds:.1f} s"
        record_property("figure", text)
        print(text)
        assert rate > 2
