"""A compact implementation of the published CompVis autoencoders, with their tensor names, to compare conversions with.

After github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py and ldm/models/autoencoder.py, and
taming-transformers' VectorQuantizer2 for the codebook: the arithmetic of the forward pass, without training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def normalize(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6, affine=True)


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = normalize(inputs), nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm2, self.conv2 = normalize(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalize(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        hidden = self.norm(x)
        q, k, v = (layer(hidden).reshape(n, c, h * w) for layer in (self.q, self.k, self.v))
        weights = (torch.bmm(q.transpose(1, 2), k) * c**-0.5).softmax(dim=2)  # n, query, key
        return x + self.proj_out(torch.bmm(v, weights.transpose(1, 2)).reshape(n, c, h, w))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(blocks: list[nn.Module], attention: list[nn.Module]) -> nn.Module:
    module = nn.Module()
    module.block, module.attn = nn.ModuleList(blocks), nn.ModuleList(attention)
    return module


def run_level(module: nn.Module, h: Tensor) -> Tensor:
    for i, block in enumerate(module.block):
        h = block(h)
        if len(module.attn):
            h = module.attn[i](h)
    return h


def middle(channels: int, attention: bool) -> nn.Module:
    module = nn.Module()
    module.block_1 = ResnetBlock(channels, channels)
    module.attn_1 = AttnBlock(channels) if attention else nn.Identity()
    module.block_2 = ResnetBlock(channels, channels)
    return module


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels, double_z, attn_type):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, 1, 1)
        self.down = nn.ModuleList()
        inputs = ch
        for i, multiplier in enumerate(ch_mult):
            blocks, attention = [], []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(inputs, ch * multiplier))
                inputs = ch * multiplier
                if resolution in attn_resolutions:
                    attention.append(AttnBlock(inputs))
            module = level(blocks, attention)
            if i != len(ch_mult) - 1:
                module.downsample = Downsample(inputs)
                resolution //= 2
            self.down.append(module)
        self.mid = middle(inputs, attn_type != "none")
        self.norm_out = normalize(inputs)
        self.conv_out = nn.Conv2d(inputs, 2 * z_channels if double_z else z_channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for module in self.down:
            h = run_level(module, h)
            if hasattr(module, "downsample"):
                h = module.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(swish(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels, double_z, attn_type):
        super().__init__()
        inputs = ch * ch_mult[-1]
        resolution //= 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, inputs, 3, 1, 1)
        self.mid = middle(inputs, attn_type != "none")
        self.up = nn.ModuleList()
        for i in reversed(range(len(ch_mult))):
            blocks, attention = [], []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(inputs, ch * ch_mult[i]))
                inputs = ch * ch_mult[i]
                if resolution in attn_resolutions:
                    attention.append(AttnBlock(inputs))
            module = level(blocks, attention)
            if i != 0:
                module.upsample = Upsample(inputs)
                resolution *= 2
            self.up.insert(0, module)
        self.norm_out = normalize(inputs)
        self.conv_out = nn.Conv2d(inputs, 3, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
        for module in reversed(self.up):
            h = run_level(module, h)
            if hasattr(module, "upsample"):
                h = module.upsample(h)
        return self.conv_out(swish(self.norm_out(h)))


class CompVisKL(nn.Module):
    """`moments(x)`: mean and log-variance stacked, before clamping; `decode(z)`."""

    def __init__(self, embed_dim: int, **config) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(double_z=True, **config), Decoder(double_z=True, **config)
        self.quant_conv = nn.Conv2d(2 * config["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, config["z_channels"], 1)

    def moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class CompVisVQ(nn.Module):
    """`latents(x)`: before quantization; `decode(h)` quantizes first, as VQModelInterface does."""

    def __init__(self, embed_dim: int, n_embed: int, **config) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(double_z=False, **config), Decoder(double_z=False, **config)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(config["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, config["z_channels"], 1)

    def latents(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, h: Tensor) -> Tensor:
        flat, codebook = h.permute(0, 2, 3, 1).reshape(-1, h.shape[1]), self.quantize.embedding.weight
        distance = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
        n, _, height, width = h.shape
        quantized = codebook[distance.argmin(1)].reshape(n, height, width, -1).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(quantized))


def config(ch_mult, attn_resolutions=(), *, z_channels=4, num_res_blocks=1, resolution=64, attn_type="vanilla") -> dict:
    return {
        "ch": 32, "ch_mult": ch_mult, "num_res_blocks": num_res_blocks, "attn_resolutions": attn_resolutions,
        "resolution": resolution, "z_channels": z_channels, "attn_type": attn_type,
    }  # fmt: skip


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor random, norms and biases too: a tensor in a wrong place changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "embedding" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)
