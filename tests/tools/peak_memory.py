"""Run tools one after another and print how far each one's memory rose: ``peak_memory.py JOBS.json``.

``JOBS.json`` is a list of ``[tool, [argument, ...]]``; the output is a JSON list of bytes. Only memory of the process's
own counts (``RssAnon``): pages of a mapped file belong to the system, which takes them back when it needs room. The
first job is there to load what Python loads late; its number means nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import threading
from pathlib import Path


def own_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak:
    """Largest :func:`own_bytes` while the context is open, looked at every half millisecond."""

    def __enter__(self) -> Peak:
        self.bytes = self.before = own_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.0005):
            self.bytes = max(self.bytes, own_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main(file: str) -> None:
    rises = []
    for tool, arguments in json.loads(Path(file).read_text(encoding="utf-8")):
        module = importlib.import_module(f"tools.{tool}")
        with Peak() as peak, contextlib.redirect_stdout(io.StringIO()):
            module.main(arguments)
        rises.append(peak.bytes - peak.before)
    print(json.dumps(rises))


if __name__ == "__main__":
    main(sys.argv[1])
