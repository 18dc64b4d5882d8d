"""Every image of a source is a sample of the set or is listed as left out; and a set says what made it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from ldm_vae.latents.format import read_manifest, read_sidecar
from ldm_vae.storage import open_folder
from ldm_vae.version import __version__
from tests.data.encoded import encode as image_bytes
from tests.data.encoded import picture
from tests.latents.test_encode import contents

BROKEN = {
    "empty": lambda data, choose: b"",
    "cut off": lambda data, choose: data[: choose.randrange(20, len(data) // 2)],
    "no picture": lambda data, choose: b"<html>404</html>",
    "zeros": lambda data, choose: bytes(len(data)),
    "too small": lambda data, choose: image_bytes(picture(4, 4)),
}


def make_images(folder: Path, choose: random.Random) -> tuple[set[str], set[str]]:
    """(ids of good images, ids of broken ones) of a random corpus: up to 30 files, up to 30 % of them broken."""
    ids: tuple[set[str], set[str]] = (set(), set())
    share = choose.uniform(0, 0.3)
    for number in range(choose.randrange(4, 31)):
        kind = choose.choice(["PNG", "JPEG", "WEBP"])
        data, broken = image_bytes(picture(choose.randrange(16, 48), 40), kind), choose.random() < share and number > 0
        if broken:
            data = choose.choice(list(BROKEN.values()))(data, choose)
        name = f"{choose.choice('abc')}/{number:03d}.{kind.lower()}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        ids[broken].add(name)
    return ids


@pytest.mark.timeout(1800)
@pytest.mark.promise(7)
@pytest.mark.parametrize("corpora", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_every_image_is_encoded_or_listed_as_left_out(encode, tmp_path, corpora, record_property):
    images = broken_images = 0
    for number in range(corpora):
        choose, folder = random.Random(number), tmp_path / f"images{number}"
        good, broken = make_images(folder, choose)
        outputs = [tmp_path / f"{number}-{name}" for name in ("one", "two")]
        for output, workers in zip(outputs, (0, 2)):
            encode(output, f"data.path={folder}", "shard_size=4", f"workers={workers}")
        assert contents(outputs[0]) == contents(outputs[1]), "the list of images left out does not change"
        manifest, place = read_manifest(outputs[0]), open_folder(outputs[0])
        sidecars = [read_sidecar(place, shard) for shard in range(manifest.shards)]
        rejections = [json.loads(line) for line in place.read("quarantine.jsonl").splitlines()]
        assert sorted(sample.id for sidecar in sidecars for sample in sidecar.samples) == sorted(good)
        assert sorted(rejection["id"] for rejection in rejections) == sorted(broken)
        assert all(rejection["reason"] and rejection["message"] for rejection in rejections)
        assert (manifest.count, manifest.rejected) == (len(good), len(broken))
        images, broken_images = images + len(good) + len(broken), broken_images + len(broken)
    record_property(
        "figure", f"{corpora} corpora of {images} files, {broken_images} broken: each encoded or listed with its reason"
    )


def test_a_set_says_what_made_it(latents):
    manifest, record = (json.loads((latents / name).read_text()) for name in ("manifest.json", "run.json"))
    plan = json.loads((latents / "plan.json").read_text())
    for values in (manifest, plan):
        assert values["format_version"] == 2
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", values["autoencoder"][name])
                   for name in ("fingerprint", "encoder_fingerprint"))  # fmt: skip
        assert values["autoencoder"]["class"] == "AutoencoderWavelet"
        assert values["preprocessing"]
    assert re.fullmatch("[0-9a-f]{64}", manifest["datasets"][0]["plan"])
    assert manifest["datasets"][0]["fingerprint"] == plan["dataset"]["fingerprint"]
    assert record["versions"]["ldm_vae"] == __version__
    assert {"python", "torch", "diffusers", "accelerate", "machine"} <= record["versions"].keys()
    sidecars = [read_sidecar(open_folder(latents), shard) for shard in range(manifest["shards"])]
    assert {sidecar.header.origin for sidecar in sidecars} == {manifest["datasets"][0]["plan"]}
    assert all(re.fullmatch("[0-9a-f]{16}", sample.checksum) for sidecar in sidecars for sample in sidecar.samples)
