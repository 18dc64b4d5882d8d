"""Fault injection: a healthy autoencoder raises nothing, and each fault raises its own verdict and no other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_vae import cli
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.health import RULES, Verdict
from ldm_vae.autoencoder.klt import fit_klt
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.wavelet import WAVELET_PRESETS, AutoencoderWavelet
from ldm_vae.data.sources import DataConfig
from ldm_vae.errors import UserError
from ldm_vae.evaluation import health_metrics
from ldm_vae.evaluation.diagnosis import DiagnoseConfig, diagnose, markdown, training_record, verdicts
from ldm_vae.evaluation.health_metrics import Measured, measure
from ldm_vae.metrics import psnr, water_level
from tests.evaluation.linear_autoencoder import CHANNELS, RATE_NATS, LinearAutoencoder, random_fields
from tests.evaluation.test_report import Page

CPU = torch.device("cpu")
TARGET = {"mode": "target", "target_nats": RATE_NATS, "final_beta": 1e-3, "pinned_share": 0.0}
Moments = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_fields()


def examine(autoencoder: Autoencoder, images: Tensor) -> Measured:
    return measure(autoencoder, images.split(16), len(images), 16, 0, CPU)


def serious(found: list[Verdict]) -> list[str]:
    """Without `near_linear`: the autoencoder of these tests is the best linear code."""
    return [verdict.name for verdict in found if verdict.severity != "info" and verdict.name != "near_linear"]


class Faulty(LinearAutoencoder):
    """The healthy autoencoder with its encoder's moments or its decoder replaced."""

    def __init__(
        self,
        images: Tensor,
        encode: Callable[[Moments], Moments] = lambda moments: moments,
        decoder_input: Callable[[Tensor], Tensor] = lambda z: z,
        decoder_output: Callable[[Tensor], Tensor] = lambda image: image,
    ) -> None:
        super().__init__(images)
        self.faulty_encode, self.decoder_input, self.decoder_output = encode, decoder_input, decoder_output

    def moments(self, images: Tensor) -> Moments:
        return self.faulty_encode(super().moments(images))

    def image(self, z: Tensor) -> Tensor:
        return self.decoder_output(super().image(self.decoder_input(z)))


def at_prior(moments: Moments) -> Moments:
    """What a weight of the KL that is far too large leads to."""
    return torch.zeros_like(moments[0]), torch.zeros_like(moments[1])


def without(channel: int) -> Callable[[Tensor], Tensor]:
    keep = torch.ones(1, 4, 1, 1)
    keep[:, channel] = 0.0
    return lambda z: z * keep


def hot_pixel(moments: Moments) -> Moments:
    mean = moments[0].clone()
    mean[:, 3, 1, 1] = 30.0  # neither at the border nor where the flat field is measured
    return mean, moments[1]


def as_gain(z: Tensor) -> Tensor:
    """What is left of the hot position brightens or darkens the whole image, as a normalization layer lets it do."""
    gain = z[:, 3:4, 1:2, 1:2] / 30
    z = z.clone()
    z[:, 3, 1, 1] = 0.0
    return gain * z


def dead(moments: Moments) -> Moments:
    mean, logvar = moments[0].clone(), moments[1].clone()
    mean[:, 1], logvar[:, 1] = 0.01 * mean[:, 1], -0.01
    return mean, logvar


def duplicate(moments: Moments) -> Moments:
    mean = moments[0].clone()
    mean[:, 1] = mean[:, 0]
    return mean, moments[1]


def static(moments: Moments) -> Moments:
    mean = moments[0].clone()
    side = mean.shape[-1]
    mean[:, 3] = torch.linspace(-1.7, 1.7, side).repeat(side, 1) + 0.02 * mean[:, 3]
    return mean, moments[1]


def share_the_first(z: Tensor) -> Tensor:
    z = z.clone()
    z[:, 0] = (z[:, 0] + z[:, 1]) / 2
    z[:, 1] = 0.0
    return z


def with_grid(image: Tensor) -> Tensor:
    wave = torch.cos(torch.arange(image.shape[-1]) * torch.pi / 4)
    return image + 0.02 * wave * wave[:, None]


def with_bad_border(image: Tensor) -> Tensor:
    image = image.clone()
    image[..., :6, :] += 0.3
    return image


def pale(image: Tensor) -> Tensor:
    return 0.8 * image


FAULTS: dict[str, dict[str, Any]] = {
    "posterior_collapse": {"encode": at_prior, "decoder_input": torch.zeros_like},
    "ignored_channel": {"decoder_input": without(3)},
    "smuggling": {"encode": hot_pixel, "decoder_input": as_gain},
    "kl_inactive": {"encode": lambda moments: (moments[0], torch.full_like(moments[1], -20.0))},
    "redundant": {"encode": duplicate, "decoder_input": share_the_first},
    "dead_channel": {"encode": dead, "decoder_input": without(1)},
    "static_channel": {"encode": static, "decoder_input": without(3)},
    "clamped": {"encode": lambda moments: (moments[0], moments[1].where(moments[0] < 1.5, -30.0))},
    "brittle_decoder": {},
    "worse_than_linear": {"decoder_output": pale},
    "grid": {"decoder_output": with_grid},
    "border": {"decoder_output": with_bad_border},
}


class Brittle(LinearAutoencoder):
    """Reconstructs exactly on the posterior mean and badly a little off it."""

    def moments(self, images: Tensor) -> Moments:
        mean, logvar = super().moments(images)
        return mean.round(decimals=1), logvar

    def image(self, z: Tensor) -> Tensor:
        off = (z - z.round(decimals=1)).abs().mean(dim=1, keepdim=True)
        rough = torch.nn.functional.interpolate(off, scale_factor=8)
        return super().image(z) + 20 * rough


def faulty(name: str, images: Tensor) -> Any:
    return Brittle(images) if name == "brittle_decoder" else Faulty(images, **FAULTS[name])


def test_a_healthy_autoencoder_raises_neither_failure_nor_warning(images: Tensor) -> None:
    figures = examine(LinearAutoencoder(images), images).figures
    assert serious(verdicts(figures, TARGET)) == []
    assert figures["rate"]["nats_per_dim"] == pytest.approx(RATE_NATS, abs=0.01)
    assert -0.5 < figures["decoder"]["linear_margin_db"] < 0.1  # a linear code hardly beats the best one


@pytest.mark.parametrize("nats", [0.5, 1.0])
def test_at_a_low_rate_the_linear_code_has_that_rate_too(nats: float, images: Tensor) -> None:
    """The decoded mean of any code shrinks there, and no sound autoencoder is blamed for it."""

    class Coded(LinearAutoencoder):
        """The best linear code at the rate: reverse water-filling."""

        def __init__(self) -> None:
            super().__init__(images)
            variances = self.deviation.square()
            gains = (1 - water_level(variances.tolist(), CHANNELS * nats) / variances).clamp_min(0)
            self.gains = gains.view(1, -1, 1, 1)

        def moments(self, images: Tensor) -> Moments:
            mean = super().moments(images)[0]
            return mean * self.gains.sqrt(), (1 - self.gains).log().expand_as(mean)

        def image(self, z: Tensor) -> Tensor:
            return super().image(z * self.gains.sqrt())

    figures = examine(Coded(), images).figures
    assert figures["rate"]["nats_per_dim"] == pytest.approx(nats, abs=0.01)
    assert -0.5 < figures["decoder"]["linear_margin_db"] < 0.1
    klt = fit_klt([images])
    uncoded = float(psnr(klt.reconstruct(images, CHANNELS).clamp(-1, 1), images).mean())
    assert figures["decoder"]["psnr_mean"] < uncoded - 0.4


def test_too_few_blocks_are_not_compared_with_their_own_linear_code(images: Tensor) -> None:
    few = images[:8]  # 512 blocks of 192 numbers
    assert examine(LinearAutoencoder(images), few).figures["decoder"]["linear_margin_db"] is None


@pytest.mark.parametrize(("name", "value"), [("codebook_size", 1024), ("downsampling", 64)])
def test_codes_and_very_large_blocks_have_no_linear_counterpart(
    name: str, value: int, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder = LinearAutoencoder(images)
    monkeypatch.setattr(LinearAutoencoder, name, value, raising=False)
    collector = health_metrics._Collector(autoencoder, len(images), 0, CPU)
    collector.add(images)
    assert collector.blocks is None


def test_a_hot_position_that_describes_its_own_place_is_no_fault(images: Tensor) -> None:
    dark = images.clamp(-0.05, 0.05)
    dark[3, :, 16:24, 24:32] = 1.0  # one bright block in an image, as an edge is
    channels = examine(LinearAutoencoder(dark), dark).figures["channels"]
    assert max(channel["hot_sigmas"] for channel in channels) > 12
    assert max(channel["hot_reach"] for channel in channels) < 1e-6
    found = verdicts(examine(LinearAutoencoder(dark), dark).figures, {})
    assert "smuggling" not in [verdict.name for verdict in found]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_raises_its_own_verdict_and_no_other(name: str, images: Tensor) -> None:
    training = {} if name in ("kl_inactive", "dead_channel", "smuggling", "clamped") else TARGET
    found = verdicts(examine(faulty(name, images), images).figures, training)
    assert set(serious(found)) == {name}, [verdict.sentence() for verdict in found]
    channels = {"dead_channel": [1], "ignored_channel": [3], "static_channel": [3], "smuggling": [3]}
    if name in channels:
        assert [verdict.channel for verdict in found if verdict.name == name] == channels[name]
    assert all(RULES[name].cause[1:] in verdict.sentence() for verdict in found if verdict.name == name)


class Rescaled(LinearAutoencoder):
    """The same code, its latents in other units."""

    def __init__(self, images: Tensor, scale: float, shift: float) -> None:
        super().__init__(images)
        self.scale, self.shift = scale, shift

    def moments(self, images: Tensor) -> Moments:
        mean, logvar = super().moments(images)
        return self.scale * mean + self.shift, logvar + 2 * math.log(self.scale)

    def image(self, z: Tensor) -> Tensor:
        return super().image((z - self.shift) / self.scale)


@pytest.mark.parametrize(("scale", "shift"), [(0.1, 0.0), (1.0, 2.0), (30.0, -50.0)])
def test_draws_for_a_plain_autoencoder_have_the_scale_of_its_latents(
    scale: float, shift: float, images: Tensor
) -> None:
    """Nothing but the KL gives latents the scale of N(0, I): with beta = 0 the round trip may not depend on it."""

    def ratio(autoencoder: Autoencoder, plain: bool) -> float:
        found = measure(autoencoder, images.split(16), len(images), 16, 0, CPU, plain)
        return float(found.figures["decoder"]["cycle_ratio"])

    with_kl, plain = ratio(LinearAutoencoder(images), plain=False), ratio(LinearAutoencoder(images), plain=True)
    assert plain == pytest.approx(with_kl, rel=0.05)  # these latents have the scale of N(0, I)
    assert ratio(Rescaled(images, scale, shift), plain=True) == pytest.approx(plain, rel=0.01)


def test_an_unreachable_rate_explains_the_missed_one(images: Tensor) -> None:
    figures = examine(LinearAutoencoder(images), images).figures
    unreachable = TARGET | {"target_nats": 5.0, "pinned_share": 0.3}
    assert serious(verdicts(figures, unreachable)) == ["rate_unreachable"]
    assert serious(verdicts(figures, unreachable | {"pinned_share": 0.01})) == ["rate_miss"]
    assert serious(verdicts(figures, unreachable | {"mode": "fixed"})) == []


@pytest.mark.parametrize(("steps", "severity"), [(12, "info"), (600, "info"), (5000, "fail")])
@pytest.mark.parametrize("name", ["rate_miss", "rate_unreachable"])
def test_a_rate_that_a_short_training_missed_is_information(name, steps, severity, images: Tensor) -> None:
    figures = examine(LinearAutoencoder(images), images).figures
    training = TARGET | {"target_nats": 5.0, "beta_path": [[1, 1e-3, 0.1], [steps, 1e-3, 2.5]]}
    found = verdicts(figures, training | {"pinned_share": 0.3 if name == "rate_unreachable" else 0.0})
    assert [verdict.severity for verdict in found if verdict.name == name] == [severity]


@pytest.mark.parametrize(
    ("margin", "name"),
    [(-0.6, "worse_than_linear"), (-0.4, "near_linear"), (0.5, "near_linear"), (1.5, None), (None, None)],
)
def test_an_autoencoder_hardly_better_than_a_linear_code_should_train_longer(margin, name, images) -> None:
    figures = examine(LinearAutoencoder(images), images).figures
    figures["decoder"]["linear_margin_db"] = margin
    found = [verdict for verdict in verdicts(figures, TARGET) if verdict.severity == "warn"]
    assert [verdict.name for verdict in found] == ([name] if name else [])
    assert all("train longer" in verdict.sentence() for verdict in found)


def test_no_rate_is_a_statement_where_it_was_meant_and_a_failure_where_not(images: Tensor) -> None:
    idle = Faulty(images, encode=lambda moments: (moments[0], torch.full_like(moments[1], -30.0)))
    figures = examine(idle, images).figures
    assert figures["rate"]["nats_per_dim"] is None
    assert figures["channels"][0]["capacity_bits"] is None
    assert serious(verdicts(figures, {})) == ["kl_inactive"]
    plain = verdicts(figures, {"mode": "fixed", "final_beta": 0.0})
    assert serious(plain) == []
    assert any("trained with beta = 0: a plain autoencoder" in verdict.cause for verdict in plain)


def test_a_deterministic_autoencoder_has_no_rate_by_design(images: Tensor) -> None:
    torch.manual_seed(0)
    preset = WAVELET_PRESETS["pico"]
    autoencoder = AutoencoderWavelet(latent_channels=4, deterministic=True, **preset).eval()  # type: ignore[arg-type]
    measured = examine(autoencoder, images[:8])
    found = verdicts(measured.figures, {})
    assert [verdict.severity for verdict in found if verdict.name == "kl_inactive"] == ["info"]
    assert any(verdict.cause == "deterministic autoencoder, no rate" for verdict in found)
    assert "clamped" not in serious(found)
    assert measured.figures["decoder"]["gap_db"] is None


def test_the_figures_do_not_depend_on_the_batch(images: Tensor) -> None:
    one = examine(LinearAutoencoder(images), images).figures
    other = measure(LinearAutoencoder(images), images.split(5), len(images), 7, 0, CPU).figures
    assert one["channels"][2] == pytest.approx(other["channels"][2], rel=1e-4)
    assert one["decoder"].pop("noise_curve") == pytest.approx(other["decoder"].pop("noise_curve"), rel=1e-4)
    trips = one["decoder"].pop("round_trips"), other["decoder"].pop("round_trips")
    assert trips[0] == pytest.approx(trips[1], rel=1e-4)
    assert one["decoder"].pop("droplet_score") is other["decoder"].pop("droplet_score") is None
    assert one["decoder"] == pytest.approx(other["decoder"], rel=1e-2, abs=1e-6)


def test_few_images_are_refused(images: Tensor) -> None:
    with pytest.raises(UserError, match=r"7 images are too few .*\(part=all takes all images of the data\)"):
        examine(LinearAutoencoder(images), images[:7])


def test_probes_are_bounded_and_spread(images: Tensor) -> None:
    many = images[:1].expand(150, -1, -1, -1)
    measured = measure(LinearAutoencoder(images), many.split(50), 150, 50, 0, CPU)
    assert measured.figures["images"] == {"count": 150, "probes": 64, "buffered": 150}


class TestDecoderProbes:
    def test_a_linear_decoder_uses_channels_by_the_energy_they_add(self, images: Tensor) -> None:
        autoencoder = LinearAutoencoder(images)
        z = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
        use = health_metrics.decoder_use(autoencoder, z, 8)
        energy = autoencoder.deviation.square()
        assert use == pytest.approx((energy / energy.sum()).tolist(), rel=0.05)
        assert sum(use) == pytest.approx(1.0, rel=1e-3)

    def test_the_noise_that_costs_one_decibel_of_a_quadratic_error(self) -> None:
        error = {tau: 0.01 * (1 + (tau / 0.3) ** 2 * (10**0.1 - 1)) for tau in (0.0, 0.05, 0.1, 0.2, 0.4)}
        curve = {tau: -10 * torch.tensor(value).log10().item() for tau, value in error.items()}
        assert health_metrics.noise_for_one_decibel(curve) == pytest.approx(0.3, rel=1e-3)
        assert health_metrics.noise_for_one_decibel({0.0: 30.0, 0.4: 29.5}) is None

    def test_border_and_corner_errors(self) -> None:
        border = health_metrics.BorderError()
        difference = torch.full((2, 3, 40, 40), 2.0)
        difference[:, :, 8:-8, 8:-8] = 1.0
        for rows in (slice(0, 8), slice(-8, None)):
            for columns in (slice(0, 8), slice(-8, None)):
                difference[:, :, rows, columns] = 3.0
        border.add(difference, torch.zeros_like(difference))
        assert border.ratio("corner") == pytest.approx(9.0)
        outer = 40 * 40 - 24 * 24
        assert border.ratio("outer") == pytest.approx((4 * 64 * 9 + (outer - 256) * 4) / outer)

    def test_a_periodic_pattern_has_harmonics_and_noise_or_shading_has_none(self) -> None:
        column = torch.arange(64)
        grid = 0.02 * torch.cos(column * torch.pi / 4).expand(3, 64, 64)
        noise = 0.02 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert health_metrics.harmonic_ratio((grid + 0.1 * noise).double(), 8) > 50
        assert health_metrics.harmonic_ratio(noise.double(), 8) < 2
        assert health_metrics.harmonic_ratio(torch.zeros(3, 64, 64).double(), 8) == 0.0
        assert health_metrics.harmonic_ratio((0.1 * column / 64).expand(3, 64, 64).double(), 8) < 2

    def test_the_stages_of_our_decoder_and_of_diffusers_are_seen(self) -> None:
        for architecture, preset in (("wavelet", "pico"), ("sd", "tiny")):
            autoencoder = build_autoencoder(AutoencoderConfig(architecture, preset)).eval()
            assert len(health_metrics.decoder_stages(autoencoder)) == 4
            score = health_metrics.droplet_score(autoencoder, torch.randn(1, 4, 8, 8))
            assert score is not None
            assert score >= 1.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> DiagnoseConfig:
    folder = tmp_path_factory.mktemp("run") / "autoencoder"
    torch.manual_seed(0)
    build_autoencoder(AutoencoderConfig("wavelet", "pico", latent_channels=3)).save_pretrained(folder)
    rate = {"mode": "target", "target_nats": 2.5, "final_beta": 1e-3, "pinned_share": 0.5}
    (folder / "training.json").write_text(
        json.dumps({"rate": rate | {"beta_path": [[0, 1e-3, 0.5], [2000, 1e-2, 0.6]]}})
    )
    return DiagnoseConfig(
        autoencoder=str(folder.parent),
        output=str(folder.parent / "health"),
        data=DataConfig(source="folder", path=str(image_folder), held_out=0.5),
        resolution=64,
        count=10,
        batch=5,
        device="cpu",
    )


@pytest.fixture(scope="module")
def report(config: DiagnoseConfig) -> dict[str, Any]:
    return diagnose(config)


def test_the_folder_holds_figures_words_and_a_page(config: DiagnoseConfig, report: dict[str, Any]) -> None:
    output = Path(config.output)
    assert json.loads((output / "health.json").read_text()) == json.loads(json.dumps(report))
    assert report["verdicts"][0]["name"] == "rate_unreachable"
    assert len(report["channels"]) == 3
    assert report["protocol"]["images"]["count"] == 10
    text = (output / "health.md").read_text()
    page = (output / "index.html").read_text()
    assert text == markdown(report)
    for verdict in report["verdicts"]:
        assert verdict["sentence"] in text
        assert verdict["name"] in page
    assert Page(page).ids == ["verdicts", "plots", "images", "flat", "prior", "figures", "protocol"]
    assert page.count("<svg") == 9
    assert page.count("data:image/webp;base64,") > 20
    assert 'src="http' not in page
    assert "url(" not in page.replace("url(#", "")
    assert json.loads((output / "run.json").read_text())["finished"] is True


def test_a_report_of_enlarged_images_says_so(
    config: DiagnoseConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diagnose(replace(config, resolution=96, output=str(tmp_path / "health")))
    assert [image["short_side"] for image in found["enlarged"]] == [80] * 10
    for text in (
        capsys.readouterr().out,
        *((tmp_path / "health" / n).read_text() for n in ("health.md", "index.html")),
    ):
        assert "10 of 10 images are smaller than the crop and enlarged" in text


def test_a_finished_report_is_read_and_one_of_other_settings_is_kept(
    config: DiagnoseConfig, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_vae.evaluation.health_metrics.measure", None)
    assert diagnose(replace(config, batch=3)) == json.loads(json.dumps(report))
    with pytest.raises(UserError, match=r"seed \(0 -> 1\); give another output, or --overwrite"):
        diagnose(replace(config, seed=1))
    older = report | {"decoder": {key: value for key, value in report["decoder"].items() if "linear" not in key}}
    older["channels"] = [{key: value for key, value in one.items() if key != "hot_reach"} for one in report["channels"]]
    assert "| PSNR over the linear code of as many numbers | n/a |" in markdown(older)


def test_the_short_form_is_the_long_form(
    config: DiagnoseConfig, report: dict[str, Any], capsys: pytest.CaptureFixture[str], image_folder: Path
) -> None:
    settings = ["data.held_out=0.5", "resolution=64", "count=10", "batch=5", "device=cpu"]
    command = ["diagnose", config.autoencoder, *settings, "--data", str(image_folder)]
    assert cli.main(command) == 0  # the output folder is that of the finished report
    assert report["verdicts"][0]["sentence"] in capsys.readouterr().out
    assert cli.main([*command, "--strict"]) == 1
    long = [f"autoencoder={config.autoencoder}", f"output={config.output}", "data.source=folder"]
    assert cli.main(["diagnose", *long, f"data.path={image_folder}", *settings]) == 0
    assert cli.main([*command, "--print-config", "--out", "elsewhere"]) == 0
    assert "output: elsewhere" in capsys.readouterr().out


def test_a_damaged_training_record_is_named(tmp_path: Path) -> None:
    assert training_record(str(tmp_path)) == {}
    (tmp_path / "training.json").write_text('{"rate":')
    with pytest.raises(UserError, match=r"its training.json is not valid JSON"):
        training_record(str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("resolution=100", "not a multiple of 8; use 96"),
        ("resolution=32", "resolution: 32 is under 64"),
        ("count=0", "count: 0 is not positive"),
        ("autoencoder=/nowhere/at/all", "no such folder"),
    ],
)
def test_refusals(
    setting: str, sentence: str, config: DiagnoseConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"autoencoder={config.autoencoder}", f"output={tmp_path / 'report'}", "device=cpu"]
    assert cli.main(["diagnose", *words, setting]) == 2
    assert sentence in capsys.readouterr().err


def test_every_verdict_and_threshold_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "health.md").read_text()
    for name, rule in RULES.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        for limit in rule.limits.values():
            for threshold in (limit.fail, limit.warn, limit.info):
                assert threshold is None or f"{threshold:g}".replace("-", "−") in row, (name, limit.metric, threshold)
