"""A real S3 server on loopback: requests go through sockets, as they do to any other store."""

from __future__ import annotations

import logging
import re
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest

logging.getLogger("werkzeug").setLevel(logging.WARNING)  # one line for each request


class Server:
    """Moto on a port of its own, and the environment in which s3fs finds it. What is stored outlives a restart."""

    def __init__(self, environment: pytest.MonkeyPatch) -> None:
        self.moto: Any = None
        self.port = 0
        self.start()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_ENDPOINT_URL", self.endpoint)
        environment.setenv("AWS_MAX_ATTEMPTS", "1")  # else botocore itself waits for 14 s
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.setenv("NO_PROXY", "127.0.0.1")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            environment.setenv(name, "/dev/null")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            environment.delenv(name, raising=False)
        forget_filesystems()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.moto.start()
        _, self.port = self.moto.get_host_and_port()

    def stop(self) -> None:
        self.moto.stop()

    def new_bucket(self) -> str:
        """The URL of an empty bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=120).close()  # moto asks for no signature; it loads its S3 first
        return f"s3://{name}"


def forget_filesystems() -> None:
    """A filesystem keeps the endpoint and the keys that it was made with."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def make_older(location: str, name: str, seconds: float) -> None:
    """Set the time back at which the server, which runs in this process, got an object."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    bucket, folder = location.removeprefix("s3://").split("/", 1)
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys[f"{folder}/{name}"].last_modified -= timedelta(
        seconds=seconds
    )


@contextmanager
def requests(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Method and status of the requests that the server answers in this block, as `GET 206`."""
    made: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.INFO, "werkzeug"):
        yield made  # an answer is logged before it is sent
    for record in caplog.records:
        if record.name == "werkzeug":
            text = re.sub(r"\x1b\[\d+m", "", record.getMessage())
            made += [" ".join(match) for match in re.findall(r'"(\w+) .* HTTP/1.1" (\d+)', text)]
