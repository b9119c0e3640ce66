"""A teacher behind SGLang's ``/generate``: the log-probabilities of given tokens, and responses where it is to answer.

Scores are at temperature 1 whatever the sampling parameters say. A token id outside the model's vocabulary, an empty
list of ids in a batch, and more most probable tokens than the vocabulary has end the whole server, so none of them is
ever sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.http_client import HttpClient, HttpError, RetryPolicy, blocking
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.agreement import Identity
from opd_megatron.teacher.gathering import Gatherer, Question, score_together
from opd_megatron.teacher.in_flight import AdaptiveLimit
from opd_megatron.teacher.known_text import KnownText
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure, failure_of
from opd_megatron.teacher.replicas import Replica, Replicas
from opd_megatron.teacher.sglang_answer import AnswerError, Reading, TopK, read_answer, read_response
from opd_megatron.teacher.sglang_scores import scores_of, take_record


class SGLangTeacher:
    """A client of one or several SGLang servers of the same model; scores are at temperature 1.

    ``vocab_size`` bounds the ids that are sent: the student's vocabulary, or the server's where that is smaller
    (:meth:`restrict`). ``max_in_flight`` fixes how many samples are asked for at a time, for each server; without it
    the number follows the server (:class:`~opd_megatron.teacher.in_flight.AdaptiveLimit`). ``top_k`` asks for as many
    most probable tokens, ``max_union_ids`` bounds :meth:`score_ids`. For ``timeout`` and ``api_key_env`` see
    :class:`~opd_megatron.http_client.HttpClient`, for ``max_retries`` and ``backoff``
    :class:`~opd_megatron.http_client.RetryPolicy`; ``answer_timeout`` limits an attempt of :meth:`answer_one` in
    seconds. ``name`` stands in scores and messages in place of the address.
    Raises :class:`UserError` on an address that is none, a key that is missing, a ``top_k`` beyond the vocabulary.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        vocab_size: int,
        name: str | None = None,
        max_in_flight: int | None = None,
        timeout: float = 120.0,
        answer_timeout: float = 1800.0,
        max_retries: int = 4,
        backoff: float = 0.5,
        top_k: int = 0,
        max_union_ids: int = 1024,
        api_key_env: str | None = None,
    ) -> None:
        addresses = [urls] if isinstance(urls, str) else list(urls)
        self.clients = [
            HttpClient(url, kind="teacher server", timeout=timeout, api_key_env=api_key_env) for url in addresses
        ]
        if repeated := [url for url, count in Counter(client.url for client in self.clients).items() if count > 1]:
            raise UserError(f"teacher server {repeated[0]} is named twice: name each replica once")
        self.name = name or self.clients[0].url
        self.vocab_size = vocab_size
        self.max_tokens: int | None = None
        """Tokens of prompt and response that the servers accept; None where they have not been asked."""
        self.top_k = top_k
        self.max_union_ids = max_union_ids
        self._max_in_flight = max_in_flight
        self._answer_timeout = answer_timeout
        self._policy = RetryPolicy(max_retries, backoff)
        self._server_vocab_size: int | None = None
        self._known: KnownText | None = None
        self._version: str | None = None
        self._deadline: float | None = None
        self._counts: Counter[str] = Counter()
        self._wait_seconds = 0.0
        self._gatherers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Gatherer] = weakref.WeakKeyDictionary()
        self.restrict()

    def restrict(
        self, *, vocab_size: int | None = None, server_vocab_size: int | None = None, max_tokens: int | None = None
    ) -> None:
        """Refuse, from this call on, what is known to be too much for the servers.

        ``vocab_size`` bounds what may be sent, ``server_vocab_size`` is the number of ids that the servers' model has.
        """
        self._server_vocab_size = server_vocab_size or self._server_vocab_size
        if vocab_size is not None:
            self.vocab_size = min(self.vocab_size, vocab_size)
        if max_tokens is not None:
            self.max_tokens = max_tokens if self.max_tokens is None else min(self.max_tokens, max_tokens)
        if self.top_k > self.vocab_size:
            raise UserError(
                f"--opd-top-k {self.top_k} is more than the {self.vocab_size} tokens of teacher {self.name}, "
                "which would end its server: lower it"
            )

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """In the block nothing is asked again that was not answered in time."""
        before = self._policy
        self._policy = dataclasses.replace(before, repeat_time_outs=False)
        try:
            yield
        finally:
            self._policy = before

    def ask(self, path: str, payload: Any = None, *, replica: int = 0) -> Any:
        """The JSON answer of one server to ``GET path``, or to ``POST path`` where there is a ``payload``.

        Not for use inside a loop that should go on meanwhile. Raises :class:`TeacherFailure`.
        """

        client = self.clients[replica]

        async def exchange() -> Any:
            try:
                if payload is None:
                    return await client.get(path, self._policy)
                return await client.post(path, payload, self._policy)
            except HttpError as error:
                raise failure_of(error) from None

        return self._blocking(exchange)

    def score(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        """Log-probabilities of each sample's response tokens; see :class:`~opd_megatron.teacher.protocol.Teacher`.

        All samples are checked before any is sent. The first failure stops the other requests.
        """
        for sample in samples:
            self.check(sample)

        return self._blocking(lambda: score_together(self.score_one, samples))

    async def score_one(self, sample: Sample) -> TeacherScores:
        """Scores of one sample; see :class:`~opd_megatron.teacher.protocol.StreamingTeacher`.

        The first token of a response to an empty prompt has no score: it is not valid and its value is 0. With
        ``top_k`` the scores hold the most probable tokens and the tail, where a token is not valid all zeros.
        """
        reading, unscored = await self._read(sample, None)
        scores = scores_of(sample, reading, unscored, self.name)
        if self.top_k:
            top = None if reading is None else reading.top
            take_record(scores, unscored, self.top_k, top)
        return scores

    async def score_ids(self, sample: Sample, ids_TK: np.ndarray) -> TeacherScores:
        """As :meth:`score_one`, with the teacher's values of ``ids_TK`` (int, distinct in a row) as the record.

        The server scores one list of ids at all positions, so that the cost is positions times the number of different
        ids: more than ``max_union_ids`` are refused. Raises :class:`TeacherFailure`.
        """
        ids_TK = np.asarray(ids_TK, dtype=np.int64)
        if ids_TK.ndim != 2 or len(ids_TK) != sample.response_length:
            raise ValueError(f"ids of shape {ids_TK.shape} for {sample.response_length} response tokens")
        union, places_TK = np.unique(ids_TK, return_inverse=True)
        if len(union) > self.max_union_ids:
            raise self._unscorable(
                sample,
                f"{len(union)} different ids at {len(ids_TK)} positions: the server scores each of them at every "
                f"position; at most {self.max_union_ids} are asked for (--opd-max-union-ids)",
            )
        if union.size and (union[0] < 0 or union[-1] >= self.vocab_size):
            raise self._unscorable(sample, f"an id to be scored is outside the vocabulary of {self.vocab_size}")
        reading, unscored = await self._read(sample, union)
        top = None
        if reading is not None:
            assert reading.union_log_probs_NU is not None
            places_NK = places_TK.reshape(ids_TK.shape)[unscored:]
            log_probs_NK = np.take_along_axis(reading.union_log_probs_NU, places_NK, axis=1)
            top = TopK.of(ids_TK[unscored:], log_probs_NK, self.vocab_size)
        scores = scores_of(sample, reading, unscored, self.name)
        take_record(scores, unscored, ids_TK.shape[1], top)
        return scores

    async def answer_one(self, sample: Sample, sampling: Mapping[str, Any]) -> tuple[np.ndarray, bool]:
        """A response to the prompt of ``sample``, which is left unchanged: ids int64 ``[T]``, and whether it ended.

        ``sampling`` are SGLang's sampling parameters; ``max_new_tokens`` among them, at which what did not end is cut,
        is lowered to what the servers can score behind the prompt. It is also cut, down to nothing, before the first
        token outside ``vocab_size``. Raises :class:`TeacherFailure`.
        """
        prompt, limit = sample.prompt_tokens, int(sampling["max_new_tokens"])
        with self._counted():
            if not len(prompt):
                raise self._unscorable(sample, "the prompt has no tokens; not sent, because that may end the server")
            self._check_tokens(sample, prompt, extra=1)
            limit = limit if self.max_tokens is None else min(limit, self.max_tokens - len(prompt))
            wanted = {**sampling, "max_new_tokens": limit}
            question = Question(_subject(sample), prompt, 0, sampling=wanted, timeout=self._answer_timeout)
            reading = await self._asked(question)
        assert reading.response is not None
        return reading.response.tokens_T, reading.response.ended

    def pin(self, tokens: np.ndarray) -> np.ndarray:
        """Score a known text on every server and hold all of them to the first one's answer from then on.

        ``tokens`` ``[N + 1]``; returns the log-probabilities ``[N]`` of those after the first. A server whose weights,
        weight version or model differ later, which is looked at as each step begins and ends and when a server comes
        back after it could not be reached, is asked no more. Raises :class:`UserError` if the servers differ among
        themselves and :class:`TeacherFailure` if one cannot be asked.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        self.check(Sample(0, 0, "", prompt_tokens=tokens[:1], response_tokens=tokens[1:]))

        self._known = None
        known = KnownText(tokens, self._read_answer)
        first: Identity = self._blocking(lambda: known.open(self.clients, self._policy))
        self._known, self._version = known, first.weight_version
        return first.log_probs_N

    def expect_other_weights(self) -> None:
        """Take the weight version of the next answer for that of the servers, which were given new weights."""
        self._version = None

    def begin_step(self, deadline: float | None) -> None:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        self._deadline = None if deadline is None else time.monotonic() + deadline
        for gatherer in self._gatherers.values():
            gatherer.deadline = self._deadline
            gatherer.replicas.begin_step(proven=self._known is None)

    async def end_step(self, deadline: float | None) -> None:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`; the known text of :meth:`pin` is the proof."""
        gatherer = self._gatherers.get(asyncio.get_running_loop())
        if gatherer is not None and self._known is not None:
            await gatherer.replicas.end_step(deadline)

    def statistics(self) -> dict[str, float]:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        counts = {key: float(value) for key, value in self._counts.items()}
        self._counts.clear()
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        gatherers = list(self._gatherers.values())
        limit = sum(replica.limit.value for gatherer in gatherers[-1:] for replica in gatherer.replicas.all)
        found = {"wait_seconds": seconds, "in_flight_limit": float(limit)}
        return dict.fromkeys(("requests", "retries", "samples"), 0.0) | counts | found

    def close(self) -> None:
        """Nothing is open between calls from code that is not asynchronous; see :meth:`aclose`."""

    async def aclose(self) -> None:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        gatherer = self._gatherers.pop(asyncio.get_running_loop(), None)
        if gatherer is not None:
            await gatherer.aclose()

    def check(self, sample: Sample) -> None:
        """Raise :class:`TeacherFailure` if ``sample`` must not be sent."""
        sample = sample.seen_by_teacher()
        if sample.response_length:
            self._check_tokens(sample, sample.tokens)

    def _check_tokens(self, sample: Sample, tokens: np.ndarray, extra: int = 0) -> None:
        """As :meth:`check` for what is sent of the sample, which ``extra`` tokens are to follow."""
        outside = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
        if outside.size:
            place = int(outside[0])
            raise self._unscorable(
                sample,
                f"token {place} has id {tokens[place]}, outside the vocabulary of {self.vocab_size}; not sent, because "
                "such an id ends the server",
            )
        if self.max_tokens is not None and len(tokens) + extra > self.max_tokens:
            raise TeacherFailure(
                f"teacher server {self.name}: {_subject(sample)}: the server takes at most {self.max_tokens} tokens; "
                "shorten prompts and responses, or start it with a larger --context-length",
                FailureKind.OVERLONG,
            )

    def _unscorable(self, sample: Sample, reason: str) -> TeacherFailure:
        return TeacherFailure(f"teacher server {self.name}: {_subject(sample)}: {reason}", FailureKind.UNSCORABLE)

    async def _read(self, sample: Sample, union: np.ndarray | None) -> tuple[Reading | None, int]:
        """What a server says of the sample, None for no tokens, and how many response tokens have no score."""
        sample = sample.seen_by_teacher()
        with self._counted():
            self.check(sample)
            # The token before the first scored one is where the server starts; an earlier start would lose its
            # prefix cache.
            start = max(len(sample.prompt_tokens) - 1, 0)
            unscored = start + 1 - len(sample.prompt_tokens)
            if sample.response_length <= unscored:
                return None, min(unscored, sample.response_length)
            return await self._asked(Question(_subject(sample), sample.tokens, start, union)), unscored

    async def _asked(self, question: Question) -> Reading:
        """The answer to ``question`` within the time limit of the step."""
        remaining = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
        try:
            async with asyncio.timeout(remaining):
                return await self._gatherer().ask(question)
        except TimeoutError:
            raise TeacherFailure(
                f"teacher server {self.name}: {question.subject}: the time limit of the step passed",
                FailureKind.DEADLINE,
            ) from None

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count what is asked for in the block as one sample, with its time and its failure."""
        began = time.monotonic()
        try:
            yield
        except TeacherFailure as failure:
            self._counts[f"failed_{failure.kind}"] += 1
            raise
        finally:
            self._counts["samples"] += 1
            self._wait_seconds += time.monotonic() - began

    def _gatherer(self) -> Gatherer:
        """That of the running loop; each has its own connections, queue and view of the servers."""
        loop = asyncio.get_running_loop()
        if loop not in self._gatherers:
            proven = self._known is None
            replicas = [Replica(client, AdaptiveLimit(self._max_in_flight), proven=proven) for client in self.clients]
            gatherer = Gatherer(Replicas(replicas, self._policy, self._prove), self._believe, self.top_k, self._counts)
            gatherer.deadline = self._deadline
            self._gatherers[loop] = gatherer
        return self._gatherers[loop]

    def _believe(self, question: Question, answer: Any, replica: Replica) -> Reading:
        if question.sampling is not None:
            limit = int(question.sampling["max_new_tokens"])
            reading = read_response(answer, len(question.tokens), limit, self.vocab_size, self._server_vocab_size)
        else:
            top_k = self.top_k if question.union is None else 0
            sent = question.tokens[question.start :]
            reading = self._read_answer(answer, sent, top_k=top_k, union=question.union)
        if self._version is None:
            self._version = reading.weight_version
        if reading.weight_version != self._version:
            reason = f"its weight version is {reading.weight_version!r}, not {self._version!r}"
            raise AnswerError(FailureKind.CHANGED_MODEL, reason)
        return reading

    def _read_answer(self, answer: Any, sent: np.ndarray, **wanted: Any) -> Reading:
        last_id = (self._server_vocab_size or self.vocab_size) - 1
        return read_answer(answer, sent, self.vocab_size, last_id=last_id, **wanted)

    async def _prove(self, replica: Replica) -> None:
        """Raise :class:`TeacherFailure` unless ``replica`` serves what was pinned, :class:`HttpError` if it is gone."""
        if self._known is not None:
            await self._known.prove(replica.client, RetryPolicy(0))

    def _blocking(self, start: Callable[[], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            try:
                return await start()
            finally:
                await self.aclose()
                for client in self.clients:
                    await client.aclose()

        return blocking(run)


def _subject(sample: Sample) -> str:
    return f"sample {sample.index} ({len(sample.prompt_tokens)} prompt + {sample.response_length} response tokens)"
