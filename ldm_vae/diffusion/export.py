"""`ldm-vae model convert`: a trained model for other programs, or to share.

ConvertConfig -> convert -> diffusers, compvis, onnx, torchscript    of an autoencoder: `autoencoder.interop`
                         -> diffusers-pipeline                       `export_standard`: runs without this package
                         -> checkpoint                               `pack`: half precision, small files, records
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers
from diffusers import AutoencoderKL, DiTPipeline, UNet2DModel
from omegaconf import OmegaConf

from ldm_vae import provenance, random
from ldm_vae.autoencoder import lineage
from ldm_vae.autoencoder.interop.compvis import fold_normalizer, open_autoencoder
from ldm_vae.autoencoder.interop.convert import DTYPES, RECORD, Conversion, Precision, check_target, convert_autoencoder
from ldm_vae.autoencoder.lineage import RECORD as TRAINING
from ldm_vae.autoencoder.lineage import subsample
from ldm_vae.autoencoder.models import load_autoencoder, model_directory
from ldm_vae.autoencoder.weights import check_finite
from ldm_vae.diffusion.generation import has_pipeline, pipeline_directory
from ldm_vae.diffusion.pipeline import DEFAULT_GUIDANCE, LatentDiffusionPipeline
from ldm_vae.diffusion.samplers import scheduler_shift
from ldm_vae.diffusion.unet import TIME_SCALE, LatentUNet
from ldm_vae.errors import UserError
from ldm_vae.files import (
    published_directory,
    readable_json,
    write_checksums,
    write_json,
    write_text,
)
from ldm_vae.latents.format import read_manifest
from ldm_vae.redaction import without_folders
from ldm_vae.utils.progress import begin, beside, end, end_dry_run, say

PIPELINE, CHECKPOINT = "diffusers-pipeline", "checkpoint"
TARGETS = ("diffusers", "compvis", "onnx", "torchscript", PIPELINE, CHECKPOINT)


@dataclass(frozen=True)
class ConvertConfig:
    """`ldm-vae model convert`.

    Supported files in the CompVis layout are kl-f4 to kl-f32, vq-f4 to vq-f16, Stable Diffusion and SDXL. A .ckpt file
    that holds anything but tensors is refused.

      ldm-vae model convert vae-ft-mse-840000-ema-pruned.safetensors models/sd-vae to=diffusers
      ldm-vae model convert runs/mine mine.safetensors to=compvis
      ldm-vae model convert runs/mine exported/mine to=onnx latents=runs/latents

    With to=diffusers-pipeline, `model` is a run of `ldm-vae train-diffusion`, or its pipeline/. The result runs in
    stock diffusers, without this package. It needs an autoencoder of architecture sd and a U-Net of patch 1 and
    prediction velocity.

      ldm-vae model convert runs/diffusion exported/diffusion to=diffusers-pipeline

    With to=checkpoint, `model` is a run of `train-vae` or `train-diffusion`. The result can be shared and loads in
    every command. The weights are in half precision in files below 16 MiB, with the records of the training, but
    without folder names of this machine. Measure this copy, since rounding changes its fingerprint.

      ldm-vae model convert runs/mine checkpoints/mine to=checkpoint
      ldm-vae model convert runs/diffusion checkpoints/generator to=checkpoint autoencoder=runs/decoder

    Attributes:
        model: A run of `train-vae` or `train-diffusion`, a diffusers directory, a hub id, or a .ckpt or .safetensors
            file in the CompVis layout (whole models too, of which the autoencoder is taken).
        output: A new directory; for compvis a name that ends in .safetensors.
        to: diffusers, compvis, onnx, torchscript, diffusers-pipeline or checkpoint.
        precision: Precision of the weights: fp32, fp16 or bf16; None: fp32, and fp16 for a checkpoint.
        autoencoder: For a checkpoint of a pipeline: an autoencoder with the same encoder and another decoder.
        size: Side in pixels of the example for onnx and torchscript.
        latents: The folder of a finished set, or its URL. Its statistics are recorded by onnx and torchscript, and
            folded into the autoencoder by diffusers.
        config: LDM configuration of a CompVis file (scale_factor).
        channels: Number of first latent channels to keep, after nested training.
        prefix: Text before the names in a compvis file, for example first_stage_model.
    """

    model: str = "???"
    output: str = "???"
    to: str = "???"
    precision: str | None = None
    autoencoder: str | None = None
    size: int = 256
    latents: str | None = None
    config: str | None = None
    channels: int | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise UserError(f"to: {self.to!r} is unknown; choose one of {', '.join(TARGETS)}")
        if self.precision is not None and self.precision not in DTYPES:
            raise UserError(f"precision: {self.precision!r} is unknown; choose one of {', '.join(DTYPES)}")
        others = ("size", "latents", "config", "channels", "prefix") if self.to in (PIPELINE, CHECKPOINT) else ()
        for name in (*others, *(["autoencoder"] if self.to != CHECKPOINT else [])):
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{name}: has no effect with to={self.to}; leave it out")


def convert(config: ConvertConfig, *, overwrite: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Write the converted model atomically. Returns: the content of conversion.json.

    Args:
        config: The model and the target.
        overwrite: Replace the result of an earlier conversion at `config.output`.
        dry_run: Open the model and check the target only; return {}.

    Raises:
        UserError: the model cannot be read, the target format cannot hold it, or the path holds something else.
    """
    precision: Any = config.precision or ("fp16" if config.to == CHECKPOINT else "fp32")
    begin("model convert", config.model, f"to {config.to}", precision, f"to {config.output}")
    if dry_run:
        check_target(Path(config.output), config.model, overwrite, is_file=config.to == "compvis")
        if has_pipeline(config.model):
            LatentDiffusionPipeline.from_pretrained(pipeline_directory(config.model), use_safetensors=True)
        else:
            open_autoencoder(config.model, config.config)
        end_dry_run(config.output, "it takes the time of reading and writing the weights, which was not measured")
        return {}
    if config.to == PIPELINE:
        record = export_standard(config.model, config.output, precision=precision, overwrite=overwrite)
        notes = record["notes"]
        what = f"{record['class']} of stock diffusers, {precision}; README.md there shows how to call it"
    elif config.to == CHECKPOINT:
        record, notes = pack(
            config.model, config.output, precision=precision, overwrite=overwrite, autoencoder=config.autoencoder
        )
        what = f"{precision}, autoencoder {record['fingerprint'][:19]}..."
    else:
        target: Any = config.to
        conversion = Conversion(
            config.model, config.output, target, precision, overwrite, config.size, config.config, config.channels,
            config.prefix,
        )  # fmt: skip
        record, notes = convert_autoencoder(conversion, _statistics(config.latents, config.model))
        source = record["source"]
        what = f"{source['class']}, {config.to}, {precision}, from {source['fingerprint'][:19]}..."
    for note in notes:
        say(f"note: {note}")
    end(config.output, what, _next_words(config))
    return record


def _next_words(config: ConvertConfig) -> list[str]:
    """The next command with a converted model; empty for a model for other programs."""
    if config.to == "compvis":
        return ["ldm-vae", "model", "convert", config.output, beside(config.output, "diffusers"), "to=diffusers"]
    return ["ldm-vae", "model", "card", config.output] if config.to in ("diffusers", CHECKPOINT) else []


def _statistics(latents: str | None, model: str) -> Callable[[str], dict[str, Any]] | None:
    """Encoder fingerprint -> statistics of the latents in a folder. They must be from that encoder."""
    if latents is None:
        return None

    def statistics_for(encoder_fingerprint: str) -> dict[str, Any]:
        manifest = read_manifest(latents)
        manifest.check_autoencoder(encoder_fingerprint, model)
        return manifest.statistics

    return statistics_for


# A directory that stock diffusers runs without this package: `AutoencoderKL` with the normalizer folded in,
# `UNet2DModel` in place of the transformer of `DiTPipeline` (the only stock loop with classes and guidance but no text;
# a
# U-Net has all that it needs), and `FlowMapEulerDiscreteScheduler`, which has the same times and steps. `LDMPipeline`
# would need `init_noise_sigma` of its scheduler, which no flow scheduler with unrounded times has. Models that these
# classes cannot express are refused.

NULL_CLASS = 1000
"""The label that `DiTPipeline` uses for "no label" under guidance in every model."""
ANY = "image"
"""The only label of an exported model without classes; it has no effect."""

CHECKED_TIMES = (0.05, 0.5, 0.95)
CHECK_TOLERANCE = 1e-4
"""Largest difference of velocities, whose size is about 1; the two networks run the same operations."""

README = """# {name}

Latent diffusion for stock [diffusers](https://github.com/huggingface/diffusers), 0.39 or newer. Images are
{height}x{width}. {classes}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("DIRECTORY")
labels = pipeline.get_label_ids([{label!r}] * 4)
images = pipeline(labels, guidance_scale={guidance:g}, num_inference_steps=30).images
```

When loading, diffusers notes that the part called `transformer` is a U-Net, which is correct. The scheduler takes Euler
steps; for fewer steps of second order:

```python
from diffusers import DPMSolverMultistepScheduler

pipeline.scheduler = DPMSolverMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift={shift!r}
)
```
"""


def export_standard(
    source: str, target: str | Path, *, precision: Precision = "fp32", overwrite: bool = False
) -> dict[str, Any]:
    """Write the stock directory, with README.md and conversion.json, atomically.

    Args:
        source: a pipeline directory, or the run directory of `train-diffusion`.
        target: a new directory.
        precision: of the written weights.
        overwrite: replace the result of an earlier conversion at `target`.

    Returns:
        The content of conversion.json.

    Raises:
        UserError: stock diffusers has no such network or autoencoder; the message says what to train instead.
    """
    target = Path(target)
    check_target(target, source, overwrite)
    pipeline = LatentDiffusionPipeline.from_pretrained(pipeline_directory(source), use_safetensors=True)
    standard = standard_pipeline(pipeline)
    for network in standard.components.values():
        if isinstance(network, nn.Module):
            nn.Module.to(network, dtype=DTYPES[precision])
    record: dict[str, Any] = {
        "format_version": 1,
        "source": {
            "name": source,
            "class": type(pipeline).__name__,
            "fingerprint": pipeline.autoencoder.fingerprint(),
        },
        "to": "diffusers-pipeline",
        "class": type(standard).__name__,
        "precision": precision,
        "normalizer": pipeline.normalizer.to_dict(),
        "notes": ["the statistics of the latents are folded into the autoencoder; its scaling_factor is 1"],
    }
    with published_directory(target) as folder:
        standard.save_pretrained(folder, safe_serialization=True)
        write_text(folder / "README.md", readme(pipeline, target.name))
        write_json(folder / RECORD, record | {"versions": provenance.versions()})
    return record


def standard_pipeline(pipeline: LatentDiffusionPipeline) -> DiTPipeline:
    """The stock pipeline (float32) that makes the same images as `pipeline` at its training size, from the same noise.

    Raises:
        UserError: see `export_standard`.
    """
    if type(pipeline.autoencoder).__name__ != AutoencoderKL.__name__:
        raise UserError(
            "autoencoder: this one is not of a class of stock diffusers that takes "
            "the normalizer in; train on latents of one with autoencoder.architecture=sd"
        )
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        raise UserError(
            f"diffusers {diffusers.__version__} has no FlowMapEulerDiscreteScheduler; install 0.39 or newer"
        )
    unet = standard_unet(pipeline.unet, tuple(pipeline.config["latent_size"]))
    autoencoder = fold_normalizer(pipeline.autoencoder, pipeline.normalizer.mean, pipeline.normalizer.std)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(int(TIME_SCALE), scheduler_shift(pipeline.scheduler))
    names = {str(number): name for number, name in enumerate(pipeline.labels or [ANY])}
    standard = DiTPipeline(unet, autoencoder, scheduler, names)  # type: ignore[arg-type]
    standard.register_to_config(id2label=names)
    return standard


@torch.no_grad()
def standard_unet(unet: LatentUNet, latent_size: tuple[int, int]) -> UNet2DModel:
    """The network as a stock one that predicts the velocity, compared with the original before it is returned.

    It has the classes that `DiTPipeline` needs, all after the last label being "no label"; without labels they are 0.

    Raises:
        UserError: a `UNet2DModel` cannot express it, or the stock pipeline cannot run it.
    """
    check_expressible(unet, latent_size)
    classes, state = int(unet.config["num_classes"]), dict(unet.network.state_dict())
    config = {key: value for key, value in unet.network.config.items() if not key.startswith("_")}
    standard = UNet2DModel(**config | {"sample_size": latent_size[0], "num_class_embeds": NULL_CLASS + 1})
    rows = state.get("class_embedding.weight", torch.zeros(1, standard.class_embedding.embedding_dim))
    null = rows[unet.null_label].expand(NULL_CLASS + 1 - classes, -1)
    state["class_embedding.weight"] = torch.cat([rows[:classes], null])
    standard.load_state_dict(state, strict=True)
    standard.eval().requires_grad_(False)
    check_equal(unet.eval(), standard, latent_size)
    return standard


def check_expressible(unet: LatentUNet, latent_size: tuple[int, int]) -> None:
    """Raises: UserError if the stock classes do not support the U-Net or the size of its latents."""
    config, network = unet.config, unet.network
    instead = "train with unet.patch=1 and unet.prediction=velocity, or use it with `ldm-vae generate`"
    if config["patch"] != 1 or config["prediction"] != "velocity":
        raise UserError(
            f"unet.patch={config['patch']} and unet.prediction={config['prediction']} surround the network with "
            f"operations that stock diffusers has no U-Net for; {instead}"
        )
    if not config["latent_channels"] == network.config["in_channels"] == network.config["out_channels"]:
        raise UserError(
            f"unet: takes {network.config['in_channels']} channels for latents of {config['latent_channels']}, and "
            "the stock pipeline gives the latents alone; train without coordinates"
        )
    if latent_size[0] != latent_size[1] or latent_size[0] % unet.multiple:
        raise UserError(
            f"latents: {latent_size[0]}x{latent_size[1]} is not a square with sides divisible by {unet.multiple}, "
            "which the stock pipeline and this U-Net need; train at another size"
        )
    if config["num_classes"] > NULL_CLASS:
        raise UserError(
            f"labels: {config['num_classes']} are more than the {NULL_CLASS} of DiTPipeline; "
            "use the model with `ldm-vae generate`"
        )


def check_equal(unet: LatentUNet, standard: UNet2DModel, latent_size: tuple[int, int]) -> None:
    """Raises: UserError unless both networks give the same velocities for noise, also with the null label."""
    generator = random.generator(0, "standard export")
    noise = torch.randn(1, int(unet.config["latent_channels"]), *latent_size, generator=generator)
    for time in CHECKED_TIMES:
        for label in (0, NULL_CLASS):
            ids = torch.tensor([min(label, unet.null_label)]) if unet.null_label else None
            ours = unet(noise, torch.tensor(time), ids)
            theirs = standard(noise, torch.tensor(time * TIME_SCALE), torch.tensor([label])).sample
            error = float((ours - theirs).abs().max())
            if not error <= CHECK_TOLERANCE * max(1.0, float(ours.abs().max())):
                raise UserError(
                    f"unet: the stock network differs from it by {error:.2g} at t = {time}, so it does something that "
                    "a UNet2DModel does not; use the model with `ldm-vae generate`"
                )


def readme(pipeline: LatentDiffusionPipeline, name: str) -> str:
    """README.md of the exported directory."""
    height, width = (side * pipeline.autoencoder.downsampling for side in pipeline.config["latent_size"])
    names = pipeline.labels
    shown = (
        f"Classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}." if names else "There are no classes."
    )
    return README.format(
        name=name,
        height=height,
        width=width,
        classes=shown,
        label=(names or [ANY])[0].split(",")[0].strip(),  # DiTPipeline takes a comma as "or"
        guidance=DEFAULT_GUIDANCE if names else 1.0,
        shift=scheduler_shift(pipeline.scheduler),
    )


# A finished run as a directory to share: rounded weights in small files, the records of its training, checksums.

SHARD_SIZE = "15MB"
LARGEST_FILE_BYTES = 16 << 20
"""Largest file that repository hosts accept without further tools."""
RECORDS = (provenance.RUN_RECORD, "config.yaml")
METRICS = "metrics.jsonl"
METRIC_LINES = 300


def pack(
    source: str,
    target: str | Path,
    *,
    precision: Precision = "fp16",
    overwrite: bool = False,
    autoencoder: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Write the directory atomically. Returns: the content of conversion.json, and notes as sentences.

    Args:
        source: a run of `train-vae` or `train-diffusion`, or the directory of an autoencoder or of a pipeline.
        target: a new directory, or an earlier conversion with `overwrite`.
        precision: of the written weights.
        autoencoder: replaces that of a pipeline; it has the same encoder and a decoder that was trained further.

    Raises:
        UserError: no model in the source, a weight that the precision cannot hold, or a target with other content.
    """
    target = Path(target)
    check_target(target, source, overwrite)
    with published_directory(target) as folder:
        if has_pipeline(source):
            fingerprints = _write_pipeline(source, folder, precision, autoencoder)
        elif autoencoder is not None:
            raise UserError(f"{source}: is an autoencoder, not a pipeline that could take another one; leave it out")
        else:
            fingerprints = _write_autoencoder(source, folder, precision)
        _check_sizes(folder)
        record: dict[str, Any] = {
            "format_version": 1,
            "source": {"name": without_folders(source), **fingerprints["source"]},
            "to": "checkpoint",
            "precision": precision,
            **fingerprints["copy"],
        }
        write_json(folder / RECORD, record | {"versions": provenance.versions()})
        write_checksums(folder)
    return record, _notes(record)


def _write_autoencoder(source: str, folder: Path, precision: Precision) -> dict[str, dict[str, str]]:
    model = load_autoencoder(source)
    before = _identities(model)
    nn.Module.to(model, DTYPES[precision])
    check_finite(model.state_dict(), f"{source} in {precision}")
    after = _identities(model)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD_SIZE)
    directory = model_directory(Path(source))
    if directory is not None:
        _copy_records(directory, folder)
        if (directory / TRAINING).is_file():
            record = without_folders(json.loads((directory / TRAINING).read_text())) | after
            if after != before:
                record["rounded_from"] = {"precision": precision, **before}
            write_json(folder / TRAINING, record)
    return {"source": before, "copy": after}


def _write_pipeline(
    source: str, folder: Path, precision: Precision, autoencoder: str | None
) -> dict[str, dict[str, str]]:
    directory = pipeline_directory(source)
    replaced = {} if autoencoder is None else {"autoencoder": load_autoencoder(autoencoder)}
    pipeline = LatentDiffusionPipeline.from_pretrained(directory, use_safetensors=True, **replaced)
    before = _identities(pipeline.autoencoder)
    for name, network in pipeline.components.items():
        if isinstance(network, nn.Module):
            nn.Module.to(network, DTYPES[precision])
            check_finite(network.state_dict(), f"{source}, {name} in {precision}")
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD_SIZE)
    _copy_records(directory, folder)
    if autoencoder is None:  # for a copy, those in the copy
        made_by = lineage.read_runs(directory / lineage.OF_AUTOENCODER)
    else:
        made_by = lineage.runs_of(Path(autoencoder), before["fingerprint"])
    _write_runs(folder / lineage.OF_AUTOENCODER, made_by)
    return {"source": before, "copy": _identities(pipeline.autoencoder)}


def _identities(model: Any) -> dict[str, str]:
    return {"fingerprint": model.fingerprint(), "encoder_fingerprint": model.encoder_fingerprint()}


def _copy_records(directory: Path, folder: Path) -> None:
    """Records of the run with the model `directory`: its command and settings, and its curves at some hundred steps."""
    folders = [directory, directory.parent] if directory.name in ("autoencoder", "pipeline") else [directory]
    place = next((one for one in folders if (one / provenance.RUN_RECORD).is_file()), None)
    if place is None:
        return
    for name in RECORDS:
        if (place / name).is_file():
            write_text(folder / name, _without_folders(place / name))
    _write_runs(folder / lineage.FILE, lineage.earlier_runs(place))
    if (place / METRICS).is_file():
        lines = (place / METRICS).read_text().splitlines()
        rare = {number for number, line in enumerate(lines) if '"held_out/' in line or '"alarm"' in line}
        kept = rare.union(subsample([number for number in range(len(lines)) if number not in rare], METRIC_LINES))
        shortened = [json.dumps(without_folders(json.loads(lines[number]))) + "\n" for number in sorted(kept)]
        write_text(folder / METRICS, "".join(shortened))


def _without_folders(path: Path) -> str:
    """The text of a JSON or YAML file of a run."""
    if path.suffix == ".json":
        return readable_json(without_folders(json.loads(path.read_text())))
    settings = OmegaConf.to_container(OmegaConf.load(path))
    return OmegaConf.to_yaml(OmegaConf.create(without_folders(settings)))


def _write_runs(path: Path, runs: list[dict[str, Any]]) -> None:
    if runs:
        write_text(path, lineage.runs_text(without_folders(runs)))


def _check_sizes(folder: Path) -> None:
    """Raises: UserError: one tensor alone is larger than a file may be."""
    for path in folder.rglob("*.safetensors"):
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise UserError(
                f"{path.name}: one tensor of {path.stat().st_size >> 20} MiB cannot be divided into files of at most "
                f"{LARGEST_FILE_BYTES >> 20} MiB; share a smaller model"
            )


def _notes(record: dict[str, Any]) -> list[str]:
    if record["fingerprint"] == record["source"]["fingerprint"]:
        return []
    return [
        f"rounding to {record['precision']} changed the weights, so this is another autoencoder: measure this copy, "
        "and encode images for it with it; a pipeline still accepts latents of its original"
    ]
