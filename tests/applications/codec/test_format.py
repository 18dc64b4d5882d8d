"""A file of any bytes is read or refused in one sentence; every flipped bit and every cut is found.

Each damage is done to whole files of both kinds; where the checksum would refuse an input at once, it is made to fit
again, so that what lies behind it is tried as well.
"""

from __future__ import annotations

import io
import random
import tracemalloc

import numpy as np
import pytest

from ldm_vae.applications.codec import format
from ldm_vae.applications.codec.compression import Codec
from ldm_vae.errors import UserError
from tests.applications.codec.conftest import smooth_picture

INPUTS = 1200


@pytest.fixture(scope="module")
def files(plain: Codec, fitted: Codec) -> list[tuple[Codec, bytes]]:
    """Small files: self-fitted, with a fitted model, and in parts."""
    image = smooth_picture(21, 30)
    made = []
    for codec, parts in ((plain, ()), (fitted, ()), (plain, (1, 2))):
        made.append((codec, codec.compress(codec.analyze(image, "it"), 700, parts).data))
    return made


def levels(codec: Codec, data: bytes, channels: int | None = None) -> np.ndarray:
    """What a file says, up to the decoder network."""
    header, parts = format.read(io.BytesIO(data), len(data), "it", channels)
    return codec.levels_of(header, parts, "it")[1]


def refused(codec: Codec, data: bytes) -> bool:
    try:
        levels(codec, data)
    except UserError as error:
        return str(error).startswith("it: ") and "\n" not in str(error)
    return False


def test_a_file_says_what_it_was_given(files):
    for codec, data in files:
        header, parts = format.read(io.BytesIO(data), len(data), "it")
        assert (header.width, header.height, header.step, header.channels) == (30, 21, 700, 3)
        assert format.pack_file(header, parts) == data
        assert levels(codec, data).shape == (3, 3, 4)


@pytest.mark.promise(6)
def test_every_flipped_bit_is_found(files, record_property):
    tried = 0
    for codec, data in files:
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            assert refused(codec, bytes(damaged)), bit
            tried += 1
    record_property("figure", f"compressed pictures: each of {tried} flipped bits is found")


@pytest.mark.promise(6)
def test_every_cut_and_every_byte_too_many_is_found(files, record_property):
    tried = 0
    for codec, data in files:
        for length in range(len(data)):
            assert refused(codec, data[:length]), length
            tried += 1
        assert refused(codec, data + b"\0")
    record_property("figure", f"compressed pictures: each of {tried} cuts is found")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, lost, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(changed))
        kind = rng.randrange(5)
        if kind == 0:
            changed[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 1:
            del changed[place : place + rng.randrange(1, 9)]
        elif kind == 2:
            changed[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            changed[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\x7f\0\0"))
        else:
            changed += changed[place : place + 20]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def with_fitting_checksums(data: bytes) -> bytes:
    """The same with the first checksum made right, as far as its header can be read."""
    start = format.PREAMBLE.size
    try:
        reader = format.FileReader(io.BytesIO(data[start:]), len(data) - start, "it")
        header = format._header(reader)
        end = start + len(reader.consumed) + header.lengths[0]
    except (UserError, ValueError):
        end = len(data)
    return (
        format.PREAMBLE.pack(format.MAGIC, format.FORMAT_VERSION, format.part_checksum(data[start:end])) + data[start:]
    )


@pytest.mark.promise(6)
def test_whatever_is_in_a_file_is_read_or_refused(files, record_property):
    rng = random.Random(0)
    counts = {True: 0, False: 0}
    for number in range(INPUTS):
        codec, data = files[number % len(files)]
        damaged = mutated(data, rng)
        if number % 4 == 0 or damaged == data:
            assert refused(codec, damaged) or damaged == data
        counts[refused(codec, with_fitting_checksums(damaged))] += 1
    assert min(counts.values()) > 20  # forged checksums let some through, and what they say is read
    record_property("figure", f"compressed pictures: {INPUTS} mutated files read or refused")


def test_sizes_are_judged_before_memory_is_taken(plain, files):
    _, data = files[0]
    huge = bytearray(data)
    start = format.PREAMBLE.size + format.FINGERPRINT_BYTES
    huge[start : start + 4] = b"\xff\xff\xff\xff"  # 65535 x 65535 pixels
    tracemalloc.start()
    assert refused(plain, with_fitting_checksums(bytes(huge)))
    length = bytearray(data)
    place = format.PREAMBLE.size + format.FIXED.size + 3 * format.CHANNEL.size + 2
    length[place : place + 4] = b"\xfc\xff\xff\xff"  # a part of 4 GB
    assert refused(plain, bytes(length))
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it: is not a file of `ldm-vae compress`"),
        (b"\x89PNG\r\n\x1a\n" + bytes(80), "it: is not a file of `ldm-vae compress`"),
        (b"LDMZ\x02" + bytes(80), "it: has format version 2, this program reads 1; update ldm_vae"),
        (b"LDMZ\x00" + bytes(80), "it: is damaged (format version 0)"),
        (b"LDMZ\x01" + bytes(8), "it: is cut off (18 bytes are missing)"),
    ],
)
def test_other_files_are_refused_by_what_they_are(plain, data, sentence):
    with pytest.raises(UserError) as error:
        levels(plain, data)
    assert str(error.value).startswith(sentence)


def test_a_preview_needs_its_part_only(plain, files):
    _, data = files[2]
    whole = levels(plain, data)
    for channels in (1, 2):
        header_bytes = format.PREAMBLE.size + format.FIXED.size + 3 * (format.CHANNEL.size + format.PART.size) + 16
        lengths = _lengths(data)
        cut = data[: header_bytes + sum(lengths[:channels])]
        assert (levels(plain, cut, channels) == whole[:channels]).all()
        with pytest.raises(UserError, match="is cut off"):
            levels(plain, cut)
        with pytest.raises(UserError, match="is cut off"):
            levels(plain, cut[:-1], channels)
    with pytest.raises(UserError, match="cannot be decoded from 2 channels alone, only from 3;"):
        levels(plain, files[0][1], 2)


def _lengths(data: bytes) -> tuple[int, ...]:
    return format.read(io.BytesIO(data), len(data), "it")[0].lengths
