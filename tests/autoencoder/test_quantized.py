"""Vector and scalar quantization: against references, their gradients, and what a run with them needs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from ldm_vae.autoencoder.base import DETERMINISTIC_LOGVAR
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.quantized import SEARCHED_POSITIONS, pass_gradient
from ldm_vae.autoencoder.weights import fingerprint

CONFIGS = {
    "rotation": AutoencoderConfig(preset="pico", kind="vq", codebook_size=64),
    "ema": AutoencoderConfig(preset="pico", kind="vq", codebook_size=64, codebook="ema"),
    "fsq": AutoencoderConfig(preset="pico", kind="fsq"),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return build_autoencoder(CONFIGS[name])


def images(count: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 5, 5, generator=rng) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_interface_of_a_posterior(name):
    model = build(name).eval()
    mean, logvar = model.encode_moments(images(2, 61, 77))
    assert mean.shape == logvar.shape == (2, 4, 8, 10)
    assert torch.equal(logvar, torch.full_like(logvar, DETERMINISTIC_LOGVAR))
    assert model.deterministic
    assert (model.config.latent_channels, model.downsampling) == (4, 8)
    assert model.reconstruct(images(2, 61, 77)).shape == (2, 3, 61, 77)
    assert model(images()).sample.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", ["rotation", "ema"])
@pytest.mark.parametrize("training", [False, True])
def test_vector_quantization_is_the_nearest_neighbor(name, training):
    model = build(name).train(training)
    side = math.isqrt(SEARCHED_POSITIONS) + 1  # more positions than are searched at once
    latents = 0.2 * torch.randn(1, 4, side, side)
    codebook = model.quantizer.codebook.detach().double().clone()
    quantized = model.quantize(latents)
    positions = latents[0].flatten(1).T.double()
    expected = (positions[:, None] - codebook).square().sum(dim=2).argmin(dim=1).reshape(1, side, side)
    # float32 distances leave ties open: a handful of positions lies within rounding of two codes
    differ = quantized.indices != expected
    assert float(differ.double().mean()) < 1e-3
    chosen, best = codebook[quantized.indices[differ]], codebook[expected[differ]]
    at = latents.permute(0, 2, 3, 1)[differ].double()
    torch.testing.assert_close((at - chosen).norm(dim=1), (at - best).norm(dim=1), rtol=0, atol=1e-4)
    assert torch.equal(quantized.latents.detach(), codebook[quantized.indices].permute(0, 3, 1, 2).float())


def test_scalar_quantization_rounds_as_in_the_paper():
    """Appendix A.1 of arXiv:2309.15505, written again with float64."""
    model = build("fsq")
    latents = 1.5 * torch.randn(2, 4, 9, 7)
    levels = torch.tensor([8.0, 5.0, 5.0, 5.0], dtype=torch.float64).reshape(4, 1, 1)
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
    bounded = torch.tanh(latents.double() + torch.atanh(offset / half)) * half - offset
    rounded = bounded.round()
    expected_indices = ((rounded + levels // 2) * torch.tensor([1, 8, 40, 200]).reshape(4, 1, 1)).sum(dim=1)
    quantized = model.quantize(latents)
    sure = ((bounded - bounded.floor() - 0.5).abs() > 1e-4).all(dim=1)  # away from the edge between two levels
    assert float(sure.double().mean()) > 0.99
    assert torch.equal(quantized.indices[sure], expected_indices.long()[sure])
    torch.testing.assert_close(
        quantized.latents.permute(0, 2, 3, 1)[sure], (rounded / (levels // 2)).permute(0, 2, 3, 1)[sure].float()
    )
    assert model.codebook_size == 1000
    assert quantized.losses == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_decode_to_the_same_image(name):
    model = build(name).eval().requires_grad_(False)
    picture = images(2, 40, 56)
    indices = model.token_indices(picture)
    assert indices.shape == (2, 5, 7)
    assert indices.dtype == torch.int64
    assert torch.equal(model.decode_indices(indices).sample.clamp(-1, 1), model.reconstruct(picture))
    quantized = model.quantize(model.encode_moments(picture)[0])
    assert torch.equal(model.codes(indices), quantized.latents)
    assert torch.equal(
        model.decode(quantized.latents, force_not_quantize=True).sample, model.decode_indices(indices).sample
    )
    with pytest.raises(ValueError, match="from 0 to"):
        model.decode_indices(torch.full((1, 2, 2), model.codebook_size))
    with pytest.raises(ValueError, match="give integers"):
        model.decode_indices(torch.zeros(1, 2, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_is_exact(name, tmp_path):
    model = build(name).train()
    model.quantize(model.encode(images()).latent_dist.mean)  # moves an averaged codebook
    model.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert fingerprint(loaded) == fingerprint(model)
    assert torch.equal(loaded.reconstruct(images()), model.eval().reconstruct(images()))
    by_diffusers = type(model).from_pretrained(tmp_path)  # its default way, parameters made on the meta device
    assert torch.equal(by_diffusers.token_indices(images()), model.token_indices(images()))


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_and_autocast_quantize_in_float32(name, tmp_path):
    model = build(name).eval().requires_grad_(False)
    latents = model.encode_moments(images())[0]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model.quantize(latents)
    assert torch.equal(under_autocast.indices, model.quantize(latents).indices)
    assert under_autocast.latents.dtype == torch.float32
    model.save_pretrained(tmp_path)
    half = load_autoencoder(tmp_path, dtype=torch.bfloat16)
    assert half.decode_images(latents).isfinite().all()
    assert half.token_indices(images()).shape == (2, 8, 8)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_reaches_encoder_decoder_and_codebook(name):
    model = build(name).train()
    picture = images()
    latents = model.encode(picture).latent_dist.mean
    latents.retain_grad()
    quantized = model.quantize(latents)
    reconstruction = model.decode(quantized.latents, force_not_quantize=True).sample
    (reconstruction - picture).square().mean().backward(retain_graph=True)
    assert float(latents.grad.norm()) > 0  # of the image alone, through the quantization
    assert float(model.encoder.stages[0].resample.weight.grad.norm()) > 0
    assert float(model.decoder.head.weight.grad.norm()) > 0
    assert set(quantized.losses) == {"rotation": {"codebook", "commitment"}, "ema": {"commitment"}, "fsq": set()}[name]
    if name == "rotation":
        codebook = model.quantizer._codebook.embed
        assert codebook.grad is None  # the image does not move the codes, their loss does
        quantized.losses["codebook"].backward()
        assert float(codebook.grad.norm()) > 0


def test_the_losses_are_means_on_either_side_of_the_quantization():
    model = build("rotation")
    latents = torch.randn(2, 4, 6, 6, requires_grad=True)
    quantized = model.quantize(latents)
    squared = (latents - quantized.latents).detach().square().mean()
    torch.testing.assert_close(quantized.losses["commitment"].detach(), squared)
    torch.testing.assert_close(quantized.losses["codebook"].detach(), squared)
    (gradient,) = torch.autograd.grad(quantized.losses["commitment"], latents)
    torch.testing.assert_close(gradient, 2 * (latents - quantized.latents).detach() / latents.numel())
    assert not torch.autograd.grad(quantized.losses["codebook"], latents, allow_unused=True)[0]


def test_the_rotation_is_that_of_the_library():
    latents = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    codes, weight = torch.randn_like(latents).detach(), torch.randn_like(latents)
    ours = pass_gradient(latents, codes, rotate=True)
    reference = rotate_to(latents.permute(0, 2, 3, 1), codes.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, codes)
    torch.testing.assert_close(reference, codes)
    gradients = [torch.autograd.grad((out * weight).sum(), latents)[0] for out in (ours, reference)]
    torch.testing.assert_close(*gradients)
    straight = torch.autograd.grad((pass_gradient(latents, codes, rotate=False) * weight).sum(), latents)[0]
    assert torch.equal(straight, weight)
    assert float((gradients[0] - weight).norm()) > 0.1


def test_a_latent_of_zero_gives_finite_gradients():
    latents = torch.zeros(1, 4, 2, 2, requires_grad=True)
    pass_gradient(latents, torch.ones(1, 4, 2, 2), rotate=True).sum().backward()
    assert latents.grad.isfinite().all()


def gradients_of(model: Any, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for part in parts:
        quantized = model.quantize(model.encode(part).latent_dist.mean)
        reconstruction = model.decode(quantized.latents, force_not_quantize=True).sample
        loss = (reconstruction - part).square().mean() + sum(quantized.losses.values())
        (loss / len(parts)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_micro_batches_change_nothing_where_the_codebook_is_learnt_by_gradient():
    model, picture = build("rotation").train(), images(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, split = gradients_of(model, [picture]), gradients_of(model, list(picture.split(1)))
    assert "quantizer._codebook.embed" in whole
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, split[name], rtol=1e-4, atol=1e-6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_only_quantize_in_training_moves_an_averaged_codebook():
    model = build("ema").train()
    latents = model.encode(images()).latent_dist.mean.detach()
    before = model.quantizer.codebook.clone()
    model.decode(latents)
    model.eval().quantize(latents)
    model.token_indices(images())
    assert torch.equal(model.quantizer.codebook, before)
    chosen_from = model.train().quantize(latents)
    assert not torch.equal(model.quantizer.codebook, before)
    # what is decoded was chosen before the move, though an unused code may have been replaced since
    assert torch.equal(chosen_from.latents, before[chosen_from.indices].permute(0, 3, 1, 2))


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """As the engine does: the global generator is seeded at every step."""
    for step in steps:
        torch.manual_seed(step)
        picture = images(2) * (0.5 + 0.1 * step)
        quantized = model.quantize(model.encode(picture).latent_dist.mean)
        reconstruction = model.decode(quantized.latents, force_not_quantize=True).sample
        ((reconstruction - picture).square().mean() + sum(quantized.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["rotation", "ema"])
def test_resume_is_exact(name, tmp_path):
    """With dead codes that are replaced on the way: everything that matters is in the state."""

    def start() -> tuple[Any, torch.optim.Optimizer]:
        model = build(name).train()
        return model, torch.optim.SGD(model.parameters(), lr=0.05)  # no state of its own

    whole, optimizer = start()
    initial = whole.quantizer.codebook.detach().clone()
    train(whole, optimizer, range(6))
    half, optimizer = start()
    train(half, optimizer, range(3))
    save_file({key: value.contiguous() for key, value in half.state_dict().items()}, tmp_path / "state.safetensors")
    resumed, optimizer = start()
    with torch.no_grad():
        for tensor in [*resumed.parameters(), *resumed.buffers()]:
            tensor.zero_() if tensor.is_floating_point() else None
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True)
    train(resumed, optimizer, range(3, 6))
    for (key, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(expected, found), key
    assert not torch.equal(whole.quantizer.codebook, initial)


def test_codes_that_win_nothing_are_replaced_by_latents_of_the_batch():
    model = build("ema").train()
    latents = 3 + torch.randn(2, 4, 16, 16)  # far from the initial codes: one or two of them win everything
    assert len(model.quantize(latents).indices.unique()) < 10
    assert len(model.quantize(latents).indices.unique()) > 40


def quantize_in_a_process(rank: int, folder: Path) -> None:
    """Two steps of a moving-average codebook on this process's half of the batch; the state goes to a file."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = build("ema").train()
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        model.quantize(latents_of_step(step)[rank::2])
    torch.distributed.barrier()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("quantizer")}
    save_file(tensors, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def latents_of_step(step: int) -> torch.Tensor:
    return 0.1 * torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(step))


@pytest.mark.slow
def test_two_processes_move_an_averaged_codebook_together(tmp_path):
    torch.multiprocessing.spawn(quantize_in_a_process, args=(tmp_path,), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    alone = build("ema").train()
    before = alone.quantizer.codebook.clone()
    for step in range(2):
        alone.quantize(latents_of_step(step))
    one = alone.state_dict()
    assert not torch.equal(one["quantizer._codebook.embed"], before[None])
    # a code that won nothing is replaced by a latent that two processes draw otherwise than one
    same = (one["quantizer._codebook.embed"] - first["quantizer._codebook.embed"]).abs().amax(dim=2) < 1e-5
    assert float(same.double().mean()) > 0.5
