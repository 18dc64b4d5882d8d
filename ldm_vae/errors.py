"""The errors that a user can cause, and the exit codes of the commands. Programmers' mistakes stay `assert`s.

Code that has to know what went wrong catches a subclass of `UserError`; no code reads a sentence. The classes here are
the general ones. Those of one room stand there, as `storage.remote.AccessDenied`.
"""

from __future__ import annotations

import errno

EXIT_USER_ERROR = 2
"""A wrong setting, file or folder; the one-line reason is on standard error."""

EXIT_INTERRUPTED = 75
"""Stopped by SIGTERM or SIGINT after saving (sysexits' EX_TEMPFAIL): the same command continues."""

EXIT_STUCK = 70
"""A process of the job hangs or is gone, and this one has ended itself: the same command continues."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that pass through every folder unchanged: the caller decides what to do about them."""


class UserError(ValueError):
    """The user can correct what is wrong. The message is one sentence: *where: what; what instead*.

    `UserError(where, what, instead)` composes the sentence; `instead` may be left out. `UserError("sentence")` takes it
    as it is: `what` is the sentence then, `where` and `instead` are empty.
    """

    def __init__(self, *parts: object) -> None:
        assert 1 <= len(parts) <= 3, f"UserError: {len(parts)} parts; give a sentence, or where, what and instead"
        where, what, instead = ("", *parts, "") if len(parts) == 1 else (*parts, "")[:3]
        self.where, self.what, self.instead = str(where), str(what), str(instead)
        super().__init__((f"{where}: " if self.where else "") + self.what + (f"; {instead}" if self.instead else ""))


class DamagedFile(UserError):
    """A file is not what was written: its checksum or format is wrong, or it is missing or does not belong there."""


class NewerFormat(UserError):
    """A file or folder has a format version that only a later release can read."""


class FolderLocked(UserError):
    """Another process is at work in the folder. `holder` names it, as `process 4711 on host x`."""

    def __init__(self, *parts: object, holder: str = "another process") -> None:
        super().__init__(*parts)
        self.holder = holder
