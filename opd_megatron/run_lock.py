"""One run at a time in a run folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from opd_megatron.config.errors import UserError

LOCK_NAME = ".lock"

_TAKEN = (errno.EACCES, errno.EAGAIN)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; raises :class:`UserError` if another process holds it.

    The lock is the operating system's (POSIX, on the file ``.lock``), so a process that is killed leaves none behind,
    and children do not inherit it. The file goes in the end, and so do folders that were made for it and stayed empty.
    """
    made = _make_folders(folder)
    stream = None
    try:
        stream = _acquire(folder)
        yield
    finally:
        if stream is not None:
            # gone before it is free: who waits for this file notices that it has no name any more
            (folder / LOCK_NAME).unlink(missing_ok=True)
            stream.close()
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Make ``folder``; those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(folder: Path) -> IO[str]:
    path = folder / LOCK_NAME
    while True:
        try:
            stream = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # its holder, who had made the folder, has just removed both
            folder.mkdir(parents=True, exist_ok=True)
            continue
        except PermissionError as error:
            raise UserError(f"--run-dir {folder}: {path} cannot be opened ({error.strerror})") from None
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                stream.seek(0)
                holder = stream.read().strip()
                stream.close()
                raise UserError(
                    f"--run-dir {folder} is in use by another run{f' ({holder})' if holder else ''}: wait for its end "
                    "or choose another folder"
                ) from None
            logger.warning("%s cannot be locked (%s): start no second run in its folder", path, error.strerror)
            return stream
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                break
        stream.close()  # its holder has just removed it
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream
