"""Questions about single samples, gathered into requests of several, and their answers handed back one by one."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from opd_megatron.http_client import HttpError, HttpFault, retried
from opd_megatron.sample import TeacherScores
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure
from opd_megatron.teacher.replicas import ABOUT_THE_REQUEST, Replica, Replicas
from opd_megatron.teacher.sglang_answer import AnswerError, Reading

Subject = TypeVar("Subject")
MOST_TOKENS = 2**18
"""Tokens that several samples of one request have together at most."""


@dataclass(eq=False)
class Question:
    """The tokens of one sample, of which those after ``start`` are to be scored.

    ``union`` are ids whose log-probabilities are asked for at every position. With ``sampling``, SGLang's sampling
    parameters, nothing is scored: the tokens are a prompt to which a response is to be sampled.
    """

    subject: str
    tokens: np.ndarray
    start: int
    union: np.ndarray | None = None
    sampling: Mapping[str, Any] | None = None
    timeout: float | None = None
    """Seconds of one attempt where they are not those of a score."""
    answer: asyncio.Future[Reading] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    failed_at: set[Replica] = field(default_factory=set)
    """Servers that were asked in vain."""

    @property
    def goes_alone(self) -> bool:
        """Whether it shares a request with no other: its list of ids is meant for it, or its answer takes long."""
        return self.union is not None or self.sampling is not None


Read = Callable[[Question, Any, Replica], Reading]


class Gatherer:
    """Takes questions as they come and sends them, within one event loop.

    What waits when a server has room goes into one request: a single question at an idle server, up to half of what may
    be in flight where the server is behind. A request of several questions that fails for a reason that may lie in one
    of them, and an answer to one of several that is not believed, are followed by a request for each question alone, so
    that a bad one fails alone. One alone whose answer is not believed is asked again like one that got no answer.
    ``read`` turns one sample's answer into a :class:`Reading` or raises :class:`AnswerError`. ``counts`` is told of
    requests and retries.
    """

    def __init__(self, replicas: Replicas, read: Read, top_k: int, counts: Counter[str]) -> None:
        self.replicas = replicas
        self.deadline: float | None = None
        self._read = read
        self._top_k = top_k
        self._counts = counts
        self._queue: deque[Question] = deque()
        self._dispatcher: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Task[None]] = set()

    async def ask(self, question: Question) -> Reading:
        """The answer to ``question``; raises :class:`TeacherFailure`. When cancelled, nothing more is sent for it."""
        self._queue.append(question)
        if self._dispatcher is None or self._dispatcher.done():
            # It begins after the callers that are ready at this moment, and so finds their questions, too.
            self._dispatcher = asyncio.create_task(self._dispatch())
        return await question.answer

    async def aclose(self) -> None:
        """Abandon all requests and close the connections."""
        tasks = [*self._requests, *([self._dispatcher] if self._dispatcher is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for question in self._queue:
            question.answer.cancel()
        self._queue.clear()
        for replica in self.replicas.all:
            await replica.client.aclose()

    async def _dispatch(self) -> None:
        while self._queue:
            if self._queue[0].answer.done():
                self._queue.popleft()
                continue
            wanted = 1 if self._queue[0].goes_alone else len(self._queue)
            try:
                replica, room = await self.replicas.acquire(wanted)
            except (HttpError, TeacherFailure) as error:
                waiting, self._queue = list(self._queue), deque()
                _fail(waiting, error)
                continue
            batch = self._take(room)
            self.replicas.extend(replica, len(batch) - room)
            if batch:
                self._start(batch, replica)

    def _take(self, most: int) -> list[Question]:
        """The next questions, at most ``most``; some go alone."""
        batch: list[Question] = []
        tokens = 0
        while self._queue and len(batch) < most:
            question = self._queue[0]
            tokens += len(question.tokens)
            if batch and (question.goes_alone or tokens > MOST_TOKENS):
                break
            self._queue.popleft()
            if question.answer.done():
                continue
            batch.append(question)
            if question.goes_alone:
                break
        return batch

    def _start(self, batch: list[Question], replica: Replica | None = None) -> None:
        """Send ``batch``, to ``replica`` where room is reserved there, in a task that ends when nobody waits for it."""
        held = [] if replica is None else [replica]
        task = asyncio.create_task(self._send(batch, held))
        self._requests.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._requests.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                for question in batch:  # whoever waits must hear of a fault that nobody foresaw
                    if not question.answer.done():
                        question.answer.set_exception(error)
            if held:  # cancelled before it began
                self.replicas.extend(held.pop(), -len(batch))

        def abandon(_: asyncio.Future[Reading]) -> None:
            if all(question.answer.done() for question in batch):
                task.cancel()

        task.add_done_callback(ended)
        for question in batch:
            question.answer.add_done_callback(abandon)

    async def _send(self, batch: list[Question], held: list[Replica]) -> None:
        subject = batch[0].subject if len(batch) == 1 else f"{len(batch)} samples"
        payload, tokens = self._payload(batch), sum(len(question.tokens) for question in batch)
        disbelief: AnswerError | None = None

        async def attempt() -> tuple[Replica, Any]:
            failed_at = {replica for question in batch for replica in question.failed_at}
            replica = held.pop() if held else await self.replicas.acquire_again(len(batch), failed_at)
            self._counts["requests"] += 1
            nonlocal disbelief
            disbelief = None
            try:
                answer = await self.replicas.ask(replica, len(batch), tokens, payload, subject, batch[0].timeout)
                return replica, self._believed(batch[0], answer, replica) if len(batch) == 1 else answer
            except HttpError as error:
                _note_failure(batch, replica)
                if len(batch) > 1 and error.delivered and not error.busy:
                    error.transient = False
                elif error.fault is HttpFault.STATUS and error.status not in ABOUT_THE_REQUEST:
                    error.transient |= self.replicas.others_than(failed_at | {replica})
                raise
            except AnswerError as error:
                disbelief = error
                server = replica.client.server
                raise HttpError(server, subject, str(error), HttpFault.MALFORMED, transient=True) from None

        def count_retry() -> None:
            self._counts["retries"] += 1

        try:
            replica, answer = await retried(attempt, self.replicas.policy, deadline=self.deadline, on_retry=count_retry)
        except (HttpError, TeacherFailure) as error:
            if len(batch) > 1 and isinstance(error, HttpError) and error.delivered and not error.busy:
                self._one_by_one(batch)
            elif disbelief is not None and isinstance(error, HttpError) and error.fault is HttpFault.MALFORMED:
                _fail(batch, error, disbelief.kind)
            else:
                _fail(batch, error)
            return
        if len(batch) > 1:
            self._hand_out(batch, replica, answer)
        elif not batch[0].answer.done():
            batch[0].answer.set_result(answer)

    def _believed(self, question: Question, answer: Any, replica: Replica) -> Reading:
        """What ``answer`` says; a server of another model is asked no more. Raises :class:`AnswerError`."""
        try:
            reading = self._read(question, answer, replica)
        except AnswerError as error:
            _note_failure([question], replica)
            reason = f"{replica.client.server}: {error}"
            if error.kind is FailureKind.CHANGED_MODEL:
                self.replicas.refuse(replica, reason)
            else:
                self.replicas.distrust(replica, reason)
            raise
        self.replicas.trust(replica)
        return reading

    def _hand_out(self, batch: list[Question], replica: Replica, answers: Any) -> None:
        if not isinstance(answers, list) or len(answers) != len(batch):
            _note_failure(batch, replica)
            self.replicas.distrust(replica, f"{replica.client.server}: no list of {len(batch)} answers")
            self._one_by_one(batch)
            return
        for question, own in zip(batch, answers, strict=True):
            if question.answer.done():
                continue
            try:
                question.answer.set_result(self._believed(question, own, replica))
            except AnswerError:
                # Another attempt, or another server where this one's weights are others, may do.
                self._one_by_one([question])

    def _one_by_one(self, batch: Sequence[Question]) -> None:
        for question in batch:
            if not question.answer.done():
                self._counts["retries"] += 1
                self._start([question])

    def _payload(self, batch: Sequence[Question]) -> dict[str, Any]:
        """One sample in the plain form, several as lists."""
        if batch[0].sampling is not None:
            prompt, sampling = batch[0].tokens, batch[0].sampling
            return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        payload: dict[str, Any] = {
            "input_ids": [question.tokens for question in batch],
            "logprob_start_len": [question.start for question in batch],
        }
        if len(batch) == 1:
            payload = {key: values[0] for key, values in payload.items()}
        if batch[0].union is not None:
            payload["token_ids_logprob"] = batch[0].union
        elif self._top_k:
            payload |= {
                "top_logprobs_num": self._top_k,
                "return_flat_raw_top_logprobs": True,
                "return_flat_raw_top_logprobs_b64": True,
            }
        return payload | {
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
        }


def _note_failure(batch: Sequence[Question], replica: Replica) -> None:
    for question in batch:
        question.failed_at.add(replica)


def _fail(
    batch: Sequence[Question], error: HttpError | TeacherFailure, kind_of_answer: FailureKind | None = None
) -> None:
    for question in batch:
        if question.answer.done():
            continue
        if isinstance(error, HttpError):
            kind = kind_of_answer or FailureKind(error.fault.value)
            message = str(error.about(question.subject))
        else:
            kind, message = error.kind, f"{question.subject}: {error}"
        question.answer.set_exception(TeacherFailure(message, kind))


async def score_together(
    score_one: Callable[[Subject], Coroutine[Any, Any, TeacherScores]], subjects: Sequence[Subject]
) -> list[TeacherScores]:
    """Scores of all samples (or by all teachers), asked for at the same time; the first failure abandons the others."""
    tasks = [asyncio.ensure_future(score_one(subject)) for subject in subjects]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
