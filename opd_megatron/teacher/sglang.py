"""A teacher behind SGLang's ``/generate``: the log-probabilities of given tokens, with nothing generated.

The endpoint's facts used here hold for SGLang 0.5: ``input_token_logprobs`` is a list of ``[log_prob, id, text]`` that
begins at token ``logprob_start_len``, whose first entry has no value; entry i is the log-probability of token i given
the tokens before it, at temperature 1 whatever the sampling parameters say. The last id of the vocabulary is reported
as 0, beside the right log-probability (the server takes it for a placeholder of an image). A token id outside the
model's vocabulary and an empty list of ids end the whole server, so neither is ever sent.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import TeacherError
from opd_megatron.teacher.sglang_client import SGLangClient

LARGEST_LOG_PROB = 1e-3
"""A log-probability is at most 0, up to rounding in the server's precision."""


class SGLangTeacher:
    """A client of one SGLang server; scores are at temperature 1.

    ``vocab_size`` bounds the ids that are sent: the student's vocabulary, or the server's where that is smaller
    (:meth:`restrict`). At most ``max_in_flight`` requests are open at a time. For ``timeout``, ``max_retries`` and
    ``backoff`` see :class:`SGLangClient`. Raises :class:`UserError` on an address that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        vocab_size: int,
        max_in_flight: int = 8,
        timeout: float = 120.0,
        max_retries: int = 4,
        backoff: float = 0.5,
    ) -> None:
        self.client = SGLangClient(
            url, pool_size=max_in_flight, timeout=timeout, max_retries=max_retries, backoff=backoff
        )
        self.name = self.client.url
        self.vocab_size = vocab_size
        self.max_tokens: int | None = None
        """Tokens of prompt and response that the server accepts; None where it has not been asked."""
        self._threads = concurrent.futures.ThreadPoolExecutor(max_in_flight, thread_name_prefix="teacher")

    def restrict(self, *, vocab_size: int | None = None, max_tokens: int | None = None) -> None:
        """Refuse, from now on, what is known to be too much for the server."""
        if vocab_size is not None:
            self.vocab_size = min(self.vocab_size, vocab_size)
        if max_tokens is not None:
            self.max_tokens = max_tokens

    def score(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        """Log-probabilities of each sample's response tokens; see :class:`~opd_megatron.teacher.protocol.Teacher`.

        The first token of a response to an empty prompt has no score: it is not valid and its value is 0. All samples
        are checked before any is sent. The first failure stops the other requests.
        """
        for sample in samples:
            self._check(sample)
        abandon = threading.Event()
        futures = [self._threads.submit(self._score_one, sample, abandon) for sample in samples]
        try:
            done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                if (error := future.exception()) is not None:
                    raise error
            return [future.result() for future in futures]
        finally:
            abandon.set()
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Close the connections; requests that are still open are left to their time limit."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.client.close()

    def _check(self, sample: Sample) -> None:
        if not sample.response_length:
            return
        tokens = sample.tokens
        outside = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
        if outside.size:
            place = int(outside[0])
            raise TeacherError(
                f"teacher server {self.name}: {_subject(sample)}: token {place} has id {tokens[place]}, outside the "
                f"vocabulary of {self.vocab_size}; not sent, because such an id ends the server"
            )
        if self.max_tokens is not None and len(tokens) > self.max_tokens:
            raise TeacherError(
                f"teacher server {self.name}: {_subject(sample)}: the server takes at most {self.max_tokens} tokens; "
                "shorten prompts and responses, or start it with a larger --context-length"
            )

    def _score_one(self, sample: Sample, abandon: threading.Event) -> TeacherScores:
        length = sample.response_length
        log_probs_T = np.zeros(length, dtype=np.float32)
        valid_T = np.ones(length, dtype=np.bool_)
        weight_version = ""
        if length:
            # The token before the first scored one is where the server starts; an earlier start would lose its
            # prefix cache.
            start = max(len(sample.prompt_tokens) - 1, 0)
            unscored = start + 1 - len(sample.prompt_tokens)
            valid_T[:unscored] = False
            tokens = sample.tokens
            payload = {
                "input_ids": tokens.tolist(),
                "sampling_params": {"temperature": 0, "max_new_tokens": 0},
                "return_logprob": True,
                "logprob_start_len": start,
            }
            answer = self.client.exchange("POST", "/generate", payload, subject=_subject(sample), abandon=abandon)
            try:
                log_probs_T[unscored:], weight_version = read_answer(answer, tokens[start:], self.vocab_size)
            except ValueError as error:
                raise TeacherError(f"teacher server {self.name}: {_subject(sample)}: {error}") from error
        return TeacherScores(log_probs_T, valid_T, teacher=self.name, weight_version=weight_version)


def _subject(sample: Sample) -> str:
    return f"sample {sample.index} ({len(sample.prompt_tokens)} prompt + {sample.response_length} response tokens)"


def read_answer(answer: Any, sent_ids: np.ndarray, vocab_size: int) -> tuple[np.ndarray, str]:
    """Log-probabilities of ``sent_ids[1:]`` (float64) and the server's weight version.

    ``sent_ids`` are those from ``logprob_start_len`` on; id ``vocab_size - 1`` may come back as 0. Raises
    ``ValueError`` if the answer is about other tokens or holds anything but finite log-probabilities.
    """
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    entries = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or not isinstance(entries, list):
        raise ValueError("the answer has no list meta_info.input_token_logprobs; is this a SGLang server?")
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        raise ValueError(f"the server aborted the request ({finish.get('message', 'no reason given')})")
    if len(entries) != len(sent_ids):
        raise ValueError(f"{len(entries)} tokens in the answer, {len(sent_ids)} expected")
    try:
        ids = np.array([entry[1] for entry in entries], dtype=np.int64)
        log_probs = np.array([entry[0] for entry in entries[1:]], dtype=np.float64)
    except (TypeError, IndexError, KeyError, OverflowError, ValueError) as error:
        raise ValueError(f"input_token_logprobs is not a list of [log_prob, id, text] ({error})") from error
    reported_as_0 = (sent_ids == vocab_size - 1) & (ids == 0)
    if (different := np.flatnonzero((ids != sent_ids) & ~reported_as_0)).size:
        place = int(different[0])
        raise ValueError(f"the answer is about other tokens: id {ids[place]} where {sent_ids[place]} was sent")
    if (bad := np.flatnonzero(~(log_probs <= LARGEST_LOG_PROB) | np.isneginf(log_probs))).size:
        place = int(bad[0])
        raise ValueError(f"{entries[place + 1][0]} is not a log-probability (token id {ids[place + 1]})")
    return log_probs, str(meta.get("weight_version", ""))
