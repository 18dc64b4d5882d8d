"""How a command on several processes begins and ends."""

from __future__ import annotations

import pytest

from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ldm_vae.latents.encode import EncodeConfig
from ldm_vae.training.distributed import Processes, exit_code
from ldm_vae.training.trainer import TrainingConfig


def test_training_and_encoding_wait_equally_long():
    assert TrainingConfig().timeout_seconds == EncodeConfig().timeout_seconds == 300


@pytest.mark.parametrize("config", [TrainingConfig, EncodeConfig])
def test_no_time_to_wait_is_refused(config):
    with pytest.raises(UserError, match="timeout_seconds: 0 is below 1"):
        config(timeout_seconds=0)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (UserError("no"), EXIT_USER_ERROR),
        (KeyboardInterrupt(), EXIT_INTERRUPTED),
        (SystemExit(2), 2),
        (SystemExit("no"), 1),
        (ValueError("no"), 1),
    ],
)
def test_a_process_that_leaves_the_others_keeps_its_exit_code(failure, code):
    assert exit_code(failure) == code


@pytest.mark.parametrize(
    ("found", "ended"),
    [
        ([(1, "b"), (0, "a")], ["a", "b"]),
        ([(0, "a")], None),
        ([(0, "a"), (0, "a")], None),
        ([(0, "a"), (2, "c")], None),
    ],
)
def test_work_is_counted_before_it_is_called_done(found, ended):
    if ended is None:
        with pytest.raises(UserError, match="of 2 parts of the work have one result"):
            Processes().gather(found, 2)
    else:
        assert Processes().gather(found, 2) == ended
