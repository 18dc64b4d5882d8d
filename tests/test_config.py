"""Configuration: defaults, YAML, overrides; every mistake is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ldm_vae import config as configuration
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.data.sources import DataConfig
from ldm_vae.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def load(*overrides: str, path: Path | None = None) -> TrainVaeConfig:
    return configuration.load(TrainVaeConfig, path, ["output=x", *overrides])


def test_overrides_beat_yaml_and_yaml_beats_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("rate: {target_nats: 1.5}\ntraining: {learning_rate: 1e-4, seed: 3}\n")
    config = load("training.seed=7", path=file)
    assert config.rate.target_nats == 1.5
    assert config.training.learning_rate == 1e-4  # a float, where plain YAML reads a string
    assert config.training.seed == 7
    assert config.training.warmup_steps == TrainVaeConfig().training.warmup_steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainin.seed=1", "did you mean one of 'training', 'train'?"),
        ("training.sed=1", "did you mean 'seed'"),
        ("training.seed=soon", "training.seed: 'soon' is not a whole number"),
        ("training.precision=int8", "expected one of"),
        ("training.log_every=0", "training.log_every: 0 is not positive"),
        ("rate.beta=1", "has no effect with rate.mode=target"),
        ("data.path=/tmp", "has no effect with data.source=synthetic"),
        ("phases=[{crop: 63}]", "not a multiple of 8"),
        ("phases=[{corp: 64}]", "did you mean 'crop'"),
        ("autoencoder.preset=sd", "is not a preset of architecture 'wavelet'"),
        ("nonsense", "not of the form key=value"),
    ],
)
def test_mistakes_are_refused_in_one_line(override, message):
    with pytest.raises(UserError) as error:
        load(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_recipe_of_latent_diffusion_has_its_learning_rate_at_its_own_batch():
    """CompVis/latent-diffusion, main.py: `learning_rate = accumulate_grad_batches * ngpu * bs * base_lr`."""
    recipe = next(path for path in CONFIGS if path.stem == "vae_f8c4_sd")
    config = load("data.path=IMAGES", path=recipe)
    expected = 4.5e-6 * config.phases[0].batch
    assert [config.training.learning_rate, config.adversarial.learning_rate] == pytest.approx([expected] * 2)
    assert config.training.final_learning_rate_fraction == 1  # constant, as there


def test_a_missing_required_key_is_named():
    with pytest.raises(UserError, match="output is required; give it as output=VALUE"):
        configuration.load(TrainVaeConfig)


def test_a_missing_file_names_its_neighbour():
    with pytest.raises(UserError, match=r"did you mean .*vae_quickstart\.yaml"):
        configuration.load(TrainVaeConfig, CONFIGS[0].parent / "vae_quikstart.yaml")


def test_yaml_tags_and_duplicate_keys_are_refused(tmp_path):
    for text in ("a: !!python/object/apply:os.system ['true']\n", "held_out_images: 1\nheld_out_images: 2\n"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError):
            load(path=tmp_path / "a.yaml")


def test_round_trip_through_yaml(tmp_path):
    config = load("phases=[{steps: 5}, {steps: 7, crop: 128}]", "training.betas=[0.8,0.9]")
    (tmp_path / "a.yaml").write_text(configuration.to_yaml(config))
    assert configuration.load(TrainVaeConfig, tmp_path / "a.yaml") == config


def test_changed_keys_reach_into_lists():
    old, new = ({"phases": [{"steps": 1, "crop": 64}, {"steps": steps}], "seed": 0} for steps in (2, 3))
    assert configuration.changed_keys(old, new) == {"phases.1.steps": (2, 3)}
    assert configuration.changed_keys({"a": [1]}, {"a": [1, 2]}) == {"a": ([1], [1, 2])}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_the_repository_loads(path):
    from ldm_vae.diffusion.training import TrainDiffusionConfig
    from ldm_vae.evaluation.comparison import CompareConfig
    from ldm_vae.evaluation.rate_distortion import FrontierConfig
    from ldm_vae.latents.encode import EncodeConfig

    required = {
        "vae": (TrainVaeConfig, ["output=x"]),
        "ae": (TrainVaeConfig, ["output=x"]),
        "encode": (EncodeConfig, ["output=x", "autoencoder=y"]),
        "frontier": (FrontierConfig, ["output=x"]),
        "compare": (CompareConfig, ["output=x"]),
        "diffusion": (TrainDiffusionConfig, ["output=x", "latents=y", "autoencoder=z"]),
    }
    schema, overrides = required[path.stem.split("_")[0]]
    for key, value in {"path": "data.path=images", "initial": "initial=runs/vae"}.items():
        if f"{key}: ???" in path.read_text():
            overrides = [*overrides, value]
    configuration.load(schema, path, overrides)
    assert path.read_text().startswith("#"), "a recipe opens with its command and what is known about it"


@dataclass(frozen=True)
class Texts:
    names: list[str] = field(default_factory=list)
    folder: str | None = None
    switch: Literal["off", "on"] = "on"
    times: dict[str, int] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)


@pytest.mark.parametrize("text", ["1e3", "null", "[x]", "no", "1:30:00", "a: b", "{x", "'", "#", "0x1f", " "])
def test_a_text_is_the_text_after_the_equals_sign(text):
    assert configuration.load(Texts, None, [f"folder={text}"]).folder == text


def test_a_text_stays_text_in_lists_choices_and_keys(tmp_path):
    words = ["names=[no,yes, 1e3, 'a, b', null]", "switch=off", "times={1e3: 2, no: 3}", "folder="]
    expected = Texts(names=["no", "yes", "1e3", "a, b", "null"], switch="off", times={"1e3": 2, "no": 3})
    assert configuration.load(Texts, None, words) == expected
    file = tmp_path / "a.yaml"
    file.write_text(
        "names: [no, yes, 1e3, 'a, b', null]\nswitch: off\ntimes:\n  1e3: 2\n  no: 3\nfolder: null\ndata: synthetic\n"
    )
    assert configuration.load(Texts, file) == expected
    file.write_text("names:\n- 1e3\n- &x no\nfolder: 0123\n")
    assert configuration.load(Texts, file).folder == "0123"
    assert configuration.load(Texts, file).names[0] == "1e3"


def test_the_home_folder_is_spelled_out_in_one_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "a.yaml"
    file.write_text("folder: ~/a\nnames: [~/b]\ndata: ~/images\n")
    config = configuration.load(Texts, file)
    assert (config.folder, config.names, config.data.path) == ("/home/me/a", ["/home/me/b"], "/home/me/images")
    assert configuration.load(Texts, file, ["data=~/others"]).data.path == "/home/me/others"
    assert configuration.load(Texts, file, ["data=hf:org/set"]).data.datasets.name == "org/set"
