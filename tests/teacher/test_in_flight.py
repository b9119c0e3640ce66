"""The limit of what is in flight, at simulated servers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.teacher.in_flight import FIRST, MOST, STEP, AdaptiveLimit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(limit: AdaptiveLimit, clock: Clock, capacity: int, rounds: int, *, full: bool = True) -> list[int]:
    """The limits after each round at a server that works on up to ``capacity`` samples at a time, one second each."""
    found = []
    for _ in range(rounds):
        count = limit.value
        clock.now += max(count / capacity, 1.0)
        limit.answered(count, 100 * count, full=full)
        found.append(limit.value)
    return found


@pytest.mark.parametrize("capacity", [1, 4, 40, 100, 500])
def test_the_limit_comes_to_rest_where_the_server_is_busy_and_no_further(capacity: int) -> None:
    clock = Clock()
    found = work(limit := AdaptiveLimit(clock=clock), clock, capacity, 60)
    if capacity > FIRST:
        assert min(found[10:]) >= capacity * 0.9
    assert max(found) <= max(4 * capacity, 2 * FIRST)
    assert limit.value <= max(2 * capacity + STEP, FIRST + STEP)


def test_a_server_that_is_never_at_its_limit_teaches_nothing() -> None:
    clock = Clock()
    assert set(work(AdaptiveLimit(clock=clock), clock, 10**6, 20, full=False)) == {FIRST}


def test_an_overloaded_server_is_asked_for_half_once_per_crowd_and_more_again_later() -> None:
    clock = Clock()
    limit = AdaptiveLimit(clock=clock)
    work(limit, clock, 10**6, 4)
    before = limit.value
    assert before == 16 * FIRST
    sent_at, clock.now = clock.now, clock.now + 1.0
    for _ in range(5):
        limit.overloaded(sent_at)
    assert limit.value == before // 2
    clock.now += 1.0
    limit.overloaded(clock.now)
    assert limit.value == before // 4
    assert work(limit, clock, 10**6, 1) == [before // 4 + STEP]
    for _ in range(20):
        clock.now += 1.0
        limit.overloaded(clock.now)
    assert limit.value == 1


def test_a_fixed_limit_is_begun_with_and_never_exceeded() -> None:
    clock = Clock()
    limit = AdaptiveLimit(40, clock=clock)
    assert work(limit, clock, 10**6, 10) == [40] * 10
    limit.overloaded(clock.now)
    assert limit.value == 20
    assert work(limit, clock, 10**6, 10)[-1] == 40


EVENTS = st.lists(
    st.tuples(st.sampled_from(["answered", "overloaded"]), st.integers(1, 300), st.floats(0, 10), st.booleans()),
    max_size=200,
)


@settings(max_examples=100, deadline=None)
@given(events=EVENTS, fixed=st.none() | st.integers(1, 64))
def test_whatever_happens_the_limit_stays_within_its_bounds_and_falls_by_half_at_most(
    events: list[tuple[str, int, float, bool]], fixed: int | None
) -> None:
    clock = Clock()
    limit = AdaptiveLimit(fixed, clock=clock)
    for event, count, seconds, full in events:
        before, clock.now = limit.value, clock.now + seconds
        if event == "answered":
            limit.answered(count, 10 * count, full=full)
            assert limit.value >= before // 2
            assert limit.value <= 2 * before + STEP
            assert full or limit.value == before
        else:
            limit.overloaded(clock.now)
            assert limit.value == max(1, before // 2)
        assert 1 <= limit.value <= (MOST if fixed is None else fixed)
