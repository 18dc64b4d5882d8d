"""Scores are functions of the image alone, maps belong to their scores, and what is not finite is named."""

from __future__ import annotations

import pytest
import torch

from ldm_vae.applications.anomaly import scores
from ldm_vae.applications.anomaly.scores import (
    EncodedImages,
    Networks,
    check_pipeline_size,
    learn,
    load_networks,
    measure_scores,
)
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.rate import kl_divergence
from ldm_vae.diffusion import flow
from ldm_vae.errors import UserError
from ldm_vae.random import generator

CPU = torch.device("cpu")
IDS = [f"image {i}" for i in range(6)]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def networks(saved, random_backbone) -> Networks:
    return load_networks(str(saved / "autoencoder"), CPU, str(saved), "squeeze", str(random_backbone), 2)


@pytest.fixture(scope="module")
def learnt(networks, images):
    return learn(networks, [(IDS[:3], images[:3]), (IDS[3:], images[3:])])


@pytest.fixture(scope="module")
def measured(networks, learnt, images):
    return measure_scores(networks, learnt, images, IDS)


def test_every_score_is_measured_and_every_local_one_has_a_map(networks, measured):
    assert list(measured.values) == networks.score_names == scores.score_names(False, True, True, True)
    local = {name for name, score in scores.SCORES.items() if score.local}
    assert measured.maps.keys() == local
    for name, heat in measured.maps.items():
        assert heat.shape == (6, 16, 16)
        torch.testing.assert_close(measured.values[name], heat.flatten(1).mean(dim=1).double())
        torch.testing.assert_close(measured.values[f"{name}_peak"], heat.flatten(1).amax(dim=1).double())


def test_a_new_score_is_one_line(networks, learnt, images, monkeypatch):
    darkness = scores.Score(
        "darkness", "reconstruction", lambda batch, normal: -batch.images.mean(dim=(1, 2, 3)), False
    )
    monkeypatch.setitem(scores.SCORES, "darkness", darkness)
    found = measure_scores(networks, learnt, images, IDS)
    torch.testing.assert_close(found.values["darkness"], -images.mean(dim=(1, 2, 3)).double())
    assert (scores.title("darkness"), "darkness" in found.maps) == ("darkness", False)


def test_a_score_depends_on_its_image_alone(networks, learnt, images, measured):
    alone = measure_scores(networks, learnt, images[4:5], IDS[4:5]).values
    for name, values in measured.values.items():
        assert float(alone[name]) == pytest.approx(float(values[4]), rel=1e-3, abs=1e-6), name


def test_the_scores_are_what_their_names_say(networks, learnt, images, measured):
    mean, logvar = networks.autoencoder.encode_moments(images)
    kl = kl_divergence(mean, logvar)
    inner = slice(4, -4)  # windows at the border weigh its pixels more
    difference = (images - networks.autoencoder.decode_images(mean)).abs().mean(dim=1)
    assert float(measured.maps["l1"][..., inner, inner].mean()) == pytest.approx(float(difference.mean()), rel=0.05)
    assert float(measured.maps["kl"].mean()) == pytest.approx(float(kl.sum(dim=1).mean()), rel=0.05)
    noise = torch.randn(1, *mean.shape[1:], generator=generator(0, "anomaly", "posterior"))
    decoded = networks.autoencoder.decode_images(mean + torch.exp(0.5 * logvar) * noise)
    elbo = scores.negative_elbo(images, decoded, kl, learnt.variance).double()
    torch.testing.assert_close(measured.values["elbo"], elbo, atol=0.02, rtol=0.02)
    assert learnt.variance == pytest.approx(float((images - decoded).square().mean()), rel=1e-4)


def test_the_flow_loss_is_that_of_fixed_noise_at_a_fixed_time(networks, images, measured):
    clean = networks.pipeline.normalizer.normalize(networks.autoencoder.encode_moments(images)[0])
    losses = []
    for draw in range(2):
        noise = torch.randn(1, *clean.shape[1:], generator=generator(0, "anomaly", f"flow {draw}")).expand_as(clean)
        times = torch.full((6,), 0.3)
        with torch.no_grad():
            velocity = networks.pipeline.unet(flow.interpolate(clean, noise, times), times)
        losses.append(flow.velocity_loss(velocity, flow.velocity_target(clean, noise)))
    torch.testing.assert_close(measured.values["flow_t0.3"], torch.stack(losses).mean(0).double(), rtol=0.1, atol=0)


def test_a_plain_autoencoder_has_no_posterior_scores(images):
    torch.manual_seed(0)
    models = Networks(build_autoencoder(AutoencoderConfig(preset="pico", kind="ae")).eval(), CPU)
    found = measure_scores(models, learn(models, [(IDS, images)]), images, IDS)
    assert set(map(scores.score_quantity, found.values)) == {"l1", "ms_ssim", "mahalanobis", "mahalanobis_pooled"}


def test_latents_that_are_not_finite_are_named(networks, images):
    broken = images.clone()
    broken[4, :, 8:16, 8:16] = torch.nan
    with pytest.raises(UserError, match="latents of image 4 are not finite"):
        EncodedImages(networks, broken, IDS)
    with pytest.raises(UserError, match="latents of image 4 are not finite"):
        learn(networks, [(IDS, broken)])


def test_a_pipeline_of_another_autoencoder_or_size_is_refused(saved, autoencoder_directory, networks):
    with pytest.raises(UserError, match="latents of another autoencoder"):
        load_networks(str(autoencoder_directory), CPU, str(saved))
    with pytest.raises(UserError, match="resolution: 128 is not that of the pipeline, 64x64"):
        check_pipeline_size(networks, 128)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("l1_paek", "did you mean l1_peak"),
        ("flow_t0.3", "it needs pipeline when"),
        ("regret", "it needs a posterior and regret_steps"),
        ("fid", "there are: l1, l1_peak"),
    ],
)
def test_an_unknown_score_says_what_is_there(name, message):
    with pytest.raises(UserError, match=message):
        scores.check_score(name, scores.score_names(True, False, False, False))
