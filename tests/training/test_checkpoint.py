"""Checkpoints: complete or absent, every damage found, nothing that is not finite."""

from __future__ import annotations

import random

import pytest
import torch

from ldm_vae.errors import UserError
from ldm_vae.training.checkpoint import (
    Checkpoint,
    load,
    load_optimizer_tensors,
    newest,
    optimizer_tensors,
    save,
    verify,
)


def checkpoint(step: int) -> Checkpoint:
    rng = torch.Generator().manual_seed(step)
    return Checkpoint(step, {"net": {"a.weight": torch.randn(8, 8, generator=rng)}}, {"seconds": 1.5, "model": {}})


def test_round_trip(tmp_path):
    path = save(tmp_path, checkpoint(7), keep=2)
    assert path.name == "step-000000007"
    loaded = load(path)
    assert (loaded.step, loaded.state) == (7, {"seconds": 1.5, "model": {}})
    assert torch.equal(loaded.tensors["net"]["a.weight"], checkpoint(7).tensors["net"]["a.weight"])


def test_the_newest_good_one_is_taken_and_the_damaged_one_named(tmp_path):
    for step in (1, 2):
        save(tmp_path, checkpoint(step), keep=2)
    file = tmp_path / "step-000000002" / "net.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    path, problems = newest(tmp_path)
    assert path is not None
    assert path.name == "step-000000001"
    assert "net.safetensors is damaged" in problems[0]


def test_every_flipped_bit_and_truncation_is_found(tmp_path):
    path = save(tmp_path, checkpoint(1), keep=2)
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for _ in range(100):
            damaged = bytearray(original)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            if file.name == "MANIFEST.json" and verify(path) is None:
                continue  # white space of the manifest itself
            assert verify(path) is not None, file.name
        for length in range(0, len(original), 7):
            file.write_bytes(original[:length])
            assert verify(path) is not None
        file.write_bytes(original)
        assert verify(path) is None


def test_a_missing_file_is_found(tmp_path):
    path = save(tmp_path, checkpoint(1), keep=2)
    (path / "net.safetensors").unlink()
    assert "net.safetensors" in str(verify(path))


def test_a_newer_format_is_refused_with_advice(tmp_path):
    path = save(tmp_path, checkpoint(1), keep=2)
    manifest = path / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    assert "update ldm_vae" in str(verify(path))


def test_old_ones_go_but_never_below_two(tmp_path):
    for step in range(1, 6):
        save(tmp_path, checkpoint(step), keep=0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000004", "step-000000005"]


def test_leftovers_of_a_crash_are_ignored_and_removed(tmp_path):
    (tmp_path / ".tmp-dead-step-000000009").mkdir()
    assert newest(tmp_path)[0] is None
    save(tmp_path, checkpoint(1), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    bad = checkpoint(3)
    bad.tensors["net"]["a.weight"][0, 0] = float("inf")
    with pytest.raises(UserError, match=r"'a\.weight' is not finite"):
        save(tmp_path, bad, keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_round_trip(memory_format):
    """Tensors travel through files as contiguous ones; a channels_last weight needs its moments in its own order."""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def make():
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def step(layer, optimizer):
        layer(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, second = make(), make()
    step(*first)
    second[0].load_state_dict(first[0].state_dict())
    load_optimizer_tensors(
        second[1], {k: v.clone(memory_format=torch.contiguous_format) for k, v in optimizer_tensors(first[1]).items()}
    )
    step(*first)
    step(*second)
    assert torch.equal(first[0].weight, second[0].weight)
