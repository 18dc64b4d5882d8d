"""One flat folder of files, on a local disk or behind any fsspec URL: what latent shards are written to and read from.

`base` is what both have in common; `local` and `remote` do the work, `cache` keeps copies of what was read from a
remote folder. No module here knows what the files mean.
"""

from __future__ import annotations

from pathlib import Path

from ldm_vae.storage.base import Folder, is_url


def open_folder(location: str | Path) -> Folder:
    """A folder at a path (`~` is expanded), or at a URL that fsspec knows. Nothing is made or read yet.

    Raises:
        UserError: the URL's protocol is unknown, or its package is not installed.
    """
    if is_url(location):
        from ldm_vae.storage.remote import RemoteFolder

        return RemoteFolder(str(location))
    from ldm_vae.storage.local import LocalFolder

    return LocalFolder(location)
