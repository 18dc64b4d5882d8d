"""What lies in `checkpoints/`: it loads, its card tells what a card must, its files are small and name no machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ldm_vae.autoencoder.lineage import read_record
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.diffusion.export import LARGEST_FILE_BYTES
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.files import MANIFEST

FOLDER = Path(__file__).parents[1] / "checkpoints"
CHECKPOINTS = sorted(path for path in FOLDER.iterdir() if path.is_dir())
PIPELINES = [path for path in CHECKPOINTS if (path / "model_index.json").is_file()]
AUTOENCODERS = [path for path in CHECKPOINTS if path not in PIPELINES]
LARGEST_ALL_BYTES = 60 * 10**6
MACHINE = re.compile(r"(?<![\w.~:/*?-])(?:/(?:home|root|Users|mnt|srv|tmp|work|data|opt|var)/|\.\./)[\w.-]+")
IN_EVERY_CARD = (
    "## Intended use", "Not good for: ", "| commit | ", "| machine | ", "| wall time | ", "| precision | ",
    "Energy, guessed and not measured: ", "(curves.svg)", "```bash\n", "| license | credits |", "## Limits",
)  # fmt: skip
NOT_SAID = ("Not stated.", "Not recorded.", "Not measured", "Not diagnosed.", "None shown.", "nobody has written down")


def named(path: Path) -> str:
    return path.name


def test_all_files_are_small_and_name_no_machine():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST_ALL_BYTES
    for path in files:
        assert path.stat().st_size <= LARGEST_FILE_BYTES, path
        if path.suffix in (".md", ".json", ".jsonl", ".yaml", ".svg", ".txt", ".csv"):
            assert not (found := MACHINE.search(path.read_text())), f"{path}: {found[0]}"
        else:
            assert path.suffix in (".safetensors", ".webp"), f"{path}: weights and pictures only"


def test_the_check_for_machines_sees_them_and_no_addresses():
    for text in ("path: /home/me/images", '"/srv/x"', "data.path=../shared/images"):
        assert MACHINE.search(text)
    for text in ("https://a.org/data/x", "runs/data/x", "images/s", "~/data/x", "and/or"):
        assert not MACHINE.search(text)


@pytest.mark.parametrize("path", AUTOENCODERS, ids=named)
def test_an_autoencoder_loads_and_its_record_is_its_own(path):
    assert (path / MANIFEST).is_file()  # loading checks it
    autoencoder, record = load_autoencoder(path), read_record(path)
    assert record["fingerprint"] == fingerprint(autoencoder)
    assert record["encoder_fingerprint"] == autoencoder.encoder_fingerprint()


def test_two_decoders_of_one_encoder_read_the_same_latents():
    records = [read_record(FOLDER / name) for name in ("vae-f8c4-nano", "vae-f8c4-nano-perceptual")]
    assert records[0]["encoder_fingerprint"] == records[1]["encoder_fingerprint"]
    assert records[0]["fingerprint"] != records[1]["fingerprint"]


@pytest.mark.parametrize("path", PIPELINES, ids=named)
def test_a_pipeline_loads_with_the_encoder_of_its_latents_or_its_rounding(path):
    assert (path / MANIFEST).is_file()
    pipeline = LatentDiffusionPipeline.from_pretrained(path, use_safetensors=True)
    known = {pipeline.config["encoder_fingerprint"], *pipeline.config["rounded_encoders"].values()}
    assert pipeline.autoencoder.encoder_fingerprint() in known


@pytest.mark.parametrize("path", CHECKPOINTS, ids=named)
def test_the_card_tells_what_a_card_must(path):
    text = (path / "README.md").read_text()
    assert ModelCard(text).data.license, "no licence in the front matter"
    missing = [words for words in IN_EVERY_CARD if words not in text]
    assert not missing, f"the card lacks {missing}"
    assert not [words for words in NOT_SAID if words in text]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) >= 2
    assert all((path / name).is_file() for name in pictures)
    run = json.loads((path / "run.json").read_text())
    assert run["finished"]


@pytest.mark.parametrize("path", AUTOENCODERS, ids=named)
def test_the_card_of_an_autoencoder_has_figures_with_intervals_and_verdicts(path):
    text = (path / "README.md").read_text()
    assert re.search(r"\| decode\(mean\) \|.* [\d.]+ \[[\d.]+, [\d.]+\]", text)
    assert re.search(r"- [\d,]+ images \(\w+\) of ", text)
    assert "## Health" in text
    assert "- **fail**" not in text
