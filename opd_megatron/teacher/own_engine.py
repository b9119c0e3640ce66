"""The rollout engine as the teacher: it has the student's current weights and scores responses behind other prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opd_megatron.config.errors import UserError
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.preflight import Finding
from opd_megatron.teacher.protocol import TeacherError
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_preflight import check_length, server_info


class EngineTeacher:
    """Asks the servers that sample, whose ``addresses`` change where one is started anew; ``connect`` makes a client.

    The weights are whatever the engine was given last, and the same for all samples of a rollout.
    """

    name = "self"

    def __init__(self, addresses: Callable[[], list[str]], connect: Callable[[Sequence[str]], SGLangTeacher]) -> None:
        self._addresses = addresses
        self._connect = connect
        self._known: list[str] = []
        self._client: SGLangTeacher | None = None
        self._left: list[SGLangTeacher] = []
        self._max_tokens: int | None = None

    def preflight(self, longest_sample: int, overlong: str) -> list[Finding]:
        """Whether the servers take what they will be asked: the longest prompt with its context and response.

        Raises :class:`UserError` where ``overlong`` (``--opd-overlong``) is ``stop`` and they do not, and where one
        cannot be asked.
        """
        client, findings = self._current(), []
        try:
            for replica, server in enumerate(client.clients):
                info = server_info(client, replica)
                findings += check_length(info, longest_sample, overlong, server.server)
                client.restrict(max_tokens=info.max_tokens)
        except TeacherError as error:
            raise UserError(f"{error}; see the server's log") from error
        self._max_tokens = client.max_tokens
        return [*findings, Finding("server", f"the rollout engine's, {len(client.clients)} in all")]

    def begin_step(self, deadline: float | None) -> None:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`; the weights are new."""
        client = self._current()
        client.expect_other_weights()
        client.begin_step(deadline)

    async def end_step(self, deadline: float | None) -> None:
        """Nothing to prove: the engine does when it is given weights, whose label is in each answer."""

    async def score_one(self, sample: Sample) -> TeacherScores:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        assert self._client is not None
        return await self._client.score_one(sample)

    def statistics(self) -> dict[str, float]:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        return self._current().statistics()

    def close(self) -> None:
        """Nothing is open between calls from code that is not asynchronous; see :meth:`aclose`."""

    async def aclose(self) -> None:
        """See :class:`~opd_megatron.teacher.protocol.StreamingTeacher`."""
        for client in [*self._left, *([] if self._client is None else [self._client])]:
            await client.aclose()
        self._left.clear()

    def _current(self) -> SGLangTeacher:
        """The client of the servers that run at this moment."""
        addresses = self._addresses()
        if self._client is None or addresses != self._known:
            if self._client is not None:
                self._left.append(self._client)
            self._client, self._known = self._connect(addresses), addresses
            self._client.restrict(max_tokens=self._max_tokens)
        return self._client
