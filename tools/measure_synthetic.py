"""A latent diffusion model proved on data whose truth is known: does it draw what it was asked for?

    python -m tools.measure_synthetic OUTPUT --pipeline runs/quickstart/diffusion --latents runs/quickstart/latents \\
        --data configs/encode_quickstart.yaml

For models trained on the synthetic set. A small network, the reader, learns from freshly rendered images what an image
shows: the class, and attributes of the scene. It then reads images that the model generates, as many of each class.
Three promises, each with its limit:

- classes: at least 90 % of the generated images are recognized as the class that they were to show;
- attributes: the distribution of each that the reader can read differs from that of held-out real images by at most a
  tenth more than two sets of real images differ; the distance is Kolmogorov and Smirnov's (Kuiper's for hues), the
  largest difference of the shares below any value;
- memory: at most 1 % are copies of training latents (`ldm_vae.diffusion.validation`).

Real images are read too, as rendered and through the autoencoder: what is lost there is not the diffusion model's.
Writes results.json, results.md, run.json, images/, sheet.png with what was not recognized framed, and wrong.png with
all of it. The exit code is 0 where all promises are kept, 1 where one is broken. The same command continues.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.result_folder import check_output, write_results
from ldm_vae.data.synthetic.source import SyntheticConfig
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.errors import EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from ldm_vae.data.synthetic import SyntheticConfig
    from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
    from tools.synthetic_reader import Reader, Truth

RECOGNISED = 0.90
GAP = 0.10
"""Share of the images that an attribute's distribution may be off by, beyond what chance explains."""
COPIES = 0.01
READABLE = 0.9
"""Correlation with the truth on held-out real images from which an attribute counts as read."""
READER_RECOGNISES = 0.98
"""Share of held-out real images below which the reader is not reliable."""
SPLITS = 200
CONTROLS = 100
"""Held-out real images that are sent through the autoencoder."""
EXIT_BROKEN = 1
CELL, FRAME, RED = 128, 6, (214, 39, 40)
"""Pixels of a picture on the sheet and of its frame; the frame's color."""


def judge_classes(asked: np.ndarray, read: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Shares recognized as asked, with 95 % Wilson intervals, and what was read for each class."""
    import numpy as np
    from scipy.stats import binomtest

    def share(right: np.ndarray) -> dict[str, Any]:
        interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        return {"images": len(right), "recognised": float(right.mean()), "interval": [interval.low, interval.high]}

    by_class = {}
    for number, name in enumerate(names):
        mine = read[asked == number]
        if len(mine):
            others = {names[k]: int(count) for k, count in enumerate(np.bincount(mine)) if count and k != number}
            by_class[name] = share(mine == number) | {"read_as": others}
    found = share(asked == read)
    return found | {"limit": RECOGNISED, "kept": found["recognised"] >= RECOGNISED, "by_class": by_class}


def judge_attributes(real: Truth, generated: Truth, correlations: dict[str, float]) -> dict[str, Any]:
    """By attribute the gap between generated and real readings, and that between halves of the real ones.

    Args:
        real: Readings of twice as many images as `generated`: its halves are as large.
        generated: Readings.
        correlations: By attribute, of readings and truth; those below READABLE are not judged.
    """
    import numpy as np

    from tools.synthetic_reader import is_circle, largest_gap

    rng = np.random.default_rng(0)
    count = len(real.labels) // 2
    orders = [rng.permutation(2 * count) for _ in range(SPLITS)]
    found = {}
    for name, values in real.attributes.items():
        if correlations[name] < READABLE:
            continue
        circle = is_circle(name)
        usual = [largest_gap(values[order[:count]], values[order[count:]], circle) for order in orders]
        gaps = [largest_gap(values[order[:count]], generated.attributes[name], circle) for order in orders]
        chance, gap = float(np.quantile(usual, 0.95)), float(np.median(gaps))
        found[name] = {"gap": gap, "chance": chance, "limit": chance + GAP, "kept": gap <= chance + GAP}
    return found


def above_chance(attributes: dict[str, Any]) -> str:
    """Which of the judged attributes have a larger gap than real images have by chance, within the limit or not."""
    off = [name for name, one in attributes.items() if one["gap"] > one["chance"]]
    return f"Gap above chance: {len(off)} of {len(attributes)} attributes{': ' * bool(off)}{', '.join(off)}."


def judge_copies(generated: Tensor, held_out: Tensor, training: Tensor) -> dict[str, Any]:
    """The copy rate of generated latents among the training latents, and that of real ones that are not in there.

    Args:
        generated, held_out: (n, c, h, w), normalized.
        training: (m, v, c, h, w), normalized: v latents of each image, see `validation.known_latents`.
    """
    from ldm_vae.diffusion.validation import find_neighbors

    found, control = (find_neighbors(latents, training) for latents in (generated, held_out))
    share = found.copies / len(generated)
    return {
        "copies": found.copies, "images": len(generated), "compared": len(training), "share": share, "limit": COPIES,
        "kept": share <= COPIES, "median_ratio": float(found.ratios.median()),
        "held_out_copies": control.copies, "held_out_images": len(held_out),
        "held_out_median_ratio": float(control.ratios.median()),
    }  # fmt: skip


def open_set(latents: str, data: Path, pipeline: LatentDiffusionPipeline) -> tuple[SyntheticConfig, Tensor]:
    """The settings of the synthetic set that the pipeline was trained on, and its latents, see `known_latents`.

    Raises:
        UserError: the latents are not those of this pipeline, or of other images than `data` describes.
    """
    from ldm_vae.config import load
    from ldm_vae.data.synthetic.source import SyntheticSource
    from ldm_vae.diffusion.validation import known_latents
    from ldm_vae.latents.dataset import LatentDataset
    from ldm_vae.latents.encode import EncodeConfig

    config = load(EncodeConfig, data, ["autoencoder=unused", "output=unused"]).data
    dataset = LatentDataset(latents)
    pipeline.check_latents(dataset.manifest)
    made_of = [each["fingerprint"] for each in dataset.manifest.datasets]
    if config.source != "synthetic" or made_of != [SyntheticSource(config.synthetic).fingerprint()]:
        raise UserError(f"{latents}: was not encoded from the images that {data} describes; give its own configuration")
    if list(SyntheticSource.label_names) != pipeline.labels:
        raise UserError("--pipeline: its classes are not those of the synthetic set; train it with the set's labels")
    return config.synthetic, known_latents(dataset, pipeline.normalizer, len(dataset))


def look(pipeline: LatentDiffusionPipeline, images: Iterable[np.ndarray], side: int) -> tuple[Tensor, Tensor]:
    """Images as the reader takes them (n, 3, side, side), and their normalized posterior means (n, c, h, w)."""
    import torch

    from ldm_vae.data import transforms
    from ldm_vae.data.samples import channels_first
    from tools.synthetic_reader import reduced

    seen, latents = [], []
    for image in images:
        seen.append(reduced(image, side))
        whole = transforms.from_uint8(channels_first(image))[None]
        latents.append(pipeline.autoencoder.encode_moments(whole)[0])
    return torch.cat(seen), pipeline.normalizer.normalize(torch.cat(latents))


def through_autoencoder(
    pipeline: LatentDiffusionPipeline, config: SyntheticConfig, count: int, side: int
) -> tuple[Tensor, Tensor]:
    """Held-out real images, encoded and decoded (n, 3, side, side), and their normalized latents (n, c, h, w)."""
    import torch

    from ldm_vae.data import transforms
    from ldm_vae.data.synthetic.source import SyntheticSource
    from tools.synthetic_reader import held_out_config, reduced

    height, _ = pipeline.image_size()
    source = SyntheticSource(held_out_config(config, count, height))
    _, latents = look(pipeline, map(source.read, range(count)), side)
    decoded = [pipeline.decode(pipeline.normalizer.denormalize(latent)) for latent in latents.split(1)]
    images = [transforms.to_uint8(image)[0].permute(1, 2, 0).numpy() for image in decoded]
    return torch.cat([reduced(image, side) for image in images]), latents


def make_reader(config: SyntheticConfig, side: int, images: int, epochs: int) -> Reader:
    """A reader of the set `config`, taught by images that are in no other set here."""
    from tools.synthetic_reader import reader_config, render, train_reader

    return train_reader(*render(reader_config(config, images), side), epochs)


def check_reader(errors: dict[str, Any]) -> None:
    """Raises: UserError when it does not recognize real images, or reads no attribute in them."""
    read = [name for name, value in errors["correlations"].items() if value >= READABLE]
    if errors["recognised"] < READER_RECOGNISES or not read:
        raise UserError(
            f"the reader recognizes {errors['recognised']:.1%} of held-out real images and can read {len(read)} "
            "attributes, which makes it no judge; give more --reader-images or --reader-epochs"
        )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, and the pictures that show it."""
    import numpy as np
    from PIL import Image

    from ldm_vae.diffusion.generation import GenerateConfig, generate, pipeline_directory, plan_images
    from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
    from tools.synthetic_reader import held_out_config, reading_errors, render

    pipeline = LatentDiffusionPipeline.from_pretrained(pipeline_directory(args.pipeline), use_safetensors=True)
    config, training = open_set(args.latents, args.data, pipeline)
    settings = {name: getattr(args, name) for name in ("count", "seed", "steps", "guidance", "precision")}
    print("the reader learns from real images ...", file=sys.stderr, flush=True)
    reader = make_reader(config, args.side, args.reader_images, args.reader_epochs)
    real, truth = render(held_out_config(config, 2 * args.count), args.side)
    real_read = reader.read(real)
    errors = reading_errors(real_read, truth)
    check_reader(errors)
    request = GenerateConfig(args.pipeline, str(args.output / "images"), **settings)
    generate(request)
    paths = [image.path for image in plan_images(request, pipeline.labels)]
    asked = np.arange(args.count) % len(pipeline.labels)  # as `plan_images` takes the classes: all in turn
    images, latents = look(pipeline, (np.asarray(Image.open(path).convert("RGB")) for path in paths), args.side)
    read = reader.read(images)
    control_images, control_latents = through_autoencoder(pipeline, config, min(CONTROLS, len(real)), args.side)
    control_errors = reading_errors(reader.read(control_images), truth.first(len(control_images)))
    draw(paths, asked, read.labels, pipeline.labels, args.output)
    return {
        "settings": settings | {name: getattr(args, name) for name in ("side", "reader_images", "reader_epochs")},
        "reader": errors | {"images": len(real)},
        "reconstructions": control_errors | {"images": len(control_images)},
        "classes": judge_classes(asked, read.labels, pipeline.labels),
        "attributes": judge_attributes(real_read, read, errors["correlations"]),
        "copies": judge_copies(latents, control_latents, training),
    }


def draw(paths: Sequence[Path], asked: np.ndarray, read: np.ndarray, names: Sequence[str], folder: Path) -> None:
    """`sheet.png`: ten images of each class, framed where not recognized; `wrong.png`: all that were not."""
    from PIL import Image, ImageOps

    from ldm_vae.utils.image_grid import labeled_sheet

    def small(index: int) -> Image.Image:
        picture = Image.open(paths[index]).convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
        wrong = asked[index] != read[index]
        return ImageOps.expand(ImageOps.crop(picture, FRAME), FRAME, RED) if wrong else picture

    shown = range(min(len(paths), 10 * len(names)))
    sheet = labeled_sheet([small(index) for index in shown], [names[asked[index]] for index in shown])
    sheet.save(folder / "sheet.png")
    wrong = [index for index in range(len(paths)) if asked[index] != read[index]]
    if wrong:
        words = [f"{names[asked[index]]}\nread {names[read[index]]}" for index in wrong]
        labeled_sheet([small(index) for index in wrong], words).save(folder / "wrong.png")


def kept(found: dict[str, Any]) -> bool:
    """Whether every promise is."""
    return all(
        [found["classes"]["kept"], found["copies"]["kept"], *(one["kept"] for one in found["attributes"].values())]
    )


def report(found: dict[str, Any]) -> str:
    """`results.md`."""
    from ldm_vae.utils.text import markdown_table

    def word(yes: bool) -> str:
        return "kept" if yes else "**broken**"

    classes, copies, attributes = found["classes"], found["copies"], found["attributes"]
    reader, through, settings = found["reader"], found["reconstructions"], found["settings"]
    worst = max(attributes, key=lambda name: attributes[name]["gap"] - attributes[name]["chance"])
    beyond = attributes[worst]["gap"] - attributes[worst]["chance"]
    low, high = classes["interval"]
    promises = [
        ["recognized as asked", f"{classes['recognised']:.1%} [{low:.1%}, {high:.1%}] of {classes['images']}",
         f"at least {RECOGNISED:.0%}", word(classes["kept"])],
        [f"attributes off by, beyond chance (worst: {worst})", f"{max(beyond, 0.0):.3f}", f"at most {GAP:.2f}",
         word(all(one["kept"] for one in attributes.values()))],
        ["copies of training latents", f"{copies['copies']} of {copies['images']}", f"at most {COPIES:.0%}",
         word(copies["kept"])],
    ]  # fmt: skip
    marginals = [
        [name, f"{one['gap']:.3f}", f"{one['chance']:.3f}", f"{one['limit']:.3f}", f"{reader['errors'][name]:.3f}",
         f"{through['errors'][name]:.3f}"]
        for name, one in attributes.items()
    ]  # fmt: skip
    by_class = [
        [name, f"{one['recognised']:.1%}", ", ".join(f"{other} {n}" for other, n in one["read_as"].items()) or "–"]
        for name, one in classes["by_class"].items()
    ]
    unread = [name for name, value in reader["correlations"].items() if value < READABLE]
    note = (
        f"{settings['steps']} steps, guidance {settings['guidance']:g}, {settings['precision']}, seed "
        f"{settings['seed']}. The reader: {settings['side']} x {settings['side']} pixels, "
        f"{settings['reader_images']:,} real images, {settings['reader_epochs']} epochs; it recognizes "
        f"{reader['recognised']:.1%} of {reader['images']:,} held-out real images and {through['recognised']:.1%} of "
        f"{through['images']} that went through the autoencoder. Gap: largest difference of the shares below any value "
        f"(on any arc, for hues), median over {SPLITS} halves of the real readings; chance: 95 % point of the gap "
        "between such a half and the other; error: of the reader, median. "
        f"Nearest over second nearest training latent, median: generated {copies['median_ratio']:.2f}, held-out real "
        f"{copies['held_out_median_ratio']:.2f} ({copies['held_out_copies']} copies of {copies['held_out_images']}), "
        f"among {copies['compared']:,}. The interval is Wilson's, 95 %."
    )
    note += f" {above_chance(attributes)}"
    if unread:
        note += f" Not judged, the reader cannot read it: {', '.join(unread)}."
    return "\n".join(
        [
            "# Truth known", "", *markdown_table(["promise", "measured", "limit", ""], promises), "",
            *markdown_table(["attribute", "gap", "chance", "limit", "error, real", "error, reconstructed"], marginals),
            "", *markdown_table(["asked for", "recognized", "read instead"], by_class), "", note, "",
        ]
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--pipeline", required=True, help="a pipeline directory, or a run of `ldm-vae train-diffusion`")
    parser.add_argument("--latents", required=True, help="the set it was trained on")
    parser.add_argument("--data", required=True, type=Path, help="the configuration that the set was encoded with")
    parser.add_argument("--count", type=int, default=500, help="generated images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their noise (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="default: %(default)s")
    parser.add_argument("--side", type=int, default=64, help="pixels at which images are read (default: %(default)s)")
    parser.add_argument("--reader-images", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--reader-epochs", type=int, default=8, help="default: %(default)s")
    args = parser.parse_args()
    try:
        check_output(args.output)
        if args.count < 20 or args.count % 10:
            raise UserError(f"--count: {args.count} are not as many of each of ten classes; give 20, 30, ...")
        began = time.time()
        found = measure(args)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    text = report(found)
    write_results(args.output, found | {"kept": kept(found)}, text, began)
    print(text)
    return 0 if kept(found) else EXIT_BROKEN


if __name__ == "__main__":
    sys.exit(main())
