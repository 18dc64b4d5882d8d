"""The settings read from source: complete, explained, the same as the dataclasses, and alike in all commands."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from ldm_vae import cli, schema
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


def test_a_wrong_word_is_refused_without_a_model_library():
    code = (
        "import sys, time; from ldm_vae import cli; cli.main(['train-vae', 'training.learning_rte=1', 'output=x']);"
        "print(time.process_time(), [m for m in ('torch', 'diffusers', 'numpy', 'omegaconf') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "did you mean training.learning_rate?" in found.stderr
    seconds, heavy = found.stdout.split(" ", 1)
    assert float(seconds) < 1
    assert heavy.strip() == "[]"
