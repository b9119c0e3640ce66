"""The flow from prompts to a finished rollout: what goes where and when, and in which order it comes out."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import RunError
from opd_megatron.flow import FailurePolicy, FilterError, RolloutFlow, Stages
from opd_megatron.flow.clock import StageClock
from opd_megatron.flow.filters import unequal_rewards
from opd_megatron.reward import RewardError
from opd_megatron.sample import Sample
from opd_megatron.teacher.protocol import FailureKind, TeacherError, TeacherFailure
from tests.flow.parts import Prompts, Reward, Source, Teacher, make

COPIES = 3


def stages(**changes: Any) -> Stages:
    settings: dict[str, Any] = {
        "source": Source(COPIES),
        "prompts": Prompts(),
        "batch": 4,
        "copies": COPIES,
        "reward": Reward(),
        "teacher": Teacher(),
    }
    return Stages(**(settings | changes))


def shuffled(seed: int) -> Any:
    """A delay for each sample, a few milliseconds in random order."""
    draw = random.Random(seed)
    delays: dict[int, float] = {}
    return lambda sample: delays.setdefault(sample.index, draw.randrange(8) * 0.002)


@pytest.mark.parametrize("policy", ["mask", "drop"])
def test_the_teacher_answers_before_it_scores_and_a_failure_there_is_its_failure(policy: str) -> None:
    """Only what is not the student's; an answer that does not come takes the way of a score that does not."""
    answered: list[int] = []

    class Mixed(Source):
        async def stream(self, records: Any, rollout_id: int, first_group: int = 0) -> Any:
            async for sample in super().stream(records, rollout_id, first_group):
                sample.from_data = sample.group_index % 2 == 1
                yield sample

    async def answer(sample: Sample, rollout_id: int) -> None:
        await asyncio.sleep(0.001)
        assert rollout_id == 7
        if sample.index == 4:
            raise TeacherFailure("no answer", FailureKind.TIMEOUT)
        answered.append(sample.index)
        sample.response_tokens, sample.loss_mask = np.full(5, 2), np.ones(5, dtype=bool)

    failing = FailurePolicy(policy, max_failed_frac=0.5)
    rollout = make(stages(source=Mixed(COPIES), answer=answer, policy=failing, reward=None), 7)
    assert rollout.metrics["opd/teacher_failed/timeout"] == 1
    assert not {index for index in answered if index // COPIES % 2 == 0}
    assert len(rollout.samples) == 12
    for sample in rollout.samples:
        assert sample.teacher_scores is not None
        failed = sample.index == 4
        assert failed == (sample.teacher_failure is not None)
        assert (sample.response_length == 5) == (sample.from_data and not failed)
    assert any(sample.index == 4 for sample in rollout.samples) == (policy == "mask")


@pytest.mark.parametrize("takes_groups", [False, True])
def test_samples_come_out_in_the_order_of_the_prompts(takes_groups: bool) -> None:
    for seed in range(3):
        parts = stages(
            source=Source(COPIES, shuffled(seed)),
            reward=Reward(takes_groups=takes_groups, delay=shuffled(seed + 10)),
            teacher=Teacher(shuffled(seed + 20)),
        )
        samples = make(parts).samples
        assert parts.source.finished != sorted(parts.source.finished)  # type: ignore[attr-defined]
        assert [sample.index for sample in samples] == list(range(12))
        assert [sample.label for sample in samples] == [label for label in range(4) for _ in range(3)]
        for sample in samples:
            assert sample.reward == sample.index % 2
            assert sample.teacher_scores is not None
            assert set(sample.teacher_scores.log_probs_T) == {-float(sample.index)}


def test_a_reward_of_groups_gets_whole_groups_in_order() -> None:
    reward = Reward(takes_groups=True)
    make(stages(source=Source(COPIES, shuffled(4)), reward=reward))
    assert sorted(reward.calls) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_the_teacher_is_asked_while_others_are_sampled() -> None:
    """The last sample is finished only when the teacher has answered for all others."""
    teacher = Teacher()

    class Waiting(Source):
        async def stream(self, records: Any, rollout_id: int, first_group: int = 0) -> Any:
            async for sample in super().stream(records, rollout_id, first_group):
                if sample.index == 11:
                    while len(teacher.answered) < 11:
                        await asyncio.sleep(0)
                yield sample

    rollout = make(stages(source=Waiting(COPIES), teacher=teacher, reward=Reward(delay=lambda sample: 0.01)))
    assert sorted(teacher.answered) == list(range(12))
    assert rollout.metrics["opd/teacher_failed_frac"] == 0.0


def test_with_a_filter_only_groups_that_pass_reach_the_teacher() -> None:
    """Groups 1, 2 and 5 have equal rewards; the next prompts take their places."""
    for at_once in (True, False):
        for seed in range(3):
            teacher, prompts = Teacher(), Prompts()
            parts = stages(
                source=Source(COPIES, shuffled(seed)),
                prompts=prompts,
                reward=Reward(lambda sample: 0.0 if sample.group_index in (1, 2, 5) else sample.index),
                teacher=teacher,
                keep=unequal_rewards,
                max_refills=3,
                refill_at_once=at_once,
            )
            rollout = make(parts)
            assert [sample.group_index for sample in rollout.samples[::COPIES]] == [0, 3, 4, 6]
            assert [sample.index for sample in rollout.samples] == [0, 1, 2, 9, 10, 11, 12, 13, 14, 18, 19, 20]
            assert sorted(teacher.asked) == [sample.index for sample in rollout.samples]
            assert prompts.drawn == 7
            assert rollout.metrics["rollout/filtered_groups"] == 3.0


def test_a_filter_that_keeps_too_little_ends_the_run() -> None:
    parts = stages(reward=Reward(lambda sample: 1.0), keep=unequal_rewards, max_refills=8)
    with pytest.raises(FilterError, match="dropped 9 of 12 groups of rollout 0, more than --dynamic-filter-max-refill"):
        make(parts)


def test_the_engine_waits_where_too_much_is_open() -> None:
    teacher = Teacher(lambda sample: 0.003)
    make(stages(teacher=teacher, batch=20, most_open=5))
    assert 4 <= teacher.most_open <= 6
    free = Teacher(lambda sample: 0.003)
    make(stages(teacher=free, batch=20))
    assert free.most_open > 20


def odd(kind: FailureKind, *indices: int) -> Any:
    return lambda sample: kind if sample.index in indices else None


def test_masked_samples_keep_their_place_and_hold_no_number() -> None:
    teacher = Teacher(fails=odd(FailureKind.TIMEOUT, 4))
    rollout = make(stages(teacher=teacher, policy=FailurePolicy("mask")))
    assert [sample.index for sample in rollout.samples] == list(range(12))
    (masked,) = [sample for sample in rollout.samples if sample.teacher_failure is not None]
    assert (masked.index, masked.teacher_failure, masked.reward) == (4, "timeout", 0.0)
    assert masked.teacher_scores is not None
    assert not masked.teacher_scores.valid_T.any()
    assert np.isnan(masked.teacher_scores.log_probs_T).all()
    assert rollout.metrics["opd/teacher_failed_frac"] == pytest.approx(1 / 12)
    assert rollout.metrics["opd/teacher_failed/timeout"] == 1.0


@pytest.mark.parametrize("at_once", [True, False])
def test_a_dropped_sample_takes_its_group_along_and_the_next_prompt_comes(at_once: bool) -> None:
    slow_neighbours = Teacher(lambda sample: 0.0 if sample.index == 4 else 0.01, odd(FailureKind.STATUS, 4))
    rollout = make(stages(teacher=slow_neighbours, policy=FailurePolicy("drop"), refill_at_once=at_once))
    assert [sample.group_index for sample in rollout.samples[::COPIES]] == [0, 2, 3, 4]
    assert {3, 5} & set(slow_neighbours.abandoned)
    assert all(sample.teacher_failure is None for sample in rollout.samples)
    assert rollout.metrics["opd/teacher_failed/status"] == 1.0
    assert rollout.metrics["rollout/filtered_groups"] == 0.0


def test_one_failure_stops_the_run_and_abandons_what_is_open() -> None:
    teacher = Teacher(lambda sample: 0.0 if sample.index == 5 else 60.0, odd(FailureKind.WRONG_IDS, 5))
    parts = stages(teacher=teacher)
    with pytest.raises(TeacherFailure, match="sample 5 of no use"):
        make(parts)
    assert teacher.open == 0
    assert parts.source.closed == 1  # type: ignore[attr-defined]
    assert teacher.is_closed


@pytest.mark.parametrize("policy", ["mask", "drop"])
def test_more_failures_than_the_budget_end_the_run(policy: str) -> None:
    teacher = Teacher(fails=odd(FailureKind.TIMEOUT, 1, 4, 9))
    with pytest.raises(TeacherError, match=r"failed for 3 samples of a rollout of 12 \(3 timeout\), more than"):
        make(stages(teacher=teacher, policy=FailurePolicy(policy, max_failed_frac=0.2)))
    rollout = make(stages(teacher=teacher, policy=FailurePolicy(policy, max_failed_frac=0.25)))
    assert len(rollout.samples) == 12


def test_overlong_samples_have_a_policy_of_their_own() -> None:
    teacher = Teacher(fails=odd(FailureKind.OVERLONG, 2))
    rollout = make(stages(teacher=teacher, policy=FailurePolicy("stop", on_overlong="mask")))
    assert [sample.teacher_failure for sample in rollout.samples].count("overlong") == 1
    with pytest.raises(TeacherFailure):
        make(stages(teacher=teacher, policy=FailurePolicy("mask", on_overlong="stop")))


def test_what_is_unanswered_at_the_deadline_has_failed() -> None:
    teacher = Teacher(lambda sample: 600.0 if sample.index == 7 else 0.0)
    rollout = make(stages(teacher=teacher, policy=FailurePolicy("mask", deadline=0.05)))
    assert [sample.index for sample in rollout.samples if sample.teacher_failure == "deadline"] == [7]
    assert rollout.metrics["perf/teacher_wait_seconds"] >= 0.05
    with pytest.raises(TeacherFailure, match=r"sample 7 when the step had waited for it for 0\.05 seconds"):
        make(stages(teacher=teacher, policy=FailurePolicy(deadline=0.05)))


def test_what_takes_the_place_of_late_samples_has_as_much_time_again() -> None:
    """The replacements are answered at once, but not before the deadline of those whose place they take."""
    teacher = Teacher(lambda sample: 600.0 if sample.group_index in (1, 2) else 0.01)
    for at_once in (True, False):
        policy = FailurePolicy("drop", deadline=0.05, max_failed_frac=1.0)
        rollout = make(stages(teacher=teacher, policy=policy, refill_at_once=at_once))
        assert [sample.group_index for sample in rollout.samples[::COPIES]] == [0, 3, 4, 5]
        assert all(sample.teacher_scores is not None for sample in rollout.samples)


def test_replacements_that_are_late_themselves_have_failed() -> None:
    teacher = Teacher(lambda sample: 600.0 if sample.group_index > 0 else 0.0)
    with pytest.raises(TeacherError, match="more than --opd-max-failed-frac"):
        make(stages(teacher=teacher, policy=FailurePolicy("drop", deadline=0.02, max_failed_frac=1.0)))


@pytest.mark.parametrize("stage", ["reward", "teacher"])
def test_a_sample_that_a_stage_lets_go_is_missed(stage: str) -> None:
    """A task that is cancelled from within ends without an error, and with it its sample."""

    class Forgetful(Teacher if stage == "teacher" else Reward):  # type: ignore[misc]
        async def score_one(self, sample: Sample) -> Any:
            if sample.index == 5:
                raise asyncio.CancelledError
            return await super().score_one(sample)

        async def score_async(self, samples: Any) -> None:
            if samples[0].index == 5:
                raise asyncio.CancelledError
            await super().score_async(samples)

    with pytest.raises(RunError, match="rollout 0 lost a sample"):
        make(stages(**{stage: Forgetful()}))


def test_sampling_does_not_count_towards_the_deadline() -> None:
    parts = stages(
        source=Source(COPIES, lambda sample: 0.02 * sample.index),
        teacher=Teacher(lambda sample: 0.01),
        policy=FailurePolicy(deadline=0.1),
    )
    assert len(make(parts).samples) == 12


def test_a_time_out_of_the_teacher_s_own_is_not_taken_for_the_deadline() -> None:
    class Broken(Teacher):
        async def score_one(self, sample: Sample) -> Any:
            raise TimeoutError("a bug")

    with pytest.raises(TimeoutError, match="a bug"):
        make(stages(teacher=Broken(), policy=FailurePolicy("mask")))


def test_a_reward_that_fails_ends_the_rollout_with_its_own_error() -> None:
    def value(sample: Sample) -> float:
        if sample.index == 3:
            raise RewardError("no reward for sample 3")
        return 0.0

    teacher = Teacher(lambda sample: 60.0)
    with pytest.raises(RewardError, match="no reward for sample 3"):
        make(stages(reward=Reward(value), teacher=teacher))
    assert teacher.open == 0


def test_an_interrupt_leaves_no_call_and_the_next_rollout_works() -> None:
    def interrupt(sample: Sample) -> float:
        if sample.index == 3:
            raise KeyboardInterrupt
        return 0.0

    teacher, prompts = Teacher(lambda sample: 60.0), Prompts()
    flow = RolloutFlow(stages(reward=Reward(interrupt), teacher=teacher, prompts=prompts))
    with pytest.raises(KeyboardInterrupt):
        flow.make(0)
    assert teacher.open == 0
    teacher.delay = lambda sample: 0.0
    flow._stages.reward.value = lambda sample: 0.0  # type: ignore[union-attr]
    assert len(flow.make(1).samples) == 12
    flow.close()


def test_waiting_is_what_only_the_teacher_does() -> None:
    now = 0.0
    clock = StageClock(lambda: now)
    with clock.at_work("teacher"):
        now = 1.0
        with clock.at_work("sampling"):
            now = 3.0
            with clock.held_up("sampling"):
                now = 3.5
            with clock.at_work("reward"):
                now = 4.0
        now = 6.0
    now = 10.0
    assert clock.metrics() == {
        "perf/sampling_seconds": 2.5,
        "perf/reward_seconds": 0.5,
        "perf/teacher_seconds": 6.0,
        "perf/teacher_wait_seconds": 3.5,
    }


def test_a_teacher_that_changed_within_the_step_ends_it_before_anything_is_trained() -> None:
    teacher = Teacher(delay=lambda sample: 0.01)
    stages = Stages(Source(2), Prompts(), batch=3, copies=2, reward=Reward(), teacher=teacher)
    make(stages)
    assert teacher.proved == [6], "the proof comes when all is scored"
    teacher.changed = True
    with pytest.raises(TeacherFailure, match="other weights"):
        make(stages)
