"""Settings that folders already answer are not asked for again."""

from __future__ import annotations

import json

import pytest

from ldm_vae import cli, schema


@pytest.fixture
def run(tmp_path):
    """The folder of a finished `train-vae`, as far as it is read before the command starts."""
    folder = tmp_path / "run"
    (folder / "autoencoder").mkdir(parents=True)
    (folder / "autoencoder" / "config.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    data = {"source": "folder", "path": str(tmp_path / "photos"), "cache_megabytes": 100, "include": ["a/*"]}
    (folder / "config.yaml").write_text(json.dumps({"format_version": 1, "data": data, "held_out_resolution": 128}))
    return folder


def printed(words, capsys):
    """The resolved settings of a command line, read back."""
    import yaml

    assert cli.main([str(word) for word in words] + ["--print-config"]) == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["encode", "evaluate", "diagnose", "codec bench", "directions fit", "anomaly fit"])
@pytest.mark.parametrize("inside", ["", "autoencoder"])
def test_images_and_their_size_come_from_the_run(command, inside, run, tmp_path, capsys):
    values = printed([*command.split(), run / inside, f"output={tmp_path / 'out'}"], capsys)
    assert values["data"]["path"] == str(tmp_path / "photos")
    assert values["data"]["source"] == "folder"
    assert values["data"]["include"] == ["a/*"]
    assert values["data"]["cache_megabytes"] == 0
    assert str(values["resolution"]) == "128"


@pytest.mark.parametrize("command", ["encode", "evaluate"])
def test_what_is_given_stays(command, run, tmp_path, capsys):
    words = [command, run, f"output={tmp_path / 'out'}"]
    values = printed([*words, "data=synthetic", "resolution=64"], capsys)
    assert (values["data"]["source"], str(values["resolution"])) == ("synthetic", "64")
    values = printed([*words, "data.synthetic.count=7"], capsys)
    assert values["data"]["source"] == "synthetic"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"autoencoder: {run}\nresolution: 96\ndata: {{source: synthetic}}\n")
    values = printed([command, recipe, f"output={tmp_path / 'out'}"], capsys)
    assert (values["data"]["source"], str(values["resolution"])) == ("synthetic", "96")


@pytest.mark.parametrize(
    ("command", "made_by"),
    [
        (["train-diffusion", "{folder}"], ["ldm-vae", "encode", "{run}", "data=x", "output=y"]),
        (["train-diffusion", "{folder}"], ["scripts/encode_dataset.py", "autoencoder={run}", "output=y"]),
        (["latents", "decode", "{folder}"], ["ldm-vae", "encode", "--autoencoder", "{run}", "output=y"]),
        (["codec", "fit", "latents={folder}"], ["ldm-vae", "encode", "{run}", "output=y"]),
        (["anomaly", "score", "{folder}"], ["ldm-vae", "anomaly", "fit", "{run}", "output=y"]),
        (["anomaly", "evaluate", "{folder}"], ["ldm-vae", "anomaly", "fit", "{run}", "output=y"]),
        (["directions", "evaluate", "{folder}"], ["ldm-vae", "directions", "fit", "{run}", "output=y"]),
    ],
)
def test_the_autoencoder_comes_from_the_record_of_what_it_made(command, made_by, run, tmp_path, capsys):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"command": [word.format(run=run) for word in made_by]}))
    words = [word.format(folder=folder) for word in command]
    assert printed([*words, f"output={tmp_path / 'out.png'}"], capsys)["autoencoder"] == str(run)
    other = tmp_path / "other"
    assert printed([*words, f"output={other}.png", f"autoencoder={other}"], capsys)["autoencoder"] == str(other)


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "{}", '{"command": []}', '{"command": ["ldm-vae", "frob"]}', '{"command": 3}']
)
def test_a_record_that_says_nothing_is_passed_over(record, tmp_path, capsys):
    (tmp_path / "run.json").write_text(record)
    assert cli.main(["latents", "decode", str(tmp_path), f"output={tmp_path / 'sheet.png'}"]) == 2
    assert "autoencoder is required" in capsys.readouterr().err


def test_what_was_taken_is_printed(run, tmp_path, capsys):
    words = cli.ArgumentReader("encode").read([str(run), f"output={tmp_path / 'out'}"])
    command = cli.COMMANDS["encode"]
    cli.take_defaults(command, schema.read_schema(command.config), words, {})
    assert capsys.readouterr().err == f"data and resolution=128 from {run / 'config.yaml'}\n"


def test_a_command_whose_data_is_a_text_takes_none_from_the_run(run, tmp_path, capsys):
    words = ["explore", str(run), f"export={tmp_path / 'page.html'}", "--print-config"]
    assert cli.main(words) == 0
    assert "data: null" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "made_by", "taken"),
    [
        (
            "anomaly score",
            "ldm-vae anomaly fit {run} model={model} perceptual_weights={weights} output=x resolution=32",
            {"autoencoder": "{run}", "pipeline": "{model}", "perceptual_weights": "{weights}"},
        ),
        (
            "anomaly evaluate",
            "ldm-vae anomaly fit {run} pipeline={model} output=x",
            {"autoencoder": "{run}", "pipeline": "{model}", "perceptual_weights": None},
        ),
        (
            "directions evaluate",
            "ldm-vae directions fit autoencoder={run} resolution=48 output=x",
            {"autoencoder": "{run}", "resolution": 48},
        ),
    ],
)
def test_the_settings_of_a_fit_are_not_given_twice(command, made_by, taken, run, tmp_path, capsys):
    places = {"run": run, "model": tmp_path / "model", "weights": tmp_path / "weights.safetensors"}
    for name in ("model", "fit"):
        (tmp_path / name).mkdir()
    places["weights"].touch()
    (tmp_path / "fit" / "run.json").write_text(json.dumps({"command": made_by.format(**places).split()}))
    values = printed([*command.split(), tmp_path / "fit", "data=synthetic", "output=y"], capsys)
    assert {key: values[key] for key in taken} == {
        key: text.format(**places) if isinstance(text, str) else text for key, text in taken.items()
    }
    given = printed([*command.split(), tmp_path / "fit", "data=synthetic", "output=y", "autoencoder=a/b"], capsys)
    assert given["autoencoder"] == "a/b"


@pytest.mark.parametrize("words", ["evaluate a/b data=synthetic perceptual_net=null", "generate a/b sampler=null"])
def test_a_choice_that_may_be_null_can_be_null_on_the_command_line(words, tmp_path, capsys):
    key = words.rpartition(" ")[2].partition("=")[0]
    assert printed([*words.split(), f"output={tmp_path / 'x'}"], capsys)[key] is None
