"""`convert_autoencoder`: from any source to one of four targets, written completely or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers

from ldm_vae import provenance
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.interop.compvis import (
    METADATA,
    Opened,
    architecture_of,
    fold_normalizer,
    open_autoencoder,
    settings_of,
    tensors_from_model,
)
from ldm_vae.autoencoder.lineage import RECORD as TRAINING
from ldm_vae.autoencoder.weights import describe_architecture
from ldm_vae.errors import UserError
from ldm_vae.files import published_directory, write_atomically, write_json, write_text

Target = Literal["diffusers", "compvis", "onnx", "torchscript"]
Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORD = "conversion.json"


@dataclass(frozen=True)
class Conversion:
    """What to convert, and how.

    Args:
        source: a diffusers directory, a run of `train-vae`, a hub id, a .ckpt or .safetensors file (CompVis layout).
        target: a new directory; for `compvis` a file that ends in .safetensors.
        to: diffusers, compvis, onnx or torchscript.
        precision: of the written weights.
        overwrite: replace what an earlier conversion wrote at `target`.
        size: example side in pixels, for onnx and torchscript.
        config: the LDM configuration of a checkpoint file (scale_factor, resolution).
        channels: keep only the first latent channels, as many as this; for autoencoders trained with nested channels.
        prefix: text before every tensor name of a compvis file; whole models use `first_stage_model.`.
    """

    source: str
    target: str
    to: Target
    precision: Precision = "fp32"
    overwrite: bool = False
    size: int = 256
    config: str | None = None
    channels: int | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.to not in get_args(Target) or self.precision not in get_args(Precision):
            raise UserError(f"convert: {self.to}, {self.precision} is not a known target and precision")
        if self.prefix and self.to != "compvis":
            raise UserError("prefix: has an effect with to=compvis only; leave it out")
        if self.prefix and not self.prefix.endswith("."):
            raise UserError(f"prefix: {self.prefix!r} does not end with a dot; use {self.prefix + '.'!r}")
        if self.to == "compvis" and not self.target.endswith(".safetensors"):
            raise UserError(
                f"{self.target}: a compvis checkpoint is written as safetensors, never as a pickle; "
                "give a name that ends in .safetensors"
            )


def convert_autoencoder(
    conversion: Conversion, statistics_for: Callable[[str], dict[str, Any]] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Convert. Returns: the record that is written beside the weights, and notes as sentences.

    Args:
        statistics_for: encoder fingerprint -> `mean` and `std` of its latents per channel. onnx and torchscript record
            them, diffusers folds them in (`fold_normalizer`).

    Raises:
        UserError: the source cannot be read, the target format cannot hold it, or the target path is in use.
    """
    target = Path(conversion.target)
    check_target(target, conversion.source, conversion.overwrite, is_file=conversion.to == "compvis")
    opened = open_autoencoder(conversion.source, conversion.config)
    if conversion.channels is not None:
        note = f"the first {conversion.channels} latent channels of the source, which have another fingerprint"
        opened = Opened(opened.model.narrow(conversion.channels), [*opened.notes, note])
    identity = opened.model.fingerprint()
    statistics = statistics_for(opened.model.encoder_fingerprint()) if statistics_for else None
    if statistics is not None and conversion.to == "compvis":
        raise UserError("latents: has no effect with to=compvis; use to=diffusers, to=onnx or to=torchscript")
    if statistics is not None and conversion.to == "diffusers":
        note = "the statistics of the latents are folded in: its latents have mean 0 and std 1, scaling_factor is 1"
        opened = Opened(fold_normalizer(opened.model, statistics["mean"], statistics["std"]), [*opened.notes, note])
    record: dict[str, Any] = {
        "format_version": 1,
        "source": {"name": conversion.source, "class": type(opened.model).__name__, "fingerprint": identity},
        "to": conversion.to,
        "precision": conversion.precision,
        "notes": [*opened.notes],
    }
    if conversion.to == "compvis":
        _write_compvis(opened.model, target, conversion, record)
    else:
        with published_directory(target) as folder:
            if conversion.to == "diffusers":
                _write_diffusers(opened, folder, conversion, record)
            else:
                export_runtime(
                    opened.model,
                    folder,
                    conversion.to,
                    precision=conversion.precision,
                    size=conversion.size,
                    statistics=statistics,
                )
            write_json(folder / RECORD, record | {"versions": provenance.versions()})
    return record, record["notes"]


def check_target(target: Path, source: str, overwrite: bool, is_file: bool = False) -> None:
    """Raises: UserError if `target` exists and is not a conversion, or must not be replaced.

    `is_file`: the target is a file with a YAML of the same name, not a directory.
    """
    settings = target.with_suffix(".yaml")
    if is_file and settings.exists() and not overwrite:
        raise UserError(f"{settings}: exists and would be replaced; give another target, or --overwrite")
    if not target.exists():
        return
    if target.resolve() == Path(source).resolve():
        raise UserError(f"{target}: is the source as well; give another target")
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if is_file or not (target / RECORD).is_file():
            raise UserError(
                f"{target}: holds something that `ldm-vae model convert` did not write; give another target"
            )
    elif not is_file:
        raise UserError(f"{target}: is a file; give a new directory")
    if not overwrite:
        raise UserError(f"{target}: exists; give another target, or --overwrite")


def _write_diffusers(opened: Opened, folder: Path, conversion: Conversion, record: dict[str, Any]) -> None:
    model = torch.nn.Module.to(opened.model, DTYPES[conversion.precision])  # that of diffusers warns
    model.save_pretrained(folder, safe_serialization=True)
    record["fingerprint"] = model.fingerprint()
    name = type(model).__name__
    if not hasattr(diffusers, name):
        record["notes"].append(
            f"{name} is a class of this package: load the directory with ldm_vae.autoencoder.models.load_autoencoder; "
            "stock diffusers cannot load it (use to=onnx or to=torchscript where ldm_vae is not installed)"
        )
    if record["fingerprint"] != record["source"]["fingerprint"]:
        cause = "folding" if conversion.precision == "fp32" else f"rounding to {conversion.precision}"
        record["notes"].append(
            f"{cause} changed the weights and so the fingerprint; latents and "
            "diffusion models of the original will refuse this copy"
        )
    elif opened.directory is not None and (opened.directory / TRAINING).is_file():
        shutil.copyfile(opened.directory / TRAINING, folder / TRAINING)


def _write_compvis(model: Any, target: Path, conversion: Conversion, record: dict[str, Any]) -> None:
    """NAME.safetensors, and NAME.yaml with the settings in LDM's form."""
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    tensors = tensors_from_model(model, conversion.prefix)
    tensors = {name: tensor.to(DTYPES[conversion.precision]) for name, tensor in tensors.items()}
    settings = settings_of(model)
    stated = {"scaling_factor": settings.scaling_factor, **settings.normalization()}
    metadata = {"format": "pt", "fingerprint": record["source"]["fingerprint"], "precision": conversion.precision}
    metadata[METADATA] = json.dumps(stated)
    write_atomically(target, lambda path: save_file(tensors, path, metadata=metadata))
    target.chmod(target.parent.stat().st_mode & 0o666)
    architecture = architecture_of(model)
    if not (architecture.quant_conv and architecture.post_quant_conv):
        listed = ", ".join(f"{name} {value}" for name, value in stated.items())
        record["notes"].append(
            f"no YAML was written: LDM's classes always have quant_conv, this model has none; its {listed}"
        )
        return
    values = architecture.compvis_config(settings)
    write_text(target.with_suffix(".yaml"), OmegaConf.to_yaml(OmegaConf.create(values)))


# Export for programs without this package: encoder and decoder as ONNX or TorchScript, and config.json.

Format = Literal["onnx", "torchscript"]
OPSET = 18
"""The operator set of the ONNX files: that of torch's exporter, supported by onnxruntime 1.14 and newer."""

SUFFIX = {"onnx": "onnx", "torchscript": "pt"}
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}
"""Largest accepted error relative to the largest value of an output; a wrong graph has a far larger error."""

INSTALL = 'pip install "ldm_vae[export]"'
Graph = Callable[[Tensor], tuple[Tensor, ...]]


class EncoderGraph(nn.Module):
    """Images (n, 3, h, w) in [-1, 1] -> mean and log-variance, each (n, c, h/f, w/f); float32 in and out."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.autoencoder.encode(images.to(self.autoencoder.dtype), return_dict=False)[0]
        return posterior.mean.float(), posterior.logvar.float()


class DecoderGraph(nn.Module):
    """Latents (n, c, h, w), not normalized -> images (n, 3, f h, f w), about [-1, 1], not clamped; float32."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (self.autoencoder.decode(latents.to(self.autoencoder.dtype), return_dict=False)[0].float(),)


def export_runtime(
    autoencoder: Autoencoder,
    directory: Path,
    format: Format,
    *,
    precision: str = "fp32",
    size: int = 256,
    statistics: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write encoder, decoder and config.json into an existing folder; return the content of config.json.

    Args:
        autoencoder: a loaded model (float32) with a latent distribution.
        precision: fp32, fp16 or bf16: the weights and the arithmetic inside.
        size: side in pixels of the example for making and checking the graphs; other sizes work as well.
        statistics: `mean` and `std` per latent channel, if known.

    Raises:
        UserError: missing packages, an unsuitable size, or a model without a latent distribution.
    """
    factor = autoencoder.downsampling
    _check_exportable(autoencoder)
    if size < 2 * factor or size % factor:
        what = f"{size} is not a multiple of {factor} from {2 * factor} on"
        raise UserError("resolution", what, f"use {max(2, size // factor) * factor}")
    if format == "onnx":
        _require_onnx(precision)
    identity = {"fingerprint": autoencoder.fingerprint(), "encoder_fingerprint": autoencoder.encoder_fingerprint()}
    autoencoder = autoencoder.to(memory_format=torch.contiguous_format)
    model = nn.Module.to(autoencoder, DTYPES[precision])  # that of diffusers gives needless warnings
    graphs: dict[str, nn.Module] = {"encoder": EncoderGraph(model).eval(), "decoder": DecoderGraph(model).eval()}
    sides = [(size, size), (size + factor, 2 * factor)]
    images = [_example(n, 3, *side) for n, side in zip((2, 1), sides)]
    inputs = {"encoder": images, "decoder": [_moments(graphs["encoder"], image)[0] for image in images]}
    record = _description(autoencoder, identity, format, precision, statistics)
    for half, graph in graphs.items():
        path = directory / record["files"][half]
        (_write_onnx if format == "onnx" else _write_torchscript)(graph, inputs[half][0], path, half, factor)
        run = (_onnx_graph if format == "onnx" else _torchscript_graph)(path)
        record[half]["largest_error"] = _check(half, graph, run, inputs[half], precision)
    write_json(directory / "config.json", record)
    return record


def _check_exportable(autoencoder: Autoencoder) -> None:
    """Raises: UserError for a learned codebook: its search works in parts, whose number a graph would fix."""
    if autoencoder.has_codes and autoencoder.kind == "vq":
        raise UserError(
            "AutoencoderQuantized: the codebook search of kind=vq depends on the image's size, which an exported graph "
            "cannot hold; kinds kl, ae and fsq can be exported, this one goes to to=diffusers"
        )


def _example(count: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.rand((count, channels, height, width), generator=generator) * 2 - 1


@torch.no_grad()
def _moments(graph: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return graph(images)
    except AttributeError as error:  # VQModel gives latents, other classes other outputs
        name = type(graph.autoencoder).__name__
        raise UserError(
            f"{name}: encodes to no latent distribution, so it has no mean and logvar to export; "
            "only KL autoencoders can be exported to onnx and torchscript"
        ) from error


def _description(
    autoencoder: Autoencoder,
    identity: dict[str, str],
    format: Format,
    precision: str,
    statistics: dict[str, Any] | None,
) -> dict[str, Any]:
    factor, channels = autoencoder.downsampling, autoencoder.latent_channels
    image = {"dtype": "float32", "shape": ["n", 3, f"{factor}h", f"{factor}w"]}
    latent = {"dtype": "float32", "shape": ["n", channels, "h", "w"]}
    return {
        "format_version": 1,
        "format": format,
        **({"opset": OPSET} if format == "onnx" else {}),
        "files": {half: f"{half}.{SUFFIX[format]}" for half in ("encoder", "decoder")},
        "precision": precision,
        "autoencoder": {**identity, **describe_architecture(autoencoder)},
        "downsampling": factor,
        "latent_channels": channels,
        "encoder": {
            "inputs": {"images": image | {"range": [-1, 1]}},
            "outputs": {
                "mean": latent | {"meaning": "posterior mean"},
                "logvar": latent | {"meaning": "natural logarithm of the posterior variance"},
            },
        },
        "decoder": {
            "inputs": {"latents": latent | {"meaning": "as the encoder gives them, not normalized"}},
            "outputs": {"images": image | {"range": "about [-1, 1]; clamp before use"}},
        },
        "latent_statistics": statistics,
        "versions": provenance.versions(),
    }


def _require_onnx(precision: str) -> None:
    if precision == "bf16":
        raise UserError("precision: onnxruntime computes bf16 on few devices; use fp32 or fp16, or to=torchscript")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"to=onnx: the package {package} is not installed; run {INSTALL}") from error


def _write_onnx(graph: nn.Module, example: Tensor, path: Path, half: str, factor: int) -> None:
    """Through torch.export with symbolic batch, height and width; one file, weights inside (below 2 GB)."""
    height, width = (torch.export.Dim(name, min=1, max=4096) for name in ("h", "w"))
    if half == "encoder":
        sides = {2: factor * height, 3: factor * width} if factor > 1 else {2: height, 3: width}
    else:
        sides = {2: height, 3: width}
    outputs = ["mean", "logvar"] if half == "encoder" else ["images"]
    name = "images" if half == "encoder" else "latents"
    with _quiet():
        try:
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes={name: {0: torch.export.Dim("n", min=1, max=4096), **sides}},
                input_names=[name],
                output_names=outputs,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            model = type(graph.autoencoder).__name__
            raise UserError(
                f"{model}: torch cannot export its {half} to ONNX ({type(error).__name__}); try to=torchscript"
            ) from error
        assert program is not None
        for node in program.model.graph.all_nodes():  # their names hold source paths of this machine
            node.metadata_props.clear()
        program.save(path)


def _write_torchscript(graph: nn.Module, example: Tensor, path: Path, half: str, factor: int) -> None:
    """A frozen trace with constant weights. Shapes come from the input, as the check at another size shows."""
    with _quiet(), torch.no_grad():
        traced = path.with_suffix(".traced")
        torch.jit.freeze(torch.jit.trace(graph, (example,), check_trace=False)).save(str(traced))
    # without the source locations of the operations, which hold paths of this machine
    with zipfile.ZipFile(traced) as archive, zipfile.ZipFile(path, "w") as kept:
        for member in archive.infolist():
            if not member.filename.endswith(".debug_pkl"):
                kept.writestr(zipfile.ZipInfo(member.filename), archive.read(member))
    traced.unlink()


def _onnx_graph(path: Path) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: tuple(torch.from_numpy(output) for output in session.run(None, {name: values.numpy()}))


def _torchscript_graph(path: Path) -> Graph:
    return torch.no_grad()(torch.jit.load(str(path)))


def _check(half: str, graph: nn.Module, run: Graph, inputs: list[Tensor], precision: str) -> dict[str, float]:
    """Largest absolute difference between file and model per example shape. Raises: UserError if it is too large."""
    errors: dict[str, float] = {}
    for values in inputs:
        with torch.no_grad():
            expected = graph(values)
        for ours, theirs in zip(expected, run(values), strict=True):
            error = float((ours - theirs).abs().max())
            scale = max(1.0, float(ours.abs().max()))
            if ours.shape != theirs.shape or not error <= TOLERANCE[precision] * scale:
                raise UserError(
                    f"{half}: the exported graph differs by {error:.3g} from the model at {tuple(values.shape)}; "
                    "nothing was written; try the other format (onnx, torchscript) or fp32"
                )
            key = "x".join(map(str, values.shape))
            errors[key] = max(errors.get(key, 0.0), error)
    return errors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which report every pass and every Python comparison."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
