"""Autoencoders in the CompVis checkpoint layout, to diffusers models and back. Tensors keep their bits.

Covers the published latent-diffusion autoencoders (arXiv:2112.10752): kl-f4, kl-f8, kl-f16, kl-f32, vq-f4, vq-f8,
vq-f16, the Stable Diffusion and SDXL ones, and files of the same layout without the 1x1 convolutions around the latent.

`Architecture` says which tensors exist. From it follow the names of every tensor in the CompVis layout
(`encoder.down.0.block.0.conv1`, github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py) and in that
of diffusers (`encoder.down_blocks.0.resnets.0.conv1`), and the settings of both.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae import runtime
from ldm_vae.errors import UserError

runtime.repair_torchvision()

from diffusers import AutoencoderKL

from ldm_vae import config as configuration
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.deterministic import VQModel
from ldm_vae.autoencoder.models import adapted, load_autoencoder, model_directory
from ldm_vae.autoencoder.weights import check_finite
from ldm_vae.files import check_tensor_file, count_numbers

UNKNOWN_SAMPLE_SIZE = 256
"""Pixels; diffusers uses it for tiling only."""


NORMALIZATION = ("shift_factor", "latents_mean", "latents_std")
METADATA = "latents"
"""Key of the same numbers in the safetensors files that are written here, which have a YAML beside them or not."""


@dataclass(frozen=True)
class CompVisSettings:
    """Settings in an LDM configuration that a checkpoint file does not hold.

    scaling_factor: `model.params.scale_factor`, 1.0 if the configuration has none.
    resolution: `ddconfig.resolution` in pixels.
    shift_factor, latents_mean, latents_std: as in diffusers; the input of a diffusion model is
        (latents - shift_factor) * scaling_factor.
    """

    scaling_factor: float | None = None
    resolution: int | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def normalization(self) -> dict[str, Any]:
        """The known settings other than the scale, under diffusers' names."""
        known = {name: getattr(self, name) for name in NORMALIZATION}
        return {name: value for name, value in known.items() if value is not None}


def load_compvis(path: str | Path, config: str | Path | None = None) -> tuple[Autoencoder, list[str]]:
    """A checkpoint file -> a diffusers `AutoencoderKL` or `VQModel` (float32, eval, frozen) and notes as sentences.

    Args:
        path: a .ckpt or .safetensors file, of the autoencoder alone or of a whole model.
        config: the YAML of the original repository; its scale_factor, shift_factor, latents_mean, latents_std and
            resolution are taken. Without it, those in a file written by this package.

    Raises:
        UserError: the file is unsafe or damaged, or the model cannot be expressed in diffusers.
    """
    foreign = read_foreign(Path(path))
    settings = read_settings(Path(config)) if config else stated_settings(Path(path))
    try:
        model = model_from_tensors(foreign.tensors, settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    notes = []
    if foreign.prefix:
        notes.append(f"tensors were found under {foreign.prefix!r}")
    if foreign.dropped:
        listed = ", ".join(f"{name}.* ({count})" for name, count in sorted(foreign.dropped.items()))
        notes.append(f"left out, not part of the autoencoder: {listed}")
    if settings.scaling_factor is None:
        notes.append(
            "scaling_factor is 1.0: the file does not state one (give config=FILE for that of its repository); "
            "ldm_vae measures the statistics of the latents instead"
        )
    return model, notes


def model_from_tensors(tensors: dict[str, Tensor], settings: CompVisSettings | None = None) -> Autoencoder:
    """CompVis tensors (names without prefix) -> a diffusers model in float32. Raises: UserError."""
    settings = settings or CompVisSettings()
    architecture = from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    config = architecture.diffusers_config(
        settings.resolution or UNKNOWN_SAMPLE_SIZE, 1.0 if settings.scaling_factor is None else settings.scaling_factor
    )
    names = architecture.tensor_names()
    missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    if missing or unknown:
        raise UserError(
            f"the tensors do not fit a CompVis autoencoder of widths {architecture.widths}: "
            f"missing {_some(missing)}, unknown {_some(unknown)}"
        )
    model_class: Any = VQModel if architecture.is_quantized else AutoencoderKL
    config |= _checked_normalization(settings, architecture)
    asked, held = count_numbers(lambda: model_class(**config)), sum(tensor.numel() for tensor in tensors.values())
    if asked > 2 * held:  # before memory is taken; smaller differences are named below
        raise UserError(f"the tensors hold {held} numbers, the architecture that they describe has {asked}")
    model = model_class(**config)
    state = {
        theirs: (tensors[ours].flatten(1) if is_projection(ours) else tensors[ours]).to(torch.float32)
        for ours, theirs in names.items()
    }
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        shapes = " ".join(str(error).split())
        raise UserError(f"shapes do not fit the architecture that the others describe: {shapes[:300]}") from error
    check_finite(state, "the model")
    return adapted(model.eval().requires_grad_(False))


def _checked_normalization(settings: CompVisSettings, architecture: Architecture) -> dict[str, Any]:
    """Raises: UserError for settings that the diffusers class does not have."""
    known = settings.normalization()
    if known and architecture.is_quantized:
        raise UserError(f"config: {next(iter(known))} has no place in diffusers' VQModel; remove it there")
    for name in ("latents_mean", "latents_std"):
        if name in known and len(known[name]) != architecture.z_channels:
            raise UserError(
                f"config: {name} has {len(known[name])} numbers for {architecture.z_channels} latent channels; "
                "give the configuration of this model"
            )
    return known


def settings_of(model: Any) -> CompVisSettings:
    """The settings of a diffusers model to write beside its tensors."""
    config = model.config
    size = config.sample_size if isinstance(config.sample_size, int) else UNKNOWN_SAMPLE_SIZE
    return _settings(dict(config), size, "the model")


def stated_settings(path: Path) -> CompVisSettings:
    """The settings in a safetensors file written by this package; empty for others."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return CompVisSettings()
    check_tensor_file(path)
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        return _settings(dict(values), None, str(path))
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is not a readable safetensors file ({error}); fetch it again") from error


def _settings(values: Mapping[str, Any], resolution: Any, where: str) -> CompVisSettings:
    """From values under diffusers' names, or LDM's `scale_factor`. Raises: UserError unless they are numbers."""
    numbers: dict[str, Any] = {"scaling_factor": values.get("scale_factor", values.get("scaling_factor"))}
    numbers |= {name: values.get(name) for name in NORMALIZATION} | {"resolution": resolution}
    found: dict[str, Any] = {}
    for name, value in numbers.items():
        try:
            if isinstance(value, bool):
                raise TypeError
            if value is not None and name.startswith("latents_"):
                found[name] = tuple(float(one) for one in value)
            elif value is not None:
                found[name] = int(value) if name == "resolution" else float(value)
        except (TypeError, ValueError) as error:
            called = "scale_factor" if name == "scaling_factor" else name
            raise UserError(f"{where}: {called} {value!r} is not a number; correct it") from error
    return CompVisSettings(**found)


def tensors_from_model(model: Any, prefix: str = "") -> dict[str, Tensor]:
    """A diffusers `AutoencoderKL` or `VQModel` -> CompVis tensors, contiguous, attention as 1x1 convolutions.

    Raises:
        UserError: the layout cannot hold this model.
    """
    names = architecture_of(model).tensor_names()
    state = model.state_dict()
    assert state.keys() == set(names.values()), sorted(state.keys() ^ set(names.values()))
    return {
        prefix + ours: (state[theirs][:, :, None, None] if is_projection(ours) else state[theirs]).detach().contiguous()
        for ours, theirs in names.items()
    }


def architecture_of(model: Any) -> Architecture:
    """Raises: UserError if the CompVis layout cannot hold the model."""
    return from_diffusers(type(model).__name__, model.config)


def read_settings(path: Path) -> CompVisSettings:
    """The settings in an LDM configuration file, or in the config.json of a diffusers model. Raises: UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the YAML configuration of the original repository")
    values = configuration.read_yaml(path)
    if "_class_name" in values:
        return _settings(values, values.get("sample_size"), str(path))
    parameters = _mapping(_mapping(values, "model"), "params")
    if not parameters:
        raise UserError(f"{path}: has no model.params, so it is not an LDM configuration; leave config out")
    stage = _mapping(_mapping(parameters, "first_stage_config"), "params") or parameters
    details = _mapping(stage, "ddconfig")
    stated: dict[str, Any] = {}
    for place in (details, stage, values, parameters):  # the outermost entry of the model is taken
        stated |= {name: place[name] for name in ("scale_factor", "scaling_factor", *NORMALIZATION) if name in place}
    return _settings(stated, details.get("resolution"), str(path))


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _some(names: list[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"


# Foreign checkpoint files: `.ckpt` and `.safetensors` become a plain dictionary of the autoencoder's tensors.

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
LANDMARK = "encoder.conv_in.weight"
TRAINING_ONLY = ("loss.", "model_ema.")
"""Keys beside the autoencoder in CompVis training checkpoints: the perceptual loss, discriminator, running averages."""


@dataclass(frozen=True)
class ForeignState:
    """The autoencoder's tensors without prefix, the prefix they had, and what else the file held (word -> count)."""

    tensors: dict[str, Tensor]
    prefix: str
    dropped: dict[str, int]


def read_foreign(path: Path) -> ForeignState:
    """Read a checkpoint file and keep what belongs to the autoencoder, on the CPU, in the file's own precision.

    Raises:
        UserError: no such file, damaged, a pickle that holds more than tensors, or no CompVis autoencoder in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .ckpt or .safetensors file in the CompVis layout")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if any(
        name.endswith(("encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.stages.0.resample.weight"))
        for name in state
    ):
        raise UserError(
            f"{path}: has the tensor names of a diffusers model; give its directory, whose config.json says what it is"
        )
    prefix = _prefix(path, state)
    tensors: dict[str, Tensor] = {}
    dropped: Counter[str] = Counter()
    for name, tensor in state.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            dropped[name.split(".")[0]] += 1
        elif inner.startswith(TRAINING_ONLY):
            dropped[inner.split(".")[0]] += 1
        else:
            tensors[inner] = tensor
    return ForeignState(tensors, prefix, dict(dropped))


def _prefix(path: Path, state: dict[str, Tensor]) -> str:
    """The prefix of `encoder.conv_in.weight`: empty, `first_stage_model.` or another one."""
    found = sorted(name.removesuffix(LANDMARK) for name in state if name.endswith(LANDMARK))
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if not found:
        raise UserError(f"{path}: holds no CompVis autoencoder (no tensor named [PREFIX.]{LANDMARK})")
    if len(found) > 1 and "first_stage_model." not in found:
        raise UserError(
            f"{path}: holds several autoencoders ({', '.join(map(repr, found))}); save the wanted one alone"
        )
    return "first_stage_model." if len(found) > 1 else found[0]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_tensor_file(path)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a readable safetensors file ({error}); fetch it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    _check_unpacked_size(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any error here is caused by a damaged or hostile file
        unsafe = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|operand) ([\w.]+)", str(error))
        if unsafe or "weights_only" in str(error) or "Weights only" in str(error):
            what = f"{unsafe[1] or unsafe[2]!s}, " if unsafe else ""
            raise UserError(
                f"{path}: is a pickle with more than tensors in it ({what}which loading could run as code), so it "
                "is not opened; get the .safetensors version of the model"
            ) from error
        raise UserError(f"{path}: is not a readable checkpoint ({_first_line(error)}); fetch it again") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path}: does not hold named tensors; save the state_dict() of the model")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not _has_all_its_numbers(tensor):
            raise UserError(f"{path}: the tensor {name!r} has a shape without the numbers for it; fetch it again")
    return tensors


def _check_unpacked_size(path: Path) -> None:
    """Raises: UserError for a compressed archive, which could unpack to any size. Torch does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # the format before torch 1.6 is not an archive
    if unpacked > path.stat().st_size:
        raise UserError(f"{path}: unpacks to {unpacked} bytes, more than it has; fetch it again")


def _has_all_its_numbers(tensor: Tensor) -> bool:
    """False for a tensor that repeats one number, or has none: a small file could request any amount of memory."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# The normalization of latents, folded into the 1x1 convolutions of an `AutoencoderKL`: same images, unit latents.


@torch.no_grad()
def fold_normalizer(model: Any, mean: Sequence[float], std: Sequence[float]) -> Autoencoder:
    """A new `AutoencoderKL` (float32, eval, frozen) that encodes to, and decodes from, normalized latents.

    decode(folded, (z - m) / s) = decode(model, z); the posterior of the folded model has mean (mu - m) / s and
    log-variance logvar - 2 ln s. Equal up to rounding of float32; computed in float64. diffusers clamps log-variances
    to [-30, 20], now in the new units. A model without the 1x1 convolutions gets them.

    Args:
        model: diffusers' `AutoencoderKL`; stays as it is.
        mean, std: statistics of its latents (c,), as in `LatentNormalizer`.

    Raises:
        UserError: a class without such convolutions, or another number of channels.
    """
    if type(model).__name__ != AutoencoderKL.__name__:
        raise UserError(
            "latents: statistics fold into the 1x1 convolutions of diffusers' AutoencoderKL only; "
            "train with autoencoder.architecture=sd, or use to=onnx, which records them beside the model"
        )
    channels = int(model.config["latent_channels"])
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"latent statistics: {len(mean)} channels for an autoencoder of {channels}; use those of one")
    center, width = (torch.tensor(list(values), dtype=torch.float64) for values in (mean, std))
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config |= {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0}
    folded = AutoencoderKL(**config | {"shift_factor": None, "latents_mean": None, "latents_std": None})
    state = {name: value.float().cpu() for name, value in model.state_dict().items()}
    weight, bias = _layer(model.quant_conv, 2 * channels)
    scale = torch.cat([1 / width, torch.ones(channels, dtype=torch.float64)])
    shift = torch.cat([-center / width, -2 * width.log()])
    state |= _named("quant_conv", weight * scale[:, None], bias * scale + shift)
    weight, bias = _layer(model.post_quant_conv, channels)
    state |= _named("post_quant_conv", weight * width, bias + weight @ center)
    folded.load_state_dict(state, strict=True)
    return adapted(folded.eval().requires_grad_(False))


def _layer(layer: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a 1x1 convolution in float64; the identity if there is none."""
    if layer is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    assert layer.bias is not None
    return layer.weight.double().cpu().flatten(1), layer.bias.double().cpu()


def _named(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {f"{name}.weight": weight.float()[:, :, None, None], f"{name}.bias": bias.float()}


# Open an autoencoder of any form: a directory, a run, a hub id, or a checkpoint file of another project.


@dataclass(frozen=True)
class Opened:
    """A model (float32, eval, frozen), notes about its opening, and its local directory if it has one."""

    model: Autoencoder
    notes: list[str] = field(default_factory=list)
    directory: Path | None = None


def open_autoencoder(source: str | Path, config: str | Path | None = None) -> Opened:
    """Load from a diffusers directory, a run of `train-vae`, a hub id, a .ckpt or a .safetensors file.

    Args:
        source: what to load; .ckpt and .safetensors are read as CompVis checkpoints.
        config: the LDM configuration of a checkpoint file; refused for other sources, which have their own.

    Raises:
        UserError: the source does not exist, or is not an autoencoder.
    """
    path = Path(source)
    if path.suffix in SUFFIXES and not path.is_dir():
        model, notes = load_compvis(path, config)
        return Opened(model, notes)
    if config is not None:
        raise UserError(f"config: {source} states its own settings; give it for .ckpt and .safetensors files only")
    return Opened(load_autoencoder(source), [], model_directory(path))


# The architecture of the CompVis encoder and decoder, read from shapes or settings, under both naming schemes.

NORM_GROUPS = 32
"""GroupNorm groups: fixed in the CompVis code, so its files do not record them."""

RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
PLAIN_DOWN, ATTENTION_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
PLAIN_UP, ATTENTION_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """A CompVis autoencoder.

    Attributes:
        in_channels, out_channels: channels of the images.
        widths: channels at each resolution, finest first (`ch * ch_mult`).
        blocks: residual blocks per resolution in the encoder (`num_res_blocks`); the decoder has one more.
        z_channels: channels between encoder and quant_conv (the mean's half for a KL autoencoder).
        embed_dim: channels of the latent, or of the codebook vectors.
        codebook_entries: vectors of the codebook; None for a KL autoencoder.
        down_attention, up_attention: resolutions (0 is the finest) with attention after every residual block.
        middle_attention: whether the middle has an attention block.
        quant_conv, post_quant_conv: whether there are 1x1 convolutions around the latent.
    """

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    blocks: int
    z_channels: int
    embed_dim: int
    codebook_entries: int | None = None
    down_attention: tuple[int, ...] = ()
    up_attention: tuple[int, ...] = ()
    middle_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True

    def __post_init__(self) -> None:
        odd = [width for width in self.widths if width % NORM_GROUPS]
        if odd:
            raise UserError(
                f"architecture: widths {', '.join(map(str, self.widths))} are not multiples of {NORM_GROUPS}, the "
                "GroupNorm groups of the CompVis layout; such a model cannot be expressed in it"
            )
        if not self.is_quantized and self.z_channels != self.embed_dim:
            raise UserError(
                f"architecture: z_channels {self.z_channels} and embed_dim {self.embed_dim} differ; diffusers' "
                "AutoencoderKL has one number for both, so this KL autoencoder cannot be expressed in it"
            )

    @property
    def is_quantized(self) -> bool:
        return self.codebook_entries is not None

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position along one side."""
        return 2 ** (len(self.widths) - 1)

    def diffusers_config(self, sample_size: int, scaling_factor: float) -> dict[str, Any]:
        """The arguments of `diffusers.AutoencoderKL`, or of `diffusers.VQModel`."""
        levels = range(len(self.widths))
        config: dict[str, Any] = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.widths,
            "down_block_types": tuple(ATTENTION_DOWN if i in self.down_attention else PLAIN_DOWN for i in levels),
            "up_block_types": tuple(ATTENTION_UP if i in self.up_attention else PLAIN_UP for i in reversed(levels)),
            "layers_per_block": self.blocks,
            "latent_channels": self.z_channels,
            "norm_num_groups": NORM_GROUPS,
            "sample_size": sample_size,
            "scaling_factor": scaling_factor,
            "mid_block_add_attention": self.middle_attention,
        }
        if self.is_quantized:
            return config | {"num_vq_embeddings": self.codebook_entries, "vq_embed_dim": self.embed_dim}
        return config | {"use_quant_conv": self.quant_conv, "use_post_quant_conv": self.post_quant_conv}

    def compvis_config(self, settings: CompVisSettings) -> dict[str, Any]:
        """The settings in the form of the published LDM configurations (`model.params.ddconfig`)."""
        sample_size = settings.resolution or UNKNOWN_SAMPLE_SIZE
        attention = sorted({sample_size // 2**level for level in (*self.down_attention, *self.up_attention)})
        base = self.widths[0]
        parameters: dict[str, Any] = {
            "embed_dim": self.embed_dim,
            "ddconfig": {
                "double_z": not self.is_quantized,
                "z_channels": self.z_channels,
                "resolution": sample_size,
                "in_channels": self.in_channels,
                "out_ch": self.out_channels,
                "ch": base,
                "ch_mult": [width // base for width in self.widths],
                "num_res_blocks": self.blocks,
                "attn_resolutions": attention,
                "dropout": 0.0,
            },
        }
        if not self.middle_attention:
            parameters["ddconfig"]["attn_type"] = "none"
        if self.is_quantized:
            parameters["n_embed"] = self.codebook_entries
        parameters["lossconfig"] = {"target": "torch.nn.Identity"}  # the published one is for training
        kind, known = "VQModel" if self.is_quantized else "AutoencoderKL", settings.normalization()
        return {
            "model": {"target": f"ldm.models.autoencoder.{kind}", "params": parameters},
            "scale_factor": 1.0 if settings.scaling_factor is None else settings.scaling_factor,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in known.items()},
        }

    def tensor_names(self) -> dict[str, str]:
        """CompVis name -> diffusers name, of every tensor of the model."""
        names = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in self._layers() for part in ("weight", "bias")}
        return names | ({"quantize.embedding.weight": "quantize.embedding.weight"} if self.is_quantized else {})

    def _layers(self) -> Iterator[tuple[str, str]]:
        last = len(self.widths) - 1
        for half in ("encoder", "decoder"):
            yield f"{half}.conv_in", f"{half}.conv_in"
            yield f"{half}.norm_out", f"{half}.conv_norm_out"
            yield f"{half}.conv_out", f"{half}.conv_out"
            yield from _resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", False)
            yield from _resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", False)
            if self.middle_attention:
                yield from _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
        for level, width in enumerate(self.widths):
            ours, theirs = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
            changes = width != self.widths[max(0, level - 1)]
            yield from _blocks(ours, theirs, self.blocks, level in self.down_attention, changes)
            if level < last:
                yield f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv"
        for level, width in enumerate(self.widths):
            ours, theirs = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"  # CompVis counts from the finest
            changes = width != self.widths[min(last, level + 1)]
            yield from _blocks(ours, theirs, self.blocks + 1, level in self.up_attention, changes)
            if level > 0:
                yield f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv"
        if self.quant_conv:
            yield "quant_conv", "quant_conv"
        if self.post_quant_conv:
            yield "post_quant_conv", "post_quant_conv"


def _resnet(ours: str, theirs: str, changes_width: bool) -> Iterator[tuple[str, str]]:
    layers = RESNET | ({"nin_shortcut": "conv_shortcut"} if changes_width else {})
    yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in layers.items())


def _attention(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in ATTENTION.items())


def _blocks(ours: str, theirs: str, count: int, attention: bool, changes_width: bool) -> Iterator[tuple[str, str]]:
    for j in range(count):
        yield from _resnet(f"{ours}.block.{j}", f"{theirs}.resnets.{j}", changes_width and j == 0)
        if attention:
            yield from _attention(f"{ours}.attn.{j}", f"{theirs}.attentions.{j}")


def is_projection(name: str) -> bool:
    """Whether a CompVis name is an attention weight: (o, i, 1, 1) there, (o, i) in diffusers."""
    layer, _, part = name.rpartition(".")
    block, _, projection = layer.rpartition(".")
    return part == "weight" and projection in ("q", "k", "v", "proj_out") and (".attn." in block or "attn_1" in block)


def from_shapes(shapes: Shapes) -> Architecture:
    """Read the architecture off a CompVis state (name -> shape, without prefix).

    Raises:
        UserError: a required tensor is missing, or diffusers' blocks cannot express these shapes.
    """
    try:
        return _from_shapes(shapes)
    except KeyError as error:
        raise UserError(f"checkpoint: has no tensor {error.args[0]!r}, which every CompVis autoencoder has") from error


def _from_shapes(shapes: Shapes) -> Architecture:
    levels = _count(shapes, "encoder.down")
    widths = tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels))
    base, in_channels = shapes["encoder.conv_in.weight"][:2]
    if not widths or widths[0] != base:
        raise UserError(
            f"checkpoint: the first convolution has {base} channels and the finest resolution {widths[0]}; diffusers "
            "has one number for both (ch_mult must begin with 1)"
        )
    counts = {_count(shapes, f"encoder.down.{level}.block") for level in range(levels)}
    counts |= {_count(shapes, f"decoder.up.{level}.block") - 1 for level in range(levels)}
    if len(counts) != 1:
        raise UserError(
            f"checkpoint: residual blocks differ between resolutions ({sorted(counts)}); cannot be expressed"
        )
    middle = {f"{half}.mid.attn_1.q.weight" in shapes for half in ("encoder", "decoder")}
    if len(middle) != 1:
        raise UserError("checkpoint: only one of encoder and decoder has attention in the middle; cannot be expressed")
    z_channels = shapes["decoder.conv_in.weight"][1]
    codebook = shapes.get("quantize.embedding.weight")
    moments = shapes["encoder.conv_out.weight"][0]
    if moments != (z_channels if codebook else 2 * z_channels):
        raise UserError(
            f"checkpoint: the encoder gives {moments} channels and the decoder takes {z_channels}; a KL autoencoder "
            "has twice as many (mean and log-variance), one with a codebook (quantize.embedding.weight) as many"
        )
    post = shapes.get("post_quant_conv.weight")
    return Architecture(
        in_channels=in_channels,
        out_channels=shapes["decoder.conv_out.weight"][0],
        widths=widths,
        blocks=counts.pop(),
        z_channels=z_channels,
        embed_dim=codebook[1] if codebook else post[1] if post else z_channels,
        codebook_entries=codebook[0] if codebook else None,
        down_attention=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes),
        up_attention=tuple(i for i in range(levels) if f"decoder.up.{i}.attn.0.q.weight" in shapes),
        middle_attention=middle.pop(),
        quant_conv="quant_conv.weight" in shapes,
        post_quant_conv=post is not None,
    )


def _count(shapes: Shapes, prefix: str) -> int:
    """The number of indices that follow `prefix.` in the names."""
    depth = prefix.count(".") + 1
    return len({name.split(".")[depth] for name in shapes if name.startswith(f"{prefix}.")})


def from_diffusers(class_name: str, config: Mapping[str, Any]) -> Architecture:
    """The architecture of a diffusers `AutoencoderKL` or `VQModel`.

    Raises:
        UserError: naming the setting that the layout cannot express.
    """
    if class_name not in ("AutoencoderKL", "VQModel"):
        raise UserError(
            f"{class_name}: the CompVis layout holds diffusers' AutoencoderKL and VQModel (`architecture: sd`); "
            "export this model with to=diffusers, to=onnx or to=torchscript"
        )
    down, up = list(config["down_block_types"]), list(config["up_block_types"])[::-1]
    expected: dict[str, tuple[Any, Any]] = {
        "norm_num_groups": (config["norm_num_groups"], NORM_GROUPS),
        "act_fn": (config["act_fn"], "silu"),
        "norm_type": (config.get("norm_type", "group"), "group"),
        "down_block_types": (sorted({*down} - {PLAIN_DOWN, ATTENTION_DOWN}), []),
        "up_block_types": (sorted({*up} - {PLAIN_UP, ATTENTION_UP}), []),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise UserError(
                f"{class_name}.{name}: {found!r} cannot be expressed in the CompVis layout ({wanted!r} there)"
            )
    widths = tuple(config["block_out_channels"])
    if any(width % widths[0] for width in widths):
        raise UserError(
            f"{class_name}.block_out_channels: {widths} are not multiples of the first, which CompVis demands"
        )
    if [kind == ATTENTION_DOWN for kind in down] != [kind == ATTENTION_UP for kind in up]:
        raise UserError(
            f"{class_name}: encoder and decoder have attention at different resolutions; CompVis has one list for both"
        )
    quantized = class_name == "VQModel"
    latent = config["latent_channels"]
    return Architecture(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        widths=widths,
        blocks=config["layers_per_block"],
        z_channels=latent,
        embed_dim=(config.get("vq_embed_dim") or latent) if quantized else latent,
        codebook_entries=config["num_vq_embeddings"] if quantized else None,
        down_attention=tuple(i for i, kind in enumerate(down) if kind == ATTENTION_DOWN),
        up_attention=tuple(i for i, kind in enumerate(up) if kind == ATTENTION_UP),
        middle_attention=config.get("mid_block_add_attention", True),
        quant_conv=quantized or config.get("use_quant_conv", True),
        post_quant_conv=quantized or config.get("use_post_quant_conv", True),
    )
