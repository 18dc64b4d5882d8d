"""The latent U-Net: any size, any precision, exact saving, labels, cost."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_vae import config as configuration
from ldm_vae.diffusion import flow
from ldm_vae.diffusion.unet import GROUP_CHANNELS, PRESETS, LatentUNet, UNetConfig, build_unet, whole_coordinates
from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json
from ldm_vae.random import generator

SMALL = UNetConfig(preset="tiny", widths=(32, 64))


@dataclass(frozen=True)
class Settings:
    unet: UNetConfig = field(default_factory=UNetConfig)


def random_unet(config: UNetConfig = SMALL, classes: int = 3) -> LatentUNet:
    """With a last layer that is not zero."""
    torch.manual_seed(0)
    unet = build_unet(config, latent_channels=4, num_classes=classes).eval()
    nn.init.normal_(unet.network.conv_out.weight, std=0.05)
    unet.measure_tokens(correlated())
    return unet


def inputs(count: int = 2, height: int = 16, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 4, height, width, generator=generator(0, "x")), torch.linspace(0.1, 1.0, count)


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (8, 40), (1, 5)])
def test_any_size(size: tuple[int, int]) -> None:
    noisy, times = inputs(2, *size)
    velocity = random_unet()(noisy, times, torch.tensor([0, 2]))
    assert velocity.shape == noisy.shape
    assert velocity.isfinite().all()


def test_padding_continues_the_image() -> None:
    """A constant latent of an odd size looks like the same constant of the next even size, away from the border."""
    unet = random_unet(UNetConfig(preset="tiny", widths=(32,), patch=2, layers=1))
    even, odd = (unet(torch.full((1, 4, side, side), 0.5), torch.tensor(0.5)) for side in (16, 15))
    torch.testing.assert_close(odd[..., :8, :8], even[..., :8, :8])


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_velocity_is_float32_in_bfloat16(precision: str) -> None:
    unet, (noisy, times) = random_unet(), inputs()
    exact = unet(noisy, times)
    if precision == "weights":
        velocity = unet.to(torch.bfloat16)(noisy, times)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = unet(noisy, times)
    assert velocity.dtype == torch.float32
    assert (velocity - exact).abs().mean() < 0.02 * exact.abs().mean()


def correlated(count: int = 64) -> torch.Tensor:
    """Smooth latents (n, 4, 16, 16): neighbours and channels are correlated."""
    coarse = torch.randn(count, 4, 4, 4, generator=generator(0, "smooth"))
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    return smooth + 0.5 * smooth.roll(1, dims=1)


def test_a_new_network_is_the_best_linear_denoiser_of_tokens() -> None:
    """Compared with the Wiener filter written with the tokens' covariance matrix instead of its eigenvectors."""
    unet = build_unet(UNetConfig(preset="tiny", widths=(32,), patch=2), latent_channels=4)
    latents = correlated()
    unet.measure_tokens(latents)
    rows = torch.nn.functional.pixel_unshuffle(latents, 2).movedim(1, -1).reshape(-1, 16)
    covariance = (rows.T @ rows / len(rows)).double()
    noise = torch.randn(latents.shape, generator=generator(0, "noise"))
    t = 0.4
    noisy = flow.interpolate(latents, noise, torch.full((64,), t))
    gain = (1 - t) * covariance @ torch.linalg.inv((1 - t) ** 2 * covariance + t**2 * torch.eye(16))
    tokens = torch.nn.functional.pixel_unshuffle(noisy, 2).double()
    clean = torch.nn.functional.pixel_shuffle(torch.einsum("cd,ndhw->nchw", gain, tokens), 2)
    torch.testing.assert_close(unet(noisy, torch.tensor(t)), ((noisy - clean) / t).float(), atol=0.02, rtol=0)


def test_a_new_velocity_network_is_zero() -> None:
    unet = build_unet(UNetConfig(preset="tiny", widths=(32,), prediction="velocity"), latent_channels=4)
    noisy, times = inputs()
    assert torch.equal(unet(noisy, times), torch.zeros_like(noisy))


@pytest.mark.parametrize("prediction", ["x", "clean", "velocity"])
def test_the_velocity_comes_out_of_every_prediction(prediction: str) -> None:
    """The last layer's bias alone is the prediction, so what must come out is known."""
    config = UNetConfig(preset="tiny", widths=(32,), patch=2, prediction=prediction)  # type: ignore[arg-type]
    unet = build_unet(config, latent_channels=4)
    bias = torch.randn(16, generator=generator(0, "bias"))
    with torch.no_grad():
        unet.network.conv_out.bias.copy_(bias)
    noisy, times = inputs(3)
    predicted = torch.nn.functional.pixel_shuffle(bias.view(1, 16, 1, 1).expand(3, -1, 8, 8), 2)
    expected = {
        "velocity": predicted,
        "clean": (noisy - predicted) / times.view(-1, 1, 1, 1),
        "x": flow.velocity_from_clean_head(noisy, predicted, times, torch.ones(4)),
    }
    torch.testing.assert_close(unet(noisy, times), expected[prediction])


def test_coordinates_tell_a_crop_from_a_whole_image() -> None:
    unet = random_unet(UNetConfig(preset="tiny", widths=(32, 64), coordinates=True))
    noisy, times = inputs(2, 16, 24)
    whole = whole_coordinates(16, 24).expand(2, -1, -1, -1)
    assert torch.equal(unet(noisy, times), unet(noisy, times, coordinates=whole))
    corner = whole_coordinates(32, 48).expand(2, -1, -1, -1)[..., :16, :24]
    assert not torch.allclose(unet(noisy, times), unet(noisy, times, coordinates=corner))
    assert unet(noisy[..., :15, :23], times).shape == (2, 4, 15, 23)
    with pytest.raises(ValueError, match="coordinates=None"):
        random_unet()(noisy, times, coordinates=whole)


def test_labels_matter_and_none_is_the_null_label() -> None:
    unet, (noisy, times) = random_unet(), inputs()
    none = unet(noisy, times)
    assert torch.equal(none, unet(noisy, times, torch.tensor([3, 3])))
    assert unet.null_label == 3
    assert not torch.allclose(none, unet(noisy, times, torch.tensor([0, 0])))
    with pytest.raises(ValueError, match="unconditional"):
        random_unet(classes=0)(noisy, times, torch.tensor([0, 0]))


def test_saving_is_exact(tmp_path: Path) -> None:
    unet, (noisy, times) = random_unet(), inputs()
    unet.save_pretrained(tmp_path)
    loaded = LatentUNet.from_pretrained(tmp_path)
    assert not loaded.training
    settings = [{k: v for k, v in u.config.items() if not k.startswith("_")} for u in (unet, loaded)]
    assert canonical_json(settings[0]) == canonical_json(settings[1])
    assert torch.equal(loaded(noisy, times), unet(noisy, times))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        unet = random_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        noisy, times = inputs()
        unet(noisy, times).square().mean().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(("preset", "lowest", "highest"), [("tiny", 0.2, 0.65), ("small", 3, 4.5), ("base", 20, 40)])
def test_cost_of_the_presets(preset: str, lowest: float, highest: float) -> None:
    with torch.device("meta"):
        config = UNetConfig(preset=preset, prediction="velocity")  # type: ignore[arg-type]
        unet = build_unet(config, latent_channels=4, num_classes=10)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.zeros(1, 4, 64, 64), torch.zeros(1))
    assert lowest < counter.get_total_flops() / 2e9 < highest


def test_groups_have_the_size_that_is_fast() -> None:
    for preset in PRESETS:
        with torch.device("meta"):
            unet = build_unet(UNetConfig(preset=preset), latent_channels=4)  # type: ignore[arg-type]
        norms = [module for module in unet.modules() if isinstance(module, nn.GroupNorm)]
        assert norms
        assert all((norm.num_channels // norm.num_groups) % GROUP_CHANNELS == 0 for norm in norms)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unet.widths=[48]", "multiples of 32"),
        ("unet.widths=[]", "multiples of 32"),
        ("unet.attention=[3]", "levels outside 0..2"),
        ("unet.patch=0", "unet.patch: 0"),
        ("unet.dropout=1", "unet.dropout"),
        ("unet.preset=large", "large"),
    ],
)
def test_settings_without_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.load(Settings, None, [override])


def test_overrides_replace_the_preset() -> None:
    config = configuration.load(Settings, None, ["unet.preset=tiny", "unet.widths=[64,96]", "unet.attention=[1]"])
    assert config.unet.shape() == PRESETS["tiny"] | {"widths": (64, 96), "attention": (1,)}


def test_it_learns_which_class_is_which() -> None:
    """A few steps on two classes of blobs: from pure noise, the label alone decides the sign."""
    torch.manual_seed(0)
    unet = build_unet(UNetConfig(preset="tiny", widths=(32,), patch=2), latent_channels=1, num_classes=2)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    rng = generator(0, "training")
    grid = torch.linspace(-1, 1, 8)
    blob = torch.exp(-2 * (grid[:, None] ** 2 + grid[None] ** 2))[None, None]
    unet.measure_tokens(torch.cat([-blob, blob]))
    for _ in range(40):
        labels = torch.randint(0, 2, (8,), generator=rng)
        clean = (2.0 * labels - 1).view(-1, 1, 1, 1) * blob
        noise = torch.randn(clean.shape, generator=rng)
        times = flow.sample_times(8, rng)
        velocity = unet(flow.interpolate(clean, noise, times), times, labels)
        flow.velocity_loss(velocity, flow.velocity_target(clean, noise)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    noise = torch.randn(2, 1, 8, 8, generator=rng)
    times = torch.ones(2)
    with torch.no_grad():
        clean = flow.clean_from_velocity(noise, unet(noise, times, torch.tensor([0, 1])), times)
    likeness = torch.cosine_similarity(clean.flatten(1), torch.cat([-blob, blob]).flatten(1))
    assert likeness.min() > 0.9
