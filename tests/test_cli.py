"""The command line: quick help, one-line errors with exit code 2, and the training commands end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from ldm_vae import cli, schema
from ldm_vae.errors import EXIT_USER_ERROR, UserError


def test_every_command_is_in_the_overview_and_explains_itself(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name.split()[0]} " in overview for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert cli.main([*name.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: ldm-vae {name}" in text
        assert "--dry-run" in text
        assert "--print-config" in text
        assert ("--overwrite" in text) == ("overwrite" in schema.parameters(cli.COMMANDS[name].function))


@pytest.mark.parametrize("name", cli.GROUPS)
def test_every_tool_is_in_the_overview_of_its_command(name, capsys):
    assert cli.main([name]) == cli.main([name, "--help"]) == 0
    overview = capsys.readouterr().out
    tools = [one.split()[1] for one in cli.COMMANDS if one.startswith(f"{name} ")]
    assert all(f"  {tool} " in overview for tool in tools)
    assert cli.main([name, f"{tools[-1]}x"]) == 2
    assert f"there is no tool '{tools[-1]}x'; did you mean '{tools[-1]}'?" in capsys.readouterr().err


def settings_of(*words: str) -> list[str]:
    name, rest, _ = cli.find_command(words)
    read = cli.ArgumentReader(name).read(rest)
    texts = [text.replace("'", "").replace(" ", "") for text in read.settings]
    return sorted([*texts, *(f"--{flag}" for flag in read.flags), *([str(read.recipe)] if read.recipe else [])])


@pytest.mark.parametrize("words", [["seed=3"], ["--seed=3"], ["--seed", "3"]])
def test_three_spellings_of_a_setting(words):
    assert settings_of("generate", *words) == ["seed=3"]
    assert settings_of("train-vae", *words) == ["training.seed=3"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("demo a.jpg b/ --out seen --size 64", "demo a.jpg b/ output=seen resolution=64"),
        ("demo --pipeline runs/diffusion", "demo model=runs/diffusion"),
        ("diagnose runs/vae --data ~/images", "diagnose runs/vae data=~/images"),
        ("generate r --label cat --label 3 --size 512x768", "generate r labels=[cat,3] resolution=512x768"),
        ("generate r --interpolate cat dog --guidance-interval 0 0.8",
         "generate r interpolate=[cat,dog] guidance_interval=0,0.8"),
        ("generate r --grid --neighbours runs/latents --out x", "generate r grid=true latents=runs/latents output=x"),
        ("reconstruct runs/mine a.jpg b/ --out seen", "reconstruct runs/mine a.jpg b/ output=seen"),
        ("compress a.jpg --autoencoder v --target-bpp 0.3", "codec compress a.jpg autoencoder=v target_bpp=0.3"),
        ("decompress a.ldmz --autoencoder v --progressive 1", None),
        ("codec-fit autoencoder=v latents=l output=o", "codec fit v latents=l output=o"),
        ("codec-bench autoencoder=v output=o", "codec bench v output=o"),
        ("directions apply d cat/probe p/ --autoencoder v --strengths=-3,0,3 --box 8,8,64,64 --out cats",
         "directions apply d cat/probe p/ autoencoder=v strengths=-3,0,3 box=8,8,64,64 output=cats"),
        ("interpolate a.jpg b.jpg --pipeline runs/diffusion --size 512 --animation gif --out between",
         "interpolate a.jpg b.jpg model=runs/diffusion resolution=512 animation=gif output=between"),
        ("explore v --compare w --size 64 --export p.html --overwrite",
         "explore v compare=w resolution=64 export=p.html --overwrite"),
        ("anomaly fit autoencoder=v pipeline=d output=o", "anomaly fit v model=d output=o"),
        ("latents stats s --samples 20000 --output o", "latents stats s count=20000 output=o"),
        ("latents decode s --autoencoder v --output p.png --samples 3,17 --flipped",
         "latents decode s autoencoder=v output=p.png samples=3,17 --flipped"),
        ("latents export s o --to parquet", "latents export s o to=parquet"),
        ("latents import s o --from lightningdit --autoencoder v",
         "latents import s o layout=lightningdit autoencoder=v"),
        ("latents verify s --quick --report r.json", "latents verify s quick=true report=r.json"),
        ("latents repair autoencoder=v output=o --remove-foreign", "latents repair v output=o --remove-foreign"),
        ("convert s o --to onnx --dtype fp16 --size 64", "model convert s o to=onnx precision=fp16 resolution=64"),
        ("card m --evaluation e --intended-use words", "model card m evaluation=e intended_use=words"),
        ("ema r --length 0.05 0.1 --kid 1000 --images photos", "model ema r lengths=0.05,0.1 count=1000 data=photos"),
        ("report runs/quickstart --out r.html", "report runs/quickstart output=r.html"),
        ("synth toys --count 1000 --resolution 256", "synth toys count=1000 resolution=256"),
        ("train-vae configs/a.yaml output=x data.source=folder",
         "train-vae configs/a.yaml --output x --data.source folder"),
    ],
)  # fmt: skip
def test_old_spellings_mean_the_same(old, new):
    if new is None:
        with pytest.raises(UserError, match="progressive: no such setting"):
            settings_of(*old.split())
    else:
        assert settings_of(*old.split()) == settings_of(*new.split())


def test_an_old_spelling_gets_a_line_of_advice(capsys, tmp_path):
    cli.main(["codec-fit", "autoencoder=v", "latents=l", "--out", str(tmp_path / "o.safetensors"), "--print-config"])
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "ldm-vae: `codec-fit` is now `codec fit` (the old spelling works for one release)",
        "ldm-vae codec fit: out= is now output= (the old spelling works for one release)",
    ]


def test_data_is_a_folder_a_name_or_synthetic(capsys):
    for text, found in (
        ("~/images", "source: folder\n  path: ~/images"),
        ("hf:org/set", "source: datasets\n  path: null"),
        ("synthetic", "source: synthetic\n  path: null"),
    ):
        assert cli.main(["evaluate", "runs/vae", f"data={text}", "output=x", "--print-config"]) == 0
        assert found in capsys.readouterr().out


def test_a_setting_may_be_longer_than_the_name_of_a_file():
    assert settings_of("model", "card", "runs/vae", f"intended_use={'Latents of photographs. ' * 40}")


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
        (["training.learning_rte=1"], "did you mean training.learning_rate?"),
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
    words = ["decompress", "--output", "o", "--autoencoder", "owner/name", "--", *names]
    assert cli.main(words) == EXIT_USER_ERROR
    (dashed,) = {*names} - {"b.ldmz"}
    assert f"{dashed}: no such file or folder; give files" in capsys.readouterr().err


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


def test_a_run_goes_on_with_other_images_only_when_asked(image_folder, tmp_path, capsys):
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)

    def train(steps: int, *words: str) -> int:
        return cli.main([
            "train-vae", f"output={tmp_path / 'run'}", f"data={folder}", "data.held_out=0", "held_out_images=0",
            "crop.short_side_min=32", "autoencoder.preset=pico", f"phases=[{{steps: {steps}, crop: 32, batch: 4}}]",
            "training.precision=fp32", "training.workers=0", "training.device=cpu", "training.tracker=none", *words,
        ])  # fmt: skip

    assert train(2) == 0
    (folder / "a" / "000.png").rename(folder / "a" / "other.png")
    capsys.readouterr()
    assert train(3) == EXIT_USER_ERROR
    changed = "the images are not those of the first 2 steps (24 images with other names, classes or sizes in bytes)"
    assert f"{changed}; give those, or another output, or go on with these images by changed_data=continue" in (
        capsys.readouterr().err
    )
    (folder / "a" / "other.png").unlink()
    assert train(3) == EXIT_USER_ERROR
    assert "(24 images then, 23 now)" in capsys.readouterr().err
    assert train(3, "changed_data=continue") == 0
    assert "going on with these, as changed_data=continue asks" in capsys.readouterr().out
    assert train(4) == 0, "the next part began with the images that are there"


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
