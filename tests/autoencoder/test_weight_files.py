"""Saving over any earlier layout: the folder loads and gives what was saved. Loading takes what is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder, load_autoencoder
from ldm_vae.autoencoder.weight_files import WeightFormat, choose_layout, layout_of, layouts
from ldm_vae.autoencoder.weights import load_weights
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.unet import LatentUNet, UNetConfig, build_unet
from ldm_vae.errors import UserError
from ldm_vae.files import write_checksums
from tests.diffusion.conftest import NAMES, make_pipeline

SAVES: dict[str, dict[str, Any]] = {
    "single": {},
    "sharded": {"max_shard_size": "100KB"},
    "more shards": {"max_shard_size": "30KB"},
    "fp16": {"variant": "fp16"},
    "fp16 sharded": {"variant": "fp16", "max_shard_size": "100KB"},
    "bin": {"safe_serialization": False},
    "bin sharded": {"safe_serialization": False, "max_shard_size": "100KB"},
    "bin fp16": {"safe_serialization": False, "variant": "fp16"},
}
KINDS = {
    "wavelet": AutoencoderConfig(preset="pico"),
    "sd": AutoencoderConfig("sd", "tiny"),
    "vector": AutoencoderConfig("vector", "digits", 2),
    "fsq": AutoencoderConfig(preset="pico", kind="fsq"),
}


def built(kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    if kind == "unet":
        unet = build_unet(UNetConfig(preset="tiny", widths=(32, 64)), 4, 3).eval()
        nn.init.normal_(unet.network.conv_out.weight, std=0.05)
        return unet
    return build_autoencoder(KINDS[kind]).eval()


def loaded(kind: str, folder: Path, variant: str | None) -> Any:
    return load_weights(LatentUNet, folder, variant=variant) if kind == "unet" else load_autoencoder(folder)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == name2 and torch.equal(a, b) for (name, a), (name2, b) in pairs)


@pytest.mark.parametrize("later", SAVES)
@pytest.mark.parametrize("earlier", SAVES)
def test_a_folder_saved_over_loads_as_what_was_saved_last(tmp_path: Path, earlier: str, later: str) -> None:
    built("wavelet", 0).save_pretrained(tmp_path, **SAVES[earlier])
    (tmp_path / "notes.txt").write_text("mine")
    write_checksums(tmp_path)
    model = built("wavelet", 1)
    model.save_pretrained(tmp_path, **SAVES[later])
    assert same(load_autoencoder(tmp_path), model)  # the checksums fit, too
    assert len(layouts(tmp_path)) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("kind", [*KINDS, "unet"])
def test_every_kind_of_model_saves_like_that(tmp_path: Path, kind: str) -> None:
    for earlier, later in (("sharded", "single"), ("single", "more shards"), ("more shards", "fp16")):
        folder = tmp_path / earlier
        built(kind, 0).save_pretrained(folder, **SAVES[earlier])
        model = built(kind, 1)
        model.save_pretrained(folder, **SAVES[later])
        assert same(loaded(kind, folder, None), model)


def test_another_network_in_the_same_folder(tmp_path: Path) -> None:
    built("wavelet", 0).save_pretrained(tmp_path, **SAVES["sharded"])
    built("sd", 1).save_pretrained(tmp_path, variant="fp16")
    assert same(load_autoencoder(tmp_path), built("sd", 1))


def test_a_rounded_copy_stays_beside_its_original_and_no_other_does(tmp_path: Path) -> None:
    for halves in ([torch.float16], [torch.bfloat16], [torch.float16, torch.bfloat16]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        built("wavelet", 0).save_pretrained(folder, **SAVES["sharded"])
        for half in halves:
            nn.Module.to(model := built("wavelet", 0), half)
            model.save_pretrained(folder, variant=str(half).removeprefix("torch."))
        assert len(layouts(folder)) == 1 + len(halves)
        assert same(load_autoencoder(folder), built("wavelet", 0))
        built("wavelet", 1).save_pretrained(folder, variant="new")
        assert list(layouts(folder)) == [WeightFormat("new", "safetensors")]


def test_a_save_that_fails_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = built("wavelet", 0)
    old.save_pretrained(tmp_path, **SAVES["sharded"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        built("wavelet", 1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pipeline_over_the_published_one_with_shards(tmp_path: Path) -> None:
    folder = tmp_path / "ldm"
    shutil.copytree(Path(__file__).parents[2] / "checkpoints" / "ldm-emoji-512", folder)
    assert list(folder.glob("unet/*.index.json"))
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipeline.unet.network.conv_out.weight.mul_(0.5)
    pipeline.save_pretrained(folder)
    again = LatentDiffusionPipeline.from_pretrained(folder)
    assert same(again.unet, pipeline.unet)
    with torch.no_grad():
        pipeline.unet.network.conv_out.weight.mul_(0.5)
    pipeline.unet.save_pretrained(folder / "unet", max_shard_size="1MB")  # the component alone
    assert same(LatentDiffusionPipeline.from_pretrained(folder).unet, pipeline.unet)


def test_a_pipeline_of_one_variant_loads_without_naming_it(tmp_path: Path) -> None:
    pipeline = make_pipeline(NAMES)
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert same(again.unet.half(), pipeline.unet)
    with pytest.raises(UserError, match=r"no weights of the variant 'ema', only fp16 \(safetensors\)"):
        LatentDiffusionPipeline.from_pretrained(tmp_path, variant="ema")


@pytest.mark.parametrize("save", [name for name in SAVES if name != "single"])
def test_the_variant_that_is_there_is_taken_and_named(
    tmp_path: Path, save: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = built("sd", 0)
    model.save_pretrained(tmp_path, **SAVES[save])
    assert same(load_autoencoder(tmp_path), model)
    named = "has no plain safetensors" in caplog.text
    assert named == ("fp16" in save or "bin" in save)


def test_weights_that_are_code_are_refused(tmp_path: Path) -> None:
    model = built("wavelet", 0)
    model.save_pretrained(tmp_path, safe_serialization=False)

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("run",)

    torch.save({**model.state_dict(), "code": Code()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded as AutoencoderWavelet") as error:
        load_autoencoder(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="cannot be read as weights of torch"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("diffusion_pytorch_model.safetensors", WeightFormat("", "safetensors")),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", WeightFormat("", "safetensors")),
        ("diffusion_pytorch_model.safetensors.index.json", WeightFormat("", "safetensors")),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", WeightFormat("fp16", "safetensors")),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", WeightFormat("fp16", "safetensors")),
        ("diffusion_pytorch_model.bin.index.json", WeightFormat("", "bin")),
        ("diffusion_pytorch_model.non_ema.bin", WeightFormat("non_ema", "bin")),
        ("diffusion_pytorch_model_old.safetensors", None),
        ("explorer.safetensors", None),
        ("config.json", None),
    ],
)
def test_names(name: str, layout: WeightFormat | None) -> None:
    assert layout_of(name) == layout


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        choose_layout(tmp_path)
