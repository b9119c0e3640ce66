"""What the rooms ask of the machine: files that appear whole, ports that are free."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of ``path`` that takes its name when the block ends well and vanishes when not.

    Whenever the process is killed, a reader sees the old file or the new one and never a part of it, and what is left
    of the temporary file goes with the next write. Missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment.

    It lies below those that systems give to outgoing connections, one of which could take it before the server does.
    """
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def is_free(port: int) -> bool:
    """Whether a server can listen on ``port`` of the loopback interface, where its predecessor's connections end."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
