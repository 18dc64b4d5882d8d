"""Where a set is: the folder that a tool was given, or a hint at the ones that may have been meant."""

from __future__ import annotations

from pathlib import Path

from ldm_vae.errors import UserError
from ldm_vae.latents.manifest import MANIFEST, plan_name
from ldm_vae.storage import Folder, is_url, local_path, open_folder

SHOWN_SETS = 8


def open_set_folder(location: str | Path) -> Folder:
    """The folder of a set. Raises: UserError for a local one that is not there, or only holds folders of sets."""
    if not is_url(location):
        path = local_path(location)
        if not path.is_dir():
            raise UserError(f"{location}: no such folder; give one that `ldm-vae encode` wrote")
        names = () if is_set(path) else sorted(child.name for child in path.iterdir() if is_set(child))
        if names:
            more = f" and {len(names) - SHOWN_SETS} more" if len(names) > SHOWN_SETS else ""
            raise UserError(
                f"{location}: is no set, but holds {', '.join(names[:SHOWN_SETS])}{more}; give one of them, as "
                f"{path / names[0]}"
            )
    return open_folder(location)


def is_set(path: Path) -> bool:
    """A local folder with a set, finished or not."""
    return (path / plan_name(0)).exists() or (path / MANIFEST).exists()


def refuse_inside(output: str | Path, option: str) -> None:
    """Raises: UserError when a file would come to lie in a set's local folder."""
    folder = Path(output).parent
    if is_set(folder):
        raise UserError(f"{option}: {folder} holds latents; give a place outside of it")
