"""A training step of an autoencoder beside diffusers' example, and beside the machine's convolutions.

    python -m benchmarks train OUTPUT

Equal architecture (an `AutoencoderKL` as Stable Diffusion has it, narrower), images and terms: L1, LPIPS, KL and a
hinge GAN. Ours is the package's own `update()` with its engine; one call updates both networks. Weights are random,
those of LPIPS too: they change no cost. Nothing is said here of what a step teaches.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

SUMMARY = "a training step: diffusers' example, the machine's roof, waits for data and for the device"

STEPS = 10_000
"""Steps of the assumed run; none of the measured steps logs."""
TRAINING = {"tracker": "none", "log_every": STEPS, "save_every": STEPS, "validate_every": STEPS, "preview_every": STEPS}

BLOCKS = (("down", "DownEncoder"), ("up", "UpDecoder"))
BACKBONES = {"vgg": "vgg16", "squeeze": "squeezenet1_1"}
"""Backbone of LPIPS -> its name in torchvision."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 256], help="of the AutoencoderKL")
    parser.add_argument("--preset", default="base", help="of ours, for the roof and the waits (base)")
    parser.add_argument("--perceptual", default="vgg", choices=tuple(BACKBONES), help="backbone of LPIPS (vgg)")
    parser.add_argument("--crop", type=int, default=128, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="images a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--wait-steps", type=int, default=12, help="of the training whose waits count (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """The comparison, then ours against the roof, then a real training."""
    import torch

    from ldm_vae.runtime import reuse_freed_memory

    reuse_freed_memory()
    names = ("widths", "preset", "perceptual", "crop", "batch", "rounds", "device")
    settings = {name: getattr(arguments, name) for name in names}
    found: dict[str, Any] = settings | {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_networks(folder, arguments.widths, arguments.perceptual)
        progress("diffusers' example beside ours ...")
        found["seconds"] = compare(arguments, folder)
        progress(f"{arguments.preset} and the roof ...")
        found["roof"] = [measure_roof(arguments, folder, whole) for whole in (True, False)]
        progress(f"a training of {arguments.wait_steps} steps ...")
        found["waits"] = measure_waits(arguments, folder)
    return found


EXAMPLE, REPAIRED = "diffusers' example, fp32", "diffusers' example with LPIPS's gradient, fp32"


def write_networks(folder: Path, widths: list[int], backbone: str) -> None:
    """An `AutoencoderKL` and the backbone of LPIPS, both random, as files that the package reads."""
    import torch

    from ldm_vae import runtime

    runtime.repair_torchvision()
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file
    from torchvision import models

    torch.manual_seed(0)
    kinds = {f"{way}_block_types": (f"{name}Block2D",) * len(widths) for way, name in BLOCKS}
    AutoencoderKL(
        block_out_channels=tuple(widths), layers_per_block=2, norm_num_groups=min(32, widths[0] // 2), **kinds
    ).save_pretrained(folder / "kl")
    with torch.device("meta"):  # else the classifier behind it would be drawn too
        features = getattr(models, BACKBONES[backbone])(weights=None).features.state_dict()
    scales = {name: (2 / max(1, value[0].numel())) ** 0.5 * (value.ndim > 1) for name, value in features.items()}
    tensors = {f"features.{name}": scales[name] * torch.randn(value.shape) for name, value in features.items()}
    save_file(tensors, folder / f"{backbone}.safetensors")


def reconstruction_loss(folder: Path, perceptual: float) -> Any:
    """L1, and LPIPS at this weight."""
    from ldm_vae.autoencoder.losses import LossConfig

    weights = backbone_file(folder)
    net: Any = weights.stem
    return LossConfig(l1=1.0, perceptual=perceptual, perceptual_net=net, perceptual_weights=str(weights))


def backbone_file(folder: Path) -> Path:
    """The one that `write_networks` wrote; its stem is the name of the backbone."""
    (weights,) = folder.glob("*.safetensors")
    return weights


def our_step(
    folder: Path, autoencoder: dict[str, Any], precision: str, crop: int, batch: int, device: str, whole: bool = True
) -> Callable[[], object]:
    """A call is one `update()`. `autoencoder`: settings of the training; `whole`: with LPIPS and the GAN."""
    import torch

    from ldm_vae.autoencoder.gan import AdversarialConfig
    from ldm_vae.autoencoder.train_config import Phase, TrainVaeConfig
    from ldm_vae.autoencoder.training import VaeModel
    from ldm_vae.training.loader import Batch, MicroBatch
    from ldm_vae.training.trainer import Engine, TrainingConfig

    training: Any = TRAINING | {"precision": precision, "device": device}
    game = AdversarialConfig(loss="hinge", warmup=1, ramp=1, r1=0.0, augment=False)
    config = TrainVaeConfig(
        loss=reconstruction_loss(folder, 0.5 * whole),
        adversarial=game if whole else AdversarialConfig(),
        phases=[Phase(steps=STEPS, crop=crop, batch=batch)],
        training=TrainingConfig(**training),
        **autoencoder,
    )
    accelerator = accelerator_of(config.training)
    model = VaeModel(config, None, accelerator.device)
    engine = Engine(model, config.training, accelerator, STEPS)
    images = torch.randint(0, 256, (batch, 3, crop, crop), dtype=torch.uint8, device=accelerator.device)
    given = Batch((MicroBatch({"image": images}, slice(0, batch)),), batch)
    model.update(0, given, engine)  # measures the weight of the game
    steps = iter(range(1, STEPS - 1))
    return lambda: model.update(next(steps), given, engine)


def theirs(folder: Path, repaired: bool, crop: int, batch: int, device: str) -> Callable[[], object]:
    """See `peer_step`: one update of both networks."""
    import torch

    from ldm_vae import runtime

    runtime.repair_torchvision()
    import lpips
    from diffusers import AutoencoderKL

    from benchmarks.peer_step import peer_step

    autoencoder: Any = AutoencoderKL.from_pretrained(folder / "kl").to(device).train()
    perceptual = (
        lpips.LPIPS(net=backbone_file(folder).stem, pnet_rand=True, verbose=False).to(device).requires_grad_(False)
    )
    return peer_step(autoencoder, perceptual, 2 * torch.rand(batch, 3, crop, crop, device=device) - 1, repaired)


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of an update of both networks."""
    from benchmarks.outsider import Outsider
    from benchmarks.rounds import alternating

    size = (arguments.crop, arguments.batch, arguments.device)
    initial = {"initial": str(folder / "kl")}
    actions = {f"ours, {precision}": our_step(folder, initial, precision, *size) for precision in ("bf16", "fp32")}
    with Outsider(theirs, folder, False, *size) as example, Outsider(theirs, folder, True, *size) as repaired:
        peers = {EXAMPLE: example, REPAIRED: repaired}
        return alternating(actions | peers, arguments.rounds, device=arguments.device)


def measure_roof(arguments: argparse.Namespace, folder: Path, whole: bool) -> dict[str, Any]:
    """For our architecture in bf16: the time that the roof would need for the counted operations, over the time taken.

    LPIPS computes in float32, whose roof is lower: `fraction` gives each part the roof of its precision, and
    `fraction_of_bf16` takes the higher one for all.
    """
    import torch

    from benchmarks.roof import roof_action
    from benchmarks.rounds import alternating, ratio
    from ldm_vae.autoencoder.models import AutoencoderConfig
    from ldm_vae.runtime import gigamacs

    size, device = (arguments.crop, arguments.batch, arguments.device), arguments.device
    ours = {"autoencoder": AutoencoderConfig(preset=arguments.preset)}
    step = our_step(folder, ours, "bf16", *size, whole=whole)
    operations = 2e9 * gigamacs(step)
    of_lpips = 2e9 * lpips_gigamacs(folder, arguments.crop, arguments.batch, device) if whole else 0.0
    roofs = {name: roof_action(dtype, device) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    actions = {"step": step} | {name: action for name, (action, _) in roofs.items()}
    seconds = alternating(actions, arguments.rounds, device=device)
    speeds = {name: [flops / one for one in seconds[name]] for name, (_, flops) in roofs.items()}
    pairs = list(zip(speeds["bf16"], speeds["fp32"], strict=True))
    needed = [(operations - of_lpips) / bf16 + of_lpips / fp32 for bf16, fp32 in pairs]
    return {
        "terms": "L1, LPIPS, KL, GAN" if whole else "L1, KL",
        "gigaflops": operations / 1e9,
        "lpips_gigaflops": of_lpips / 1e9,
        "step_seconds": median(seconds["step"]),
        "roof_gigaflops_per_second": {name: median(values) / 1e9 for name, values in speeds.items()},
        "fraction": vars(ratio(needed, seconds["step"])),
        "fraction_of_bf16": vars(ratio([operations / bf16 for bf16, _ in pairs], seconds["step"])),
        "host_synchronisations": host_synchronisations(step),
    }


def lpips_gigamacs(folder: Path, crop: int, batch: int, device: str) -> float:
    """GMAC of the distance and its gradient."""
    import torch

    from ldm_vae.autoencoder.losses import LPIPS
    from ldm_vae.runtime import gigamacs

    weights = backbone_file(folder)
    distance = LPIPS(weights.stem, str(weights)).to(device)  # type: ignore[arg-type]
    images, targets = torch.rand(2, batch, 3, crop, crop, device=device)
    return gigamacs(lambda: distance(images.requires_grad_(), targets).mean().backward())


def host_synchronisations(action: Callable[[], object]) -> int:
    """How often a call reads a number from the device, where a GPU would have to be waited for."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    with Counter() as counter:
        action()
    return counter.count


def measure_waits(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """A real training on synthetic images with one worker: what the loop waits for its batches, after the first."""
    from unittest.mock import patch

    from ldm_vae.autoencoder.models import AutoencoderConfig
    from ldm_vae.autoencoder.train_config import Phase, TrainVaeConfig, training_samples
    from ldm_vae.autoencoder.training import VaeModel
    from ldm_vae.data.sources import DataConfig
    from ldm_vae.data.synthetic.source import SyntheticConfig
    from ldm_vae.training import loader, trainer
    from ldm_vae.training.run_directory import RunDirectory
    from ldm_vae.training.trainer import TrainingConfig

    training: Any = TRAINING | {"device": arguments.device, "workers": 1}
    config = TrainVaeConfig(
        output=str(folder / "run"),
        data=DataConfig(source="synthetic", synthetic=SyntheticConfig(count=64, resolution=256)),
        autoencoder=AutoencoderConfig(preset=arguments.preset),
        loss=reconstruction_loss(folder, 0.5),
        phases=[Phase(steps=arguments.wait_steps, crop=arguments.crop, batch=arguments.batch)],
        training=TrainingConfig(**training),
    )
    times: list[tuple[float, float]] = []

    def timed(*sources: Any, **settings: Any) -> Iterator[Any]:
        with contextlib.closing(batches(*sources, **settings)) as stream:
            while True:
                asked = time.perf_counter()
                batch = next(stream, None)
                times.append((asked, time.perf_counter()))
                if batch is None:
                    return
                yield batch

    batches = loader.batches
    accelerator = accelerator_of(config.training)
    model = VaeModel(config, None, accelerator.device)
    run = RunDirectory(config.output, config)
    with patch.object(loader, "batches", timed):
        trainer.fit(model, training_samples(config), config.plan(1), config.training, run, accelerator)
    waited = sum(given - asked for asked, given in times[1:-1])  # not the start of the worker
    return {"steps": len(times) - 2, "waited_seconds": waited, "share": waited / (times[-1][0] - times[0][1])}


def accelerator_of(training: Any) -> Any:
    """An accelerator beside others of another precision, which accelerate keeps to one for a process."""
    from accelerate.state import AcceleratorState

    from ldm_vae.training.trainer import make_accelerator

    AcceleratorState._shared_state = {}
    return make_accelerator(training)


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from benchmarks.rounds import bar, bars_table, ratio

    seconds, names = found["seconds"], list(found["seconds"])
    over = {peer: {name: ratio(seconds[peer], seconds[name]) for name in names} for peer in (EXAMPLE, REPAIRED)}
    lines = [
        "# A training step",
        "",
        "| an update of both networks | seconds | the example over this | the repaired one over this |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {median(seconds[name]):.2f} | {over[EXAMPLE][name]} | {over[REPAIRED][name]} |" for name in names
    ]
    headings = ["terms", "GFLOP a step", "of these LPIPS", "seconds", "roof bf16, fp32", "of the roof", "of bf16's"]
    lines += ["", f"| `{found['preset']}`, {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    bars = [
        bar(f"{peer}, over {ours}", over[peer][ours].median, least)
        for peer in (EXAMPLE, REPAIRED)
        for ours, least in (("ours, bf16", 2.0), ("ours, fp32", 1.2))
    ]
    for row in found["roof"]:
        roofs = row["roof_gigaflops_per_second"]
        lines.append(
            f"| {row['terms']} | {row['gigaflops']:.0f} | {row['lpips_gigaflops']:.0f} | {row['step_seconds']:.2f} | "
            f"{roofs['bf16']:.0f}, {roofs['fp32']:.0f} GFLOP/s | {row['fraction']['median']:.0%} | "
            f"{row['fraction_of_bf16']['median']:.0%} |"
        )
        bars.append(bar(f"share of the roof, {row['terms']}", 100 * row["fraction"]["median"], 60, " %"))
    waits, synchronizations = found["waits"], max(row["host_synchronisations"] for row in found["roof"])
    bars.append(bar("time not spent waiting for data", 100 * (1 - waits["share"]), 98, " %"))
    bars.append(bar("steps without a host synchronization, log steps aside", 100.0 * (not synchronizations), 100, " %"))
    note = (
        f"{found['batch']} images of {found['crop']}x{found['crop']}, {found['threads']} threads, {found['device']}; "
        f"medians of {found['rounds']} rounds in which all take turns, ratios within a round [quartiles]. On both "
        f"sides an AutoencoderKL of widths {found['widths']}, L1, LPIPS ({found['perceptual']}), KL, hinge GAN, random "
        "weights. A call updates both networks: the example needs two iterations for that, each with a forward pass of "
        "its own, and so sees two batches; a single iteration of it takes about half of the time. It computes LPIPS "
        "without gradient, which costs less than ours and trains nothing; repaired, with it, the losses are equal. The "
        "example calibrates the weight of the GAN every step, ours once. Each has a process of its own, as of a "
        "user. The roof is a stack of 3x3 convolutions in the same rounds; operations are counted, "
        "forward and backward; LPIPS computes in fp32 and is set against the roof of fp32, the last column sets all "
        f"against that of bf16. Waits: a training of {waits['steps']} steps on synthetic images with one worker, the "
        f"first batch aside; host synchronizations of a step: {synchronizations}."
    )
    return "\n".join([*lines, "", *bars_table(bars), "", note, ""])
