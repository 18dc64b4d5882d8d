"""Removes private text from records: secrets of the environment, passwords in URLs, folders of the machine.

Every text that `files` publishes passes through `redacted`, and so do settings before they are compared with saved
ones. Records that are shared with a model also pass through `without_folders`. The only input besides the text is the
environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from ldm_vae.errors import UserError

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(r"(?=.*[A-Za-z])(?=.*[0-9])\S{12,}")
"""Shorter values, as in `TOKENIZERS_PARALLELISM=false`, could be part of any word or number."""
PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")
"""A password in a URL, after the user name."""

SEPARATORS = re.compile(r"([\s'\",;\[\]{}])")
"""The separators of words in a text; a word is at most one path, or `key=path`."""
LOCAL_SCHEMES = ("file", "local")
OUTSIDE = ("/", "../", "..\\", "\\\\")
"""The beginning of a path that is absolute or leads outside the current folder."""


def redacted(value: Any) -> Any:
    """The same plain containers and text, without secrets, and with `~` in place of the home folder."""
    secrets = _secrets()
    home = os.path.expanduser("~").rstrip("/")  # the home folder is / in some containers

    def redact(text: str) -> str:
        text = without_password(text)
        for secret in secrets:
            text = text.replace(secret, "***")
        return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if home.startswith("/") else text

    return _mapped(value, redact)


def without_folders(value: Any) -> Any:
    """The same plain containers and text; a path that is absolute or leads outside is reduced to its last name.

    A path is recognized by its beginning: `/`, `../`, `~somebody`, `C:\\`, `\\\\host`, `file:`. A text that is a single
    path, or `key=path`, may contain spaces; elsewhere a path ends at a space.
    """
    return _mapped(value, _shortened_text)


def without_password(text: str) -> str:
    """The same text, with `***` in place of each password in a URL."""
    return PASSWORD.sub(r"\1:***@", text)


def check_no_password(text: str, where: str) -> None:
    """Raises: UserError for a URL with a password, which would end up in messages and records."""
    if PASSWORD.search(text):
        raise UserError(
            f"{where}: {without_password(text)} contains a password, which would be copied into records and messages; "
            "leave it out and set it in the environment, for example FSSPEC_SFTP_PASSWORD for sftp"
        )


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Plain containers with `change` applied to every string, keys included."""
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _secrets() -> list[str]:
    """Values of environment variables with secret-sounding names, longest first, as one may contain another."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    return sorted((v for v in found if SECRET_VALUE.fullmatch(v) and not os.path.exists(v)), key=len, reverse=True)


def _shortened_text(text: str) -> str:
    key, equals, path = text.rpartition("=")
    if _leads_outside(path) and not any(mark in text for mark in "'\",;#[]{}\n") and "://" not in key:
        return key + equals + _last_name(path)
    return "".join(map(_shortened_word, SEPARATORS.split(text)))


def _shortened_word(word: str) -> str:
    """Shorten both parts of `zip://a.csv::file:///b/c.zip`. An `=` inside a URL belongs to it."""
    before = "" if "://" in word.partition("=")[0] else "".join(word.rpartition("=")[:2])
    before += "(" * (len(word) - len(before) - len(word[len(before) :].lstrip("(")))
    return before + "::".join(_shortened_place(place) for place in word[len(before) :].split("::"))


def _shortened_place(place: str) -> str:
    host, colon, path = place.partition(":/")
    if colon and not path.startswith("/") and len(host) > 1 and host.replace("-", "").replace(".", "").isalnum():
        return _last_name(path) if host.lower() in LOCAL_SCHEMES else f"{host}:{_last_name(path)}"
    return _last_name(place) if _leads_outside(place) else place


def _leads_outside(path: str) -> bool:
    scheme, colon, _ = path.partition(":")
    if colon and scheme.lower().split("+")[-1] in LOCAL_SCHEMES:
        return True
    if "://" in path:
        return False
    drive = path[:1].isalpha() and path[1:3] in (":/", ":\\")
    another_home = path[:1] == "~" and (path[1:2].isalpha() or path[1:2] == "_") and "/" in path
    return path.startswith(OUTSIDE) or drive or another_home or "/../" in path


def _last_name(path: str) -> str:
    """The last name of a path, or the path itself if it has none, such as `/`."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path
