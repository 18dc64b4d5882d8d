"""What `accelerate config` asks for and the environment of `accelerate launch` never change a result unseen."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ldm_vae.errors import UserError
from ldm_vae.latents.encode import EncodeConfig
from ldm_vae.latents.encode import make_accelerator as encoding_accelerator
from ldm_vae.runtime import PLUGINS
from ldm_vae.training.distributed import close_accelerator, joined_processes, open_accelerator
from ldm_vae.training.trainer import TrainingConfig, make_accelerator
from tests.training import toy
from tests.training.test_trainer_fit import ROOT, assert_same, environment, metrics, weights


def launched_with(*options: str) -> dict[str, str]:
    """The variables that `accelerate launch OPTIONS` sets for one process."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    arguments = launch.launch_command_parser().parse_args([*options, "train.py"])
    arguments, _, _ = launch._validate_launch_command(arguments)
    _, variables = prepare_simple_launcher_cmd_env(arguments)
    return {name: value for name, value in variables.items() if name.startswith("ACCELERATE_")}


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    output = tmp_path_factory.mktemp("plain")
    assert toy.main(str(output), "micro=4") == 0
    return output


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps=4 is not used: the micro-batch"),
        (
            launched_with("--mixed_precision=bf16", "--cpu"),
            "mixed_precision=bf16 is not used: training.prec",
        ),
        (launched_with("--dynamo_backend=inductor", "--cpu", "--mixed_precision=no"), "dynamo_backend=inductor is not"),
    ],
)
def test_settings_of_accelerate_change_no_bit_and_are_named(plain, variables, line, tmp_path, monkeypatch, capsys):
    set_all(monkeypatch, variables)
    assert toy.main(str(tmp_path), "micro=4") == 0
    assert f"accelerate's {line}" in capsys.readouterr().out
    assert_same(weights(plain), weights(tmp_path))
    assert metrics(plain) == metrics(tmp_path)


def test_the_plain_settings_of_accelerate_are_not_mentioned(tmp_path, monkeypatch, capsys):
    set_all(monkeypatch, launched_with("--mixed_precision=no", "--dynamo_backend=no", "--cpu"))
    assert toy.main(str(tmp_path), "steps=1") == 0
    assert "accelerate" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "name"),
    [({variable: "true"}, name) for variable, name in PLUGINS.items()] + [({"PJRT_DEVICE": "TPU"}, "TPU")],
)
def test_plugins_are_refused_by_name(variables, name, monkeypatch):
    set_all(monkeypatch, variables)
    for start in (
        lambda: make_accelerator(TrainingConfig(tracker="none")),
        lambda: encoding_accelerator(EncodeConfig(autoencoder="a", output="o")),
        lambda: joined_processes().__enter__(),
    ):
        with pytest.raises(UserError, match=f"^accelerate: {name}.* not supported"):
            start()


def test_sagemaker_without_its_own_distribution_is_one_process(monkeypatch):
    set_all(monkeypatch, {"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO"})
    close_accelerator(make_accelerator(TrainingConfig(device="cpu", tracker="none")))


@pytest.mark.parametrize("command", ["train-vae", "train-diffusion", "encode", "evaluate"])
def test_a_plugin_is_refused_before_torch_is_imported_and_before_anything_is_written(command, tmp_path):
    program = "import sys; from ldm_vae.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules)"
    words = {
        "train-vae": ["data=synthetic"], "train-diffusion": [f"latents={tmp_path / 'set'}"],
        "encode": [f"autoencoder={tmp_path}", "data=synthetic"],
        "evaluate": [f"autoencoder={tmp_path}", "data=synthetic"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; sys.exit(code)", command, *words[command], f"output={tmp_path / 'run'}"],
        env=environment() | {"ACCELERATE_USE_FSDP": "true"}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "accelerate: FSDP is not supported (ACCELERATE_USE_FSDP=true)" in done.stderr
    assert done.stdout.strip() == "False"
    assert not (tmp_path / "run").exists()


def test_a_device_that_accelerate_sets_and_we_do_not_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(UserError, match=r"accelerate: accelerate is set up for meta, and training.device=cpu is cpu"):
        make_accelerator(TrainingConfig(device="cpu", tracker="none"))


def test_one_process_may_train_in_one_precision_and_then_in_another(tmp_path):
    for precision in ("fp32", "bf16", "fp32"):
        accelerator = make_accelerator(TrainingConfig(device="cpu", precision=precision, tracker="none"))
        assert accelerator.mixed_precision == {"fp32": "no"}.get(precision, precision)
        if precision != "bf16":  # a run that failed has not closed it
            close_accelerator(accelerator)


def test_an_accelerator_of_the_program_around_us_is_left_alone(monkeypatch):
    from accelerate import Accelerator

    theirs = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        with pytest.raises(UserError, match=r"training.precision: an Accelerator with mixed_precision=bf16 is in this"):
            make_accelerator(TrainingConfig(device="cpu", precision="fp32", tracker="none"))
        close_accelerator(open_accelerator(SimpleNamespace(device="cpu", processes=None, timeout_seconds=300)))
        assert theirs.mixed_precision == "bf16"
        assert theirs.device == torch.device("cpu")
    finally:
        theirs.state._reset_state(reset_partial_state=True)


def test_a_tracker_that_is_not_installed_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # wandb leaves such a folder, and Python would import it
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"^training.tracker: wandb is not installed; run `pip install wandb`, or set"):
        make_accelerator(TrainingConfig(device="cpu", tracker="wandb"))
    with pytest.raises(UserError, match="wandb is not installed"):
        make_accelerator(TrainingConfig(device="cpu", tracker="wandb"), tmp_path)


@pytest.mark.parametrize("form", ["training.tracker=wandb", "recipe"])
def test_a_missing_tracker_is_one_sentence_and_writes_nothing(form, tmp_path, capsys, monkeypatch):
    from ldm_vae import cli

    monkeypatch.setattr(cli, "resolve", pytest.fail)  # nothing of the command is imported
    words = [form]
    if form == "recipe":
        (tmp_path / "recipe.yaml").write_text("training: {tracker: wandb}\n")
        words = [str(tmp_path / "recipe.yaml")]
    assert cli.main(["train-vae", *words, "data.source=synthetic", f"output={tmp_path / 'run'}"]) == 2
    assert "training.tracker: wandb is not installed; run `pip install wandb`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_ends_the_run_in_one_sentence(tmp_path, monkeypatch):
    import accelerate.tracking

    class UsageError(Exception):
        """wandb's, where nobody is logged in."""

    def start(self):
        raise UsageError("api_key not configured (no-tty)\ncall wandb.login")

    monkeypatch.setattr(accelerate.tracking.TensorBoardTracker, "start", start)
    monkeypatch.setattr(toy, "make_accelerator", lambda config: make_accelerator(config, tmp_path))
    match = r"training.tracker: tensorboard does not start \(UsageError: api_key not configured \(no-tty\)\); see"
    with pytest.raises(UserError, match=match):
        toy.main(str(tmp_path), "training.tracker=tensorboard", "steps=1")
