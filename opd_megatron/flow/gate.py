"""Back-pressure: what is open behind a gate holds up what comes before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Gate:
    """Open while fewer than ``most`` blocks of :meth:`passing` run; it closes nothing that is behind it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside = 0
        self._opened = asyncio.Event()
        self._opened.set()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    async def wait(self) -> None:
        """Return when the gate is open."""
        await self._opened.wait()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Something is behind the gate while the block runs."""
        self._inside += 1
        if self._inside >= self._most:
            self._opened.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if self._inside < self._most:
                self._opened.set()
