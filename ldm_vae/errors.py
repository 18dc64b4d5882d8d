"""Errors that a user can cause, and the exit codes of the commands. Programming mistakes are `assert`s.

Code that has to know what went wrong catches a subclass of `UserError`; no code parses a message. The classes here are
the general ones. Classes of one package are defined there, for example `storage.remote.AccessDenied`.
"""

from __future__ import annotations

import errno

EXIT_USER_ERROR = 2
"""A wrong setting, file or folder; the one-line reason is on standard error."""

EXIT_INTERRUPTED = 75
"""Stopped by SIGTERM or SIGINT after saving (sysexits' EX_TEMPFAIL): the same command continues."""

EXIT_STUCK = 70
"""Another process of the job hangs or has died, so this one has stopped: the same command continues."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that every kind of folder passes on unchanged: the caller decides how to handle them."""


class UserError(ValueError):
    """The user can correct what is wrong. The message is one sentence: *where: what; what instead*.

    `UserError(where, what, instead)` builds the sentence; `instead` is optional. `UserError("sentence")` uses it
    unchanged: `what` is then the sentence, `where` and `instead` are empty.
    """

    def __init__(self, *parts: object) -> None:
        assert 1 <= len(parts) <= 3, f"UserError: {len(parts)} parts; give a sentence, or where, what and instead"
        where, what, instead = ("", *parts, "") if len(parts) == 1 else (*parts, "")[:3]
        self.where, self.what, self.instead = str(where), str(what), str(instead)
        super().__init__((f"{where}: " if self.where else "") + self.what + (f"; {instead}" if self.instead else ""))


class DamagedFile(UserError):
    """A file differs from what was written: its checksum or format is wrong, it is missing, or it is unexpected."""


class NewerFormat(UserError):
    """A file or folder has a format version that only a later release can read."""


class OlderFormat(UserError):
    """A file or folder has a format version that this release does not read any more."""


class NotFinite(UserError):
    """NaN or infinite numbers where an image was to be made."""


class FolderLocked(UserError):
    """Another process is using the folder. `holder` names it, for example `process 4711 on host x`."""

    def __init__(self, *parts: object, holder: str = "another process") -> None:
        super().__init__(*parts)
        self.holder = holder
