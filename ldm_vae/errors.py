"""The error that a user can cause, and the exit codes of the commands. Programmers' mistakes stay `assert`s."""

from __future__ import annotations

import errno

EXIT_USER_ERROR = 2
"""A wrong setting, file or folder; the one-line reason is on standard error."""

EXIT_INTERRUPTED = 75
"""Stopped by SIGTERM or SIGINT after saving (sysexits' EX_TEMPFAIL): the same command continues."""

EXIT_STUCK = 70
"""A process of the job stands still or is gone, and this one has ended itself: the same command continues."""


class UserError(ValueError):
    """Something in the user's hands is wrong. The message is one sentence: *where: what; what instead*."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that pass through every folder unchanged: what is to be done about them is the caller's business."""
