"""Integers through the range coder of `constriction`, each with its own table. Knows nothing of images or files."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm_vae.applications.codec.tables import ESCAPE, REACH, probability_tables
from ldm_vae.errors import UserError

ESCAPED_BITS = 16
LARGEST_RESIDUAL = (1 << (ESCAPED_BITS - 1)) - 1
CHUNK = 8192
"""Symbols handed over at a time: each brings 2 KB of table."""


def _library() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise UserError("codec: needs the package constriction; run pip install constriction") from error
    return constriction


class ResidualEncoder:
    """Appends residuals; `finish` gives the bytes, a multiple of four."""

    def __init__(self) -> None:
        library = _library()
        self._coder = library.stream.queue.RangeEncoder()
        self._tables = library.stream.model.Categorical(perfect=False)
        self._uniform = library.stream.model.Uniform(1 << ESCAPED_BITS)

    def put(self, residuals: np.ndarray, rows: np.ndarray) -> None:
        """Integers (n,) up to +-32767, and the row of `tables.probability_tables` of each."""
        tables = probability_tables()
        for start in range(0, len(residuals), CHUNK):
            part = residuals[start : start + CHUNK]
            escaped = np.abs(part) > REACH
            symbols = np.where(escaped, ESCAPE, part + REACH).astype(np.int32)
            self._coder.encode(symbols, self._tables, tables[rows[start : start + CHUNK]])
            if escaped.any():
                self._coder.encode((part[escaped] + LARGEST_RESIDUAL).astype(np.int32), self._uniform)

    def finish(self) -> bytes:
        return self._coder.get_compressed().astype("<u4").tobytes()


class ResidualDecoder:
    """The inverse, over bytes whose checksum was compared: what is wrong then was never written by the encoder."""

    def __init__(self, data: bytes, where: str) -> None:
        library = _library()
        self._where = where
        self._coder = library.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self._tables = library.stream.model.Categorical(perfect=False)
        self._uniform = library.stream.model.Uniform(1 << ESCAPED_BITS)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The next residuals (n,), int64. Raises: UserError for data that no encoder wrote."""
        tables, found = probability_tables(), []
        try:
            for start in range(0, len(rows), CHUNK):
                part = self._coder.decode(self._tables, tables[rows[start : start + CHUNK]]).astype(np.int64)
                escaped = part == ESCAPE
                part -= REACH
                if escaped.any():
                    part[escaped] = self._coder.decode(self._uniform, int(escaped.sum())) - LARGEST_RESIDUAL
                found.append(part)
        except AssertionError as error:  # how constriction says it
            raise damaged(self._where) from error
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def finish(self) -> None:
        """Raises: UserError where data is left over."""
        if not self._coder.maybe_exhausted():
            raise damaged(self._where)


def damaged(where: str) -> UserError:
    return UserError(f"{where}: is damaged (its data do not decode); fetch it again, or compress the picture again")
