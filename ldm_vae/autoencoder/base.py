"""`Autoencoder`: the interface of every kind of autoencoder to the rest of the package.

    images (n, 3, h, w) in [-1, 1]  --encode-->  posterior: mean, logvar (n, c, h/f, w/f)  --decode-->  images

A kind of this package is a subclass with `posterior`, `image` and the properties that differ from the defaults here.
`models.py` lists the kinds, and gives diffusers' own classes this interface when they are loaded. No other code depends
on the class of an autoencoder. Sizes that f does not divide are padded by replication and cropped back, here only.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin

from ldm_vae.autoencoder import weights
from ldm_vae.autoencoder.weight_files import SavedCompletely
from ldm_vae.data.transforms import finite_pixels, pad_to_multiple
from ldm_vae.errors import NotFinite, UserError

runtime.silence_empty_warning()

DETERMINISTIC_LOGVAR = -30.0
"""Log-variance of a deterministic latent, the lower limit of diffusers' posterior: a standard deviation of 3e-7."""

LARGEST_PIXEL = 1.01
"""Tolerance for images in [-1, 1]: rounding in half precision."""

GROUP_OFFLOADING = "group_offloading"
"""The name of diffusers' hook."""

DEFAULT_CONTEXT = 8
"""Assumed number of latent positions on each side that a pixel depends on, if they cannot be counted."""


@dataclass(frozen=True)
class AutoencoderSettings:
    """Kind and architecture. `wavelet`: pico, nano, small, base. `sd` (diffusers' AutoencoderKL): tiny, sd. `vector`:
    digits, one vector a gray image of 32 x 32 pixels.

    Args:
        architecture: wavelet, sd or vector; sd is for kind kl only, vector for kl and ae.
        preset: sizes of encoder and decoder.
        latent_channels: channels of the latent. For fsq: the number of entries in `fsq_levels`. For frozen: leave it
            out; it follows from `encoder` and `residual_channels`.
        kind: the form of the latent. kl: a posterior with a controlled rate. ae: a point, without regularization. vq:
            one of a codebook's vectors. fsq: rounded channels. frozen: the features of a pretrained vision transformer.
        codebook_size: vq: number of codes, default 1024.
        codebook: vq: "rotation" (default), learned by gradient; "ema", a moving average of the latents.
        fsq_levels: fsq: levels of each channel, at least 3 each, default 8, 5, 5, 5 (1000 codes).
        encoder: frozen: local directory or hub id of a DINOv2 or DINOv3 vision transformer in safetensors.
        residual_channels: frozen: channels that a small learned encoder adds to the features.
        linear_path: wavelet, kl or ae: the network starts as the best linear code of the training images' 8x8 blocks
            and adds to it. For 12 channels and more.
    """

    architecture: str = "wavelet"
    preset: str = "nano"
    latent_channels: int = 4
    kind: str = "kl"
    codebook_size: int | None = None
    codebook: Literal["rotation", "ema"] | None = None
    fsq_levels: list[int] | None = None
    encoder: str | None = None
    residual_channels: int = 0
    linear_path: bool = False

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of each channel, fsq."""
        return tuple(self.fsq_levels or (8, 5, 5, 5))


def called_like_forward(method: Callable[..., Any]) -> Any:
    """Let the offloading hooks of a model run for another method than `forward`.

    `enable_model_cpu_offload` and `enable_sequential_cpu_offload` set a hook of accelerate, group offloading sets one
    of diffusers. The decorator of diffusers for `encode` and `decode` supports the hook of accelerate only.
    """

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = None if vars(self).get("_group_is_here") else _group_hook(self)
        hook: Any = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)
        if group is None:
            return method(self, *args, **kwargs)
        args, kwargs = group.pre_forward(self, *args, **kwargs)
        self._group_is_here = True  # for what this method calls
        try:
            return group.post_forward(self, method(self, *args, **kwargs))
        finally:
            self._group_is_here = False

    wrapper._called_like_forward = True  # type: ignore[attr-defined]
    return wrapper


@contextlib.contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Inside the block, the offloaded weights of a module are on its device, to be read without a call."""
    hooks = [hook for hook in (getattr(module, "_hf_hook", None), _group_hook(module)) if hook is not None]
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def _group_hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(GROUP_OFFLOADING)


class Decoded(NamedTuple):
    """The decoder's output in a training pass.

    `sample` (n, 3, h, w); `losses`: further scalar terms, each a mean per element; `indices` (n, h/f, w/f): the codes
    that were chosen, None without a codebook.
    """

    sample: Tensor
    losses: dict[str, Tensor]
    indices: Tensor | None


class Autoencoder(SavedCompletely, ConfigMixin):  # type: ignore[misc]
    """An autoencoder of images, with diffusers' interface: `encode(x).latent_dist` and `decode(z).sample`.

    A new kind defines `posterior` and `image` (or all of `encode` and `decode`). It also overrides the properties below
    if their defaults, which read the configuration of diffusers, do not hold.
    """

    config: Any  # a FrozenDict whose keys are attributes
    trainable = True
    """Whether `train-vae` can train it."""
    decoder_parts = ("decoder", "post_quant_conv", "quantize", "quantizer")
    """Top-level names of the parameters that process latents only."""
    loss_weights: Mapping[str, float] = MappingProxyType({})
    """Weights of the losses from `decode_with_losses`."""
    has_codes = False
    """Whether `token_indices` gives the numbers of the codes and `decode_indices` takes them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # diffusers looks for `ModelMixin` in the module that a saved pipeline names for its autoencoder
        vars(sys.modules[cls.__module__]).setdefault("ModelMixin", ModelMixin)
        for name in ("encode", "decode"):  # those of diffusers, too
            if not hasattr(method := getattr(cls, name), "_called_like_forward"):
                setattr(cls, name, called_like_forward(method))

    @classmethod
    def from_settings(cls, settings: AutoencoderSettings, sizes: Mapping[str, Any], logvar_floor: float) -> Autoencoder:
        """A new autoencoder with random weights. `sizes`: the preset's; `logvar_floor` follows from the rate."""
        return cls(latent_channels=settings.latent_channels, **sizes)

    @classmethod
    def check_settings(cls, settings: AutoencoderSettings) -> None:
        """Raises: UserError for settings that this kind does not support."""

    @property
    def kind(self) -> str:
        """kl, ae, vq, fsq or frozen, as in `AutoencoderSettings`."""
        return "ae" if self.deterministic else "kl"

    @property
    def deterministic(self) -> bool:
        """Whether its latents are points: `latent_dist.logvar` is `DETERMINISTIC_LOGVAR` and means no rate."""
        return False

    @property
    def downsampling(self) -> int:
        """f: image pixels per latent position along one side."""
        widths = getattr(self.config, "block_out_channels", None)
        widths = widths or getattr(self.config, "encoder_block_out_channels", None)
        return 2 ** (len(widths) - 1) if widths else 8

    @property
    def latent_channels(self) -> int:
        """c: channels of the latent."""
        return int(self.config.latent_channels)

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return int(getattr(self.config, "in_channels", 3))

    @property
    def only_side(self) -> int | None:
        """The only side in pixels of the square images that it supports; None: any size."""
        return None

    @property
    def codebook_size(self) -> int | None:
        """Number of codes of a quantizing autoencoder; None for the others."""
        return None

    @property
    def logvar_bounds(self) -> tuple[float, float]:
        """The bounds to which the log-variance is clamped."""
        return -30.0, 20.0

    @property
    def decoder_context(self) -> int:
        """Number of latent positions on each side of its own that a pixel depends on."""
        return DEFAULT_CONTEXT

    @property
    def needs_statistics(self) -> bool:
        """Whether `fit_statistics` must be called once before training."""
        return False

    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics that the network needs before training, from image batches (n, 3, h, w) in [-1, 1]."""

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images (n, 3, h, w) in [-1, 1], h and w divisible by f -> posterior over latents (n, c, h/f, w/f)."""
        raise NotImplementedError

    def image(self, z: Tensor) -> Tensor:
        """Latents (n, c, h, w) -> images (n, 3, fh, fw), about [-1, 1], not clamped."""
        return self.decoder(z)

    @called_like_forward
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Images (n, 3, h, w) in [-1, 1] -> posterior over latents (n, c, h/f, w/f). h and w divisible by f."""
        posterior = self.posterior(x)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @called_like_forward
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Latents (n, c, h, w) -> images (n, 3, fh, fw), about [-1, 1], not clamped."""
        image = self.image(z)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Encode and decode (n, 3, h, w); from the posterior's mean unless `sample_posterior`."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def decode_with_losses(self, latents: Tensor) -> Decoded:
        """`decode` in training, with the losses that the latents themselves have."""
        return Decoded(self.decode(latents).sample, {}, None)

    def quantized(self, latents: Tensor) -> Tensor:
        """The latents as the decoder uses them: rounded to codes if the autoencoder quantizes."""
        return latents

    def narrow(self, channels: int) -> Autoencoder:
        """The smaller autoencoder that keeps the first `channels` latent channels. Raises: UserError."""
        raise UserError(
            "channels: this autoencoder cannot be cut to fewer channels; train kind kl or ae with architecture wavelet"
        )

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, h, w) in [-1, 1] -> posterior mean and log-variance, each (n, c, ⌈h/f⌉, ⌈w/f⌉), float32.

        Raises:
            UserError: whole numbers, or images of an unsupported shape.
        """
        self.check_images(images)  # before padding brings smaller ones to its size
        images = pad_to_multiple(images.to(self.dtype), self.downsampling)
        posterior = self.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w), not normalized -> images (n, 3, fh, fw), float32, clamped to [-1, 1].

        Raises:
            NotFinite: latents or images with NaN or infinite numbers, often an overflow of float16.
        """
        images = self.decode(latents.to(self.dtype)).sample.float()
        try:
            return finite_pixels(images, "decoder").clamp(-1, 1)
        except NotFinite:
            finite_pixels(latents, "latents")
            raise

    def reconstruct(self, images: Tensor, sample: torch.Generator | None = None) -> Tensor:
        """Encode and decode images of any size (n, 3, h, w); same shape, clamped to [-1, 1].

        From the posterior's mean, or from a posterior sample drawn with the generator `sample` (on the images' device).

        Raises:
            UserError: numbers outside of [-1, 1], or images of an unsupported shape.
        """
        if images.is_floating_point() and images.numel() and not bool(images.abs().amax() <= LARGEST_PIXEL):
            low, high = float(images.min()), float(images.max())
            raise UserError("images", f"numbers from {low:.4g} to {high:.4g}", "scale them to -1 (black) to 1 (white)")
        mean, logvar = self.encode_moments(images)
        if sample is not None:
            noise = torch.randn(mean.shape, generator=sample, device=mean.device)
            mean = mean + torch.exp(0.5 * logvar) * noise
        return self.decode_images(mean)[..., : images.shape[-2], : images.shape[-1]]

    def check_side(self, where: str, side: int) -> None:
        """Raises: UserError naming `where`, for a side in pixels that the autoencoder does not support."""
        if self.only_side not in (None, side):
            raise UserError(f"{where} {side}: this autoencoder supports one image size; use {self.only_side}")

    def check_images(self, images: Tensor) -> None:
        """Raises: UserError unless the images are floats (n, 3, h, w) of a supported size."""
        if images.ndim != 4 or images.shape[1] != self.image_channels or not images.is_floating_point():
            found = f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
            raise UserError("images", found, f"give floats (n, {self.image_channels}, h, w) from -1 to 1")
        (height, width), only = images.shape[-2:], self.only_side
        if only is not None and (height, width) != (only, only):
            raise UserError(
                f"{type(self).__name__}: images of {height} x {width} pixels; it knows {only} x {only} only, so scale "
                f"them to that size (resolution={only})"
            )

    def fingerprint(self) -> str:
        """`sha256:HEX` over the architecture and every tensor, see `weights.fingerprint`."""
        return weights.fingerprint(self)

    def encoder_fingerprint(self) -> str:
        """The same without the tensors that only decode. Autoencoders that are equal in it make the same latents.

        Training the decoder further (encoder frozen) does not change it, so existing latents stay valid.
        """
        return weights.fingerprint(self, without=self.decoder_parts)

    def token_fingerprint(self) -> str:
        """The same without the decoder. Quantized autoencoders that are equal in it make the same codes."""
        return weights.fingerprint(self, without=("decoder",))


def deterministic_posterior(latents: Tensor) -> DiagonalGaussianDistribution:
    """Latents (n, c, h, w) -> a posterior with this mean and the log-variance `DETERMINISTIC_LOGVAR` everywhere.

    It is so narrow that a sample equals the mean, so that shards, evaluation and diffusion treat all autoencoders
    alike.
    """
    return DiagonalGaussianDistribution(torch.cat([latents, torch.full_like(latents, DETERMINISTIC_LOGVAR)], dim=1))
