"""How much a server is asked at a time: a limit that follows what the server can do."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST = 16
"""Samples in flight that an automatic limit begins with."""
MOST = 1024
"""Largest automatic limit."""
STEP = 8
"""Samples by which a limit rises once doubling has ended."""
GAIN = 0.1
"""A rise has to bring this much more throughput to stay."""
FORGET = 0.02
"""Share of the reference rate that is forgotten in each round without a gain, so that a rise is tried again."""


class AdaptiveLimit:
    """Samples that may be in flight at one server, between 1 and ``maximum``.

    The rule is additive increase and multiplicative decrease. Answers are counted in rounds of ``value`` samples. After
    a round in which the limit was in the way throughout:

    - if tokens per second are more than ``GAIN`` above the reference rate, they become the reference and the limit
      rises: it doubles until a rise brings nothing for the first time, and grows by ``STEP`` from then on;
    - if not, the last rise brought nothing and is taken back, and the reference loses ``FORGET`` of its value, after
      some rounds enough for the next rise to be tried.

    An answer that says the server has too much to do (429, 503, a time-out) halves the limit and forgets the reference;
    of requests that were under way together only the first counts. With ``fixed`` the limit begins at it and never
    exceeds it; it still gives way to an overloaded server and comes back.
    """

    def __init__(self, fixed: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.maximum = MOST if fixed is None else fixed
        self.value = min(FIRST, self.maximum) if fixed is None else fixed
        self._clock = clock
        self._doubling = True
        self._rise = 0
        self._reference = 0.0
        self._lowered_at = -float("inf")
        self._samples = self._tokens = 0
        self._full = True
        self._began = clock()

    def answered(self, samples: int, tokens: int, *, full: bool) -> None:
        """Count ``samples`` that the server answered; ``full`` says that the limit kept others waiting meanwhile."""
        self._samples += samples
        self._tokens += tokens
        self._full = self._full and full
        if self._samples < self.value:
            return
        seconds = self._clock() - self._began
        if self._full and seconds > 0:
            self._judge(self._tokens / seconds)
        self._begin_round()

    def overloaded(self, sent_at: float) -> None:
        """Note that a request sent at ``sent_at`` (of the clock) was too much for the server."""
        if sent_at < self._lowered_at:
            return
        self.value = max(1, self.value // 2)
        self._doubling = False
        self._rise = 0
        self._reference = 0.0
        self._lowered_at = self._clock()
        self._begin_round()

    def _judge(self, rate: float) -> None:
        if rate > self._reference * (1.0 + GAIN):
            self._reference = rate
            before = self.value
            self.value = min(self.maximum, before * 2 if self._doubling else before + STEP)
            self._rise = self.value - before
        else:
            self._doubling = False
            self.value -= self._rise
            self._rise = 0
            self._reference *= 1.0 - FORGET

    def _begin_round(self) -> None:
        self._samples = self._tokens = 0
        self._full = True
        self._began = self._clock()
