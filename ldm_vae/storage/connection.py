"""Requests to the filesystem behind an fsspec URL: which one it is, what is tried again, what an error means."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ldm_vae.errors import DISK_FULL, UserError
from ldm_vae.redaction import check_no_password

logger = logging.getLogger(__name__)

PAUSES_SECONDS = (1.0, 4.0, 16.0)
"""Between attempts. The packages make some of their own in each of ours: an outage of about a minute is survived."""
LONGEST_SECONDS = 90.0
"""No further attempt after this time: data loaders wait no more than 300 s for a worker."""
BLOCK_BYTES = 16 << 20

UNREACHABLE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH)
TRANSIENT = (*UNREACHABLE, errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.EPIPE)
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "memory")
DENIED_OBJECT = ("AccessDenied", "AllAccessDisabled", "InvalidObjectState", "403")
PACKAGES = {"s3": 'pip install "ldm_vae[s3]"', "s3a": 'pip install "ldm_vae[s3]"'}

T = TypeVar("T")


class AccessDenied(UserError):
    """One file or folder may not be read or written, while the credentials as such are good."""


@dataclass(frozen=True)
class Connection:
    """A URL that fsspec knows.

    No connection stays open: fsspec keeps one filesystem for each process (and thread, where needed), so this can be
    pickled, and used after a fork. Listings are never cached, or a reader would not see what others write.

    Raises:
        UserError: the protocol is unknown, its package is not installed, or the URL holds a password.
    """

    location: str

    def __post_init__(self) -> None:
        check_no_password(self.location, "address")
        self.request(lambda filesystem: None)

    @property
    def protocol(self) -> str:
        return self.location.split("://")[0]

    @property
    def is_object_store(self) -> bool:
        """True where a write is one request that succeeds or changes nothing, and folders need not be made."""
        return self.protocol in OBJECT_STORES

    @property
    def root(self) -> str:
        """The filesystem's path of this location."""
        return self._open()[1]

    def path(self, name: str) -> str:
        """The filesystem's path of a file below this location."""
        return f"{self.root}/{name}"

    def request(self, action: Callable[[Any], T], *, retry: bool = True) -> T:
        """`action(filesystem)`, with `retry` again after some pauses while the store cannot be reached.

        Raises:
            FileNotFoundError, FileExistsError: as the filesystem says.
            OSError: with ENOSPC or EDQUOT.
            UserError: anything else, `AccessDenied` where it concerns this file or folder only.
        """
        start = time.monotonic()
        for pause in (*PAUSES_SECONDS, None) if retry else (None,):
            try:
                return action(self._open()[0])
            except (FileNotFoundError, FileExistsError, UserError) as error:
                if _code(error) == "NoSuchBucket":
                    raise self.no_folder(error) from error
                raise
            except PermissionError as error:
                advice = "give credentials that may read and write there"
                kind = AccessDenied if _concerns_one_object(error) else UserError
                raise kind(f"{self.location}: access denied ({_reason(error)}); {advice}") from error
            except Exception as error:  # every package has its own kinds
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                if pause is None or not _is_transient(error) or time.monotonic() - start > LONGEST_SECONDS:
                    advice = "check the network, the credentials and the endpoint (for S3: AWS_ENDPOINT_URL)"
                    raise UserError(f"{self.location}: {_reason(error)}; {advice}") from error
                logger.warning("%s: %s; trying again in %.0f s", self.location, _reason(error), pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def read(self, name: str, length: int | None = None) -> bytes:
        """The first `length` bytes of a file in one request, or all. Raises: as `request`."""
        path = self.path(name)
        return self.request(lambda filesystem: _read_range(filesystem, path, 0, length))

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file's bytes in order, one request for each 16 MiB. Raises: as `request`."""
        path = self.path(name)
        size = self.request(lambda filesystem: filesystem.info(path)["size"])
        for start in range(0, size, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, size)
            yield self.request(lambda filesystem: _read_range(filesystem, path, start, end))  # noqa: B023

    def no_folder(self, error: Exception) -> UserError:
        """What it means when even the place to write to is not there."""
        return UserError(f"{self.location}: no such bucket or folder ({_reason(error)}); make it, or give another")

    def _open(self) -> tuple[Any, str]:
        """(filesystem, its path of this location)."""
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(self.location, use_listings_cache=False)
        except ImportError as error:
            cure = PACKAGES.get(self.protocol, f"install what fsspec needs for it ({error})")
            raise UserError(f"{self.location}: the package for {self.protocol}:// is missing; {cure}") from error
        except ValueError as error:
            advice = "give a path, or a URL as s3://bucket/folder"
            raise UserError(f"{self.location}: {_reason(error)}; {advice}") from error
        return filesystem, path.rstrip("/")


def _read_range(filesystem: Any, path: str, start: int, end: int | None) -> bytes:
    try:
        return filesystem.cat_file(path, start=start, end=end)
    except OSError as error:
        if error.errno == errno.EINVAL and filesystem.info(path)["size"] == 0:
            return b""  # S3 refuses every range of an empty object
        raise


def _concerns_one_object(error: PermissionError) -> bool:
    """False for expired or wrong credentials, which s3fs also reports as PermissionError."""
    return _code(error) in (None, *DENIED_OBJECT)


def _code(error: Exception) -> str | None:
    """The error code of an S3 answer."""
    return getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")


def _is_transient(error: Exception) -> bool:
    """Worth another attempt. Unknown errors are: one attempt too many costs less than a job."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT
    if isinstance(error, (ValueError, TypeError, NotImplementedError, IsADirectoryError, NotADirectoryError)):
        return False
    return not type(error).__name__.endswith(("CredentialsError", "ValidationError", "NotFound"))


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
