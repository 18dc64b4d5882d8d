"""A flat folder of files, on a local disk or at any fsspec URL. Latent shards are written to and read from it.

`base` defines the interface, `local` and `remote` implement it, and `cache` keeps copies of files of remote folders.
No module here depends on the content of the files.
"""

from __future__ import annotations

from pathlib import Path

from ldm_vae.storage.base import Folder, is_url


def open_folder(location: str | Path) -> Folder:
    """A folder at a path (`~` is expanded) or at an fsspec URL. Nothing is created or read yet.

    Raises:
        UserError: the URL's protocol is unknown, or its package is not installed.
    """
    if is_url(location):
        from ldm_vae.storage.remote import RemoteFolder

        return RemoteFolder(str(location))
    from ldm_vae.storage.local import LocalFolder

    return LocalFolder(location)
