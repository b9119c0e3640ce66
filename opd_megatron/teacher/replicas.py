"""Servers of one teacher: which is asked next, which is left out for a while, which serves other weights."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from opd_megatron.http_client import MAX_PAUSE, HttpClient, HttpError, HttpFault, RetryPolicy, retried
from opd_megatron.teacher.in_flight import AdaptiveLimit
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure

logger = logging.getLogger(__name__)

SUSPECTS = 2
"""As long as no more requests than these have failed in a row, one of them may be what brings the server down."""
ABOUT_THE_REQUEST = (400, 413, 422)
"""Statuses that say something of what was sent, and nothing of who answers."""


@dataclass(eq=False)
class Replica:
    """One server and what is known about it."""

    client: HttpClient
    limit: AdaptiveLimit
    in_flight: int = 0
    """Samples that it has been asked for."""
    failures: int = 0
    """Attempts in a row, one after the other, in which it could not be reached."""
    suspects: set[str] = field(default_factory=set)
    """What was asked for in those that the server may have seen, and which may be the reason itself."""
    out_since: float = -float("inf")
    out_until: float = -float("inf")
    bad_answers: int = 0
    """Answers in a row, one after the other, that were of no use."""
    shunned_until: float = -float("inf")
    """Until then it is asked only where no other server can be."""
    proven: bool = True
    """Whether it is known to serve the teacher's weights; if not, it is asked before anything else is sent."""
    answered: bool = False
    """Whether it has answered in this step."""
    refused: str | None = None
    """Why it is not asked any more."""
    refuted: bool = False
    """Whether what it answered in this step may be of other weights."""

    def is_dead(self, max_retries: int) -> bool:
        """Whether it has failed too often in a row, and for more than one sample and the batch that it was in."""
        suspected = bool(self.suspects) and len(self.suspects) <= SUSPECTS
        return self.failures > max_retries and not suspected

    @property
    def largest_batch(self) -> int:
        """Half the limit, so that the server works on one batch while the answer to another is sent and read."""
        return max(1, (self.limit.value + 1) // 2)

    def room(self, wanted: int) -> int:
        """How many of ``wanted`` samples it may be sent at once, 0 for none at this moment."""
        if self.bad_answers:
            return int(self.in_flight == 0)  # a single sample finds out whether its answers are of use again
        wanted = min(wanted, self.largest_batch)
        if self.in_flight == 0:
            return wanted
        if self.failures or not self.proven:
            return 0  # a single request finds out how it is
        # Not less than wanted: a trickle of small requests would keep a long queue from forming large ones.
        return wanted if self.in_flight + wanted <= self.limit.value else 0


Proof = Callable[[Replica], Awaitable[None]]


@dataclass(eq=False)
class Replicas:
    """Shares requests out among the servers of one teacher, within one event loop.

    The server with the least in flight is asked first. One that cannot be reached is left out for a pause that doubles
    with each attempt, and then tried with a single request. When the last one has been tried ``policy.max_retries``
    times more without success, whoever waits fails with the last reason. One whose answers are of no use is left out in
    the same way as long as there is another to ask; what fails at all of them is the request's own affair. ``prove`` is
    awaited before the first request to a server whose weights are in doubt and raises :class:`TeacherFailure` if they
    are not the teacher's.
    """

    all: Sequence[Replica]
    policy: RetryPolicy
    prove: Proof
    _last_error: HttpError | None = None
    _waiters: list[asyncio.Future[None]] = field(default_factory=list)
    _repeating: int = 0
    saturated: bool = False

    async def acquire_again(self, count: int, failed_at: Set[Replica] = frozenset()) -> Replica:
        """Like :meth:`acquire` for a request of ``count`` samples that is repeated; it goes before all that is new.

        It waits for a server that works and is none of ``failed_at``, if there is one.
        """
        self._repeating += 1
        try:
            return (await self._acquire(count, repeated=True, failed_at=failed_at))[0]
        finally:
            self._repeating -= 1
            self._wake()

    async def acquire(self, wanted: int) -> tuple[Replica, int]:
        """Wait for a server with room, and reserve room there for as many of ``wanted`` samples as it may be sent.

        Raises :class:`HttpError` if no server can be reached, and :class:`TeacherFailure` if none serves the teacher's
        weights.
        """
        return await self._acquire(wanted, repeated=False)

    async def _acquire(
        self, wanted: int, *, repeated: bool, failed_at: Set[Replica] = frozenset()
    ) -> tuple[Replica, int]:
        while True:
            usable = self._usable()
            if not usable:
                raise TeacherFailure(str(self.all[0].refused), FailureKind.CHANGED_MODEL)
            now = time.monotonic()
            waiting = [replica for replica in usable if now < replica.out_until]
            if len(waiting) == len(usable) and self._is_dead(usable):
                raise self._gone()
            candidates = self._candidates(usable, failed_at, now)
            ready = [replica for replica in candidates if replica.room(wanted)]
            if ready and (repeated or not self._repeating):
                chosen = min(ready, key=lambda replica: replica.in_flight / replica.limit.value)
                count = wanted if repeated else chosen.room(wanted)
                chosen.in_flight += count
                return chosen, count
            self.saturated = True
            ends = [end for replica in usable for end in (replica.out_until, replica.shunned_until) if end > now]
            pause = min((end - now for end in ends), default=None)
            await self._change(pause)

    def _usable(self) -> list[Replica]:
        return [replica for replica in self.all if replica.refused is None]

    def _candidates(self, usable: Sequence[Replica], failed_at: Set[Replica], now: float) -> list[Replica]:
        """Those to choose from, whether they have room or not."""
        reachable = [replica for replica in usable if now >= replica.out_until]
        trusted = [replica for replica in reachable if now >= replica.shunned_until] or reachable
        working = [replica for replica in trusted if not replica.failures and not replica.bad_answers]
        others = [replica for replica in working if replica not in failed_at] if failed_at else []
        return others or trusted

    def begin_step(self, *, proven: bool) -> None:
        """Ask every server for its proof before anything else, unless they count as ``proven``."""
        for replica in self.all:
            replica.proven, replica.answered, replica.refuted = proven, False, False

    async def end_step(self, deadline: float | None) -> None:
        """Let every server that has answered in this step prove itself again, within ``deadline`` seconds.

        Raises :class:`TeacherFailure` where one has other weights, and where no other server is left beside those whose
        answer is not believed. One that cannot be asked, or believed, has had the teacher's when it last proved itself,
        and does so again before it is asked for anything else.
        """
        until = None if deadline is None else time.monotonic() + deadline
        disbelieved: dict[Replica, TeacherFailure] = {}
        proofs = (self._prove_again(replica, until, disbelieved) for replica in self.all if replica.answered)
        for outcome in await asyncio.gather(*proofs, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        if disbelieved and not self.others_than(disbelieved.keys()):
            first = next(iter(disbelieved.values()))
            raise TeacherFailure(
                f"{first}; no other server is left to ask, so what was scored in this step is not trained on",
                first.kind,
            )

    async def _prove_again(
        self, replica: Replica, until: float | None, disbelieved: dict[Replica, TeacherFailure]
    ) -> None:
        """Note in ``disbelieved`` why its answer is not believed, if it is not."""

        async def attempt() -> None:
            disbelieved.pop(replica, None)
            try:
                await self.prove(replica)
            except TeacherFailure as failure:
                if failure.kind is FailureKind.CHANGED_MODEL:
                    self.refuse(replica, str(failure))
                    replica.refuted = True
                    return
                disbelieved[replica] = failure
                subject, reason = "known text", "an answer that is not believed"
                raise HttpError(
                    replica.client.server, subject, reason, HttpFault.MALFORMED, transient=True
                ) from failure

        if replica.refused is None:
            # One that is left out has been tried often enough.
            policy = RetryPolicy(0) if replica.failures else self.policy
            try:
                await retried(attempt, policy, deadline=until)
            except HttpError as error:
                replica.proven = False
                logger.warning("%s; its weights could not be looked at again as the step ended", error)
        if replica.refuted:
            raise TeacherFailure(
                f"{replica.refused}; it has changed since the step began, so what it scored in it is not trained on",
                FailureKind.CHANGED_MODEL,
            )

    def extend(self, replica: Replica, count: int) -> None:
        """Change a reservation by ``count`` samples."""
        replica.in_flight += count
        if count < 0:
            self._wake()

    async def ask(
        self, replica: Replica, count: int, tokens: int, payload: Any, subject: str, timeout: float | None = None
    ) -> Any:
        """The answer to one attempt, whose reservation of ``count`` samples ends with it.

        ``timeout`` replaces the client's, in seconds, for what takes longer than scores: when it has passed, nothing is
        held against the server. Raises :class:`HttpError`; it is transient where another server may do better.
        """
        sent_at = time.monotonic()
        try:
            if not replica.proven:
                await self._prove(replica, subject)
            sent_at = time.monotonic()
            answer = await replica.client.attempt("POST", "/generate", payload, subject, timeout=timeout)
        except HttpError as error:
            if timeout is not None and error.delivered and error.fault is HttpFault.TIMEOUT:
                raise  # it says how long the answer is, and nothing of who gives it
            if error.busy or error.fault is HttpFault.TIMEOUT:
                replica.limit.overloaded(sent_at)
            if error.fault in (HttpFault.CONNECTION, HttpFault.TIMEOUT):
                self._leave_out(replica, sent_at, error)
            elif error.status not in ABOUT_THE_REQUEST:
                self.distrust(replica, error)
            raise
        else:
            replica.answered = True
            replica.failures = 0
            replica.suspects.clear()
            replica.limit.answered(count, tokens, full=self.saturated)
            self.saturated = False
            return answer
        finally:
            self.extend(replica, -count)

    def others_than(self, failed_at: Set[Replica]) -> bool:
        """Whether a server is left that is none of ``failed_at``."""
        return any(replica not in failed_at for replica in self._usable())

    def trust(self, replica: Replica) -> None:
        """An answer of ``replica`` was of use."""
        replica.bad_answers, replica.shunned_until = 0, -float("inf")

    def distrust(self, replica: Replica, reason: object) -> None:
        """An answer of ``replica`` was of no use, for ``reason``."""
        now = time.monotonic()
        if len(self.all) == 1 or now < replica.shunned_until:
            return  # nobody else could be asked, or under way together with the answer that has been counted
        replica.bad_answers += 1
        pause = self._pause(replica.bad_answers)
        replica.shunned_until = now + pause
        logger.warning("%s; left out for %.1f s", reason, pause)

    def refuse(self, replica: Replica, reason: str) -> None:
        """Ask ``replica`` no more."""
        if replica.refused is None:
            logger.warning("%s; it is not asked any more", reason)
        replica.refused = reason
        self._wake()

    async def _prove(self, replica: Replica, subject: str) -> None:
        try:
            await self.prove(replica)
        except HttpError as error:
            failed = error.about(subject)
            failed.delivered = False  # the known text is no sample's fault
            raise failed from None
        except TeacherFailure as failure:
            if failure.kind is FailureKind.CHANGED_MODEL:
                self.refuse(replica, str(failure))
                replica.refuted = replica.answered
            raise HttpError(
                replica.client.server,
                subject,
                f"not sent, because of the known text before it: {failure}",
                HttpFault.MALFORMED,
                transient=True,
                delivered=False,
            ) from None
        replica.proven = True
        self._wake()

    def _leave_out(self, replica: Replica, sent_at: float, error: HttpError) -> None:
        self._last_error = error
        if error.delivered:
            replica.suspects.add(error.subject)
        else:
            replica.suspects.clear()  # nothing listens: no sample is the reason
        if sent_at < replica.out_since:
            return  # under way together with the failure that has been counted
        replica.failures += 1
        replica.proven = False
        replica.out_since = time.monotonic()
        pause = self._pause(replica.failures)
        replica.out_until = replica.out_since + pause
        if len(self.all) > 1:
            logger.warning("%s; left out for %.1f s", error, pause)

    def _pause(self, times: int) -> float:
        return min(self.policy.backoff * 2.0 ** min(times - 1, 30), MAX_PAUSE)

    def _gone(self) -> HttpError:
        """The last failure to reach a server, as one that another attempt does not mend."""
        last = self._last_error
        assert last is not None
        reason = f"{last.reason} ({self.policy.max_retries + 1} attempts)"
        return HttpError(last.server, last.subject, reason, last.fault, delivered=False)

    def _is_dead(self, usable: Sequence[Replica]) -> bool:
        return all(replica.is_dead(self.policy.max_retries) for replica in usable)

    async def _change(self, seconds: float | None) -> None:
        """Wait until something may have become free, at most ``seconds``."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                await waiter
        except TimeoutError:
            pass
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
