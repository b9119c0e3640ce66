"""What every program of the project does around its ``main``."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Sequence

from opd_megatron.config.errors import RunError, UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a disk that is full or failing, which can meet a program at any write."""


def run_cli(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main`` with the arguments and return the exit code.

    A :class:`UserError` becomes one line ``error: ...``, the last of the output, and exit code 2, a :class:`RunError`
    and a full disk the same with exit code 1, Ctrl-C the line ``interrupted`` and exit code 130; any other exception is
    a fault of the program and keeps its traceback.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except (UserError, RunError) as error:
        sys.stdout.flush()
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        if error.errno not in _DISK:
            raise
        sys.stdout.flush()
        print(f"error: {error.filename or 'a file'} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("interrupted: stopped at once, what is not in a checkpoint is lost", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
