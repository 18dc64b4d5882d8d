"""Draw the pictures of docs/ from runs, on images that the package draws itself. Nothing is chosen by hand.

    python -m tools.record_pictures crops OUT.webp NAME=AUTOENCODER [NAME=AUTOENCODER ...]
    python -m tools.record_pictures latents OUT.svg NAME=HEALTH_FOLDER [NAME=HEALTH_FOLDER ...]
    python -m tools.record_pictures prior OUT.webp NAME=AUTOENCODER=HEALTH_FOLDER [...]

`crops`: the same crops through every autoencoder, enlarged, the original first: of 64 textured synthetic images the
    windows with the most contrast between neighboring pixels, one a class.
`latents`: what noise on the latents costs (PSNR), and the posterior's deviations, from health.json.
`prior`: what each decoder makes of latents drawn from a Gaussian with the moments of its own latents.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.data import transforms
from ldm_vae.data.samples import channels_first
from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource
from ldm_vae.evaluation.plots import legend, new_figure, save_svg
from ldm_vae.random import generator

ROWS, RESOLUTION, CROP, ZOOM = 4, 512, 96, 2


def crops(out: Path, pairs: list[list[str]]) -> None:
    images, corners = busy_windows()
    columns = {"original": images}
    for name, path in pairs:
        autoencoder = load_autoencoder(path)
        columns[name] = torch.cat([autoencoder.reconstruct(image) for image in images.split(1)])
    rows = [
        [column[row][:, y : y + CROP, x : x + CROP] for column in columns.values()]
        for row, (y, x) in enumerate(corners)
    ]
    save_grid(out, rows, list(columns), ZOOM)


def busy_windows() -> tuple[Tensor, list[tuple[int, int]]]:
    """Images (ROWS, 3, r, r) in [-1, 1] of different classes, and the corner of the busiest window of each."""
    source = SyntheticSource(SyntheticConfig(count=64, resolution=RESOLUTION, textured=1.0))
    found = {}
    for index in range(len(source)):
        image = transforms.from_uint8(channels_first(source.read(index)))
        contrast = (image.diff(dim=-1)[:, 1:].abs() + image.diff(dim=-2)[:, :, 1:].abs()).mean(dim=0)
        windows = avg_pool2d(contrast[None, None], CROP, stride=8)[0, 0]
        best, place = float(windows.max()), int(windows.argmax())
        corner = (place // windows.shape[1] * 8, place % windows.shape[1] * 8)
        label = source.label(index)
        if label not in found or best > found[label][0]:
            found[label] = (best, image, corner)
    busiest = sorted(found.values(), key=lambda entry: -entry[0])[:ROWS]
    return torch.stack([image for _, image, _ in busiest]), [corner for _, _, corner in busiest]


def prior(out: Path, triples: list[list[str]]) -> None:
    rows = []
    for _, path, folder in triples:
        autoencoder = load_autoencoder(path)
        channels = json.loads((Path(folder) / "health.json").read_text())["channels"]
        moments = torch.tensor([[c["mean"], (c["variance"] + c["noise"]) ** 0.5] for c in channels])
        noise = torch.randn(6, autoencoder.latent_channels, 16, 16, generator=generator(0, "prior"))
        rows.append(list(autoencoder.decode_images(moments[:, 0, None, None] + moments[:, 1, None, None] * noise)))
    save_grid(out, rows, [], 1, [name for name, *_ in triples])


def save_grid(
    out: Path, rows: list[list[Tensor]], titles: list[str], zoom: int, labels: list[str] | None = None
) -> None:
    """Tiles (3, s, s) in [-1, 1] with a title above each column, or a label above each row."""
    side, gap, head = rows[0][0].shape[-1] * zoom, 6, 18
    line = head if labels else 0
    top = head if titles else 0
    size = (len(rows[0]) * (side + gap) - gap, top + len(rows) * (side + gap + line) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * (side + gap) + 2, 3), title, fill="black")
    for row, tiles in enumerate(rows):
        y = top + row * (side + gap + line)
        if labels:
            draw.text((2, y + 3), labels[row], fill="black")
        for column, tile in enumerate(tiles):
            picture = transforms.to_pil(tile[None].clamp(-1, 1))[0].resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (side + gap), y + line))
    sheet.save(out, quality=88)


def latents(out: Path, pairs: list[list[str]]) -> None:
    figure, (noise, deviation) = new_figure(columns=2)
    for name, folder in pairs:
        report = json.loads((Path(folder) / "health.json").read_text())
        curve = report["decoder"]["noise_curve"]
        noise.plot([float(tau) for tau in curve], list(curve.values()), marker="o", markersize=3, label=name)
        relative = [(c["noise"] / max(c["variance"], 1e-12)) ** 0.5 for c in report["channels"]]
        deviation.plot(range(len(relative)), relative, marker="o", linestyle="none", label=name)
    noise.set(title="Noise on the latents", xlabel="standard deviations of the channel", ylabel="PSNR (dB)")
    deviation.set(
        title="Width of the posterior", xlabel="channel", ylabel="share of the channel's deviation", yscale="log"
    )
    deviation.set_xticks(range(len(relative)))
    legend(noise)
    save_svg(figure, out, "PSNR against noise on the latents, and posterior widths, of several autoencoders")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=("crops", "latents", "prior"))
    parser.add_argument("out", type=Path)
    parser.add_argument("inputs", nargs="+", metavar="NAME=...")
    args = parser.parse_args()
    draw = {"crops": crops, "latents": latents, "prior": prior}[args.picture]
    draw(args.out, [word.split("=") for word in args.inputs])


if __name__ == "__main__":
    main()
