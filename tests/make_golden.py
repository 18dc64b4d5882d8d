"""Make the files of `tests/golden` anew: `python -m tests.make_golden`. Only for a new format version.

The files of the version before stay under another name, and a test that they still open.
"""

from __future__ import annotations

import lzma
import math
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm_vae import config as configuration
from ldm_vae.autoencoder.lineage import write_record
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.autoencoder.wavelet import AutoencoderWavelet
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.power_function_ema import EmaConfig, EmaSnapshots
from ldm_vae.diffusion.samplers import flow_scheduler
from ldm_vae.diffusion.training import TrainDiffusionConfig
from ldm_vae.diffusion.unet import LatentUNet
from ldm_vae.files import write_checksums
from ldm_vae.latents.encode import EncodeConfig
from ldm_vae.latents.normalizer import LatentNormalizer
from tests.diffusion.test_posthoc_ema_snapshots import network, train
from tests.training import toy

GOLDEN = Path(__file__).parent / "golden"


def coarse(model: Any) -> Any:
    """Weights of three values: they take a twentieth of the space once they are packed."""
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                size = 2.0 ** round(math.log2(1e-3 + float(tensor.abs().max())))
                tensor.copy_(torch.sign(tensor).mul(tensor.abs() > tensor.abs().mean()) * size)
    return model.eval()


def tiny_autoencoder() -> AutoencoderWavelet:
    torch.manual_seed(0)
    return coarse(
        AutoencoderWavelet(
            latent_channels=3,
            encoder_channels=(8, 16),
            encoder_blocks=(1, 1),
            decoder_channels=(16, 8, 8, 8),
            decoder_blocks=(1, 0, 0, 0),
        )
    )


def write_autoencoder(folder: Path) -> None:
    model = tiny_autoencoder()
    model.save_pretrained(folder)
    config = configuration.load(TrainVaeConfig, None, ["output=runs/golden"])
    write_record(
        folder, model, config, final_beta=1e-6, pinned_share=0.0, metrics_file=folder / "none", held_out={"psnr": 20.0}
    )
    write_checksums(folder)


def write_pipeline(folder: Path) -> None:
    torch.manual_seed(1)
    unet = LatentUNet(latent_channels=3, num_classes=2, widths=(32,), layers=1, attention=())
    torch.nn.init.normal_(unet.network.conv_out.weight, std=0.05)
    unet = coarse(unet)
    normalizer = LatentNormalizer([0.1, -0.2, 0.3], [1.0, 0.5, 2.0])
    pipeline = LatentDiffusionPipeline(
        tiny_autoencoder(), unet, flow_scheduler(1.5), normalizer.to_dict(), (4, 4), ["cat", "dog"]
    )
    pipeline.save_pretrained(folder)


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_autoencoder(root / "autoencoder")
        write_pipeline(root / "pipeline")
        with chdir(root):
            toy.main("run", "steps=10")
        for name in ("run.json", "run.lock", "model.safetensors", "ema.safetensors"):
            (root / "run" / name).unlink()
        module = network()
        train(module, EmaSnapshots(EmaConfig(snapshots=4), module, root / "snapshots"), range(8), 8)
        for name in ("autoencoder", "pipeline", "run", "snapshots"):
            with (
                lzma.open(GOLDEN / f"{name}.tar.xz", "wb", preset=9) as file,
                tarfile.open(fileobj=file, mode="w") as tar,
            ):
                for path in sorted(path for path in (root / name).rglob("*") if path.is_file()):
                    member = tarfile.TarInfo(path.relative_to(root).as_posix())
                    member.size, member.mode = path.stat().st_size, 0o644
                    with open(path, "rb") as content:
                        tar.addfile(member, content)
    configs: dict[str, tuple[type, list[str]]] = {
        "train-vae": (TrainVaeConfig, ["output=runs/golden", "training.learning_rate=3e-4"]),
        "encode": (EncodeConfig, ["output=latents", "autoencoder=runs/golden", "resolution=96"]),
        "train-diffusion": (TrainDiffusionConfig, ["output=runs/d", "latents=latents", "autoencoder=runs/golden"]),
    }
    for name, (schema, overrides) in configs.items():
        (GOLDEN / f"{name}.yaml").write_text(configuration.to_yaml(configuration.load(schema, None, overrides)))


if __name__ == "__main__":
    main()
