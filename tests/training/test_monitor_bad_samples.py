"""Unreadable images are named once, whichever process met them, also after a restart."""

from __future__ import annotations

import json
from types import SimpleNamespace

from ldm_vae.training.loader import MicroBatch
from ldm_vae.training.monitor import REPORTED_AT_ONCE, BadSamples, rejection_sentences

ALONE = SimpleNamespace(num_processes=1)


def parts(*pairs):
    return [MicroBatch({"rejected": list(pairs)}, slice(0, 1)), MicroBatch({}, slice(1, 2))]


def test_an_image_is_named_once(tmp_path):
    quarantine = BadSamples(tmp_path)
    quarantine.observe(parts(("a.png", "empty"), ("b.png", "too_small"), ("a.png", "empty")))
    assert quarantine.take_new(ALONE) == [("a.png", "empty"), ("b.png", "too_small")]
    quarantine.observe(parts(("a.png", "empty"), ("c.png", "empty")))
    assert quarantine.take_new(ALONE) == [("c.png", "empty")]
    assert quarantine.take_new(ALONE) == []


def test_a_restart_knows_what_was_listed_and_survives_a_torn_line(tmp_path):
    BadSamples(tmp_path).append([("a.png", "empty")])
    with open(tmp_path / "quarantine.jsonl", "a") as file:
        file.write('{"id": "b.p')
    quarantine = BadSamples(tmp_path)
    quarantine.observe(parts(("a.png", "empty"), ("b.png", "empty")))
    new = quarantine.take_new(ALONE)
    assert new == [("b.png", "empty")]
    quarantine.append(new)
    first, _, last = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(first) == {"id": "a.png", "reason": "empty"}
    assert json.loads(last) == {"id": "b.png", "reason": "empty"}


def test_many_at_once_are_counted():
    new = [(f"{number}.png", "empty") for number in range(REPORTED_AT_ONCE + 5)]
    lines = rejection_sentences(new)
    assert len(lines) == REPORTED_AT_ONCE + 1
    assert lines[0] == "0.png: cannot be read (empty); another image takes its place"
    assert lines[-1] == "5 more cannot be read, see quarantine.jsonl"
