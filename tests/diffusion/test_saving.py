"""A pipeline as any other of diffusers: saving in every precision, the hub, offloading, pipelines that share parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.hooks
import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from ldm_vae.diffusion import saving
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline, pipeline_card
from ldm_vae.errors import UserError
from tests.diffusion import hub
from tests.diffusion.conftest import NAMES, make_pipeline
from tests.diffusion.test_pipeline import with_parts

HALVES = [torch.float16, torch.bfloat16]


def draw(pipeline: Any, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("cat", seed=0, num_inference_steps=2, output_type="pt", **arguments).images


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_saved_and_loaded_to_the_last_bit(tmp_path: Path, saved: Path, dtype: torch.dtype) -> None:
    half = LatentDiffusionPipeline.from_pretrained(saved, torch_dtype=dtype)
    expected = draw(half)
    half.save_pretrained(tmp_path, variant="half")
    assert not list(tmp_path.glob("*/diffusion_pytorch_model.safetensors"))
    again = LatentDiffusionPipeline.from_pretrained(tmp_path, variant="half", torch_dtype=dtype)
    assert torch.equal(draw(again), expected)
    rounded = LatentDiffusionPipeline.from_pretrained(tmp_path, variant="half")
    assert rounded.unet.dtype == rounded.autoencoder.dtype == torch.float32
    for key in ("encoder_fingerprint", "rounded_encoders"):
        assert rounded.config[key] == half.config[key]


def test_both_variants_live_in_one_directory(tmp_path: Path) -> None:
    for order in (0, 1):
        full, half = make_pipeline(NAMES), make_pipeline(NAMES).to(torch.float16)
        expected = draw(full), draw(half)
        writing = [(full, {}), (half, {"variant": "fp16"})]
        for pipeline, settings in writing[::-1] if order else writing:
            pipeline.save_pretrained(tmp_path / str(order), **settings)
        plain = LatentDiffusionPipeline.from_pretrained(tmp_path / str(order))
        small = LatentDiffusionPipeline.from_pretrained(
            tmp_path / str(order), variant="fp16", torch_dtype=torch.float16
        )
        assert all(torch.equal(draw(found), wanted) for found, wanted in zip((plain, small), expected))


def test_the_rounding_of_another_encoder_is_refused(saved: Path) -> None:
    other = make_pipeline(NAMES).autoencoder
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(1.5)
    other.to(torch.float16).to(torch.float32)
    with pytest.raises(UserError, match=r"fingerprint.*latents came from"):
        LatentDiffusionPipeline.from_pretrained(saved, autoencoder=other)


def test_precision_and_place_change_as_usual(saved: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(saved)
    assert pipeline.to("cpu", torch.float16) is pipeline
    assert pipeline.unet.dtype == pipeline.autoencoder.dtype == pipeline.dtype == torch.float16
    assert (draw(pipeline) - draw(make_pipeline(NAMES))).abs().mean() < 0.01
    with pytest.raises(UserError, match=r"torch_dtype: 'float16' is not a torch\.dtype"):
        LatentDiffusionPipeline.from_pretrained(saved, torch_dtype="float16")


def test_the_general_class_finds_it_and_other_pipelines_share_its_parts(saved: Path) -> None:
    general = DiffusionPipeline.from_pretrained(saved)
    assert type(general) is LatentDiffusionPipeline
    expected = draw(LatentDiffusionPipeline.from_pretrained(saved))
    assert torch.equal(draw(general), expected)
    weak = make_pipeline(NAMES).unet
    shared = LatentDiffusionPipeline.from_pipe(general, autoguidance_unet=weak)
    assert (shared.unet, shared.autoencoder, shared.autoguidance_unet) == (general.unet, general.autoencoder, weak)
    assert torch.equal(draw(shared), expected)
    assert LatentDiffusionPipeline.from_pipe(shared).autoguidance_unet is weak


def test_large_weights_are_split(tmp_path: Path, pipeline: LatentDiffusionPipeline) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("unet/*-of-*.safetensors"))) > 1
    assert torch.equal(draw(LatentDiffusionPipeline.from_pretrained(tmp_path)), draw(pipeline))


def test_schedulers_that_are_not_made_for_a_flow_are_refused(pipeline: LatentDiffusionPipeline) -> None:
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler does not sample a rectified flow here; take FlowMatchEuler"):
        pipeline("cat")


def test_a_card_says_what_is_recorded_and_stays_when_it_is_edited(
    tmp_path: Path, pipeline: LatentDiffusionPipeline
) -> None:
    recorded = with_parts(pipeline, training={"steps": 8, "held_out/flow": 0.75})
    recorded.save_pretrained(tmp_path / "a")
    text = (tmp_path / "a" / saving.CARD).read_text()
    for words in ("64x64", "3 classes", "cat, dog, red ball", "held_out/flow 0.75, steps 8", "library_name: diffusers"):
        assert words in text
    assert huggingface_hub.ModelCard(text).data.to_dict()["pipeline_tag"] == "unconditional-image-generation"
    (tmp_path / "a" / saving.CARD).write_text("mine")
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / saving.CARD).read_text() == "mine"
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / saving.CARD).read_text() == text
    assert "none" in pipeline_card(make_pipeline([]))


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """The files of an empty hub repository, which `huggingface_hub` takes for the real one."""
    with hub.hub() as (address, files):
        url = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url.replace(huggingface_hub.constants.ENDPOINT, address),
        )
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        for name in ("HF_HUB_CACHE", "HF_XET_CACHE"):
            monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "cache"))
        for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
            monkeypatch.setattr(huggingface_hub.constants, name, 100)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield files


def test_what_is_pushed_to_the_hub_can_be_loaded_from_it(
    repository: dict[str, bytes], saved: Path, tmp_path: Path
) -> None:
    """Through the real client and HTTP; the whole directory, then a second variant beside it."""
    pipeline = LatentDiffusionPipeline.from_pretrained(saved)
    expected = draw(pipeline)
    pipeline.push_to_hub(hub.REPOSITORY, token="hf_none")
    assert repository.keys() == {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    for name in repository.keys() - {saving.CARD}:
        if name.endswith(".safetensors"):
            assert repository[name] == (saved / name).read_bytes()
    assert f'from_pretrained("{hub.REPOSITORY}")' in repository[saving.CARD].decode()
    cache = tmp_path / "cache"
    assert torch.equal(draw(LatentDiffusionPipeline.from_pretrained(hub.REPOSITORY, cache_dir=cache)), expected)

    repository[saving.CARD] = b"---\nlicense: mit\n---\nmine"
    half = pipeline.to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16", push_to_hub=True, repo_id=hub.REPOSITORY, token="hf_none")
    assert repository[saving.CARD].decode().endswith("mine")
    for variant, weights in (("fp16", 2), (None, 2)):
        folder = tmp_path / str(variant)
        loaded = LatentDiffusionPipeline.from_pretrained(
            hub.REPOSITORY, cache_dir=folder, variant=variant, torch_dtype=torch.float16
        )
        assert torch.equal(draw(loaded), draw(half))
        assert len(list(folder.rglob("snapshots/**/*.safetensors"))) == weights
    for name, content in repository.items():  # as `hf download` gives it
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_bytes(content)
    for variant in ("fp16", None):
        loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / "all", variant=variant, torch_dtype=torch.float16)
        assert torch.equal(draw(loaded), draw(half))


def test_offloading_keeps_one_network_at_a_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which hook brings which network, and that all of them are away in the end; here from CPU to CPU."""
    pipeline = LatentDiffusionPipeline.from_pretrained(saved, autoguidance_unet=make_pipeline(NAMES).unet)
    expected = draw(pipeline, autoguidance_scale=1.5)
    pipeline.enable_model_cpu_offload(device="cpu")
    names = {id(part): name for name, part in pipeline.components.items()}
    events: list[str] = []
    bring, away = accelerate.hooks.CpuOffload.pre_forward, accelerate.hooks.CpuOffload.init_hook

    def brought(hook: Any, module: Any, *arguments: Any, **named: Any) -> Any:
        events.append(f"bring {names[id(module)]}")
        return bring(hook, module, *arguments, **named)

    def sent(hook: Any, module: Any) -> Any:
        events.append(f"send {names[id(module)]}")
        return away(hook, module)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", brought)
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", sent)
    assert torch.equal(draw(pipeline, autoguidance_scale=1.5), expected)
    brings = [event.split()[1] for event in events if event.startswith("bring")]
    assert brings == ["unet", "autoguidance_unet"] * 2 + ["autoencoder"]
    last = len(events) - 1 - events[::-1].index("bring autoencoder")
    assert {"send unet", "send autoguidance_unet", "send autoencoder"} <= set(events[last:])


def test_networks_can_be_brought_layer_by_layer(saved: Path) -> None:
    """That of accelerate needs an accelerator; diffusers' own runs anywhere."""
    pipeline = LatentDiffusionPipeline.from_pretrained(saved)
    expected = draw(pipeline)
    pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(draw(pipeline), expected)
    with pytest.raises(RuntimeError, match="requires accelerator"):
        LatentDiffusionPipeline.from_pretrained(saved).enable_sequential_cpu_offload()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_an_accelerator(saved: Path, kind: str) -> None:
    plain, offloaded = (LatentDiffusionPipeline.from_pretrained(saved) for _ in range(2))
    expected = draw(plain.to("cuda"))
    getattr(offloaded, kind)()
    torch.testing.assert_close(draw(offloaded), expected, atol=1e-4, rtol=0)
    picture = torch.rand(1, 3, 64, 64)
    found, wanted = (draw(pipeline, image=picture, strength=0.5) for pipeline in (offloaded, plain))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert torch.device("cuda") not in {part.device for part in (offloaded.unet, offloaded.autoencoder)}
