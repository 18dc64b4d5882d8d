"""The architecture of the CompVis `Encoder`/`Decoder` pair, said once: read from shapes or settings, named both ways.

A value of `Architecture` says which tensors exist. From it follow the names of every tensor in the CompVis layout
(`encoder.down.0.block.0.conv1`, github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py) and in that
of diffusers (`encoder.down_blocks.0.resnets.0.conv1`), and the settings of both. Files and tensors are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ldm_vae.errors import UserError

NORM_GROUPS = 32
"""GroupNorm groups: fixed in the CompVis code, so its files do not state them."""

RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
PLAIN_DOWN, ATTENTION_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
PLAIN_UP, ATTENTION_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """A CompVis autoencoder.

    Attributes:
        in_channels, out_channels: of the images.
        widths: channels at each resolution, finest first (`ch * ch_mult`).
        blocks: residual blocks a resolution in the encoder (`num_res_blocks`); the decoder has one more.
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

    def compvis_config(self, sample_size: int, scaling_factor: float) -> dict[str, Any]:
        """The settings in the form of the published LDM configurations (`model.params.ddconfig`)."""
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
        parameters["lossconfig"] = {"target": "torch.nn.Identity"}  # theirs is for training
        kind = "VQModel" if self.is_quantized else "AutoencoderKL"
        return {
            "model": {"target": f"ldm.models.autoencoder.{kind}", "params": parameters},
            "scale_factor": scaling_factor,
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
        UserError: a tensor that decides is missing, or diffusers' blocks cannot express what the shapes say.
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
            f"checkpoint: the first convolution has {base} channels and the finest resolution {widths[:1]}; diffusers "
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
    """How many numbers follow `prefix.` in the names."""
    depth = prefix.count(".") + 1
    return len({name.split(".")[depth] for name in shapes if name.startswith(f"{prefix}.")})


def from_diffusers(class_name: str, config: Mapping[str, Any]) -> Architecture:
    """The architecture of a diffusers `AutoencoderKL` or `VQModel`, where the CompVis layout can hold it.

    Raises:
        UserError: naming the setting that the layout cannot express.
    """
    if class_name not in ("AutoencoderKL", "VQModel"):
        raise UserError(
            f"{class_name}: the CompVis layout holds diffusers' AutoencoderKL and VQModel (`architecture: sd`); "
            "export this model with --to diffusers, onnx or torchscript"
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
