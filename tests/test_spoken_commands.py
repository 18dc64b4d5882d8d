"""Every command says what it will do with what, and at the end what was made, where, and what to type next.

Each command of the command line has a row in `CASES`. It runs twice, first with `--dry-run`: then it says the same
first line, writes nothing and says how long it would take. The next command of the last line is understood, and the
files that it names are there.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.evaluation.comparison import CompareConfig, compare
from ldm_vae.evaluation.rate_distortion import FrontierConfig, frontier
from tests.evaluation.test_sweep import EVALUATE, RECIPE, InProcess
from tests.latents.test_import_lightningdit_lightningdit import extract

TRAINING = [
    "training.precision=fp32", "training.workers=0", "training.log_every=1", "training.warmup_steps=1",
    "training.device=cpu", "training.tracker=none",
]  # fmt: skip
SMALL = ["resolution=64", "device=cpu"]
ROOT = Path(__file__).parents[1]


@dataclass
class Said:
    """What a command printed, in a dry run and in a run. `output`: what it was to write."""

    output: Path
    dry: list[str]
    whole: list[str]


@dataclass
class World:
    """A folder in which every command can run; a command that needs the result of another one runs that first."""

    root: Path
    images: Path
    done: dict[str, Said] = field(default_factory=dict)

    @property
    def data(self) -> list[str]:
        return [f"data={self.images}", "data.held_out=0.5"]

    def path(self, name: str) -> Path:
        """The output of a command, which has run by then."""
        return self.run(name).output

    def new(self, name: str) -> Path:
        return self.root / name.replace(" ", "-")

    @property
    def vae(self) -> str:
        return f"autoencoder={self.path('train-vae')}"

    @property
    def latents(self) -> str:
        return f"latents={self.path('encode')}"

    def copy(self, of: str, name: str) -> Path:
        """A copy of the output of a command that another one changes."""
        target = self.new(name)
        if not target.exists():
            shutil.copytree(self.path(of), target)
        return target

    def run(self, name: str) -> Said:
        if name not in self.done:
            case = CASES[name]
            words = case(self)
            output = next((Path(w.split("=", 1)[1]) for w in words if re.match(r"(output|export)=", w)), self.new(name))
            before = contents(self.root)
            dry = self.said(name, [*words, "--dry-run"])
            assert contents(self.root) == before, f"{name} --dry-run writes"
            self.done[name] = Said(output, dry, self.said(name, words))
        return self.done[name]

    def said(self, name: str, words: Sequence[str]) -> list[str]:
        """The lines on standard output."""
        AcceleratorState._reset_state(reset_partial_state=True)
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["ldm-vae", *name.split(), *words])
            code = SWEEPS[name](words) if name in SWEEPS else cli.main([*name.split(), *words])
        assert code == 0, f"{name}: {out.getvalue()[-3000:]}{errors.getvalue()[-3000:]}"
        return out.getvalue().splitlines()


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def sweep(config: type, function: Callable[..., Any]) -> Callable[[Sequence[str]], int]:
    """A sweep whose commands run in this process."""

    def run(words: Sequence[str]) -> int:
        settings = [word for word in words if "=" in word]
        function(configuration.load(config, None, settings), InProcess(), dry_run="--dry-run" in words)
        return 0

    return run


SWEEPS = {"compare": sweep(CompareConfig, compare), "frontier": sweep(FrontierConfig, frontier)}


def recipe(world: World) -> list[str]:
    path = world.root / "recipe.yaml"
    if not path.exists():
        path.write_text(RECIPE)
    return [f"vae={path}", "steps=2", f"evaluate={[*EVALUATE]}".replace("'", '"')]


def imported(world: World) -> list[str]:
    source = world.root / "extracted"
    if not source.exists():
        extract(source)
    return [str(source), f"output={world.new('imported')}", f"autoencoder={three_channels(world)}", "resolution=32"]


def three_channels(world: World) -> Path:
    from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder

    path = world.root / "three-channels"
    if not path.exists():
        build_autoencoder(AutoencoderConfig(preset="pico", latent_channels=3)).save_pretrained(path)
    return path


def damaged(world: World) -> Path:
    copy = world.copy("encode", "repaired")
    (copy / "shard-000000.safetensors").unlink(missing_ok=True)
    return copy


def compressed(world: World) -> list[str]:
    return [str(sorted(world.path("compress").rglob("*.ldmz"))[0])]


Case = Callable[[World], list[str]]
CASES: dict[str, Case] = {
    "demo": lambda w: [
        str(w.images / "a"), w.vae, f"model={w.path('train-diffusion')}", "resolution=64", "count=1", "steps=1",
        "device=cpu", "precision=fp32", f"output={w.new('demo')}",
    ],
    "train-vae": lambda w: [
        *w.data, *TRAINING, "phases=[{steps: 2, crop: 32, batch: 2}]", "autoencoder.preset=pico",
        "held_out_resolution=64", "held_out_images=2", f"output={w.new('vae')}",
    ],
    "encode": lambda w: [*w.data, w.vae, *SMALL, "workers=0", f"output={w.new('latents')}"],
    "latents info": lambda w: [str(w.path("encode"))],
    "latents verify": lambda w: [str(w.path("encode"))],
    "latents repair": lambda w: [*w.data, w.vae, *SMALL, "workers=0", f"output={damaged(w)}"],
    "latents append": lambda w: [
        *w.data, w.vae, *SMALL, "workers=0", "id_prefix=more/", f"output={w.copy('encode', 'appended')}",
    ],
    "latents stats": lambda w: [str(w.path("encode")), f"output={w.new('stats')}"],
    "latents decode": lambda w: [w.latents, w.vae, "count=2", "device=cpu", f"output={w.new('sheet')}.png"],
    "latents export": lambda w: [w.latents, "to=parquet", f"output={w.new('exported')}"],
    "latents import": imported,
    "train-diffusion": lambda w: [
        w.latents, w.vae, *TRAINING, "unet.preset=tiny", "unet.widths=[32,64]", "steps=2", "batch=2", "neighbours=0",
        "held_out=0.5", f"output={w.new('diffusion')}",
    ],
    "generate": lambda w: [
        str(w.path("train-diffusion")), "count=2", "steps=2", "device=cpu", f"output={w.new('samples')}",
    ],
    "reconstruct": lambda w: [w.vae, f"images={w.images / 'a' / '000.png'}", f"output={w.new('seen')}", "device=cpu"],
    "evaluate": lambda w: [
        w.vae, *w.data, *SMALL, "count=4", "examples=1", "codecs=[]", f"output={w.new('evaluation')}",
    ],
    "frontier": lambda w: [*recipe(w), "targets_nats=[3.0]", f"output={w.new('frontier')}"],
    "compare": lambda w: [
        *recipe(w), 'kinds=[{name: kl, overrides: ["autoencoder.kind=kl"]}]', f"output={w.new('compare')}",
    ],
    "diagnose": lambda w: [w.vae, *w.data, *SMALL, "count=8", f"output={w.new('health')}"],
    "compress": lambda w: [str(w.images / "a" / "000.png"), w.vae, "device=cpu", f"output={w.new('small')}"],
    "decompress": lambda w: [*compressed(w), w.vae, "device=cpu", f"output={w.new('large')}"],
    "codec fit": lambda w: [w.vae, w.latents, "steps=2", f"output={w.new('codec')}.safetensors"],
    "codec compress": lambda w: [str(w.images / "b" / "001.png"), w.vae, "device=cpu", f"output={w.new('small2')}"],
    "codec decompress": lambda w: [*compressed(w), w.vae, "device=cpu", f"output={w.new('large2')}"],
    "codec bench": lambda w: [
        w.vae, *w.data, *SMALL, "count=1", "qualities=[10,50,80]", "codecs=[JPEG]", "codec_qualities=[10,50,80]",
        f"entropy={w.path('codec fit')}", f"output={w.new('bench')}",
    ],
    "directions fit": lambda w: [w.vae, *w.data, "part=all", *SMALL, "components=1", f"output={w.new('directions')}"],
    "directions apply": lambda w: [
        str(w.path("directions fit")), "brightness", str(w.images / "a" / "000.png"), w.vae, "strengths=-1,0,1",
        "device=cpu", f"output={w.new('moved')}",
    ],
    "directions evaluate": lambda w: [
        str(w.path("directions fit")), w.vae, *w.data, "part=all", *SMALL, "count=8", "strengths=-1,0,1",
        "names=[brightness]", "examples=1", f"output={w.new('directions-results')}",
    ],
    "interpolate": lambda w: [
        str(w.images / "a" / "000.png"), str(w.images / "b" / "001.png"), w.vae, "frames=3", *SMALL,
        f"output={w.new('between')}",
    ],
    "explore": lambda w: [
        str(ROOT / "checkpoints" / "digits-vae-2d"), "count=200", "device=cpu", f"export={w.new('explorer')}.html",
    ],
    "anomaly fit": lambda w: [
        w.vae, f"data={w.images}", "data.held_out=0.3", *SMALL, "false_positive_rate=0.3",
        f"output={w.new('detector')}",
    ],
    "anomaly score": lambda w: [
        str(w.path("anomaly fit")), w.vae, f"data={w.images / 'a'}", "count=2", "device=cpu", "shown=1",
        f"output={w.new('scores')}",
    ],
    "anomaly evaluate": lambda w: [
        str(w.path("anomaly fit")), w.vae, "data.synthetic.count=24", "data.synthetic.resolution=64",
        "data.synthetic.defects=0.5", "count=10", "device=cpu", f"output={w.new('anomaly')}",
    ],
    "synth": lambda w: [f"output={w.new('toys')}", "count=10", "resolution=64", "workers=1"],
    "report": lambda w: [str(w.path("train-vae").parent), f"output={w.new('report')}.html"],
    "model convert": lambda w: [
        str(w.path("train-vae")), f"output={w.new('converted')}", "to=checkpoint",
    ],
    "model card": lambda w: [str(w.copy("train-vae", "described"))],
    "model ema": lambda w: [str(w.path("train-diffusion")), "lengths=0.1,0.2", "device=cpu"],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("world"), image_folder)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_command_is_in_the_table() -> None:
    assert list(CASES) == list(cli.COMMANDS) or sorted(CASES) == sorted(cli.COMMANDS)


NO_NEXT = {"explore": "its page is the end"}
ALIASES = {"codec compress": "compress", "codec decompress": "decompress"}


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_it_does_and_what_it_made(name: str, world: World) -> None:
    said = world.run(name)
    first, last, dry_last = said.whole[0], said.whole[-1], said.dry[-1]
    assert first.startswith(f"{ALIASES.get(name, name)}: "), first
    assert len(first.split("; ")) >= 2, f"{first}: says nothing but its name"
    assert said.dry[0].split("; ")[0] == first.split("; ")[0]
    assert ": nothing was written; " in dry_last
    assert dry_last.endswith("; the same command without --dry-run does it"), dry_last
    assert re.search(r"about|not measured|not known|a few seconds|at once|as long as|would be", dry_last), dry_last
    place, _, rest = last.partition(": ")
    assert place
    assert Path(place).exists() or name in ("latents stats",), f"{place} is not there"
    what, marker, words = rest.partition("; next: ")
    assert what
    assert marker, f"{last}: says no next command"
    check_next(shlex.split(words))
    many = r"(?<![.,\d])1 (?:images|shards|files|samples|steps|classes|pairs|pictures)\b"
    assert not re.findall(many, "\n".join(said.whole))
    doubled = [line for line, after in zip(said.whole, said.whole[1:]) if line.strip() and line == after]
    assert doubled == []


def check_next(words: list[str]) -> None:
    """The next command is understood, loads, and names files that are there."""
    if words[:3] == ["python", "-m", "webbrowser"]:
        assert Path(words[3]).is_file(), words
        return
    if words[:2] == ["python", "-c"]:
        compile(words[2], "next", "exec")
        assert Path(re.findall(r'data_files="(.*?)"', words[2])[0]).is_file()
        return
    assert words[0] == "ldm-vae"
    name, rest, advice = cli.find_command(words[1:])
    reader = cli.ArgumentReader(name)
    read = reader.read(rest)
    assert advice == read.advice == []
    loaded = configuration.load(cli.resolve(cli.COMMANDS[name].config), None, read.settings)
    for key, value in configuration.to_dict(loaded).items():
        if key in ("output", "export", "device", "to") or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and one.startswith("/"):
                assert Path(one).exists(), f"{shlex.join(words)}: {one} is not there"
    output = getattr(loaded, "output", None)
    assert output is None or not Path(output).exists(), f"{output}: is there already"
