"""The model card: it restates the records, says what is missing, refuses records of other weights."""

from __future__ import annotations

import json
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from ldm_vae import cli
from ldm_vae import config as configuration
from ldm_vae.autoencoder.lineage import subsample
from ldm_vae.autoencoder.models import AutoencoderConfig, build_autoencoder
from ldm_vae.autoencoder.train_config import Phase, TrainVaeConfig
from ldm_vae.autoencoder.weights import fingerprint
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.evaluation import diagnosis, model_card
from ldm_vae.evaluation.model_card import CardConfig, push, worst_window, write_card
from ldm_vae.evaluation.reconstruction import FORMAT_VERSION

CONFIG = """
output: runs/flowers
data: {source: folder, path: /data/pictures/flowers, held_out: 0.1, datasets: {name: ''}, synthetic: {count: 5}}
crop: {short_side_min: 64, short_side_max: 512, flip: true, flat: 0.04}
autoencoder: {architecture: wavelet, preset: pico, latent_channels: 2}
loss: {l1: 1.0, mse: 0.0, perceptual: 0.5, perceptual_net: vgg}
rate: {mode: target, target_nats: 2.5}
phases: [{steps: 100, crop: 64, batch: 8}, {steps: 20, crop: 192, batch: 2}]
training: {learning_rate: 0.001, ema_decay: 0.999, seed: 3}
"""
RUN = {
    "command": ["ldm-vae", "train-vae", "data.path=/data/pictures/flowers", "phases=[{steps: 100}]"],
    "started": "2026-01-02T03:04:05+00:00",
    "seconds": 3725.4,
    "versions": {"ldm_vae": "0.1.0", "torch": "2.9", "commit": "0123456789ab", "machine": "Abacus 1, 2 cores"},
    "finished": True,
    "steps": 120,
    "processes": 2,
    "device": "cpu",
    "precision": "bf16",
}


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 1, "high": mean + 1}


def evaluation(identity: str) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "autoencoder": {"fingerprint": identity},
        "protocol": {
            "images": {"fingerprint": "f00d", "part": "held_out", "count": 17},
            "preprocessing": {"fit": "cover, centre crop", "filter": "lanczos"},
            "resolution": 256,
            "range": "8-bit round trip of every reconstruction",
            "average": "per image, then mean over images",
            "lpips": "vgg",
            "precision": "float32",
        },
        "rows": [
            {
                "name": "decode(mean)",
                "metrics": {"psnr": interval(27.125), "lpips": interval(3.5)},
                "bits_per_pixel": 0.09,
            },
            {"name": "block KLT, 2 components", "metrics": {"psnr": interval(23.0)}},
            {
                "name": "JPEG, equal bytes",
                "metrics": {"psnr": interval(25.0)},
                "bits_per_pixel": 0.088,
                "over_budget": 1,
            },
        ],
        "equal_bytes": "at most the bytes of the rate",
        "gain_over_linear_db": interval(4.125),
        "rate": {"nats_per_dim": 2.0, "bits_per_dim": 2.885, "bits_per_pixel": 0.09},
        "rejected": [],
        "distribution": {
            "images": 17,
            "kid": {"mean": 0.002, "std": 0.001, "subsets": 100, "subset_size": 4},
            "kid_floor": {"mean": 0.0005, "std": 0.001, "images": 8},
            "kid_halves": {"mean": 0.0025, "std": 0.001, "images": 8},
        },
        "config": {"data": {"source": "folder", "path": "/data/pictures/flowers"}},
    }


@pytest.fixture
def run(tmp_path):
    """A finished run with every record; what the files say is in CONFIG, RUN and here."""
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig("wavelet", "pico", 2))
    folder = tmp_path / "flowers"
    model.save_pretrained(folder / "autoencoder")
    identity = fingerprint(model)
    rate = {"mode": "target", "target_nats": 2.5, "final_beta": 0.02}
    record = {"fingerprint": identity, "rate": rate, "held_out": {"held_out/psnr": 26.5, "held_out/nats_per_dim": 2.4}}
    (folder / "autoencoder" / "training.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "run.json").write_text(json.dumps(RUN))
    lines = [{"step": i, "rate/beta": i / 1000, "rate/nats_per_dim": 2 + i / 1000} for i in range(1, 101)]
    lines.append({"step": 100, "held_out/psnr": 26.5, "held_out/nats_per_dim": 2.4})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 1')
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(evaluation(identity)))
    return folder


def test_a_complete_card_restates_every_record(run, tmp_path):
    (tmp_path / "credits.txt").write_text("Photographs by A. Person, CC0.")
    found = [
        {"name": "rate_miss", "severity": "warn", "sentence": "rate_miss (warn): the rate is 2.0. Try: longer."},
        {"name": "grid", "severity": "fail", "sentence": "A grid of 8 pixels."},
    ]
    identity = json.loads((run / "autoencoder" / "training.json").read_text())["fingerprint"]
    health = {"autoencoder": {"fingerprint": identity}, "verdicts": found}
    (tmp_path / "evaluation" / "health.json").write_text(json.dumps(health))
    path, missing = write_card(
        CardConfig(
            str(run),
            evaluation=str(tmp_path / "evaluation"),
            intended_use="Latents of flowers.",
            data_credits=str(tmp_path / "credits.txt"),
            license="cc0-1.0",
        )
    )
    assert path == run / "autoencoder" / "README.md"
    assert missing == ["pictures"]
    text = path.read_text()
    for expected in (
        "# flowers\n",
        "Latents of flowers.",
        "Photographs by A. Person, CC0.",
        "ldm-vae train-vae data.path=/data/pictures/flowers 'phases=[{steps: 100}]'",
        "| commit | 0123456789ab |",
        "| machine | Abacus 1, 2 cores |",
        "| wall time | 1:02:05 (h:mm:ss) |",
        "Energy, guessed and not measured: 1.03 hours x 2 cores x 10 W = 0.021 kWh.",
        "![Training curves: KL loss, as a rate, Held-out quality](curves.svg)",
        "| phase 2 | 20 steps, 2 crops of 192 pixels |",
        "| loss weights | l1 1, perceptual 0.5 |",
        "Controlled toward 2.5 nats",
        "Final beta 0.02 on means per element; a KL weight of 1.92 in the convention",  # 0.02 * 192 / 2
        "Measured in the evaluation: 2.000 nats",
        "| 1 | 0.001 | 2.001 |",
        "| 100 | 0.1 | 2.100 |",
        "| decode(mean) | 0.090 | 27.125 [26.125, 28.125] | 3.500 [2.500, 4.500] |",
        "| block KLT, 2 components | not coded | 23.000 [22.000, 24.000] | not measured |",
        "| JPEG, equal bytes (1 of 17 over) | 0.088 | 25.000",
        "17 images (held_out) of flowers, set `f00d`.",
        "KID of decode(mean) to the originals, N = 17: 2.000",
        "- Codecs: at most the bytes of the rate; header bytes count",
        "Gain over the linear baseline on the same pixels: +4.12 [+3.12, +5.12] dB.",
        "- **fail**, grid: A grid of 8 pixels.\n- **warn**, rate_miss: the rate is 2.0. Try: longer.",
        "Trained on crops of at most 192 pixels",
        "Stock diffusers cannot load this class",
        "at least one failure",
        identity,
    ):
        assert expected in text, expected
    assert "Not recorded, so not stated below: pictures." in text
    assert len(subsample(list(range(100)), 8)) == 8


def test_one_image_is_one_image():
    results = evaluation("sha256:0")
    results["protocol"]["images"]["count"] = 1
    results["rejected"] = [["torn.png", "truncated"]]
    sentences = model_card.evaluation_facts(results)["sentences"]
    assert sentences[0].startswith("1 image (held_out) of flowers")
    assert sentences[-1] == "Left out: 1 image that could not be read."


def test_the_front_matter_is_what_the_hub_reads(run, tmp_path):
    path, _ = write_card(CardConfig(str(run), evaluation=str(tmp_path / "evaluation"), license="cc0-1.0"))
    data = ModelCard(path.read_text()).data
    assert (data.license, data.library_name, data.model_name) == ("cc0-1.0", "ldm_vae", "flowers")
    assert data.datasets is None  # a folder is no dataset of the hub
    psnr, lpips = data.eval_results
    assert (psnr.metric_type, psnr.metric_value) == ("psnr", 27.125)
    assert psnr.metric_args == {"interval_95_percent": [26.125, 28.125]}
    assert psnr.dataset_args == {"images": 17, "resolution": 256, "fingerprint": "f00d"}
    assert lpips.metric_type == "lpips"


def test_what_is_missing_is_said_and_nothing_is_put_in_its_place(run, tmp_path, capsys):
    alone = tmp_path / "alone"
    shutil.copytree(run / "autoencoder", alone)
    (alone / "training.json").unlink()
    assert cli.main(["card", str(alone)]) == 0
    assert "not recorded: the intended use, the data, " in capsys.readouterr().out
    text = (alone / "README.md").read_text()
    for expected in (
        "## Intended use\n\nNot stated.",
        "## Data\n\nNot recorded.\n\nOrigin and license of the training images: not stated.",
        "## Training\n\nNot recorded.",
        "### Rate\n\nNot recorded.",
        "## Reconstruction\n\nNot measured.",
        "## Health\n\nNot diagnosed.",
        "No evaluation is recorded",
    ):
        assert expected in text, expected
    data = ModelCard(text).data
    assert data.eval_results is None
    assert data.license is None


def test_records_of_other_weights_are_refused(run, tmp_path):
    results = tmp_path / "evaluation" / "results.json"
    results.write_text(json.dumps(evaluation("sha256:" + "0" * 64)))
    with pytest.raises(UserError, match=r"results.json: is about sha256:0+\.\.\., the model is sha256:"):
        write_card(CardConfig(str(run), evaluation=str(tmp_path / "evaluation")))
    for content, message in (
        ({}, "is not a result of `ldm-vae evaluate`"),
        (
            evaluation("") | {"format_version": 1},
            "by another version of ldm_vae, whose figures are computed differently",
        ),
    ):
        results.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            write_card(CardConfig(str(run), evaluation=str(tmp_path / "evaluation")))
    (run / "autoencoder" / "training.json").write_text(json.dumps({"fingerprint": "sha256:" + "1" * 64}))
    with pytest.raises(UserError, match=r"training\.json: is about"):
        write_card(CardConfig(str(run)))
    (run / "autoencoder" / "training.json").unlink()
    with pytest.raises(UserError, match="no such file; give a folder that `ldm-vae diagnose` wrote"):
        write_card(CardConfig(str(run), health=str(tmp_path)))
    assert not (run / "autoencoder" / "README.md").exists()


def test_figures_of_enlarged_images_are_refused(run, tmp_path):
    identity = json.loads((run / "autoencoder" / "training.json").read_text())["fingerprint"]
    small = {"enlarged": [{"id": "a", "short_side": 128}, {"id": "b", "short_side": 200}]}
    message = "results.json: 2 of 17 images are smaller than the crop and enlarged.* is 128 pixels: set"
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(evaluation(identity) | small))
    with pytest.raises(UserError, match=message):
        write_card(CardConfig(str(run), evaluation=str(tmp_path / "evaluation")))
    health = {"autoencoder": {"fingerprint": identity}, "protocol": {"images": {"count": 17}}, "verdicts": []}
    (tmp_path / "health.json").write_text(json.dumps(health | small))
    with pytest.raises(UserError, match=message.replace("results", "health")):
        write_card(CardConfig(str(run), health=str(tmp_path)))
    record = json.loads((run / "autoencoder" / "training.json").read_text())
    path, _ = write_card(CardConfig(str(run)))
    assert "validates on (PSNR 26.50 dB)" in path.read_text()
    (run / "autoencoder" / "training.json").write_text(json.dumps(record | {"held_out_enlarged": 2}))
    path, _ = write_card(CardConfig(str(run)))
    assert "Not measured." in path.read_text()


def test_somebody_elses_readme_is_kept_and_our_own_is_written_anew(run):
    readme = run / "autoencoder" / "README.md"
    readme.write_text("mine")
    with pytest.raises(UserError, match="was not written by this command; give --overwrite"):
        write_card(CardConfig(str(run)))
    assert readme.read_text() == "mine"
    write_card(CardConfig(str(run)), overwrite=True)
    write_card(CardConfig(str(run), intended_use="Again."))
    assert "Again." in readme.read_text()
    with pytest.raises(UserError, match=r"README\.md: states the intended use, and the new card would not; give"):
        write_card(CardConfig(str(run), license="cc0-1.0"))
    assert "Again." in readme.read_text()
    write_card(CardConfig(str(run), license="cc0-1.0"), overwrite=True)
    assert "Again." not in readme.read_text()


def test_a_stock_class_gets_stock_instructions_and_a_codebook_no_false_rate(tmp_path):
    build_autoencoder(AutoencoderConfig("sd", "tiny")).save_pretrained(tmp_path / "kl")
    path, _ = write_card(CardConfig(str(tmp_path / "kl")))
    assert 'AutoencoderKL.from_pretrained("DIRECTORY")' in path.read_text()
    assert ModelCard(path.read_text()).data.library_name == "diffusers"
    record = {"kind": "vq", "rate": {"final_beta": 1.0}, "held_out": {"held_out/nats_per_dim": 400.0}}
    assert model_card.rate_sentences(record, {}, 8, 4) == ["Of kind vq: beta weighs no divergence of a posterior."]


def test_a_model_of_one_size_is_told_so(tmp_path):
    build_autoencoder(AutoencoderConfig("vector", "digits", 2)).save_pretrained(tmp_path / "vector")
    text = write_card(CardConfig(str(tmp_path / "vector")))[0].read_text()
    assert "an image of 32 x 32 pixels becomes 2 numbers." in text
    assert text.count("multiples of") == 0
    assert "Height and width must be 32 pixels, scale others." in text
    assert "`ldm-vae reconstruct DIRECTORY photo.jpg output=seen resolution=32`" in text


def test_a_rate_of_an_earlier_run_is_said_to_be_one():
    record = {"rate": {"mode": "target", "target_nats": 2.5}, "initial": {"train": ["decoder"]}}
    assert model_card.rate_sentences(record, {}, 8, 4)[0].startswith("The last run trained the decoder alone")
    record["initial"] = {"train": ["encoder", "decoder"]}
    assert model_card.rate_sentences(record, {}, 8, 4)[0].startswith("Controlled toward 2.5")


def test_the_upload_is_the_directory_and_only_when_asked(run, monkeypatch, capsys):
    calls: list[tuple] = []

    class Api:
        def create_repo(self, repository, **settings):
            calls.append(("create", repository, settings["private"], settings["exist_ok"]))
            return SimpleNamespace(repo_id=f"me/{repository}")

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            calls.append(("upload", sorted(path.name for path in folder_path.iterdir()), repo_id))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert cli.main(["card", str(run)]) == 0
    assert calls == []
    assert cli.main(["card", str(run), "--push-to-hub", "flowers"]) == 0
    files = ["README.md", "config.json", "curves.svg", "diffusion_pytorch_model.safetensors", "training.json"]
    assert calls == [("create", "flowers", True, True), ("upload", files, "me/flowers")]

    class Refusing(Api):
        def create_repo(self, repository, **settings):
            raise OSError("no route\nto the hub")

    with pytest.raises(UserError, match="--push-to-hub flowers: no route; log in with `hf auth login`"):
        push(run / "autoencoder", "flowers", Refusing())


def test_the_hub_dataset_is_named_only_where_there_is_one(tmp_path, monkeypatch):
    def config(source, name):
        return {"data": {"source": source, "datasets": {"name": name}}}

    assert model_card.hub_dataset(config("datasets", "nlphuji/flickr30k")) == "nlphuji/flickr30k"
    assert model_card.hub_dataset(config("datasets", "imagefolder")) is None
    assert model_card.hub_dataset(config("folder", "nlphuji/flickr30k")) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "set").mkdir(parents=True)
    assert model_card.hub_dataset(config("datasets", "local/set")) is None


def test_settings_that_the_command_does_not_name_can_be_typed_after_it():
    settings = {"data.source": "folder", "loss.mse": 2.0, "adversarial.loss": "hinge", "repeat": {"a/*.x": 2}}
    settings |= {"phases": [{"steps": 7, "crop": 64}], "training.learning_rate": 1e-05, "data.include": ["a b/*"]}
    record = {"command": ["train-vae", "mine.yaml", "loss.mse=2", "data.include=[a b/*]"], "settings": settings}
    words = shlex.split(model_card.earlier_run(record, None)["settings"])
    assert [word.partition("=")[0] for word in words] == [
        "data.source", "adversarial.loss", "repeat", "phases", "training.learning_rate",
    ]  # fmt: skip
    found = configuration.load(TrainVaeConfig, None, ["output=x", "data.path=y", *words])
    assert found.phases == [Phase(steps=7, crop=64)]
    assert (found.repeat, found.training.learning_rate, found.adversarial.loss) == ({"a/*.x": 2}, 1e-05, "hinge")
    assert model_card.unnamed_settings({"data.path": "x", "loss.l1": 2.0}, ["data={path: x}", "loss.l=1"]) == {
        "loss.l1": 2.0
    }
    assert model_card.earlier_run({"command": ["train-vae"]}, None)["settings"] == ""


SOURCES = """
- {name: meadow, images: 120, licence: CC0, credits: A. Person, url: https://example.org/meadow}
- {name: hill, images: 7, licence: CC BY 4.0, credits: B. Person | C. Person}
"""


def test_credits_as_a_list_become_a_table_and_what_lacks_a_licence_is_refused(tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text(SOURCES)
    assert model_card.read_credits(str(path)).splitlines()[2:] == [
        "| [meadow](https://example.org/meadow) | 120 | CC0 | A. Person |",
        "| hill | 7 | CC BY 4.0 | B. Person / C. Person |",
    ]
    for wrong in ("- {name: a, images: 1, credits: b}", "name: a", "[", "- 3", "- {name: a, images: 1, x: 2}"):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"--data-credits: .*sources.yaml is not "):
            model_card.read_credits(str(path))


def test_energy_is_a_guess_that_says_how_and_of_an_accelerator_only_with_its_power():
    run = {"seconds": 7200, "device": "cuda:0", "versions": {"machine": "Abacus 1, 16 cores"}}
    assert model_card.energy_sentence(run, None) is None
    assert model_card.energy_sentence(run, 700).endswith("2.00 hours x 700 W = 1.400 kWh.")
    assert model_card.energy_sentence(run | {"device": "cpu"}, None).endswith("16 cores x 10 W = 0.320 kWh.")
    assert model_card.energy_sentence(run, 700, "runs/first").endswith(
        "That of runs/first, which it started from, comes on top."
    )
    assert model_card.energy_sentence({}, 700) is None


@pytest.mark.parametrize("watts", ["0", "-5", "nan", "inf"])
def test_what_is_no_power_is_refused(watts, capsys, tmp_path):
    assert cli.main(["card", str(tmp_path), "--watts", watts]) == EXIT_USER_ERROR
    assert f"watts: {watts} is not the power of a machine; give watts above 0" in capsys.readouterr().err


def test_what_started_from_another_model_has_its_architecture_not_that_of_the_settings():
    settings = {"autoencoder": {"preset": "nano"}, "initial": "runs/first", "train": ["decoder"]}
    assert model_card.training_rows(settings, {}) == [("started from", "runs/first; trained: ['decoder']")]


def test_what_many_channels_share_is_said_once():
    several = [
        {"name": "non_gaussian", "severity": "info", "channel": c, "sentence": f"non_gaussian (info): channel {c}, x."}
        for c in (1, 4, 5)
    ]
    told = diagnosis.recorded_verdicts(
        {"verdicts": [*several, {"name": "grid", "severity": "warn", "sentence": "A grid."}]}
    )
    assert [each["sentence"] for each in told] == ["A grid.", "channel 1, x. Likewise channels 4, 5."]


def test_an_earlier_run_is_told_with_its_command_time_and_energy():
    versions = {"machine": "Abacus 1, 16 cores", "commit": "abc"}
    record = {"name": "first", "command": ["ldm-vae", "x=a b"], "started": "2026-11-21T23:00", "seconds": 7200}
    told = model_card.earlier_run(record | {"steps": 6400, "device": "cpu", "versions": versions}, None)
    assert told["title"] == "first"
    assert told["command"] == "ldm-vae 'x=a b'"
    assert told["sentence"].startswith("2026-11-21: 6,400 steps, 2:00:00 (h:mm:ss) on Abacus 1, 16 cores, commit abc.")
    assert told["sentence"].endswith("= 0.320 kWh.")
    assert "not recorded" in model_card.earlier_run({"name": "first"}, None)["sentence"]


def shown_evaluation(folder, identity: str, count: int) -> None:
    """Examples of 200 pixels; number k is wrong by k gray levels in a corner of its own."""
    (folder / "examples").mkdir(parents=True)
    examples, images = [], []
    for number in range(count):
        original = np.full((200, 200, 3), 100, np.uint8)
        decoded = original.copy()
        decoded[-40:, -40:] += number
        files = {"original": f"{number:02d}_original.png", "decoded": f"{number:02d}_decoded.png"}
        for name, pixels in (("original", original), ("decoded", decoded)):
            Image.fromarray(pixels).save(folder / "examples" / files[name])
        examples.append({"id": f"i{number}", "label": "", "files": files})
        images.append({"id": f"i{number}", "decode(mean)": {"psnr": 40.0 - number}})
    results = evaluation(identity) | {"examples": examples, "images": images}
    (folder / "results.json").write_text(json.dumps(results))


def test_the_best_and_the_worst_of_the_examples_are_shown_where_they_are_worst(run, tmp_path):
    identity = json.loads((run / "autoencoder" / "training.json").read_text())["fingerprint"]
    shown_evaluation(tmp_path / "shown", identity, 8)
    path, _ = write_card(CardConfig(str(run), pictures=str(tmp_path / "shown"), not_for="Text."))
    text = path.read_text()
    assert "The 3 best (above) and the 3 worst (below) of 8 images of flowers, 256 pixels" in text
    assert "Not good for: Text." in text
    with Image.open(run / "autoencoder" / "crops.webp") as sheet:
        assert sheet.size == (2 * 16 + 6 * 168 - 8, sheet.height)
    pair = [Image.open(tmp_path / "shown" / "examples" / f"07_{name}.png") for name in ("original", "decoded")]
    assert [part.getpixel((140, 140))[0] for part in worst_window(*pair)] == [100, 107]
    results = tmp_path / "shown" / "results.json"
    found = json.loads(results.read_text())
    for foreign in (
        {key: value for key, value in found.items() if key != "autoencoder"},
        found | {"images": []},
        found | {"rows": []},
        found | {"examples": [f"i{number}" for number in range(8)]},
        found | {"examples": 8},
    ):
        results.write_text(json.dumps(foreign))
        with pytest.raises(UserError, match=r"shown/results\.json is not a result of .*; give a new folder of"):
            write_card(CardConfig(str(run), pictures=str(tmp_path / "shown")))
    results.write_text(json.dumps(found))
    (tmp_path / "shown" / "examples" / "07_decoded.png").unlink()
    with pytest.raises(UserError, match=r"or its pictures are damaged .*07_decoded\.png"):
        write_card(CardConfig(str(run), pictures=str(tmp_path / "shown")))
    shown_evaluation(tmp_path / "few", identity, 4)
    with pytest.raises(UserError, match="few has 4 examples, 6 are shown"):
        write_card(CardConfig(str(run), pictures=str(tmp_path / "few")))
    shown_evaluation(tmp_path / "other", "sha256:" + "0" * 64, 8)
    with pytest.raises(UserError, match=r"results\.json: is about sha256:0"):
        write_card(CardConfig(str(run), pictures=str(tmp_path / "other")))
