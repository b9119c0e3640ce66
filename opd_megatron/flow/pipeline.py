"""The pipeline of one rollout.

Every sample goes its own way as soon as it is finished, while others are still being sampled: to the reward, alone or
with its group where the reward wants that, and to a streaming teacher, at once or, where a filter may drop its group or
the teacher sees feedback, when the group was judged. A dropped group is replaced by the next prompt. Prompts, indices
and random streams are given out in the order of being drawn, and the finished rollout has that order, whatever order
answers came in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from opd_megatron.config.errors import RunError
from opd_megatron.flow.clock import StageClock
from opd_megatron.flow.failures import FailureCount, FailurePolicy, teacher_metrics
from opd_megatron.flow.filters import FilterError, GroupFilter
from opd_megatron.flow.gate import Gate
from opd_megatron.flow.masking import complete_masked, mask
from opd_megatron.reward import RewardFunction
from opd_megatron.rollout.prompt import Prompt
from opd_megatron.sample import Sample
from opd_megatron.teacher.protocol import FailureKind, StreamingTeacher, TeacherFailure

MOST_OPEN = 4096
"""Calls of reward and teacher that may be open before finished samples are no longer taken from the engine."""


class SampleSource(Protocol):
    """Makes the samples of prompts; see :class:`~opd_megatron.rollout.generate.RolloutGenerator`."""

    def stream(
        self, records: Sequence[Prompt], rollout_id: int, first_group: int = 0
    ) -> AsyncGenerator[Sample, None]: ...


class PromptSource(Protocol):
    """Hands out prompts in order."""

    def next_batch(self, n: int) -> Sequence[Prompt]: ...


TeacherAnswer = Callable[[Sample, int], Awaitable[None]]
"""Gives a sample of a rollout a response of the teacher; raises :class:`TeacherFailure`."""


@dataclass(frozen=True)
class Stages:
    """What a rollout goes through; ``batch`` prompts of ``copies`` samples each come out.

    ``max_refills`` bounds the prompts that ``keep`` may have replaced. ``feedback`` looks at each sample that has its
    reward, and says what the teacher sees of it, or that the teacher is not asked. Samples that are not the student's
    come from ``source`` without a response where ``answer`` is to give them one of the teacher's, before they are
    scored. With ``refill_at_once`` a dropped group is replaced while others are still under way; without, when all are
    decided, so that an engine whose rounding depends on what it decodes together gets the same batches in every run.
    """

    source: SampleSource
    prompts: PromptSource
    batch: int
    copies: int
    reward: RewardFunction | None = None
    keep: GroupFilter | None = None
    max_refills: int = 0
    feedback: Callable[[Sample], None] | None = None
    teacher: StreamingTeacher | None = None
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    refill_at_once: bool = True
    answer: TeacherAnswer | None = None
    most_open: int = MOST_OPEN


@dataclass(frozen=True, eq=False, repr=False)  # asyncio prints a task's result when it restores Ctrl-C's handler
class Rollout:
    """The samples in the trainer's order, and metrics of how they were made."""

    samples: list[Sample]
    metrics: dict[str, float]


class RolloutFlow:
    """Makes rollout after rollout in one event loop, which its own calls alone run."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._runner = asyncio.Runner()
        self._runner.get_loop().set_exception_handler(_report)

    def make(self, rollout_id: int) -> Rollout:
        """One finished rollout.

        Raises :class:`TeacherError`, :class:`RewardError` or :class:`FilterError` where the run cannot go on as its
        options want it. Whatever ends the call, an interrupt included, leaves no request and no task behind.
        """
        try:
            return self._runner.run(self.make_async(rollout_id))
        except BaseException:
            with contextlib.suppress(KeyboardInterrupt):  # the same one, from the task that it met
                self._runner.run(_end_tasks())
            raise

    async def make_async(self, rollout_id: int) -> Rollout:
        """As :meth:`make`, for a loop that has something else to do meanwhile."""
        return await _Making(self._stages, rollout_id).finish()

    def close(self) -> None:
        """Close the teacher's connections and the event loop."""
        if self._stages.teacher is not None:
            self._runner.run(self._stages.teacher.aclose())
        self._runner.close()


@dataclass
class _Group:
    """The samples of one prompt: those that are ready to be judged together, and their calls to the teacher."""

    ready: list[Sample] = field(default_factory=list)
    calls: list[asyncio.Task[None]] = field(default_factory=list)
    dropped: bool = False


class _Making:
    """One rollout in the making."""

    def __init__(self, stages: Stages, rollout_id: int) -> None:
        self.stages = stages
        self.rollout_id = rollout_id
        self.clock = StageClock()
        self.gate = Gate(stages.most_open)
        self.failures = FailureCount(stages.policy, stages.batch * stages.copies)
        self.groups: list[_Group] = []
        self.filtered = 0
        self.limits: set[asyncio.Timeout] = set()

    async def finish(self) -> Rollout:
        if self.stages.teacher is not None:
            self.stages.teacher.begin_step(None)  # the time limit counts while nothing else is left to do
        watch = asyncio.create_task(self._watch_deadline())
        try:
            while missing := self.stages.batch - len(self._kept()):
                async with asyncio.TaskGroup() as self.tasks:
                    self.tasks.create_task(self._sample(missing))
        except BaseExceptionGroup as several:
            first = _first_of(several)
            raise first from first.__cause__
        else:
            await self._prove_teacher()
        finally:
            watch.cancel()
        self._check_complete()
        samples = [sample for group in self._kept() for sample in sorted(group.ready, key=lambda sample: sample.index)]
        complete_masked(samples)
        metrics = {"rollout/filtered_groups": float(self.filtered), **self.clock.metrics()}
        if self.stages.teacher is not None:
            metrics |= self.failures.metrics() | teacher_metrics(self.stages.teacher)
        return Rollout(samples, metrics)

    async def _prove_teacher(self) -> None:
        if self.stages.teacher is not None:
            with self.clock.at_work("teacher"):
                await self.stages.teacher.end_step(self.stages.policy.deadline)

    def _check_complete(self) -> None:
        """Raise ``RunError`` if a stage let a sample go: a task that is cancelled from within ends without an error."""
        scored = self.stages.teacher is not None
        for group in self._kept():
            unscored = scored and any(sample.teacher_scores is None for sample in group.ready)
            if len(group.ready) != self.stages.copies or unscored:
                raise RunError(
                    f"rollout {self.rollout_id} lost a sample: a reward, a teacher or a generate function was "
                    "cancelled from within"
                )

    def _kept(self) -> list[_Group]:
        return [group for group in self.groups if not group.dropped]

    async def _sample(self, count: int) -> None:
        """Draw prompts and send each of their samples on when it is finished."""
        first = len(self.groups)
        records = self.stages.prompts.next_batch(count)
        self.groups += [_Group() for _ in range(count)]
        stream = self.stages.source.stream(records, self.rollout_id, first)
        with self.clock.at_work("sampling"):
            async with contextlib.aclosing(stream) as finished:
                async for sample in finished:
                    if not self.gate.is_open:
                        with self.clock.held_up("sampling"):
                            await self.gate.wait()
                    self.tasks.create_task(self._follow(self.groups[sample.group_index], sample))
                    await asyncio.sleep(0)  # it sets out before the next is taken, so that the gate can close

    async def _follow(self, group: _Group, sample: Sample) -> None:
        """What happens to a finished sample, and to its group with the last of them."""
        stages = self.stages
        if group.dropped:
            return
        unconditional = stages.keep is None and stages.feedback is None
        if unconditional:
            self._ask_teacher(group, sample)
        judged = stages.reward is not None and not sample.from_data  # as all of its group are, or are not
        if stages.reward is not None and judged and not stages.reward.takes_groups:
            await self._judge([sample])
        group.ready.append(sample)
        if len(group.ready) < stages.copies:
            return
        members = sorted(group.ready, key=lambda sample: sample.index)
        if stages.reward is not None and judged and stages.reward.takes_groups:
            await self._judge(members)
        if unconditional or group.dropped:
            return
        if stages.keep is not None and not stages.keep(members):
            self._filter_out(group)
            return
        for member in members:
            if stages.feedback is not None:
                stages.feedback(member)
            self._ask_teacher(group, member)

    async def _judge(self, samples: Sequence[Sample]) -> None:
        assert self.stages.reward is not None
        with self.gate.passing(), self.clock.at_work("reward"):
            await self.stages.reward.score_async(samples)

    def _ask_teacher(self, group: _Group, sample: Sample) -> None:
        if self.stages.teacher is not None and sample.teacher_scores is None:
            group.calls.append(self.tasks.create_task(self._score(self.stages.teacher, group, sample)))

    async def _score(self, teacher: StreamingTeacher, group: _Group, sample: Sample) -> None:
        self.failures.asked += 1
        try:
            with self.gate.passing(), self.clock.at_work("teacher"):
                async with asyncio.timeout(None) as limit:
                    self.limits.add(limit)
                    try:
                        if self.stages.answer is not None and sample.from_data:
                            await self.stages.answer(sample, self.rollout_id)
                        sample.teacher_scores = await teacher.score_one(sample)
                    finally:
                        self.limits.discard(limit)
            sample.validate()
        except TimeoutError:
            if not limit.expired():
                raise
            waited = self.stages.policy.deadline
            self._failed(group, sample, teacher, _deadline_failure(teacher.name, sample, waited))
        except TeacherFailure as failure:
            self._failed(group, sample, teacher, failure)

    def _failed(self, group: _Group, sample: Sample, teacher: StreamingTeacher, failure: TeacherFailure) -> None:
        if group.dropped:
            return
        if self.failures.add(failure) == "mask":
            mask(sample, failure.kind, teacher.name)
        else:
            self._drop(group)

    def _filter_out(self, group: _Group) -> None:
        self.filtered += 1
        if self.filtered > self.stages.max_refills:
            raise FilterError(
                f"the dynamic filter dropped {self.filtered} of {len(self.groups)} groups of rollout "
                f"{self.rollout_id}, more than --dynamic-filter-max-refills allows to replace: choose prompts that are "
                "neither too easy nor too hard, more samples per prompt, or another filter"
            )
        self._drop(group)

    def _drop(self, group: _Group) -> None:
        """Leave the group out and abandon what the teacher has not answered; the next prompt takes its place."""
        group.dropped = True
        own = asyncio.current_task()
        for call in group.calls:
            if call is not own:
                call.cancel()
        if self.stages.refill_at_once:
            self.tasks.create_task(self._sample(1))

    async def _watch_deadline(self) -> None:
        """End the calls that are open when the step has waited for the teacher alone for too long.

        What takes the place of what was dropped then has as much time again.
        """
        began = 0.0
        while True:
            while (left := self.stages.policy.deadline - (self.clock.teacher_wait - began)) > 0:
                await asyncio.sleep(left)
            began = self.clock.teacher_wait
            for limit in self.limits:
                limit.reschedule(asyncio.get_running_loop().time())


def _deadline_failure(teacher: str, sample: Sample, seconds: float) -> TeacherFailure:
    message = (
        f"teacher {teacher} had not answered for sample {sample.index} when the step had waited for it for {seconds:g} "
        "seconds (--opd-teacher-step-deadline)"
    )
    return TeacherFailure(message, FailureKind.DEADLINE)


def _first_of(several: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception that ended the others."""
    first = several.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Say nothing of tasks that an interrupt ended: it has reached the caller."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


async def _end_tasks() -> None:
    """Cancel every other task of the loop and wait for its end."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
