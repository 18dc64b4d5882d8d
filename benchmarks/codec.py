"""Encoding and decoding: the Stable Diffusion autoencoder by our way and by the usual one, and our architecture.

    python -m benchmarks encode OUTPUT
    python -m benchmarks decode OUTPUT

First the same weights: diffusers' `AutoencoderKL` in the SD configuration as the commands run it, in bf16 and fp32,
against the usual loop: fp32, NCHW, image by image. Our way is `prepare_for_inference`, `encode_moments`, `decode`. Then
our presets beside that autoencoder and `AutoencoderTiny`, all by our way and in one precision, and the roof of the
machine. Random weights: they change no cost.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

SUMMARY = "seconds an image: the SD autoencoder by our way and the usual one, AutoencoderTiny, our presets"

USUAL, SD, TINY, ROOF = "usual loop", "sd", "AutoencoderTiny", "roof"
OTHER_PRESETS = ("small", "base")
CHANNELS = 4
TURN_SECONDS = 0.2

SAME_WEIGHTS_BAR, OVER_SD_BAR, OVER_TINY_BAR, ROOF_BAR = 1.8, 50.0, 5.0, 0.65
EQUAL_DIFFERENCE, EQUAL_DECIBELS = 1e-4, 30.0
"""What counts as equal output: in fp32 the largest difference of a latent or pixel value; in bf16, which keeps 8 bits
of each activation, the signal-to-noise ratio."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="side of the images (512)")
    parser.add_argument("--rounds", type=int, default=7, help="of our architecture's contestants (7)")
    parser.add_argument("--slow-rounds", type=int, default=3, help="with the SD autoencoder in them (3)")
    parser.add_argument("--batch", type=int, default=1, help="images a call of every way but the usual loop (1)")
    parser.add_argument("--sd-preset", default="sd", metavar="PRESET", help="of the SD autoencoder (sd)")
    parser.add_argument("--preset", default="nano", help="of our architecture (nano)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")


@dataclass(frozen=True)
class Task:
    """One direction, and what it starts from.

    Attributes:
        direction: "encode" or "decode".
        inputs: images (n, 3, s, s) in [-1, 1] or latents (n, 4, s/8, s/8), float32.
    """

    direction: str
    inputs: Any

    def ours(self, autoencoder: Any) -> Any:
        """The latent means, or the images, of all inputs at once, as the commands compute them."""

        return autoencoder.encode_moments(self.inputs)[0] if self.encodes else autoencoder.decode_images(self.inputs)

    def usual(self, autoencoder: Any) -> Any:
        """The same, one after the other, as diffusers' documentation does it."""
        import torch

        with torch.no_grad():
            if self.encodes:
                return torch.cat([autoencoder.encode(one[None]).latent_dist.mean for one in self.inputs])
            return torch.cat([autoencoder.decode(one[None]).sample.clamp(-1, 1) for one in self.inputs])

    @property
    def encodes(self) -> bool:
        return self.direction == "encode"


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Seconds an image of every contestant, and what the bars are about."""
    import torch

    from ldm_vae.runtime import reuse_freed_memory

    reuse_freed_memory()
    torch.manual_seed(0)
    task = make_task(arguments)
    progress("the same weights, two ways ...")
    same = same_weights(task, arguments)
    ours, models = {}, contestants(arguments)
    work = {name: nominal_gigamacs(task, model) for name, model in models.items()}
    for precision in ("fp32", "bf16"):
        progress(f"our architecture, {precision} ...")
        ours[precision] = architectures(
            task, arguments, {name: prepared(model, precision) for name, model in models.items()}, work
        )
    settings = {name: getattr(arguments, name) for name in ("size", "batch", "rounds", "slow_rounds", "preset")}
    settings |= {"direction": task.direction, "device": arguments.device, "threads": torch.get_num_threads()}
    return settings | {"same_weights": same, "architectures": ours, "bars": bars(same, ours, arguments.preset)}


def make_task(arguments: argparse.Namespace) -> Task:
    import torch

    size, batch, device = arguments.size, arguments.batch, arguments.device
    if arguments.subject == "encode":
        coarse = torch.rand(batch, 3, size // 16, size // 16, device=device) * 2 - 1
        return Task("encode", torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))
    return Task("decode", torch.randn(batch, CHANNELS, size // 8, size // 8, device=device))


def sd_autoencoder(arguments: argparse.Namespace) -> Any:
    """Float32, in diffusers' own layout and with its own layers, on the device."""
    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder

    config = AutoencoderConfig(architecture="sd", preset=arguments.sd_preset, latent_channels=CHANNELS)
    built = build_autoencoder(config)
    return type(built).from_config(built.config).eval().requires_grad_(False).to(arguments.device)


def prepared(autoencoder: Any, precision: str) -> Any:
    """A copy by our way, in "fp32" or "bf16"."""
    import torch

    from ldm_vae.autoencoder.fast_layers import prepare_for_inference

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return prepare_for_inference(torch.nn.Module.to(copy.deepcopy(autoencoder), dtype))


def same_weights(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """The usual loop against our way in bf16 and in fp32: seconds an image, ratios, how far the outputs are apart."""
    import torch

    from benchmarks.outsider import Outsider
    from benchmarks.rounds import alternating, ratio

    plain = sd_autoencoder(arguments)
    ways = {precision: prepared(plain, precision) for precision in ("fp32", "bf16")}
    expected = task.usual(plain)
    found: dict[str, Any] = {}
    for precision, autoencoder in ways.items():
        error = task.ours(autoencoder) - expected
        signal_to_noise = 10 * torch.log10(expected.square().mean() / error.square().mean())
        found[precision] = {"largest_difference": float(error.abs().max()), "decibels": float(signal_to_noise)}
    actions: dict[str, Callable[[], object]] = {name: partial(task.ours, one) for name, one in ways.items()}
    with Outsider(usual_loop, arguments) as usual:
        seconds = alternating({USUAL: usual} | actions, arguments.slow_rounds, device=arguments.device)
    count = len(task.inputs)
    for precision in ways:
        over = ratio(seconds[USUAL], seconds[precision])
        found[precision] |= {"seconds": median(seconds[precision]) / count, "ratio": vars(over)}
    return found | {"usual_seconds": median(seconds[USUAL]) / count}


def usual_loop(arguments: argparse.Namespace) -> Callable[[], object]:
    """A call is the usual loop over all inputs: of the process that a user would start for it."""
    plain, task = sd_autoencoder(arguments), make_task(arguments)
    return lambda: task.usual(plain)


def architectures(
    task: Task, arguments: argparse.Namespace, models: Mapping[str, Any], work: Mapping[str, float]
) -> dict[str, Any]:
    """Contestant -> seconds an image, GMAC, GMAC/s, and the fraction of the roof that was measured in the same rounds.

    The SD autoencoder takes part in a few rounds with the preset: one call of it lasts as long as a hundred others.
    """
    from benchmarks.roof import roof_action
    from benchmarks.rounds import alternating, ratio

    actions: dict[str, Callable[[], object]] = {name: partial(task.ours, model) for name, model in models.items()}
    roof, flops = roof_action(models[arguments.preset].dtype, arguments.device)
    actions[ROOF] = roof
    quick = {name: action for name, action in actions.items() if name != SD}
    slow = {name: actions[name] for name in (arguments.preset, SD)}
    seconds = alternating(quick, arguments.rounds, seconds=TURN_SECONDS, device=arguments.device)
    slow_seconds = alternating(slow, arguments.slow_rounds, seconds=TURN_SECONDS, device=arguments.device)
    seconds[SD] = slow_seconds[SD]
    ours, count = seconds[arguments.preset], len(task.inputs)
    rows: dict[str, Any] = {}
    for name in models:
        rows[name] = {"seconds": median(seconds[name]) / count, "gigamacs": work[name]}
        if name != SD:
            rate = [work[name] * count * roof_seconds / one for one, roof_seconds in zip(seconds[name], seconds[ROOF])]
            rows[name]["of_roof"] = median(rate) / (flops / 2e9)
    return {
        "rows": rows,
        "roof_gigamacs_per_second": flops / 2e9 / median(seconds[ROOF]),
        "over_sd": vars(ratio(slow_seconds[SD], slow_seconds[arguments.preset])),
        "over_tiny": vars(ratio(seconds[TINY], ours)),
    }


def contestants(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every autoencoder as it was built, float32."""
    from ldm_vae.autoencoder.deterministic import AutoencoderTiny
    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder

    presets = dict.fromkeys((arguments.preset, *OTHER_PRESETS))
    ours = {name: build_autoencoder(AutoencoderConfig(preset=name, latent_channels=CHANNELS)) for name in presets}
    models = ours | {TINY: AutoencoderTiny(), SD: sd_autoencoder(arguments)}
    return {name: model.eval().requires_grad_(False).to(arguments.device) for name, model in models.items()}


def nominal_gigamacs(task: Task, autoencoder: Any) -> float:
    """GMAC of one image for the plain network; operations that the fast version saves or adds do not count."""
    import torch

    from ldm_vae.runtime import gigamacs

    shapes = copy.deepcopy(autoencoder).to("meta")
    one = task.inputs[:1].to("meta")
    with torch.enable_grad():  # the plain forward
        return gigamacs(lambda: shapes.encode(one) if task.encodes else shapes.decode(one))


def bars(same: Mapping[str, Any], ours: Mapping[str, Any], preset: str) -> list[dict[str, Any]]:
    """The promises: ratios in both precisions, and the fraction of the roof."""
    from benchmarks.rounds import bar

    found = []
    equal = same["bf16"]["decibels"] >= EQUAL_DECIBELS
    name = f"same weights, bf16, over the usual loop, equal to {EQUAL_DECIBELS:g} dB"
    found.append(bar(name, same["bf16"]["ratio"]["median"], SAME_WEIGHTS_BAR) | ({} if equal else {"reached": False}))
    margin = EQUAL_DIFFERENCE / max(same["fp32"]["largest_difference"], 1e-12)
    found.append(bar(f"same weights, fp32: {EQUAL_DIFFERENCE:g} over the largest difference", margin, 1))
    for precision, one in ours.items():
        found += [
            bar(f"`{preset}` over the SD autoencoder, {precision}", one["over_sd"]["median"], OVER_SD_BAR),
            bar(f"`{preset}` over `{TINY}`, {precision}", one["over_tiny"]["median"], OVER_TINY_BAR),
            bar(f"`{preset}`, of the roof, {precision}", one["rows"][preset]["of_roof"], ROOF_BAR, ""),
        ]
    return found


def text(found: dict[str, Any]) -> str:
    """`results.md`."""
    from benchmarks.rounds import Ratio, bars_table

    direction = "Encoding" if found["direction"] == "encode" else "Decoding"
    same, size = found["same_weights"], found["size"]
    lines = [
        f"# {direction} at {size} x {size}", "",
        "The SD autoencoder, the same weights two ways:", "",
        "| way | s/image | usual loop over it | largest difference | signal to noise |",
        "|---|---|---|---|---|",
        f"| the usual loop: fp32, NCHW, image by image | {same['usual_seconds']:.3g} | 1 | – | – |",
    ]  # fmt: skip
    for precision in ("fp32", "bf16"):
        one = same[precision]
        lines.append(
            f"| ours, {precision} | {one['seconds']:.3g} | {Ratio(**one['ratio'])} | {one['largest_difference']:.1e} | "
            f"{one['decibels']:.0f} dB |"
        )
    for precision, one in found["architectures"].items():
        roof = one["roof_gigamacs_per_second"]
        lines += ["", f"Architectures in {precision}, all by our way; the roof is {roof:.0f} GMAC/s:", ""]
        lines += ["| autoencoder | s/image | GMAC | GMAC/s | of the roof |", "|---|---|---|---|---|"]
        for name, row in one["rows"].items():
            rate = row["gigamacs"] / row["seconds"]
            share = f"{row['of_roof']:.0%}" if "of_roof" in row else f"{rate / roof:.0%}"
            lines.append(f"| `{name}` | {row['seconds']:.3g} | {row['gigamacs']:.3g} | {rate:.0f} | {share} |")
        lines += [
            "",
            f"`{found['preset']}` is {Ratio(**one['over_sd'])} times as fast as the SD autoencoder and "
            f"{Ratio(**one['over_tiny'])} times as fast as `{TINY}`.",
        ]
    lines += ["", *bars_table(found["bars"]), "", how(found)]
    return "\n".join(lines) + "\n"


def how(found: dict[str, Any]) -> str:
    """The paragraph on how it was measured and where we lose."""
    missed = [one["bar"] for one in found["bars"] if not one["reached"]]
    return (
        f"Medians of {found['rounds']} rounds ({found['slow_rounds']} with the SD autoencoder), ratios within a round "
        f"with quartiles; {found['threads']} threads on {found['device']}, {found['batch']} image(s) a call, random "
        "weights. The usual loop has a process of its own, as a user would start it. GMAC are those of the networks as "
        "written; our way leaves some of "
        "the SD autoencoder's out, so its fraction of the roof can pass what the arithmetic units did. "
        f"Where we lose: {'; '.join(missed) if missed else 'no bar is missed'}."
    )
