"""The settings read from source: complete, explained, the same as the dataclasses, and alike in all commands."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_vae import cli, schema
from ldm_vae import config as configuration
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.errors import UserError

NOT_KEYS = {"out", "run_root", "size", "pipeline", "length", "set", "target"}
"""Words for a setting that has another key: output, run, resolution, model, lengths, latents, output."""


def typed(command: cli.Command) -> set[str]:
    """The keys that a user types."""
    words = {own: word for word, own in command.names.items()}
    return {words.get(setting.key, setting.key) for setting in schema.read_schema(command.config)}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_setting_is_explained_and_is_a_field(name):
    command = cli.COMMANDS[name]
    settings = schema.read_schema(command.config)
    assert [one.key for one in schema.flat(settings) if not one.meaning] == []
    fields = {field.name for field in dataclasses.fields(cli.resolve(command.config))}
    assert fields == {one.key for one in settings}
    assert callable(cli.resolve(command.function))
    assert command.failed is None or callable(cli.resolve(command.failed))
    assert all(schema.find_setting(settings, command.names.get(key, key)) for key in command.subjects)


MEANINGS = {
    "autoencoder": r"run of `train-vae`, or a hub id|an autoencoder with|^the autoencoder (of|that)",
    "compare": r"^another autoencoder",
    "model": r"diffusion pipeline|run of `train-diffusion`|^a run of `train-vae` or",
    "latents": r"^the folder of a (finished )?set|^the folder of the training latents",
    "output": r"^(the |a )?(folder (for|to make|of the det)|run dir|contact sheet|new dir|file to write|[hH]TML file)",
    "images": r"image files",
    "data": r"^(a )?folder of (images, a parquet|the encoded images)",
    "seed": r"^seed of",
    "device": r"^auto, cpu, cuda",
    "precision": r"^precision of (the (networks|computation|weights|forward))",
    "count": r"^(largest )?number of (images|samples)(?! for training)",
    "held_out_images": r"^largest number of held-out images",
    "examples": r"number of example images",
    "steps": r"^number of (steps of the sampler|training steps)",
    "batch": r"^(images per forward pass|latents per step|samples per step)",
    "micro_batch": r"^(latents|images) per forward pass of a process",
    "resolution": r"^(side|size)( of the (images|center crop))? in pixels|^side in pixels|example for onnx",
    "part": r"halves validation and test",
    "processes": r"^required number of launched processes",
    "detector": r"`anomaly fit`",
    "directions": r"`directions fit`",
    "entropy": r"entropy model",
    "perceptual_net": r"^the LPIPS network",
    "perceptual_weights": r"safetensors file of (its|the LPIPS) backbone",
    "inception_weights": r"Inception weights|weights for the KID",
}
"""Key -> what its help text says, in lower case. Both ways: a setting with this meaning has this key."""

NOT_ALIKE = {
    ("train-vae", "initial"): "the start of a training, beside the settings of the autoencoder to train",
    ("train-vae", "held_out_resolution"): "of the held-out images only; training has crops",
}
"""(command, key) -> why this setting has another key than its meaning suggests."""


def test_one_meaning_has_one_key_in_all_commands():
    """By the help texts, which say what a setting is: a new setting with the meaning of an old one gets its key."""
    strange = {}
    for name, command in cli.COMMANDS.items():
        words = {own: word for word, own in command.names.items()}
        for setting in schema.read_schema(command.config):
            key, meaning = words.get(setting.key, setting.key), setting.meaning[:1].lower() + setting.meaning[1:]
            meant = [one for one, pattern in MEANINGS.items() if re.search(pattern, meaning)]
            if setting.kind != "group" and (key in MEANINGS or meant) and key not in meant:
                strange[name, key] = f"{meaning} (as {meant})"
    assert {place: words for place, words in strange.items() if place not in NOT_ALIKE} == {}
    assert NOT_ALIKE.keys() <= strange.keys(), "an exception that is not needed any more"


def test_the_same_help_text_has_the_same_key():
    keys: dict[str, set[str]] = {}
    for command in cli.COMMANDS.values():
        words = {own: word for word, own in command.names.items()}
        for setting in schema.read_schema(command.config):
            keys.setdefault(setting.meaning, set()).add(words.get(setting.key, setting.key))
    shared = {meaning: found for meaning, found in keys.items() if meaning and len(found) > 1}
    assert {meaning: found for meaning, found in shared.items() if "number of steps between" not in meaning} == {}


def test_a_message_says_the_key_that_is_typed(capsys, tmp_path):
    """Functions name the config's own key: `size` of `interpolate` is typed as `resolution`."""
    assert cli.with_typed_names("interpolate", "size: 5 is below 16 pixels") == "resolution: 5 is below 16 pixels"
    assert (
        cli.with_typed_names("explore", "size: 5; use size=8 of shape=3")
        == "resolution: 5; use resolution=8 of shape=3"
    )
    assert cli.with_typed_names("evaluate", "size: 5") == "size: 5"
    assert cli.with_typed_names("generate", "height: 500 is odd; use 496") == "resolution: 500 is odd; use 496"
    (tmp_path / "a.png").touch()
    assert (
        cli.main(
            [
                "interpolate",
                str(tmp_path / "a.png"),
                str(tmp_path / "a.png"),
                "autoencoder=a/b",
                "resolution=5",
                "output=x",
            ]
        )
        == 2
    )
    assert "interpolate: resolution: 5 is below 16 pixels" in capsys.readouterr().err


def test_one_thing_has_one_key_in_all_commands():
    for name, command in cli.COMMANDS.items():
        assert not typed(command) & NOT_KEYS, name


def test_every_old_word_is_one_that_is_not_a_key_any_more():
    for name, words in cli.OLD_SETTINGS.items():
        for old, new in words.items():
            if name:
                assert new in typed(cli.COMMANDS[name]), (name, old)
                assert old not in typed(cli.COMMANDS[name]), (name, old)
    assert set(cli.OLD_COMMANDS.values()) <= set(cli.COMMANDS)


def test_what_is_meant_is_named():
    settings = schema.read_schema("autoencoder.train_config:TrainVaeConfig")
    for key, meant in (("training.sed", "training.seed"), ("sed", "data.synthetic.seed"), ("outptu", "output")):
        with pytest.raises(UserError, match=f"{key}: no such setting; (did you mean {meant}|choose one of)"):
            schema.find_setting(settings, key)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train-vae training.learning_rte=1 output=x", "did you mean training.learning_rate?"),
        ("train-vae training.learning_rate=0 output=x", "training.learning_rate: 0 is not positive"),
        ("train-vae training.betas=0.9,x output=x", "training.betas: 'x' is not a number"),
        ("train-vae training.seed=soon output=x", "training.seed: 'soon' is not a whole number"),
        ("train-vae nowhere output=x", "data.path: nowhere: no such folder; give the folder that holds the images"),
        ("train-vae README.md output=x", "data.path: README.md: is a file; give the folder that holds the images"),
        ("train-vae synthetic output=README.md/run", "README.md/run: cannot be written (Not a directory)"),
        ("train-vae synthetic initial=docs output=x", "initial: docs: holds no config.json; give a finished run"),
        ("train-vae recipe.yaml output=x", "recipe.yaml: data.path: nowhere: no such folder"),
        ("train-vae typo.yaml output=x", "typo.yaml: training.batch: no such setting"),
        ("train-vae number.yaml output=x", "number.yaml: training.log_every: 0 is not positive"),
        ("evaluate docs/pictures output=x", "autoencoder: docs/pictures: is a folder of images; give a finished run"),
        ("evaluate ~/gone output=x", "/gone: no such folder; give a finished run of `ldm-vae train-vae`"),
        ("encode docs/pictures/curve.png output=x", "curve.png: is a file (an image); give a finished run"),
        ("generate configs output=x", "model: configs: is empty; give a finished run of `ldm-vae train-diffusion`"),
        ("latents info nowhere", "latents: nowhere: no such folder; give the folder that `ldm-vae encode` wrote"),
        (
            "compress nowhere.jpg autoencoder=a/b",
            "images: nowhere.jpg: no such file or folder; give image files or folders",
        ),
        ("decompress nowhere autoencoder=a/b", "files: nowhere: no such file"),
        ("anomaly score docs data=docs output=x", "detector: docs: holds no detector.json; give the folder that `ldm"),
        ("report nowhere", "run: nowhere: no such folder; give the folder that holds vae"),
        ("train-vea data=docs", "ldm-vae: 'train-vea': unknown command; did you mean 'train-vae'?"),
        ("latents inof x", "latents: there is no tool 'inof'; did you mean 'info'?"),
        ("train-vae synthetic", "settings: output is required; give it as output=VALUE"),
        ("train-vae synthetic output=x training=3", "training: is a group of settings; give training.seed=VALUE"),
        ("train-vae synthetic output=x training.compile=maybe", "training.compile: 'maybe' is not true or false"),
        ("train-vae nowhere.yaml output=x", "nowhere.yaml: no such configuration file; give the path of a YAML file"),
        ("train-vae synthetic output=x --overwrite", "--overwrite: has no effect with train-vae; leave it out"),
        (
            "encode a/b docs output=x",
            "'docs': is not a setting or a YAML file; a setting is key=value, and the subject",
        ),
        (
            "encode a/b data=docs output=x store=codes",
            "store: 'codes' is not one of auto, moments, mean, sample, indices",
        ),
        ("encode a/b data=docs output=x batch=0", "batch: 0 is not positive"),
        (
            "train-diffusion docs/pictures autoencoder=a/b output=x",
            "latents: docs/pictures: is a folder of images; give",
        ),
        ("train-diffusion configs autoencoder=a/b output=x batch=-1", "batch: -1 is not positive"),
        (
            "latents verify docs/pictures",
            "latents: docs/pictures: is a folder of images; give the folder that `ldm-vae",
        ),
        ("generate a/b sampler=ddim output=x", "sampler: 'ddim' is not one of euler, heun, dpm++, unipc"),
        ("generate a/b labels=a steps=0 output=x", "steps: 0 is not positive"),
        ("evaluate a/b data=docs part=heldout output=x", "part: 'heldout' is not one of"),
        ("interpolate nowhere.png autoencoder=a/b output=x", "images: nowhere.png: no such file or folder"),
        ("evaluate a/b data=docs output=x seed", "'seed': is not a setting or a YAML file"),
    ],
)
def test_a_mistake_is_refused_within_a_second(words, sentence, tmp_path):
    """Before torch is imported, and in CPU time, so that a busy machine does not decide the test."""
    for folder in ("docs/pictures", "configs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").touch()
    (tmp_path / "docs" / "pictures" / "curve.png").touch()
    (tmp_path / "recipe.yaml").write_text("data: nowhere\n")
    (tmp_path / "typo.yaml").write_text("training:\n  batch: 4\n")
    (tmp_path / "number.yaml").write_text("training:\n  log_every: 0\n")
    code = (
        f"import sys, time; from ldm_vae import cli; code = cli.main({words.split()!r});"
        "print(code, time.process_time(), [m for m in ('torch', 'torchvision', 'diffusers') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert sentence in found.stderr
    assert found.stderr.count("\n") == 1, found.stderr
    assert re.search(r"[A-Z][a-z]+[A-Z]|None|PosixPath|\bdict\b|\btuple\b|Error\b", found.stderr) is None, found.stderr
    status, seconds, heavy = found.stdout.split(" ", 2)
    assert int(status) == 2
    assert float(seconds) < 1
    assert heavy.strip() == "[]"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("phases=[10]", "phases[0]: 10 is not a group of settings; give it as {KEY: VALUE}, of steps, crop, batch"),
        ("phases=[{steps: 10, size: 64}]", "phases.size: no such setting; choose one of steps, crop, batch"),
        ("phases=[{steps: many}]", "steps: 'many' is not a whole number"),
        ("phases=3", "phases: is not a list; give it as [A, B]"),
        ("training.sed=1", "training.sed: no such setting; did you mean 'seed'?"),
        ("training.betas=[1]", "has 1 values; give 2"),
        ("repeat=3", "repeat: is not a mapping; give it as {KEY: VALUE}"),
    ],
)
def test_a_wrong_form_is_described_without_names_of_classes(override, sentence):
    with pytest.raises(UserError) as caught:
        configuration.load(TrainVaeConfig, None, ["output=x", override])
    assert sentence in str(caught.value)
    assert re.search(r"[A-Z][a-z]+[A-Z]", str(caught.value)) is None
