"""A text that every server of a teacher scores as a step begins and ends; another answer shows other weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.http_client import HttpClient, HttpError, HttpFault, RetryPolicy, retried
from opd_megatron.teacher.agreement import EXACT, ROUNDED, Identity
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure, failure_of
from opd_megatron.teacher.sglang_answer import AnswerError, Reading

ReadScores = Callable[[Any, np.ndarray], Reading]
"""What an answer says of the tokens that were sent; raises :class:`AnswerError` where it is not believed."""


class KnownText:
    """``tokens`` ``[N + 1]``, and what each server said of itself and of them."""

    def __init__(self, tokens: np.ndarray, read: ReadScores) -> None:
        self._tokens = tokens
        self._read = read
        self._tolerance = EXACT
        self._identities: dict[str, Identity] = {}

    async def open(self, clients: Sequence[HttpClient], policy: RetryPolicy) -> Identity:
        """Ask every server for the first time; the first one's answer, to which all are held from then on.

        Raises :class:`UserError` if the servers differ and :class:`TeacherFailure` if one cannot be asked.
        """
        try:
            for client in clients:
                server = await client.get("/server_info", policy)
                if isinstance(server, dict) and server.get("dtype") != "float32":
                    self._tolerance = ROUNDED
                self._identities[client.url] = await self._identify(client, policy)
        except HttpError as error:
            raise failure_of(error) from None
        for client in clients[1:]:
            difference = self._first.difference(self._identities[client.url], self._tolerance)
            if difference is not None:
                raise UserError(
                    f"{client.server} and {clients[0].url} do not serve the same weights: {difference}; start "
                    "both with the same model"
                )
        return self._first

    async def prove(self, client: HttpClient, policy: RetryPolicy) -> None:
        """Ask again; raises :class:`TeacherFailure` where the answer is another one, :class:`HttpError` without one."""
        found = await self._identify(client, policy)
        difference = self._first.difference(found, self._tolerance)
        before = self._identities[client.url].model_path
        if difference is None and found.model_path != before:
            difference = f"its model is {found.model_path!r}, not {before!r}"
        if difference is not None:
            raise TeacherFailure(f"{client.server}: {difference}", FailureKind.CHANGED_MODEL)

    @property
    def _first(self) -> Identity:
        return next(iter(self._identities.values()))

    async def _identify(self, client: HttpClient, policy: RetryPolicy) -> Identity:
        model = await client.get("/model_info", policy)
        if not isinstance(model, dict) or "model_path" not in model:
            message = f"{client.server}: /model_info names no model; is this a SGLang server?"
            raise TeacherFailure(message, FailureKind.MALFORMED)
        reading = await self._scores(client, policy)
        return Identity(model["model_path"], str(model.get("weight_version", "")), reading.log_probs_N)

    async def _scores(self, client: HttpClient, policy: RetryPolicy) -> Reading:
        """What a server says of the text; an answer that is not believed is asked for again like none."""
        payload = {
            "input_ids": self._tokens,
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        disbelief: AnswerError | None = None

        async def attempt() -> Reading:
            nonlocal disbelief
            disbelief = None
            answer = await client.attempt("POST", "/generate", payload, "known text")
            try:
                return self._read(answer, self._tokens)
            except AnswerError as error:
                disbelief = error
                raise HttpError(client.server, "known text", str(error), HttpFault.MALFORMED, transient=True) from None

        try:
            return await retried(attempt, policy)
        except HttpError as error:
            if disbelief is None:
                raise
            raise TeacherFailure(str(error), disbelief.kind) from None
