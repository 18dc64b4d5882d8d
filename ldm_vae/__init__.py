"""ldm_vae: the compression component of latent diffusion.

Train an autoencoder on your own images, encode datasets into latent shards, train a latent U-Net on them and generate.

    import ldm_vae

    autoencoder = ldm_vae.load_autoencoder("runs/vae")
    latents = autoencoder.encode(images).latent_dist.mean  # images (n, 3, h, w) in [-1, 1]

`__all__` is the whole public API; every other name may change. Importing the package is cheap: a public name is
imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldm_vae.version import __version__ as __version__

_MODULES = ("flow", "metrics")
_HOMES = {
    "Autoencoder": "autoencoder.base",
    "AutoencoderWavelet": "autoencoder.wavelet",
    "CompressConfig": "applications.codec.compression",
    "DecompressConfig": "applications.codec.compression",
    "EncodeConfig": "latents.encode",
    "EvaluateConfig": "evaluation.reconstruction",
    "GenerateConfig": "diffusion.generation",
    "GlobalOrder": "latents.dataset",
    "LatentDataset": "latents.dataset",
    "LatentDiffusionPipeline": "diffusion.pipeline",
    "LatentUNet": "diffusion.unet",
    "OrderedSampler": "latents.dataset",
    "ShardBlockOrder": "latents.dataset",
    "TrainDiffusionConfig": "diffusion.training",
    "TrainVaeConfig": "autoencoder.train_config",
    "UserError": "errors",
    "compress": "applications.codec.compression",
    "decompress": "applications.codec.compression",
    "diagnose": "evaluation.diagnosis",
    "encode_dataset": "latents.encode",
    "evaluate": "evaluation.reconstruction",
    "generate": "diffusion.generation",
    "load_autoencoder": "autoencoder.models",
    "train_diffusion": "diffusion.training",
    "train_vae": "autoencoder.training",
}
"""Public name -> the module that defines it, below this package."""

__all__ = [
    "Autoencoder",
    "AutoencoderWavelet",
    "CompressConfig",
    "DecompressConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "GlobalOrder",
    "LatentDataset",
    "LatentDiffusionPipeline",
    "LatentUNet",
    "OrderedSampler",
    "ShardBlockOrder",
    "TrainDiffusionConfig",
    "TrainVaeConfig",
    "UserError",
    "compress",
    "decompress",
    "diagnose",
    "encode_dataset",
    "evaluate",
    "flow",
    "generate",
    "load_autoencoder",
    "metrics",
    "train_diffusion",
    "train_vae",
]


if not TYPE_CHECKING:  # a checker would take every name for one that exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
