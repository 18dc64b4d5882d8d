"""Make a small fixed chain with the tree of a checkout and write down the bytes of everything it made.

Proves that two trees of this package make equal bytes and open each other's files. Owns the chain, `DIGESTS.json` and
what counts as equal; drives the command line of a tree as a user does, imports nothing of it.

  python tools/fixed_chain.py runs/chain-old --tree ../old              # the chain, 3 minutes on one core
  python tools/fixed_chain.py runs/chain-new                            # of the checkout that holds this file
  python tools/fixed_chain.py --compare runs/chain-old/DIGESTS.json runs/chain-new/DIGESTS.json
  python tools/fixed_chain.py runs/opened --opens runs/chain-old        # does this tree open what the old one made?

`--processes 2` runs the commands that have a script for it under torchrun. Digests are of the same machine, versions
and number of processes: across those, floats differ in their last bits.

`DIGESTS.json` maps each file to the sha256 of its bytes, with these exceptions:

- JSON loses the keys in `VOLATILE` (time, speed, versions with commit and machine, checksums of files that hold them)
  before it is hashed; where there is none of them, the bytes count. Paths need no care: the commands run inside OUTPUT
  with relative names, to which the tree's `checkpoints` is linked.
- PNG loses the text `Software`, which names the version. Pixels, compression and all other texts count.
- Pages, tables for people and plots (`WORDS`) are listed as `present`; their wording may change.
- Not listed: `DIGESTS.json`, `logs/` (what the commands printed), `run.lock` (a process number).

`--opens` copies what the other tree made and runs the same commands there. Those that continue must leave a finished
result alone to the byte; those that do not (`Step.again`) must make the same files from the old models and shards. Then
each training is cut back to its first checkpoint and must end as it had ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGESTS = "DIGESTS.json"
BACKBONE = "backbone/squeeze.safetensors"
PRESENT = "present"
WORDS = (".html", ".md", ".svg")
"""Suffixes of what is read by people only."""
VOLATILE = {
    "started", "seconds", "time/seconds", "images_per_second", "time/images_per_second",
    "model_busy", "waited_for_images_seconds", "versions",
    "state.json", "detector.json", "run.json", "detector",
}  # fmt: skip
"""Keys of JSON at any depth. The last line: checksums (in `MANIFEST.json`, of a detector) of files that hold some."""
LAUNCHED = {name: f"{name.replace('-', '_')}.py" for name in ("train-vae", "train-diffusion", "generate", "evaluate")}
LAUNCHED["encode"] = "encode_dataset.py"
"""Command -> its script for several processes."""

DATA = "data.source=synthetic data.synthetic.count=60 data.synthetic.resolution=64"
TRAINING = (
    "training.device=cpu training.tracker=none training.log_every=1 training.warmup_steps=1 training.ema_decay=0.9 "
    "training.save_every=3 training.validate_every=3 training.preview_every=3 training.keep_checkpoints=9 "
)
VAE = f"{DATA} {TRAINING} held_out_resolution=64 held_out_images=4"
PICO = "autoencoder.preset=pico"
PERCEPTUAL = f"loss.perceptual=0.5 loss.perceptual_net=squeeze loss.perceptual_weights={BACKBONE}"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        folder: What it fills, below OUTPUT; no other step writes there.
        command: Its words, as in a shell.
        again: Run on its finished folder it says so. Others are run into an empty folder.
    """

    folder: str
    command: str
    again: bool = True


def chain() -> list[Step]:
    """Every command of the package that leaves files which others build on."""
    measured = f"{DATA} device=cpu resolution=64 autoencoder=vae"
    return [
        Step("images", "synth images --count 6 --resolution 64 --workers 1", again=False),
        Step("vae", f"train-vae {VAE} {PICO} {PERCEPTUAL} loss.mse=1 rate.target_nats=1 latents.scale_equivariance=0.5 "
             "training.precision=fp32 training.workers=1 output=vae "
             "'phases=[{steps: 4, crop: 32, batch: 4}, {steps: 5, crop: 64, batch: 4, micro_batch: 1}]'"),
        Step("vae-polished", f"train-vae {VAE} {PERCEPTUAL} initial=vae train=[decoder] output=vae-polished "
             "adversarial.loss=hinge adversarial.width=16 adversarial.warmup=0.2 adversarial.ramp=0.2 "
             "adversarial.r1_every=2 training.precision=fp32 training.workers=0 "
             "'phases=[{steps: 9, crop: 64, batch: 4}]'"),
        Step("vae-vq", f"train-vae {VAE} {PICO} autoencoder.kind=vq autoencoder.codebook_size=16 output=vae-vq "
             "training.precision=bf16 training.workers=0 'phases=[{steps: 6, crop: 32, batch: 4}]'"),
        Step("vae-nested", f"train-vae {VAE} {PICO} autoencoder.latent_channels=16 latents.nested=[4,8] "
             "autoencoder.linear_path=true output=vae-nested training.precision=bf16 training.workers=0 "
             "'phases=[{steps: 6, crop: 32, batch: 4}]'"),
        Step("latents", f"encode {measured} flip=true shard_size=16 workers=1 output=latents"),
        Step("codes", f"encode {measured} autoencoder=vae-vq shard_size=16 workers=0 store=indices output=codes"),
        Step("verified", "latents verify latents", again=False),
        Step("verified-codes", "latents verify codes", again=False),
        Step("diffusion", f"train-diffusion {TRAINING} training.precision=bf16 training.workers=1 latents=latents "
             "autoencoder=vae unet.preset=tiny unet.widths=[32,64] steps=9 batch=4 held_out=0.2 label_dropout=0.3 "
             "ema.snapshots=3 output=diffusion"),
        Step("ema", "ema diffusion --length 0.1 --out ema --device cpu", again=False),
        Step("samples", "generate diffusion --label star --label moon --count 4 --seed 7 --steps 4 --guidance 2 "
             "--neighbours latents --device cpu --out samples"),
        Step("entropy", "codec-fit autoencoder=vae latents=latents steps=5 output=entropy/codec.safetensors",
             again=False),
        Step("compressed", "compress images --autoencoder vae --quality 60 --device cpu --out compressed",
             again=False),
        Step("compressed-context", "compress images --autoencoder vae --entropy entropy/codec.safetensors "
             "--target-bpp 2 --device cpu --out compressed-context", again=False),
        Step("compressed-nested", "compress images --autoencoder vae-nested --progressive 4,8 --device cpu "
             "--out compressed-nested", again=False),
        Step("restored", "decompress compressed/**/*.ldmz --autoencoder vae --device cpu --out restored", again=False),
        Step("restored-context", "decompress compressed-context/**/*.ldmz --autoencoder vae "
             "--entropy entropy/codec.safetensors --device cpu --out restored-context", again=False),
        Step("restored-nested", "decompress compressed-nested/**/*.ldmz --autoencoder vae-nested --channels 4 "
             "--device cpu --out restored-nested", again=False),
        Step("evaluation", f"evaluate {measured} count=4 baseline_images=8 perceptual_net=squeeze "
             f"perceptual_weights={BACKBONE} output=evaluation"),
        Step("health", f"diagnose {measured} part=all count=16 output=health"),
        Step("detector", f"anomaly fit {measured} pipeline=diffusion data.held_out=0.5 false_positive_rate=0.1 "
             "output=detector"),
        Step("scores", "anomaly score detector=detector autoencoder=vae pipeline=diffusion data.source=folder "
             "data.path=images device=cpu output=scores"),
        Step("directions", f"directions fit {measured} count=40 components=2 output=directions",
             again=False),
        Step("between", "interpolate images --pairs 1 --autoencoder vae --pipeline diffusion --frames 3 --steps 2 "
             "--prior 2 --device cpu --out between"),
        Step("reconstructed", "reconstruct vae images --sample --device cpu --out reconstructed", again=False),
    ]  # fmt: skip


def box(tree: Path) -> list[Step]:
    """The models in `checkpoints/`: their pixels."""
    steps = []
    for model in sorted(path for path in (tree / "checkpoints").iterdir() if path.is_dir()):
        name, out = f"checkpoints/{model.name}", f"box-{model.name}"
        if (model / "model_index.json").is_file():
            steps.append(Step(out, f"generate {name} --count 2 --steps 2 --device cpu --out {out}"))
        else:
            size = 32 if model.name.startswith("digits") else 64  # those know no other
            steps.append(Step(out, f"reconstruct {name} images --size {size} --device cpu --out {out}", again=False))
    return steps


@dataclass(frozen=True)
class Chain:
    """A tree, the folder that it fills, and in how many processes."""

    tree: Path
    output: Path
    processes: int

    def prepare(self) -> None:
        """The link to the tree's models, and a perceptual backbone of random weights, as the tests have it."""
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        (self.output / "checkpoints").unlink(missing_ok=True)
        (self.output / "checkpoints").symlink_to(self.tree / "checkpoints")
        if not (self.output / BACKBONE).exists():
            write_backbone(self.output / BACKBONE)

    def steps(self) -> list[Step]:
        return [*chain(), *box(self.tree)]

    def run(self, step: Step) -> list[str]:
        """Nothing, or why it failed, with the end of what it printed."""
        command, started = self.command(step), time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=self.output, env=environment, capture_output=True, text=True)
        text = f"$ {' '.join(command)}\n{done.stdout}{done.stderr}"
        (self.output / "logs" / f"{step.folder}.txt").write_text(text)
        print(f"{time.monotonic() - started:6.1f} s  {step.folder}: {step.command[:80]}", flush=True)
        return [f"{step.folder}: exit code {done.returncode}\n{text[-3000:]}"] if done.returncode else []

    def command(self, step: Step) -> list[str]:
        name, *rest = shlex.split(step.command)
        words = [path for word in rest for path in self.files(word)]
        if self.processes == 1 or name not in LAUNCHED:
            return [sys.executable, "-m", "ldm_vae.cli", name, *words]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        return [sys.executable, *launcher, str(self.tree / "scripts" / LAUNCHED[name]), *words]

    def files(self, word: str) -> list[str]:
        """What a shell makes of `folder/**/*`."""
        if "/*" not in word:
            return [word]
        return sorted(str(path.relative_to(self.output)) for path in self.output.glob(word))

    def digests(self) -> dict[str, str]:
        return {name: digest(self.output / name) for name in files_below(self.output)}


def write_backbone(path: Path) -> None:
    """SqueezeNet's features in torchvision's layout, of random weights: always the same nonsense."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {"features.0": torch.randn(64, 3, 3, 3)}
    widths = {3: (64, 16), 4: (128, 16), 6: (128, 32), 7: (256, 32),
              9: (256, 48), 10: (384, 48), 11: (384, 64), 12: (512, 64)}  # fmt: skip
    for number, (given, squeezed) in widths.items():
        tensors[f"features.{number}.squeeze"] = torch.randn(squeezed, given, 1, 1)
        for side in (1, 3):
            tensors[f"features.{number}.expand{side}x{side}"] = torch.randn(4 * squeezed, squeezed, side, side)
    weights = {f"{name}.weight": tensor * (2 / tensor[0].numel()) ** 0.5 for name, tensor in tensors.items()}
    biases = {f"{name}.bias": torch.zeros(len(tensor)) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True)
    save_file(weights | biases, path)


def files_below(folder: Path) -> list[str]:
    """Relative names of all files that are listed; links are not followed."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        name.as_posix()
        for name in names
        if name.parts[0] not in (DIGESTS, "logs", "checkpoints") and name.name != "run.lock"
    ]


def digest(path: Path) -> str:
    """sha256 of what counts in a file, or `PRESENT`."""
    if path.suffix in WORDS:
        return PRESENT
    data = path.read_bytes()
    if path.suffix == ".json":
        data = without_volatile(data)
    elif path.suffix == ".jsonl":
        data = b"\n".join(without_volatile(line) for line in data.split(b"\n"))
    elif path.suffix == ".png":
        data = b"".join(chunk for chunk in png_chunks(data) if not chunk[4:].startswith(b"tEXtSoftware\0"))
    return hashlib.sha256(data).hexdigest()


def without_volatile(data: bytes) -> bytes:
    """JSON without the keys in `VOLATILE`, order kept; the bytes themselves where there is none."""

    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in VOLATILE}

    if not any(f'"{key}"'.encode() in data for key in VOLATILE):
        return data
    return json.dumps(json.loads(data, object_pairs_hook=kept)).encode()


def png_chunks(data: bytes) -> Iterator[bytes]:
    yield data[:8]
    start = 8
    while start < len(data):
        end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
        yield data[start:end]
        start = end


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """One line for each file that is not equal."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            lines.append(f"only {'before' if name in old else 'after'}: {name}")
        elif old[name] != new[name]:
            lines.append(f"differs: {name}")
    return lines


def compare(old: dict[str, str], new: dict[str, str]) -> int:
    """Prints the verdict; 0 where everything is equal."""
    lines = differences(old, new)
    present = sum(new.get(name) == PRESENT == found for name, found in old.items())
    equal = sum(new.get(name) == found for name, found in old.items()) - present
    print("\n".join([*lines, f"{equal} files equal, {present} present in both (not compared), {len(lines)} different"]))
    return 1 if lines else 0


def exact(folder: Path) -> dict[str, str]:
    """The bytes of a finished result, and when its tensors were written."""
    state = {}
    for name in files_below(folder):
        path = folder / name
        written = path.stat().st_mtime_ns if path.suffix == ".safetensors" else ""
        state[name] = f"{hashlib.sha256(path.read_bytes()).hexdigest()} {written}"
    return state


def cut_back(run: Path) -> None:
    """Leave of a finished training what a kill after its first checkpoint leaves."""
    for checkpoint in sorted((run / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    for model in ("autoencoder", "pipeline"):
        shutil.rmtree(run / model, ignore_errors=True)
    (run / "run.json").unlink()


def opens(chain_: Chain, old: Path) -> int:
    """Does this tree open what the other one left in `old`? 0 if so."""
    shutil.copytree(old, chain_.output, symlinks=True)
    chain_.prepare()
    problems = []
    for step in chain_.steps():
        folder = chain_.output / step.folder
        before = exact(folder)
        if not step.again:
            shutil.rmtree(folder, ignore_errors=True)
        problems += chain_.run(step)
        if step.again:
            problems += [f"{step.folder}, finished before: {line}" for line in differences(before, exact(folder))]
    for step in chain_.steps():
        if step.command.startswith("train-"):
            cut_back(chain_.output / step.folder)
            problems += chain_.run(step)
    print("\n".join(problems) if problems else "finished results were left alone")
    return compare(json.loads((old / DIGESTS).read_text()), chain_.digests()) or int(bool(problems))


def make(chain_: Chain) -> int:
    chain_.prepare()
    for step in chain_.steps():
        if problems := chain_.run(step):
            sys.exit(problems[0])
    found = chain_.digests()
    (chain_.output / DIGESTS).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{chain_.output / DIGESTS}: {len(found)} files")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, metavar="OUTPUT", help="a new folder")
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="checkout (default: this one)")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--opens", type=Path, metavar="OLD", help="the OUTPUT of another tree, to open with this one")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=DIGESTS)
    args = parser.parse_args()
    if args.compare:
        old, new = (json.loads(path.read_text()) for path in args.compare)
        return compare(old, new)
    if args.output is None or args.output.exists():
        parser.error("OUTPUT: give a new folder")
    chain_ = Chain(args.tree.resolve(), args.output.resolve(), args.processes)
    return opens(chain_, args.opens.resolve()) if args.opens else make(chain_)


if __name__ == "__main__":
    sys.exit(main())
