"""No secret and no path of the home folder in anything that a command writes: canaries are planted and searched for."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_vae import cli, config, redaction
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.errors import EXIT_USER_ERROR, UserError
from ldm_vae.provenance import write_run_record
from ldm_vae.storage import open_folder

SECRETS = {
    "HF_TOKEN": "hf_CANARYabcdefghij0123456789",
    "WANDB_API_KEY": "0123456789CANARYfedcba9876543210",
    "AWS_SECRET_ACCESS_KEY": "wJalrCANARYEMI+K7MDENG+bPxRfiCYEXAMPLEKEY",
}
PASSWORD = "CANARYpassword1"
ADDRESS = f"sftp://somebody:{PASSWORD}@example.org/images"
HOME = "canary-person"

TRAINING = ["training.precision=fp32", "training.workers=0", "training.log_every=1", "training.device=cpu"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home folder of somebody with secrets."""
    home = tmp_path_factory.mktemp("home") / HOME
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def written(environment: Path, image_folder: Path) -> tuple[Path, str]:
    """(a run root below the home folder, what the commands said). The data lie in a folder named like a secret."""
    data = environment / SECRETS["HF_TOKEN"]
    shutil.copytree(image_folder, data)
    root = environment / "runs"
    images = ["data.source=folder", f"data.path={data}", "data.held_out=0.4"]
    vae, console = f"autoencoder={root}/vae", io.StringIO()

    def run(*words: str) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(console):
            patch.setattr(sys, "argv", ["ldm-vae", *words])
            with contextlib.redirect_stderr(console):
                assert cli.main(list(words)) == 0, console.getvalue()

    phases = "phases=[{steps: 1, crop: 32, batch: 2}]"
    run("train-vae", *images, *TRAINING, phases, "autoencoder.preset=pico", "held_out_resolution=64",
        f"output={root}/vae")  # fmt: skip
    run("encode", *images, vae, f"output={root}/latents", "resolution=32", "workers=0", "shard_size=8")
    run("train-diffusion", *TRAINING, vae, f"latents={root}/latents", "held_out=0", "unet.preset=tiny",
        "unet.widths=[32,64]", "steps=1", "batch=2", f"output={root}/diffusion")  # fmt: skip
    run("generate", f"{root}/diffusion", "--count", "1", "--steps", "1", "--out", f"{root}/samples")
    run("evaluate", *images, vae, "resolution=32", "count=2", f"output={root}/evaluation")
    run("card", f"{root}/vae", "--evaluation", f"{root}/evaluation")
    run("report", str(root))
    run("convert", f"{root}/vae", f"{root}/copy", "--to", "diffusers")
    run("convert", f"{root}/vae", f"{root}/torchscript", "--to", "torchscript", "--size", "32")
    run("latents", "export", f"{root}/latents", f"{root}/parquet", "--to", "parquet")
    return root, console.getvalue()


def contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file and, where it is an archive or a table, what is packed in it."""
    yield path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield str(pq.read_table(path).to_pylist()).encode()


def found(root: Path, words: list[str]) -> list[str]:
    """`FILE: WORD` for each word that stands in a file below `root`."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return [
        f"{path.relative_to(root)}: {word}"
        for path in files
        for word in words
        if word in str(path.relative_to(root)) or any(word.encode() in content for content in contents(path))
    ]


@pytest.mark.promise(9)
def test_no_command_writes_a_secret_or_the_home_folder(written, record_property):
    root, _ = written
    files = [path for path in root.rglob("*") if path.is_file()]
    names = {path.name for path in files} | {path.suffix for path in files}
    assert {"config.yaml", "run.json", "README.md", "report.html", "state.json", "conversion.json", ".pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert found(root, [*SECRETS.values(), HOME]) == []
    record_property("figure", f"{len(files)} files of 10 commands, {len(SECRETS) + 1} canaries: 0 found")


def test_nothing_that_is_packed_or_binary_hides_a_canary(tmp_path):
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", "x" * 1000 + PASSWORD)
    (tmp_path / "binary").write_bytes(b"\0\xff" + PASSWORD.encode() + b"\0")
    (tmp_path / PASSWORD).touch()
    assert len(found(tmp_path, [PASSWORD])) == 3


def test_the_console_shows_no_secret_of_the_environment(written):
    _, console = written
    assert [name for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY") if SECRETS[name] in console] == []


def test_what_was_taken_out_of_the_settings_is_not_missed(written, environment, capsys):
    """The saved settings say `~`; the same command finds its run, and a command that reads them finds the files."""
    root, _ = written
    text = (root / "diffusion" / "config.yaml").read_text()
    assert "latents: ~/runs/latents" in text
    words = [f"autoencoder={root}/vae", f"latents={root}/latents", "held_out=0", "unet.preset=tiny"]
    words += ["unet.widths=[32,64]", "steps=1", "batch=2", f"output={root}/diffusion"]
    assert cli.main(["train-diffusion", *TRAINING, *words]) == 0
    assert "this run is finished" in capsys.readouterr().out
    loaded = config.load(TrainVaeConfig, root / "vae" / "config.yaml")
    assert loaded.output == str(root / "vae")


@pytest.mark.promise(9)
def test_an_address_with_a_password_is_refused_before_anything_is_written(tmp_path, capsys, record_property):
    output = f"output={tmp_path / 'out'}"
    (tmp_path / "run.yaml").write_text(f"data: {{source: folder, path: '{ADDRESS}'}}\n")
    commands = [
        ["train-vae", "data.source=folder", f"data.path={ADDRESS}", output],
        ["train-vae", str(tmp_path / "run.yaml"), output],
        ["train-vae", "data.source=datasets", f"data.datasets.name={ADDRESS}", output],
        ["encode", f"autoencoder={tmp_path}", f"output={ADDRESS}"],
        ["train-diffusion", f"autoencoder={tmp_path}", f"latents={ADDRESS}", output],
        ["evaluate", f"autoencoder={tmp_path}", f"data.path={ADDRESS}", output],
        ["latents", "verify", ADDRESS],
    ]
    for words in commands:
        assert cli.main(words) == EXIT_USER_ERROR, words
        said = "".join(capsys.readouterr())
        assert "contains a password" in said
        assert PASSWORD not in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="contains a password"):
        open_folder(ADDRESS)
    record_property("figure", f"a password in an address: {len(commands)} of {len(commands)} commands refuse it")


@pytest.mark.parametrize("text", ["output: ${oc.env:HF_TOKEN}", "output: x${oc.env:HOME}", "output: ${data.path}"])
def test_settings_take_nothing_from_the_environment(text, environment, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="is a reference"):
        config.load(TrainVaeConfig, tmp_path / "a.yaml")
    with pytest.raises(UserError, match="is a reference"):
        config.load(TrainVaeConfig, None, [text.replace(": ", "=")])


def test_a_secret_that_was_typed_is_not_recorded(environment, tmp_path):
    command = ["ldm-vae", "encode", f"data.path={environment}/x?token={SECRETS['HF_TOKEN']}", f"a={ADDRESS}"]
    write_run_record(tmp_path, command, 0.0, 1.0, metrics={"loss": 0.5, SECRETS["WANDB_API_KEY"]: [HOME]})
    text = (tmp_path / "run.json").read_text()
    assert '"data.path=~/x?token=***"' in text
    assert "sftp://somebody:***@example.org/images" in text
    assert SECRETS["WANDB_API_KEY"] not in text
    assert '"loss": 0.5' in text


@pytest.mark.parametrize(
    ("home", "text", "expected"),
    [
        ("/home/me", "/home/me", "~"),
        ("/home/me", "a=/home/me/x:/home/me", "a=~/x:~"),
        ("/home/me", "file:///home/me/x", "file://~/x"),
        ("/home/me", "/home/me2 /home/me.old /mnt/home/me", "/home/me2 /home/me.old /mnt/home/me"),
        ("/", "/data/x", "/data/x"),
        ("/home/me", "http://host:80/a@b", "http://host:80/a@b"),
        ("/home/me", "loss: 1.5, 12:30, someone@example.org", "loss: 1.5, 12:30, someone@example.org"),
    ],
)
def test_only_the_home_folder_becomes_a_tilde(monkeypatch, home, text, expected):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SOME_TOKEN_FILE", os.path.abspath(__file__))
    assert redaction.redacted({"a": [text, 1, None]}) == {"a": [expected, 1, None]}
