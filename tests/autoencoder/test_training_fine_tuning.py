"""Starting from an existing autoencoder of diffusers, training a part of it, and what the guard restores."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from ldm_vae import config as configuration
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.autoencoder.training import VaeModel, encoder_is_frozen, select_trained, start_from
from ldm_vae.errors import UserError
from ldm_vae.training.loader import Batch, MicroBatch
from ldm_vae.training.trainer import Engine, make_accelerator

SETTINGS = [
    "output=x", "data.source=synthetic", "training.precision=fp32", "training.device=cpu", "training.tracker=none",
    "training.warmup_steps=1", "training.log_every=2", "phases=[{steps: 40, crop: 48, batch: 2}]",
]  # fmt: skip


@pytest.fixture(scope="module", params=["sd", "flux"])
def directory(request, tmp_path_factory) -> str:
    """Stable Diffusion's layout (with 1x1 convolutions around the latent) and FLUX' (16 channels, without)."""
    torch.manual_seed(0)
    flux = request.param == "flux"
    model = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16 if flux else 4, norm_num_groups=4,
        use_quant_conv=not flux, use_post_quant_conv=not flux,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return str(folder)


def trained(model: VaeModel, steps: int, first: int = 0) -> Engine:
    engine = Engine(model, model.config.training, make_accelerator(model.config.training), steps=40)
    batch = Batch((MicroBatch(model.random_samples(slice(0, 2), 48), slice(0, 2)),), 2)
    for step in range(first, first + steps):
        model.update(step, batch, engine)
    return engine


@pytest.mark.parametrize("names", [["decoder"], ["decoder.up_blocks.3", "decoder.conv_out"]])
def test_only_what_was_named_is_trained(directory, names):
    words = [*SETTINGS, f"initial={directory}", f"train=[{','.join(names)}]"]
    model = VaeModel(configuration.load(TrainVaeConfig, None, words), held_out=None)
    before = {name: value.clone() for name, value in model.autoencoder.named_parameters()}
    trained(model, 3)
    moved = {name for name, value in model.autoencoder.named_parameters() if not torch.equal(value, before[name])}
    expected = tuple(names) if names != ["decoder"] else ("decoder", "post_quant_conv")
    assert moved
    assert moved == {name for name in before if name.startswith(expected)}
    assert model.modules["autoencoder"].encoder_frozen
    assert not model.has_rate


def test_everything_is_trained_without_a_choice_and_a_wrong_name_is_refused(directory):
    autoencoder = start_from(directory)
    select_trained(autoencoder, None)
    assert all(parameter.requires_grad for parameter in autoencoder.parameters())
    assert not encoder_is_frozen(autoencoder)
    with pytest.raises(UserError, match=r"starts with 'decodr'; the parts are decoder, encoder"):
        select_trained(autoencoder, ["decodr"])


def test_settings_that_would_have_no_effect_are_refused(directory):
    with pytest.raises(UserError, match="has no effect with initial"):
        configuration.load(TrainVaeConfig, None, [*SETTINGS, f"initial={directory}", "autoencoder.preset=pico"])
    with pytest.raises(UserError, match="initial=DIR"):
        configuration.load(TrainVaeConfig, None, [*SETTINGS, "train=[decoder]"])
    with pytest.raises(UserError, match=r"latents.decoder_noise: .*set train=\[decoder\]"):
        configuration.load(TrainVaeConfig, None, [*SETTINGS, "latents.decoder_noise=0.2"])


def test_the_guard_brings_the_weights_before_the_adversarial_loss_back(directory):
    words = [*SETTINGS, f"initial={directory}", "train=[decoder]", "adversarial.loss=hinge", "adversarial.warmup=4"]
    words += ["adversarial.width=4", "adversarial.weight=fixed", "adversarial.strength=1e3", "adversarial.r1=0"]
    words += ["adversarial.hold_above=1e6", "adversarial.restore_above=1e6", "adversarial.restore_steps=1"]
    model = VaeModel(configuration.load(TrainVaeConfig, None, words), held_out=None)
    engine = trained(model, 9)
    before = {name: value.clone() for name, value in model.before_adversarial.items()}
    assert not torch.equal(model.autoencoder.state_dict()["decoder.conv_out.weight"], before["decoder.conv_out.weight"])
    model.adversarial_loss._state["reference"].fill_(1e-9)  # whatever the loss is now, it is far above
    batch = Batch((MicroBatch(model.random_samples(slice(0, 2), 48), slice(0, 2)),), 2)
    model.update(9, batch, engine)  # the tenth step: a log step
    for autoencoder in (model.autoencoder, model.averaged(engine)):
        assert all(torch.equal(value, before[name]) for name, value in autoencoder.state_dict().items())
    assert [alarm.name for alarm in model.alarms(10, {})] == ["adversarial_restored"]
    moments = engine.optimizers["autoencoder"].optimizer.state.values()
    assert not any(bool(value.any()) for state in moments for value in state.values())
