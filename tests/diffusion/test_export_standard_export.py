"""The stock directory: run by a process that cannot import this package, it draws our images; the rest is refused."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm_vae import cli, runtime
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.config import load
from ldm_vae.diffusion.export import check_expressible, export_standard, standard_pipeline, standard_unet
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.samplers import flow_scheduler
from ldm_vae.diffusion.training import TrainDiffusionConfig
from ldm_vae.diffusion.unet import UNetConfig, build_unet
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.latents.normalizer import LatentNormalizer

NAMES = ["cat", "dog", "red ball"]
STEPS, SHIFT, GUIDANCE = 12, 1.5, 2.5

STOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ldm_vae":
            raise ImportError("ldm_vae is not installed here")

sys.meta_path.insert(0, Blocker())
repair, with_classes, without, out, steps, guidance = sys.argv[1:]
import runpy  # a torch and a torchvision of different builds are the test machine's trouble, not the model's
runpy.run_path(repair)["repair_torchvision"]()
import numpy, torch
from diffusers import DiffusionPipeline

generators = lambda: [torch.Generator().manual_seed(seed) for seed in (0, 1)]
common = {"num_inference_steps": int(steps), "output_type": "np"}
pipeline = DiffusionPipeline.from_pretrained(with_classes)
pipeline.set_progress_bar_config(disable=True)
labels = pipeline.get_label_ids(["dog", "red ball"])
guided = pipeline(labels, guidance_scale=float(guidance), generator=generators(), **common).images
plain = pipeline(labels, guidance_scale=1.0, generator=generators(), **common).images
pipeline = DiffusionPipeline.from_pretrained(without)
pipeline.set_progress_bar_config(disable=True)
labels = pipeline.get_label_ids(["image"] * 2)
free = pipeline(labels, guidance_scale=1.0, generator=generators(), **common).images
assert not any(name.split(".")[0] == "ldm_vae" for name in sys.modules)
numpy.savez(out, guided=guided, plain=plain, free=free)
"""


def make(names: list[str], **unet: object) -> LatentDiffusionPipeline:
    """64x64 images, random weights: an sd autoencoder, and a U-Net that is stock unless `unet` says otherwise."""
    torch.manual_seed(0)
    settings = {"preset": "tiny", "patch": 1, "prediction": "velocity", "widths": (32, 64)} | unet
    network = build_unet(UNetConfig(**settings), 4, len(names)).eval()  # type: ignore[arg-type]
    nn.init.normal_(network.network.conv_out.weight, std=0.1)
    return LatentDiffusionPipeline(
        build_autoencoder(AutoencoderConfig("sd", "tiny", 4)).eval(),
        network,
        flow_scheduler(SHIFT),
        normalizer=LatentNormalizer([0.1, -0.2, 3.0, 0.0], [1.0, 0.5, 2.0, 1.5]).to_dict(),
        latent_size=(8, 8),
        label_names=names,
    )


def ours(pipeline: LatentDiffusionPipeline, labels: list[str] | None, guidance: float) -> np.ndarray:
    """Two images (2, h, w, 3) in [0, 1] from the noise of seeds 0 and 1."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        labels=labels,
        num_images=2,
        guidance_scale=guidance if labels else None,
        num_inference_steps=STEPS,
        generator=generators,
        output_type="np",
    ).images


def levels(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two images in 8-bit levels."""
    first, second = (np.round(image.astype(np.float64) * 255) for image in (a, b))
    return int(np.abs(first - second).max())


def test_stock_diffusers_draws_our_images_in_a_process_without_this_package(tmp_path: Path) -> None:
    pipelines = {"classes": make(NAMES), "free": make([])}
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / name / "pipeline")
        words = ["convert", str(tmp_path / name), str(tmp_path / "stock" / name), "--to", "diffusers-pipeline"]
        assert cli.main(words) == 0
        index = json.loads((tmp_path / "stock" / name / "model_index.json").read_text())
        assert {part[0] for part in index.values() if isinstance(part, list)} == {"diffusers"}
    folders = [str(tmp_path / "stock" / name) for name in ("classes", "free")]
    repair = tmp_path / "repair.py"
    repair.write_text(f"_libraries = []\n{inspect.getsource(runtime.repair_torchvision)}")
    words = [str(repair), *folders, str(tmp_path / "images.npz"), str(STEPS), str(GUIDANCE)]
    subprocess.run([sys.executable, "-I", "-c", STOCK, *words], check=True, timeout=240, cwd=tmp_path)
    stock = np.load(tmp_path / "images.npz")
    words = ["dog", "red ball"]
    for name, labels, guidance in (("guided", words, GUIDANCE), ("plain", words, 1.0), ("free", None, 1.0)):
        pipeline = pipelines["classes" if labels else "free"]
        assert stock[name].std() > 0.05
        assert levels(stock[name], ours(pipeline, labels, guidance)) <= 1
    assert levels(stock["guided"], stock["plain"]) > 10


def test_the_directory_says_how_it_is_called_and_what_it_was_made_from(tmp_path: Path) -> None:
    make(["a cat, sitting", "dog"]).save_pretrained(tmp_path / "pipeline")
    record = export_standard(str(tmp_path), tmp_path / "stock", precision="bf16")
    assert json.loads((tmp_path / "stock" / "conversion.json").read_text()).items() >= record.items()
    text = (tmp_path / "stock" / "README.md").read_text()
    assert "Images are\n64x64. Classes: a cat, sitting, dog." in text
    assert "get_label_ids(['a cat'] * 4)" in text
    assert f"flow_shift={SHIFT}" in text
    weights = load_file(tmp_path / "stock" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="exists; give another target, or --overwrite"):
        export_standard(str(tmp_path), tmp_path / "stock")
    export_standard(str(tmp_path), tmp_path / "stock", overwrite=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 2}, "unet.patch=2 and unet.prediction=velocity .* no U-Net for; train with unet.patch=1"),
        ({"prediction": "x"}, "unet.patch=1 and unet.prediction=x .* no U-Net for; train with unet.patch=1"),
        ({"coordinates": True}, "takes 6 channels for latents of 4"),
        ({"widths": (32, 32, 32, 32, 32)}, "latents: 8x8 is not a square with sides divisible by 16"),
    ],
)
def test_a_network_that_stock_diffusers_lacks_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        standard_pipeline(make([], **settings))


def test_an_autoencoder_of_this_package_is_refused() -> None:
    pipeline = make([])
    pipeline.autoencoder = build_autoencoder(AutoencoderConfig("wavelet", "pico"))
    with pytest.raises(UserError, match="autoencoder: this one is not of a class of stock diffusers"):
        standard_pipeline(pipeline)


def test_a_network_that_does_something_else_with_its_output_is_found_out() -> None:
    unet = make(NAMES).unet
    assert standard_unet(unet, (8, 8)).config.num_class_embeds == 1001
    unet.register_forward_hook(lambda _module, _inputs, velocity: 1.01 * velocity)
    with pytest.raises(UserError, match="the stock network differs from it by"):
        standard_unet(unet, (8, 8))


def test_options_for_autoencoders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(tmp_path), str(tmp_path / "stock"), "--to", "diffusers-pipeline", "--channels", "2"]
    assert cli.main(words) == EXIT_USER_ERROR
    assert "channels: has no effect with to=diffusers-pipeline" in capsys.readouterr().err
    assert cli.main(words[:-2]) == EXIT_USER_ERROR
    assert "is empty; give a finished run of `ldm-vae train-diffusion`" in capsys.readouterr().err
    assert not (tmp_path / "stock").exists()


def test_the_commands_of_the_documentation_parse() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "standard-export.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("ldm-vae ")]
    assert len(lines) == 3
    for line in lines:
        name, arguments, _ = cli.find_command(shlex.split(line)[1:])
        words = cli.ArgumentReader(name).read(arguments)
        assert words.advice == []
        if name == "train-diffusion":
            config = load(TrainDiffusionConfig, page.parents[2] / str(words.recipe), words.settings)
            check_expressible(build_unet(config.unet, 4), (64, 64))
