"""A finished run as one HTML page that needs no other file: pictures, curves, figures, time, commands.

Owns gathering and embedding; the words and the look are in `templates/report.html`. A stage that is missing
leaves its section out. Everything shown is read from the stages' folders, nothing is computed again.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ldm_vae import provenance
from ldm_vae.errors import UserError
from ldm_vae.evaluation.pages import Picture, embed, image_label, template_environment
from ldm_vae.evaluation.plots import autoencoder_panels, diffusion_panels, read_alarms, read_metrics, render_svg
from ldm_vae.evaluation.reconstruction import read_evaluation
from ldm_vae.evaluation.study import enlarged_lines, read_config_yaml, read_json
from ldm_vae.files import check_tensor_file, write_text
from ldm_vae.metrics import METRIC_TITLES
from ldm_vae.utils.progress import begin, end, end_dry_run, open_page
from ldm_vae.utils.text import pluralize

STAGES = {
    "vae": "Train the autoencoder",
    "latents": "Encode the images",
    "diffusion": "Train the U-Net",
    "samples": "Generate images",
    "evaluation": "Measure reconstructions",
}
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SAMPLES_PER_CLASS = 4
SAMPLES_WITHOUT_CLASSES = 24
HEADER_SAMPLES = 6
MAXIMUM_CLASSES = 16
MAXIMUM_EXAMPLES = 8


@dataclass(frozen=True)
class StageRecord:
    """One folder of the run and what its `run.json` says; `record` is empty while it has not finished."""

    name: str
    title: str
    directory: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return float(self.record.get("seconds", 0.0))

    @property
    def started(self) -> str:
        """ISO 8601 UTC, so that text order is time order."""
        return str(self.record.get("started", ""))

    @property
    def command(self) -> str:
        return shlex.join(self.record.get("command", []))


def write_report(run_root: str | Path, output: str | Path | None = None) -> Path:
    """Write the page and return its path; an older page is replaced.

    Raises:
        UserError: the folder is missing or holds no stage of a run.
    """
    started = time.time()
    root = Path(run_root)
    page = Path(output) if output else root / "report.html"
    stages = read_stages(root)
    write_text(page, render(root.resolve().name, stages, shlex.join(["ldm-vae", "report", str(run_root)])))
    if page.parent.resolve() == root.resolve():
        provenance.write_run_record(root, None, started, time.time() - started)
    return page


def read_stages(root: Path) -> list[StageRecord]:
    """The stages present under `root`, known ones first in the order of the journey, others by name."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds vae, latents, diffusion ...")
    others = sorted(path.parent.name for path in root.glob(f"*/{provenance.RUN_RECORD}"))
    names = [*STAGES, *(name for name in others if name not in STAGES)]
    stages = [
        StageRecord(name, STAGES.get(name, name), root / name, _finished_record(root / name))
        for name in names
        if (root / name).is_dir()
    ]
    if not any(stage.record for stage in stages):
        known = ", ".join(STAGES)
        raise UserError(f"{root}: no stage has finished here; a run has folders like {known}, with a run.json each")
    return stages


def render(title: str, stages: list[StageRecord], command: str) -> str:
    """The page as HTML text; `command` is the one that writes it."""
    from markupsafe import Markup

    environment = template_environment()
    environment.globals["plot"] = lambda panel: Markup(render_svg(panel))
    folders = {stage.name: stage.directory for stage in stages}
    absent = Path("absent")
    vae, diffusion = folders.get("vae", absent), folders.get("diffusion", absent)
    settings = {name: read_config_yaml(folder / "config.yaml") for name, folder in folders.items()}
    rate = settings.get("vae", {}).get("rate", {})
    alarms = read_alarms(vae / "metrics.jsonl")
    diffusion_metrics = read_metrics(diffusion / "metrics.jsonl")
    manifest = read_json(folders.get("latents", absent) / "manifest.json")
    samples = read_samples(folders.get("samples", absent))
    results = read_evaluation(folders.get("evaluation", absent))
    context = {
        "title": title,
        "command": command,
        "stages": stages,
        "finished": sorted((stage for stage in stages if stage.record), key=lambda stage: stage.started),
        "total_seconds": sum(stage.seconds for stage in stages),
        "longest_seconds": max(1e-9, *(stage.seconds for stage in stages)),
        "metric_titles": METRIC_TITLES,
        "training_seconds": sum(stage.seconds for stage in stages if stage.name in ("vae", "diffusion")),
        "machines": sorted(
            {
                stage.record["versions"].get("machine", "a machine that is not recorded")
                for stage in stages
                if stage.record
            }
        ),
        "code": code_size(manifest, results),
        "synthetic": _synthetic(settings.get("vae", {})) and _synthetic(results.get("config", settings.get("vae", {}))),
        "results": results,
        "enlarged": enlarged_lines(results),
        "examples": read_examples(folders.get("evaluation", absent)),
        "samples": samples,
        "header_samples": header_samples(samples),
        "vae_panels": autoencoder_panels(
            read_metrics(vae / "metrics.jsonl"),
            rate.get("target_nats") if rate.get("mode") == "target" else None,
            alarms,
        ),
        "alarms": alarms,
        "diffusion_panels": diffusion_panels(diffusion_metrics),
        "scored": any(name.startswith("samples/kid") for name in diffusion_metrics),
        "encoded": manifest.get("count", 0),
        "parameters": {"vae": count_parameters(vae), "diffusion": count_parameters(diffusion)},
        "configurations": {
            stage.title: (stage.directory / "config.yaml").read_text()
            for stage in stages
            if (stage.directory / "config.yaml").is_file()
        },
        "versions": next((stage.record["versions"] for stage in stages if stage.record), {}),
    }
    return environment.get_template("report.html").render(context)


def _synthetic(settings: dict[str, Any]) -> bool:
    return settings.get("data", {}).get("source") == "synthetic"


def code_size(manifest: dict[str, Any], results: dict[str, Any]) -> dict[str, Any] | None:
    """Sides in pixels of an `image`, `channels` and sides of its `latent`: of the encoded images, else of those that
    were measured; None where there are neither."""
    if manifest.get("latent_shape") and manifest.get("preprocessing"):
        channels, *latent = manifest["latent_shape"]
        image = [manifest["preprocessing"][side] for side in ("height", "width")]
    elif results:
        model, side = results["autoencoder"], results["protocol"]["resolution"]
        channels, image, latent = model["latent_channels"], [side, side], [side // model["downsampling"]] * 2
    else:
        return None
    fewer = 3 * image[0] * image[1] / (channels * latent[0] * latent[1])
    return {"image": image, "channels": channels, "latent": latent, "fewer": fewer}


def read_examples(folder: Path) -> list[dict[str, Any]]:
    """Pictures and figures of the evaluation's examples: originals, latents, reconstructions, differences."""
    results = read_evaluation(folder)
    images = {image["id"]: image for image in results.get("images", [])}
    rows = [row["name"] for row in results.get("rows", [])]
    found = []
    for example in results.get("examples", [])[:MAXIMUM_EXAMPLES]:
        measured = images.get(example["id"], {})
        pictures = {
            name: embed(folder / "examples" / file, f"{name} of {example['label'] or example['id']}")
            for name, file in example["files"].items()
        }
        decoded, linear = measured.get(rows[0], {}), measured.get(rows[-1], {})
        found.append({**example, "pictures": pictures, "decoded_db": decoded["psnr"], "linear_db": linear["psnr"]})
    return found


def read_samples(folder: Path) -> list[tuple[str, list[Picture]]]:
    """(label, first pictures) of a folder that `generate` filled; files of no picture and contact sheets are passed."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURE_SUFFIXES and not path.stem.startswith(("grid", "sheet", ".")):
            groups.setdefault(image_label(path, folder), []).append(path)
    count = SAMPLES_PER_CLASS if len(groups) > 1 else SAMPLES_WITHOUT_CLASSES
    return [
        (label, [embed(path, f"generated: {label}" if label else "generated") for path in paths[:count]])
        for label, paths in list(groups.items())[:MAXIMUM_CLASSES]
    ]


def header_samples(samples: list[tuple[str, list[Picture]]]) -> list[Picture]:
    """The first picture of each class, in turn the second ones, until the header is full."""
    rounds = zip_longest(*(pictures for _, pictures in samples))
    return [picture for pictures in rounds for picture in pictures if picture][:HEADER_SAMPLES]


def count_parameters(folder: Path) -> int:
    """Parameters of the exported model under `folder`, checkpoints left out, from the safetensors headers."""
    from safetensors import safe_open

    total = 0
    pattern = "autoencoder" if folder.name == "vae" else "unet"
    for path in sorted(folder.glob(f"**/{pattern}/*.safetensors")):
        if "checkpoints" in path.relative_to(folder).parts:
            continue
        check_tensor_file(path)
        with safe_open(path, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
        break
    return total


def _finished_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / provenance.RUN_RECORD)
    return record if record.get("finished") else {}


@dataclass(frozen=True)
class ReportConfig:
    """`ldm-vae report`.

    The folder holds those of the stages: vae, latents, diffusion, evaluation, samples. Missing ones are left out. The
    page needs no other file.

      ldm-vae report runs/quickstart

    Args:
        run: the folder with the folders of the stages (vae, latents, diffusion ...).
        output: the HTML file; null: report.html in that folder.
    """

    run: str = "???"
    output: str | None = None


def report(config: ReportConfig, *, dry_run: bool = False) -> int:
    """Write the page and print its size. `dry_run`: read the stages only. Returns: 0. Raises: UserError."""
    stages = [stage.name for stage in read_stages(Path(config.run)) if stage.record]
    page = Path(config.output) if config.output else Path(config.run) / "report.html"
    begin("report", f"{pluralize(len(stages), 'finished stage')} of {config.run} ({', '.join(stages)})", f"to {page}")
    if dry_run:
        end_dry_run(page, "a few seconds")
        return 0
    write_report(config.run, config.output)
    end(page, f"{page.stat().st_size / 2**20:.1f} MB, opens in any browser", open_page(page))
    return 0
