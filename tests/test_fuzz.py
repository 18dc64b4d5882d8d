"""Whatever stands in a file that we read, it is read or refused with the documented error, and within seconds.

Each parser gets a valid file and inputs that hypothesis makes of it: bytes changed, lost, doubled, put in, JSON values
exchanged. Where a checksum would refuse every input at once, it is made to fit again, so that what lies behind it is
tried as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_vae import config as configuration
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.config import digest
from ldm_vae.data.folder import FolderSource
from ldm_vae.data.streaming import _count_tar, _counted
from ldm_vae.diffusion.posthoc_ema import read_average, stored_averages
from ldm_vae.errors import UserError
from ldm_vae.files import checksum_bytes, verify_checksums
from ldm_vae.latents import format, shard
from ldm_vae.latents.format import MANIFEST, IndexPart, read_index, read_manifest, read_origin
from ldm_vae.storage import open_folder
from ldm_vae.storage.base import check_name
from tests.test_golden import LATENTS, unpacked

MOST_SECONDS = 5.0
BATCH = 100
"""Inputs that one example of hypothesis stands for, in the long run."""

TOKENS = [
    *(b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b'"', b"'", b"\\u0000", b"\\ud800"),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b"[" * 3000,
        b'{"a":' * 500,
        b":",
        b",",
        b"null",
        b"true",
        b"NaN",
        b"-Infinity",
        b"1e999",
    ),
    *(b"-1", b"0", b"0.5", b"9" * 30, b"9" * 5000, b"4294967296", b"18446744073709551615", b"[]", b"{}", b'""', b'"a"'),
    *(b"../", b"/etc/passwd", b"~", b"${oc.env:HOME}", b"!!python/object:os.system", b"&a [*a,*a]", b"*a", b"<<: *a"),
    *(b"- ", b"? ", b"|", b"#", b"=", b"@", b"%", b"\t", b"format_version", b"label", b"file_name", b"__metadata__"),
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 3.5, float("nan"), 2**40, 2**70, "", "a", "../a", "\ud800", "xxh3_128:zz", [], {}, [[]]),
    *([1, 2, 3], [0, 0, 0], [1, 2**40, 2**40], [-1, 1, 1], {"a": 1}, "uint16", "float32", "indices", "F16", "I64"),
]


@dataclass(frozen=True, repr=False)
class Parser:
    """A parser, a valid input, and the share of a million inputs that it gets: less where an input takes longer."""

    parse: Callable[[bytes], object]
    valid: bytes
    inputs: int


def edited(data: bytes, choose: random.Random) -> bytes:
    """The same with one to four accidents."""
    for _ in range(choose.choice((1, 1, 2, 4))):
        place = choose.randrange(len(data) + 1)
        end = min(len(data), place + choose.choice((0, 1, 1, 8, 100)))
        kind = choose.randrange(6)
        if kind == 0 and data:
            place = min(place, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ 1 << choose.randrange(8)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data = data[:place] + data[end:]
        elif kind == 3:
            data = data[:place] + data[place:end] * choose.choice((2, 30)) + data[end:]
        elif kind == 4:
            data = data[:place] + choose.choice(TOKENS) + data[end:]
        else:  # a whole word or number
            words = list(re.finditer(rb'-?[\w.+-]+|"[^"\n]*"', data))
            if words:
                word = choose.choice(words)
                data = data[: word.start()] + choose.choice(TOKENS) + data[word.end() :]
    return data


def exchanged(data: bytes, choose: random.Random) -> bytes:
    """JSON with one value or key exchanged; every line, or the header of a tensor file, is JSON of its own."""
    before, text, after = b"", data, b""
    if data[8:9] == b"{":  # safetensors
        length = int.from_bytes(data[:8], "little")
        before, text, after = data[:8], data[8 : 8 + length], data[8 + length :]
    elif data.count(b"\n") > 1 and data[:2] != b"{\n":
        lines = data.splitlines(keepends=True)
        place = choose.randrange(len(lines))
        before, text, after = b"".join(lines[:place]), lines[place], b"\n" + b"".join(lines[place + 1 :])
    try:
        value = json.loads(text)
    except ValueError:
        return edited(data, choose)
    holders = [value]
    for holder in holders:  # grows
        items = list(holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ())
        holders += [item for item in items if isinstance(item, (dict, list)) and item]
    holder = choose.choice(holders)
    if isinstance(holder, dict) and holder:
        key = choose.choice(list(holder))
        change = choose.randrange(3)
        if change:
            holder[key] = choose.choice(VALUES)
        if change != 1:
            holder[str(choose.choice(VALUES))] = holder.pop(key)
    elif isinstance(holder, list) and holder:
        holder[choose.randrange(len(holder))] = choose.choice(VALUES)
    text = json.dumps(value, indent=2 if data[:2] == b"{\n" else None).encode()
    if before[8:] == b"" and len(before) == 8:
        before = len(text).to_bytes(8, "little")
    return before + text + after


def attempt(parser: Parser, data: bytes) -> bool:
    """Whether an input is read; False where it is refused as it should be. Anything else is an error of the test."""
    started = time.process_time()
    try:
        parser.parse(data)
        return True
    except UserError as error:
        if not str(error):
            raise AssertionError("a refusal without words") from error
        return False
    finally:
        assert time.process_time() - started < MOST_SECONDS


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    root = tmp_path_factory.mktemp("fuzz")
    found = {**of_latents(root), **of_models(root), **of_images(root)}
    assert all(attempt(parser, parser.valid) for parser in found.values())
    return found


def of_latents(root: Path) -> dict[str, Parser]:
    copies = {name: Path(shutil.copytree(LATENTS, root / name)) for name in ("manifest", "others")}
    copy, folder = copies["others"], open_folder(copies["others"])
    whole = read_manifest(LATENTS)
    part, record = whole.index[0], whole.shard_index[0]

    def manifest(data: bytes) -> None:
        with contextlib.suppress(Exception):  # what cannot be made to fit stays as it is
            values = json.loads(data)
            values.pop("digest", None)
            data = json.dumps({**values, "digest": digest(values)}).encode()
        (copies["manifest"] / MANIFEST).write_bytes(data)
        found = read_manifest(copies["manifest"])
        found.layout.tensors(1)
        found.shard_index  # noqa: B018
        if found.content != "indices":
            found.normalizer  # noqa: B018

    def plan(data: bytes) -> None:
        (copy / "plan.json").write_bytes(data)
        read_origin(folder).layout.tensors(1)

    def lines(data: bytes) -> None:
        first, _, body = data.partition(b"\n")
        with contextlib.suppress(Exception):
            data = json.dumps(json.loads(first) | {"body": checksum_bytes(body)}).encode() + b"\n" + body
        (copy / "shard-000000.jsonl").write_bytes(data)
        format.read_sidecar_header(folder, 0)
        format.read_sidecar(folder, 0)

    def index(data: bytes) -> None:
        (copy / part.file).write_bytes(data)
        read_index(folder, [IndexPart(part.file, part.shards, checksum_bytes(data))], 2, "advice")

    def header(data: bytes) -> None:
        path = copy / "shard-000000.safetensors"
        path.write_bytes(data)
        shard.open_shard(folder, 0, record, whole.layout, verify=False)

    def bytes_of(name: str) -> bytes:
        return (LATENTS / name).read_bytes()

    return {
        "manifest": Parser(manifest, bytes_of(MANIFEST), 150_000),
        "plan": Parser(plan, bytes_of("plan.json"), 150_000),
        "sidecar": Parser(lines, bytes_of("shard-000000.jsonl"), 150_000),
        "index": Parser(index, bytes_of(part.file), 150_000),
        "shard header": Parser(header, bytes_of("shard-000000.safetensors"), 150_000),
    }


def of_models(root: Path) -> dict[str, Parser]:
    model = unpacked("autoencoder", root)
    averages = unpacked("snapshots", root)
    for path in sorted(averages.iterdir())[:-1]:
        path.unlink()
    (average,) = averages.iterdir()
    yaml = root / "config.yaml"

    def seal(data: bytes) -> None:
        (model / "MANIFEST.json").write_bytes(data)
        verify_checksums(model)

    def stored(data: bytes) -> None:
        average.write_bytes(data)
        for (_, length), path in stored_averages(averages).items():
            read_average(path, length)

    def settings_file(data: bytes) -> None:
        yaml.write_bytes(data)
        configuration.load(TrainVaeConfig, yaml)

    def override(data: bytes) -> None:
        configuration.load(TrainVaeConfig, None, ["output=a", data.decode("utf-8", "surrogateescape")])

    text = configuration.to_yaml(configuration.load(TrainVaeConfig, None, ["output=a"])).encode()
    return {
        "seal": Parser(seal, (model / "MANIFEST.json").read_bytes(), 100_000),
        "averages": Parser(stored, average.read_bytes(), 100_000),
        "settings": Parser(settings_file, text, 5_000),
        "override": Parser(override, b"training.betas=[0.9,0.99]", 10_000),
    }


def of_images(root: Path) -> dict[str, Parser]:
    images = root / "images"
    images.mkdir()
    names = ["a.png", "b c.png", "ü.png"]
    for name in names:
        Image.new("RGB", (2, 2)).save(images / name)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("0001.png", "0001.cls", "folder/0002.png"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"12345"))

    def table(name: str) -> Callable[[bytes], None]:
        def parse(data: bytes) -> None:
            (images / name).write_bytes(data)
            try:
                source = FolderSource(images)
                assert [source.id(i).encode() for i in range(len(source))]
            finally:
                (images / name).unlink()

        return parse

    def tar_file(data: bytes) -> None:
        path = root / "images.tar"
        path.write_bytes(data)
        _counted(_count_tar, str(path))

    def name(data: bytes) -> None:
        text = check_name(data.decode("utf-8", "surrogateescape"))
        assert not re.search(r"/|\.\.|\0", text)

    csv = "file_name,label\n" + "".join(f"{name},{name[0]}\n" for name in names)
    lines = "".join(json.dumps({"file_name": name, "label": name[0]}) + "\n" for name in names)
    return {
        "labels.csv": Parser(table("labels.csv"), csv.encode(), 60_000),
        "metadata.jsonl": Parser(table("metadata.jsonl"), lines.encode(), 60_000),
        "tar": Parser(tar_file, archive.getvalue(), 30_000),
        "file name": Parser(name, b"shard-000000.safetensors", 50_000),
    }


NAMES = [
    *("manifest", "plan", "sidecar", "index", "shard header", "seal", "averages", "settings", "override"),
    *("labels.csv", "metadata.jsonl", "tar", "file name"),
]


@pytest.mark.promise(9)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.001, pytest.param(1.0, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_a_damaged_file_is_read_or_refused(name, share, parsers, record_property):
    parser = parsers[name]
    wanted = max(20, int(parser.inputs * share))
    batch = BATCH if share == 1 else 1
    outcomes = {True: 0, False: 0}

    @settings(
        max_examples=-(-wanted // batch), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],  # a smaller seed is no smaller input
    )  # fmt: skip
    @given(st.integers(0, 2**64 - 1))
    def tries(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(batch):
            change = choose.choice((edited, exchanged))
            outcomes[attempt(parser, change(parser.valid, choose))] += 1

    tries()
    assert sum(outcomes.values()) >= 20
    record_property("figure", f"{name}: {sum(outcomes.values())} inputs, {outcomes[False]} refused, no other error")


@pytest.mark.promise(9)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_are_read_or_refused(name, data, parsers):
    attempt(parsers[name], data)


def test_a_million_inputs(parsers):
    """In sum, in the long run."""
    assert set(parsers) == set(NAMES)
    assert sum(parser.inputs for parser in parsers.values()) >= 1_000_000
