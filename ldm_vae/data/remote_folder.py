"""The image files below an fsspec URL, as `s3://bucket/images`: one listing, and one bounded request for each image.

An image that is gone or that may not be read is rejected alone. When the store itself cannot be reached, or refuses the
credentials, the job stops: else a broken network would make a bad image of each one.
"""

from __future__ import annotations

from collections.abc import Iterator

from ldm_vae.data.decoding import ImageRejected
from ldm_vae.errors import UserError
from ldm_vae.storage.connection import AccessDenied, Connection


class RemoteFiles:
    """See `folder.ImageFiles`."""

    def __init__(self, location: str) -> None:
        self.location, self.connection = location.rstrip("/"), Connection(location)

    def sizes(self) -> Iterator[tuple[str, int]]:
        root = self.connection.root
        try:
            entries = self.connection.request(lambda filesystem: filesystem.find(root, detail=True))
        except FileNotFoundError:
            entries = {}
        if root in entries or not entries:
            what = "is a file" if entries else "nothing is there"
            raise UserError(f"data.path: {self.location}: {what}; give the folder that holds the images")
        for path, entry in entries.items():
            name = path[len(root) + 1 :]
            hidden = name.startswith(".") or "/." in name
            if not hidden and not name.endswith("/"):  # some tools mark folders by empty objects
                yield name, int(entry["size"])

    def read(self, name: str, length: int | None = None) -> bytes:
        try:
            return self.connection.read(name, length)
        except FileNotFoundError as error:
            raise ImageRejected("unreadable", "cannot be opened: it is not there any more") from error
        except AccessDenied as error:
            raise ImageRejected("unreadable", "cannot be opened: access denied") from error
