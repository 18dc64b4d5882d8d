"""The command line: quick help, one-line errors with exit code 2, and the training commands end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from ldm_vae import cli
from ldm_vae.errors import EXIT_USER_ERROR


def test_every_command_is_in_the_overview_and_explains_itself(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in cli.COMMANDS)
    for name in cli.COMMANDS.keys() - cli.GROUPS:
        with pytest.raises(SystemExit) as exit_:
            cli.main([name, "--help"])
        assert exit_.value.code == 0
        assert f"usage: ldm-vae {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.GROUPS)
def test_every_tool_is_in_the_overview_of_its_command_and_explains_itself(name, capsys):
    assert cli.main([name]) == cli.main([name, "--help"]) == 0
    overview = capsys.readouterr().out
    for tool in cli.command_module(name).TOOLS:
        assert f"  {tool} " in overview
        with pytest.raises(SystemExit) as exit_:
            cli.main([name, tool, "--help"])
        assert exit_.value.code == 0
        assert f"usage: ldm-vae {name} {tool}" in capsys.readouterr().out
    assert cli.main([name, f"{tool}x"]) == 2
    assert f"has no tool '{tool}x'; did you mean '{tool}'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "compress", "decompress", "demo", "diagnose", "directions apply", "ema", "generate", "interpolate",
        "latents decode", "latents stats", "reconstruct", "report",
    ],
)  # fmt: skip
def test_out_and_output_mean_the_same(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    assert re.search(r"--out(put)?( [A-Z]+)?, --out(put)? ", capsys.readouterr().out)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from ldm_vae import cli; cli.main(['--help']); "
        "print([m for m in ('torch', 'diffusers', 'numpy', 'PIL', 'omegaconf', 'tqdm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_help_takes_well_under_half_a_second_of_cpu():
    before = os.times()
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ldm_vae.cli", "--help"], capture_output=True, check=True)
    after = os.times()
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    assert min(cpu, time.perf_counter() - started) < 0.5


def test_an_unknown_command_suggests_the_right_one(capsys):
    assert cli.main(["train-vea"]) == EXIT_USER_ERROR
    assert "did you mean 'train-vae'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.yaml"], "no such configuration file"),
        (["data.source=folder", "data.path=/nonexistent"], "no such folder"),
        (["training.learning_rte=1"], "Did you mean one of: 'learning_rate'"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    assert cli.main(["train-vae", *arguments, f"output={tmp_path / 'run'}"]) == EXIT_USER_ERROR
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("ldm-vae train-vae: ")
    assert message in errors
    assert "\n" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("train-vae", ["training.seed=7", "training.workers=3"]),
        ("train-diffusion", ["training.seed=7", "training.workers=3"]),
        ("encode", ["batch=4", "device=cpu"]),
        ("diagnose", ["batch=4", "device=cpu"]),
    ],
)
def test_settings_may_stand_before_and_after_an_option(command, settings, capsys):
    assert cli.main([command, *settings, "--print-config"]) == 0
    together = capsys.readouterr().out
    assert cli.main([command, settings[0], "--print-config", settings[1]]) == 0
    assert capsys.readouterr().out == together
    assert cli.main([command, "--print-config"]) == 0
    assert capsys.readouterr().out != together


@pytest.mark.parametrize("names", [["-c.ldmz", "b.ldmz"], ["b.ldmz", "--help"]])
def test_after_two_dashes_a_name_may_begin_with_one(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.ldmz").touch()
    words = ["decompress", "--output", "o", "--autoencoder", "here", "--", *names]
    assert cli.main(words) == EXIT_USER_ERROR
    (dashed,) = {*names} - {"b.ldmz"}
    assert f"{dashed}: no such file; give files" in capsys.readouterr().err


def test_an_empty_folder_is_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    arguments = ["data.source=folder", f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}"]
    assert cli.main(["train-vae", *arguments]) == EXIT_USER_ERROR
    assert "no image in it" in capsys.readouterr().err


def test_print_config_and_dry_run_write_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["autoencoder.preset=pico", "phases=[{steps: 3, crop: 32, batch: 2}]", "training.precision=fp32"]
    assert cli.main(["train-vae", *overrides, "--print-config"]) == 0
    assert "preset: pico" in capsys.readouterr().out
    assert cli.main(["train-vae", *overrides, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("1.18 M trained parameters", "GMAC per sample", "(2, 3, 32, 32)", "peak memory"):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_train_vae_from_a_folder_with_a_broken_image(image_folder, tmp_path, capsys):
    """The whole command: previews, metrics of both loss terms, a model that loads; the broken file is named."""
    import shutil

    from ldm_vae.autoencoder.models import load_autoencoder

    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    for number in range(4):  # of which some fall into the training part
        (folder / "a" / f"broken{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    output = tmp_path / "run"
    arguments = [
        f"output={output}", "data.source=folder", f"data.path={folder}", "data.held_out=0.2",
        "crop.short_side_min=32", "autoencoder.preset=pico", "phases=[{steps: 12, crop: 32, batch: 4}]",
        "training.precision=fp32", "training.workers=0", "training.log_every=4", "held_out_resolution=64",
        "held_out_images=2", "training.device=cpu",
    ]  # fmt: skip
    assert cli.main(["train-vae", *arguments]) == 0
    assert ".png: cannot be read" in capsys.readouterr().out
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/l1", "loss/kl", "rate/bits_per_dim", "rate/bits_per_pixel", "rate/beta"} <= set(lines[0])
    assert "held_out/psnr" in lines[-1]
    assert list((output / "previews").glob("*.webp"))
    assert (output / "tensorboard").is_dir()
    record = json.loads((output / "run.json").read_text())
    assert record["finished"]
    assert load_autoencoder(output).config.latent_channels == 4  # the run directory itself is accepted
