"""One process at a time for what must not be written by two."""

from __future__ import annotations

import os
from typing import IO


def lock(file: IO[bytes], path: str | os.PathLike[str], message: str) -> None:
    """Lock an open file until it is closed, at the latest when the process ends.

    Where there are no such locks, on Windows and on some network file systems, nothing is done.

    Args:
        file: what is locked.
        path: named in the error.
        message: what it means that somebody else has the lock.

    Raises:
        BlockingIOError: somebody else has it.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, message, str(path)) from None
    except OSError:  # the file system has none
        return
