"""One set-up of Python's logging for every program of the project."""

from __future__ import annotations

import logging
import sys

PACKAGE = "opd_megatron"


class _Lines(logging.Handler):
    """Prints to what ``sys.stdout`` is at that moment, so that lines appear above a progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self._ours = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
        self._others = logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S")

    def emit(self, record: logging.LogRecord) -> None:
        formatter = self._ours if record.name.split(".")[0] == PACKAGE else self._others
        print(formatter.format(record), file=sys.stdout, flush=True)


def configure_logging(level: int = logging.INFO) -> None:
    """Print this package's messages from ``level`` up, and other packages' warnings with their name; repeatable."""
    logging.getLogger(PACKAGE).setLevel(level)
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, _Lines)] + [_Lines()]
