"""How images are divided: every index exactly once, whatever divides them, and nothing is read that is not needed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from ldm_vae import config as configuration
from ldm_vae.data.sources import DataConfig
from ldm_vae.errors import UserError
from ldm_vae.latents.image_loader import ImageBatch, Images, Units, load_batches, open_images
from tests.latents.test_stream import collections, data

__all__ = ["collections"]  # a fixture

UNIT, BATCH, COUNT = 5, 2, 24
FOLDER = "folder"
COUNTED = ["[0-9].parquet", "[0-9].tar"]
KINDS = pytest.mark.parametrize("kind", [FOLDER, *COUNTED, "compressed-*.tar"])


@pytest.fixture
def images(request: pytest.FixtureRequest, collections: Path, image_folder: Path, kind: str) -> Images:
    return open_images(settings(collections, image_folder, kind), "all")


def settings(collections: Path, image_folder: Path, kind: str, *overrides: str) -> DataConfig:
    words = ["source=folder", f"path={image_folder}"] if kind == FOLDER else data(collections / kind)
    return configuration.load(DataConfig, None, [*(word.removeprefix("data.") for word in words), *overrides])


def load(images: Images, units: Units, workers: int = 0) -> list[ImageBatch]:
    return list(load_batches(images, units, unit=UNIT, batch=BATCH, size=(16, 16), workers=workers, pin=False))


def by_unit(batches: list[ImageBatch]) -> dict[int, list[tuple]]:
    """What the batches of each unit hold, in order. Each unit ends, once, with its last batch."""
    found, ended = defaultdict(list), set()
    for batch in batches:
        assert batch.unit not in ended
        if batch.last:
            ended.add(batch.unit)
        content = batch.images.numpy().tobytes()
        found[batch.unit].append((tuple(batch.rows), tuple(batch.indices), tuple(batch.labels), *batch.ids, content))
    assert ended == set(found)
    return dict(found)


@KINDS
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (3, 0), (3, 2)])
def test_processes_and_workers_share_every_unit_exactly_once(images, processes, workers):
    expected = by_unit(load(images, Units()))
    assert [[len(batch[1]) for batch in expected[number]] for number in range(5)] == [[2, 2, 1]] * 4 + [[2, 2]]
    assert [index for number in range(5) for batch in expected[number] for index in batch[1]] == list(range(COUNT))
    found: dict[int, list[tuple]] = {}
    for rank in range(processes):
        units = by_unit(load(images, Units(rank=rank, processes=processes), workers))
        assert not units.keys() & found.keys()
        found |= units
    assert found == expected


@KINDS
def test_only_missing_units_of_the_own_share_are_made(images):
    expected = by_unit(load(images, Units()))
    finished = frozenset({2, 4})
    jobs = [[load(images, Units(finished, rank, 2, (job, 2))) for rank in range(2)] for job in range(2)]
    shares = [by_unit([batch for process in processes for batch in process]) for processes in jobs]
    assert [sorted(share) for share in shares] == [[0], [1, 3]]
    assert shares[0] | shares[1] == {number: expected[number] for number in (0, 1, 3)}


@pytest.mark.parametrize("kind", COUNTED)
def test_a_stream_is_counted_and_read_only_where_it_is_needed(collections, image_folder, tmp_path, kind):
    for path in collections.glob(kind):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = open_images(settings(tmp_path, image_folder, kind), "all")
    assert images.count == COUNT
    expected = by_unit(load(images, Units()))
    for path in tmp_path.glob("1.*"):  # its rows are 5 to 13
        path.unlink()
    for finished, workers in ((frozenset({1, 2}), 0), (frozenset({0, 1, 2}), 2)):
        found = by_unit(load(images, Units(finished), workers))
        assert found == {number: batches for number, batches in expected.items() if number not in finished}
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"^data.datasets.name: [^\n]*1\.\w+: cannot be read [^\n]*$"):
            load(images, Units(frozenset({2})), workers)


@pytest.mark.parametrize("kind", COUNTED)
def test_the_part_of_a_counted_stream_must_not_be_empty(collections, image_folder, kind):
    with pytest.raises(UserError, match=r"no image of 24 in this stream falls into the held_out part"):
        open_images(settings(collections, image_folder, kind, "held_out=0.0"), "held_out")


@pytest.mark.parametrize("total", [0, 1, 7, 40])
@pytest.mark.parametrize("processes", [1, 3, 5])
@pytest.mark.parametrize("jobs", [1, 2])
def test_units_are_dealt_once_and_evenly(total, processes, jobs):
    finished = frozenset({0, 3, 4, 21})
    missing = [number for number in range(total) if number not in finished]
    dealt, consecutive = [], []
    for job in range(jobs):
        own = [Units(finished, rank, processes, (job, jobs)) for rank in range(processes)]
        dealt += (shares := [list(units.numbers(total)) for units in own])
        consecutive += (runs := [units.run(total) for units in own])
        for divided in (shares, runs):
            assert max(map(len, divided)) - min(map(len, divided)) <= 1
        assert [number for run in runs for number in run] == [n for n in missing if n % jobs == job]
    for divided in (dealt, consecutive):
        assert sorted(number for share in divided for number in share) == missing
        assert all(share == sorted(share) for share in divided)
    unbounded = [
        next(units.numbers(None)) for job in range(jobs)
        for units in (Units(finished, rank, processes, (job, jobs)) for rank in range(processes))
    ]  # fmt: skip
    assert len(set(unbounded)) == jobs * processes
    assert not finished & set(unbounded)
