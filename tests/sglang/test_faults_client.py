"""The teacher's client behind a proxy that misbehaves: the right scores, or a failure of the right kind and sample."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import FailureKind, TeacherError, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.sglang import faults
from tests.sglang.conftest import Served
from tests.sglang.proxy import Fault, FaultProxy, Plan, Recording, always, at_random, in_turn, no_fault, whenever
from tests.sglang.support import Outcome, assert_same_scores, mixed_samples, score_all, wait_until

pytestmark = pytest.mark.sglang

PASSING = [
    faults.refused(),
    faults.RESET,
    faults.RESET_MIDWAY,
    faults.CLOSED_MIDWAY,
    faults.CUT,
    faults.SILENT,
    faults.SILENT_MIDWAY,
    faults.UNAVAILABLE,
    faults.BUSY,
    faults.BUSY_FOR_A_WHILE,
    *faults.ERROR_FORMS,
]
"""Faults that another attempt can find gone."""
LASTING = [
    (faults.RESET, FailureKind.CONNECTION),
    (faults.CLOSED_MIDWAY, FailureKind.CONNECTION),
    (faults.SILENT, FailureKind.TIMEOUT),
    (faults.ERROR_FORMS[0], FailureKind.STATUS),
    (faults.BUSY, FailureKind.STATUS),
    (faults.status(400, {"error": {"message": "not so"}}), FailureKind.STATUS),
    (faults.CUT, FailureKind.MALFORMED),
]
"""Faults of whole requests, and the kind of failure when they do not pass."""
WITHIN = [
    (faults.OTHER_ID, FailureKind.WRONG_IDS),
    (faults.OTHER_FIRST_ID, FailureKind.WRONG_IDS),
    (faults.SHORTER, FailureKind.WRONG_LENGTH),
    (faults.LONGER, FailureKind.WRONG_LENGTH),
    (faults.NAN, FailureKind.NOT_FINITE),
    (faults.INFINITE, FailureKind.NOT_FINITE),
    (faults.POSITIVE, FailureKind.NOT_FINITE),
    (faults.NULL, FailureKind.NOT_FINITE),
    (faults.TEXT, FailureKind.MALFORMED),
    (faults.ABORTED, FailureKind.ABORTED),
]
"""Faults of one sample's part of an answer."""


def named(value: object) -> str | None:
    return value.name if isinstance(value, Fault) else None


class Scorer:
    """Scores the same samples through a proxy, from recorded answers; ``expected`` are the scores without faults."""

    def __init__(self, served: Served, settings: dict[str, Any]) -> None:
        self.served, self._settings = served, settings
        self.samples = mixed_samples(served, 24)
        self.recording = Recording()
        self.expected = self.through(self.proxy(no_fault))

    def connect(self, url: str | list[str], **changes: Any) -> SGLangTeacher:
        settings = {"max_retries": 4, "backoff": 0.05, "timeout": 20.0, **self._settings, **changes}
        return SGLangTeacher(url, vocab_size=self.served.vocab_size, **settings)

    def proxy(self, plan: Plan) -> FaultProxy:
        return FaultProxy(self.served.server.url, plan, self.recording)

    def through(self, proxy: FaultProxy, known: np.ndarray | None = None, **settings: Any) -> list[Outcome]:
        """Scores of all samples, by a teacher that is held to its word about the tokens ``known``."""
        with proxy:
            teacher = self.connect(proxy.url, **settings)
            if known is not None:
                teacher.pin(known)
            return score_all(teacher, self.samples)


@pytest.fixture(scope="module")
def make_scorer(qwen: Served) -> Callable[..., Scorer]:
    return functools.cache(lambda **settings: Scorer(qwen, settings))


@pytest.fixture(scope="module")
def scorer(make_scorer: Callable[..., Scorer]) -> Scorer:
    return make_scorer()


def test_the_scores_without_faults_are_the_models(qwen: Served, scorer: Scorer) -> None:
    for sample, scores in zip(scorer.samples, scorer.expected, strict=True):
        assert isinstance(scores, TeacherScores)
        expected = qwen.log_probs(sample.tokens)[len(sample.tokens) - 1 - sample.response_length :]
        np.testing.assert_allclose(scores.log_probs_T, expected, atol=1e-4)
        assert scores.valid_T.all()


@pytest.mark.parametrize("fault", PASSING, ids=named)
def test_a_passing_fault_leaves_no_trace_in_the_scores(scorer: Scorer, fault: Fault) -> None:
    proxy = scorer.proxy(in_turn(fault, None, fault))
    silent = fault in (faults.SILENT, faults.SILENT_MIDWAY)
    found = scorer.through(proxy, **({"timeout": 1.0} if silent else {}))
    assert_same_scores(found, scorer.expected)
    assert proxy.injected[fault.name] >= 1
    assert scorer.recording.misses == sum(sample.response_length > 0 for sample in scorer.samples)


@pytest.mark.parametrize(("fault", "kind"), LASTING, ids=named)
def test_a_lasting_fault_fails_every_sample_that_was_asked_for(scorer: Scorer, fault: Fault, kind: FailureKind) -> None:
    proxy = scorer.proxy(always(fault))
    found = scorer.through(proxy, max_retries=1, timeout=0.5)
    for sample, outcome in zip(scorer.samples, found, strict=True):
        if sample.response_length:
            assert isinstance(outcome, TeacherFailure)
            assert outcome.kind == kind
            assert proxy.url in str(outcome)
            assert f"sample {sample.index} " in str(outcome)
        else:
            assert isinstance(outcome, TeacherScores)
        assert sample.teacher_scores is None


def victim(scorer: Scorer) -> Sample:
    return max(scorer.samples, key=lambda sample: sample.response_length)


def is_victim(scorer: Scorer) -> Callable[[dict[str, Any]], bool]:
    tokens = victim(scorer).tokens.tolist()
    return lambda element: bool(element["input_ids"] == tokens)


def assert_only_the_victim_failed(scorer: Scorer, found: list[Outcome], kind: FailureKind) -> None:
    place = scorer.samples.index(victim(scorer))
    failure = found[place]
    assert isinstance(failure, TeacherFailure)
    assert failure.kind == kind
    assert f"sample {victim(scorer).index} " in str(failure)
    others = [index for index in range(len(found)) if index != place]
    assert_same_scores([found[index] for index in others], [scorer.expected[index] for index in others])


@pytest.mark.parametrize(("fault", "kind"), WITHIN, ids=named)
def test_a_wrong_part_of_an_answer_is_repeated_or_fails_its_sample_alone(
    scorer: Scorer, fault: Fault, kind: FailureKind
) -> None:
    lasting = faults.only_for(fault, is_victim(scorer))
    found = scorer.through(scorer.proxy(always(lasting)))
    assert_only_the_victim_failed(scorer, found, kind)


@pytest.mark.parametrize("fault", [fault for fault, _ in WITHIN], ids=named)
def test_a_wrong_answer_to_one_sample_is_asked_for_again(scorer: Scorer, fault: faults.Altered) -> None:
    proxy = scorer.proxy(in_turn(fault, fault))
    assert_same_scores(scorer.through(proxy, max_in_flight=1), scorer.expected)
    assert proxy.injected[fault.name] == 2


@pytest.mark.parametrize(("fault", "kind"), [LASTING[0], LASTING[3], LASTING[5], LASTING[6]], ids=named)
def test_a_sample_that_spoils_its_requests_takes_no_neighbour_with_it(
    scorer: Scorer, fault: Fault, kind: FailureKind
) -> None:
    found = scorer.through(scorer.proxy(whenever(is_victim(scorer), fault)), max_retries=1)
    assert_only_the_victim_failed(scorer, found, kind)


@pytest.mark.parametrize("fault", [faults.SWAPPED, faults.LOST], ids=named)
def test_an_answer_with_other_samples_than_asked_for_is_never_taken(scorer: Scorer, fault: Fault) -> None:
    for outcome, expected in zip(
        scorer.through(scorer.proxy(always(fault)), max_retries=0), scorer.expected, strict=True
    ):
        if isinstance(outcome, TeacherScores):
            assert_same_scores([outcome], [expected])
        else:
            assert outcome.kind in (FailureKind.WRONG_IDS, FailureKind.WRONG_LENGTH, FailureKind.MALFORMED)
    assert_same_scores(scorer.through(scorer.proxy(no_fault)), scorer.expected)


@pytest.mark.parametrize("fault", faults.TOP_K_FAULTS, ids=named)
def test_a_wrong_top_k_list_fails_its_sample_alone(make_scorer: Callable[..., Scorer], fault: Fault) -> None:
    scorer = make_scorer(top_k=4)
    lasting = faults.only_for(fault, is_victim(scorer))
    outcome = scorer.through(scorer.proxy(always(lasting)))[scorer.samples.index(victim(scorer))]
    assert isinstance(outcome, TeacherFailure)
    assert_only_the_victim_failed(scorer, scorer.through(scorer.proxy(always(lasting))), outcome.kind)
    assert outcome.kind in (FailureKind.TOP_K, FailureKind.WRONG_LENGTH, FailureKind.NOT_FINITE)


@pytest.mark.parametrize("seed", [1, 2])
def test_under_random_faults_every_sample_is_scored_and_rightly(make_scorer: Callable[..., Scorer], seed: int) -> None:
    scorer = make_scorer(top_k=4)
    plan = at_random([fault for fault in PASSING if "silent" not in fault.name], 0.3, seed)
    proxy = scorer.proxy(plan)
    assert_same_scores(scorer.through(proxy, max_retries=12, timeout=2.0, max_in_flight=4), scorer.expected)


REFUSED = faults.status(401, {"error": "Unauthorized"})


@pytest.mark.parametrize("fault", [*faults.ERROR_FORMS, faults.NAN, REFUSED], ids=named)
def test_a_replica_that_answers_badly_loses_no_sample_and_is_hardly_asked(scorer: Scorer, fault: Fault) -> None:
    with scorer.proxy(always(fault)) as bad, scorer.proxy(no_fault) as good:
        teacher = scorer.connect([bad.url, good.url], max_in_flight=2)
        assert_same_scores(score_all(teacher, scorer.samples), scorer.expected)
        assert 1 <= len(bad.asked) <= len(good.asked) / 2


def test_another_weight_version_ends_the_trust_in_the_server(scorer: Scorer) -> None:
    plan = always(faults.only_for(faults.OTHER_VERSION, is_victim(scorer)))
    found = scorer.through(scorer.proxy(plan), known=np.arange(8))
    for index, outcome in enumerate(found):
        if isinstance(outcome, TeacherFailure):
            assert outcome.kind == FailureKind.CHANGED_MODEL
        else:
            assert scorer.samples[index] is not victim(scorer)
            assert_same_scores([outcome], [scorer.expected[index]])


def test_the_time_limit_of_a_step_ends_the_waiting(scorer: Scorer) -> None:
    with scorer.proxy(whenever(is_victim(scorer), faults.SILENT)) as proxy:
        teacher = scorer.connect(proxy.url, max_in_flight=2)
        teacher.begin_step(3.0)
        found = score_all(teacher, scorer.samples)
        wait_until(lambda: proxy.open_requests == 0)
    for sample, outcome, expected in zip(scorer.samples, found, scorer.expected, strict=True):
        if isinstance(outcome, TeacherFailure):
            assert outcome.kind == FailureKind.DEADLINE
        else:
            assert sample is not victim(scorer)
            assert_same_scores([outcome], [expected])


def test_who_gives_up_leaves_no_request_behind(scorer: Scorer) -> None:
    async def give_up(teacher: SGLangTeacher) -> None:
        tasks = [asyncio.create_task(teacher.score_one(sample)) for sample in scorer.samples]
        while not proxy.open_requests:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        asked = [sample.response_length > 0 for sample in scorer.samples]
        assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == asked
        await asyncio.to_thread(wait_until, lambda: proxy.open_requests == 0)
        proxy.plan = no_fault
        assert isinstance(await teacher.score_one(scorer.samples[0]), TeacherScores)
        await teacher.aclose()

    with scorer.proxy(always(faults.SILENT)) as proxy:
        asyncio.run(give_up(scorer.connect(proxy.url)))


def test_no_more_is_in_flight_than_allowed(scorer: Scorer) -> None:
    with FaultProxy(scorer.served.server.url) as proxy:
        found = score_all(scorer.connect(proxy.url, max_in_flight=6), scorer.samples)
        assert proxy.most_open_samples <= 6
    assert_same_scores(found, scorer.expected, atol=1e-4)


def test_scoring_in_one_call_stops_at_the_first_failure(scorer: Scorer) -> None:
    samples = [sample for sample in mixed_samples(scorer.served, 240) if sample.response_length]
    spoilt = samples[5].tokens.tolist()
    not_so = faults.status(400, {"error": {"message": "not so"}})
    plan = whenever(lambda element: bool(element["input_ids"] == spoilt), not_so)
    with FaultProxy(scorer.served.server.url, plan) as proxy:
        teacher = scorer.connect(proxy.url, max_in_flight=4)
        with pytest.raises(TeacherError, match=rf"sample {samples[5].index} .*HTTP 400: not so"):
            teacher.score(samples)
        wait_until(lambda: proxy.open_requests == 0)
        assert sum(len(asked.elements) for asked in proxy.asked) < len(samples) / 2
        assert len(teacher.score(samples[:2])) == 2
