"""The sentence of an error and its parts, as code that branches and processes that pass it on have them."""

from __future__ import annotations

import pickle

import pytest

from ldm_vae.errors import DamagedFile, FolderLocked, UserError


def test_a_sentence_has_its_parts():
    error = UserError("runs/a", "holds no model", "give another folder")
    assert str(error) == "runs/a: holds no model; give another folder"
    assert (error.where, error.what, error.instead) == ("runs/a", "holds no model", "give another folder")
    assert str(UserError("runs/a", "holds no model")) == "runs/a: holds no model"
    assert str(UserError("as it is; no parts")) == "as it is; no parts"


@pytest.mark.parametrize("error", [DamagedFile("a", "b", "c"), FolderLocked("a", "b", "c", holder="process 1")])
def test_another_process_gets_the_same_error(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
