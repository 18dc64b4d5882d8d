"""What is not written down: secrets of the environment, passwords in URLs, the path of the home folder.

Every text that `files` publishes goes through `redacted`, and so do settings before they are compared with saved ones.
Owns no files, and reads of the environment only what it has to find in a text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from ldm_vae.errors import UserError

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(r"(?=.*[A-Za-z])(?=.*[0-9])\S{12,}")
"""Others, as in `TOKENIZERS_PARALLELISM=false`, could be a part of any word or number."""
PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")
"""Of a URL, behind the name of the user."""


def redacted(value: Any) -> Any:
    """The same plain containers and text, without secrets, and with `~` in the place of the home folder."""
    return _redacted(value, _secrets())


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {_redacted(key, secrets): _redacted(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(item, secrets) for item in value]
    return _redacted_text(value, secrets) if isinstance(value, str) else value


def without_password(text: str) -> str:
    """The same text, with `***` in the place of each password in a URL."""
    return PASSWORD.sub(r"\1:***@", text)


def check_no_password(text: str, where: str) -> None:
    """Raises: UserError for a URL with a password, which messages and records would repeat."""
    if PASSWORD.search(text):
        raise UserError(
            f"{where}: {without_password(text)} holds a password, and addresses are written into records and messages; "
            "leave it out and give it in the environment, as FSSPEC_SFTP_PASSWORD for sftp"
        )


def _redacted_text(text: str, secrets: Sequence[str]) -> str:
    text = without_password(text)
    for secret in secrets:
        text = text.replace(secret, "***")
    home = os.path.expanduser("~").rstrip("/")  # of some containers it is /
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if home.startswith("/") else text


def _secrets() -> list[str]:
    """Values of the environment whose names say that they are secret; longer ones first, one may hold another."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    return sorted((v for v in found if SECRET_VALUE.fullmatch(v) and not os.path.exists(v)), key=len, reverse=True)
