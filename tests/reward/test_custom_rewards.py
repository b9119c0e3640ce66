"""Rewards by import path: how they are told apart, what may go wrong, what is done about it."""

from __future__ import annotations

import asyncio
import re
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import RewardOptions
from opd_megatron.reward import RewardError, build_reward
from opd_megatron.reward.custom import CustomRater, takes_batch
from opd_megatron.sample import Sample

MODULE = """
from __future__ import annotations
import asyncio
import functools
import numpy as np

class Holder:
    @staticmethod
    def inner(sample):
        return 5

class Judge:
    async def __call__(self, sample):
        return sample.index

judge = Judge()
constant = 3
calls = []

def one(sample):
    calls.append(sample.index)
    return len(sample.response)

async def one_async(sample):
    await asyncio.sleep(0.01 * (5 - sample.index))
    return len(sample.response)

def batch(samples):
    return [len(sample.response) for sample in samples]

async def batch_async(group: list[Sample]):
    await asyncio.sleep(0)
    return np.array([len(sample.response) for sample in group])

def wrapped(sample):
    return one_async(sample)

def odd_ones_raise(sample):
    calls.append(sample.index)
    if sample.index % 2:
        raise ValueError("odd\\nindex")
    return True

async def odd_ones_raise_async(sample):
    return odd_ones_raise(sample)

def batch_raises(samples):
    raise KeyError("judge")

def short(samples):
    return [0.0] * (len(samples) - 1)

def not_a_list(samples):
    return 1.0

def value(sample):
    return sample.metadata["value"]

def refuses(sample):
    from opd_megatron.config.errors import UserError
    raise UserError("give a judge")

def no_arguments():
    return 1.0

_loops = set()
async def same_loop(sample):
    _loops.add(id(asyncio.get_running_loop()))
    return len(_loops)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    (tmp_path / "broken_rewards.py").write_text("import a_module_that_nobody_has\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_rewards", None)


def samples(*responses: str) -> list[Sample]:
    return [
        Sample(index, 0, f"prompt {index}\n" + "x" * 200, np.arange(2), response=response)
        for index, response in enumerate(responses)
    ]


def score(name: str, group: Sequence[Sample], **changes: Any) -> list[float | None]:
    reward = build_reward(RewardOptions(custom_rm_path=f"my_rewards:{name}", **changes))
    try:
        reward.score(group)
    finally:
        reward.close()
    return [sample.reward for sample in group]


@pytest.mark.parametrize("name", ["one", "one_async", "batch", "batch_async", "wrapped"])
def test_every_kind_of_function_rates_every_sample_in_order(name: str) -> None:
    group = samples("", "a", "bb", "ccc")
    assert score(name, group) == [0.0, 1.0, 2.0, 3.0]
    assert all(type(sample.reward) is float and sample.reward_error is None for sample in group)
    assert score(name, []) == []


def test_a_method_and_a_callable_object_will_do() -> None:
    assert score("Holder.inner", samples("a")) == [5.0]
    assert score("judge", samples("a", "b")) == [0.0, 1.0]


def test_batch_functions_are_known_by_name_or_annotation() -> None:
    def named(samples): ...  # type: ignore[no-untyped-def]
    def listed(group: list[Sample]) -> list[float]: ...  # type: ignore[empty-body]
    def sequence(group: Sequence[Sample], extra: int = 0) -> list[float]: ...  # type: ignore[empty-body]
    def single(sample: Sample) -> float: ...  # type: ignore[empty-body]
    def bare(record): ...  # type: ignore[no-untyped-def]
    def real_annotation(group): ...  # type: ignore[no-untyped-def]

    real_annotation.__annotations__ = {"group": Sequence[Sample]}
    assert [takes_batch(function) for function in (named, listed, sequence, real_annotation)] == [True] * 4
    assert [takes_batch(function) for function in (single, bare)] == [False] * 2


def test_one_event_loop_serves_all_calls() -> None:
    reward = build_reward(RewardOptions(custom_rm_path="my_rewards:same_loop"))
    for _ in range(3):
        group = samples("a", "b")
        reward.score(group)
        assert [sample.reward for sample in group] == [1.0, 1.0]
    reward.close()


def test_async_functions_of_one_sample_run_together() -> None:
    """Each call waits for all others to have begun, which only concurrent calls can do."""
    module = sys.modules.get("my_rewards") or __import__("my_rewards")
    barrier_size = 5

    async def meets(sample: Sample) -> float:
        state.setdefault("barrier", asyncio.Barrier(barrier_size))
        await asyncio.wait_for(state["barrier"].wait(), timeout=30)
        return 1.0

    state: dict[str, asyncio.Barrier] = {}
    module.meets = meets
    assert score("meets", samples(*"abcde")) == [1.0] * 5


@pytest.mark.parametrize("name", ["odd_ones_raise", "odd_ones_raise_async"])
def test_a_function_that_raises_stops_and_names_the_sample(name: str) -> None:
    with pytest.raises(RewardError) as caught:
        score(name, samples(*"abcd"))
    message = str(caught.value)
    assert "sample 1 (prompt 'prompt 1 xxx" in message
    assert "ValueError: odd index" in message
    assert "\n" not in message
    assert len(message) < 200
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_plain_function_is_not_called_again_after_it_raised() -> None:
    with pytest.raises(RewardError):
        score("odd_ones_raise", samples(*"abcd"))
    assert sys.modules["my_rewards"].calls == [0, 1]


@pytest.mark.parametrize("name", ["odd_ones_raise", "odd_ones_raise_async"])
def test_a_function_that_raises_can_be_counted(name: str) -> None:
    group = samples(*"abcd")
    assert score(name, group, rm_on_error="value", rm_error_value=-1.0) == [1.0, -1.0, 1.0, -1.0]
    assert [sample.reward_error for sample in group] == [None, "ValueError: odd index"] * 2


def test_a_batch_that_raises_fails_all_its_samples() -> None:
    with pytest.raises(RewardError, match=r"sample 0 .*KeyError: 'judge'"):
        score("batch_raises", samples("a", "b"))
    group = samples("a", "b")
    assert score("batch_raises", group, rm_on_error="value") == [0.0, 0.0]
    assert all(sample.reward_error == "KeyError: 'judge'" for sample in group)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, -1e300, None, "1.0", [1.0, 2.0], {}])
def test_a_value_that_is_no_finite_number_is_an_error(value: Any) -> None:
    group = samples("a")
    group[0].metadata = {"value": value}
    with pytest.raises(RewardError, match=r"sample 0 .*the reward is"):
        score("value", group)
    assert score("value", group, rm_on_error="value", rm_error_value=0.25) == [0.25]


@pytest.mark.parametrize("policy", ["stop", "value"])
def test_a_batch_function_must_return_one_reward_per_sample(policy: str) -> None:
    with pytest.raises(RewardError, match="2 rewards for 3 samples"):
        score("short", samples("a", "b", "c"), rm_on_error=policy)
    with pytest.raises(RewardError, match="not one reward per sample"):
        score("not_a_list", samples("a"), rm_on_error=policy)


def test_a_user_error_of_the_function_passes_through() -> None:
    with pytest.raises(UserError, match="give a judge"):
        score("refuses", samples("a"), rm_on_error="value")


@pytest.mark.parametrize(
    ("path", "phrase"),
    [
        ("my_rewards", "write it as package.module:function"),
        ("my_rewards:", "write it as package.module:function"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("broken_rewards:f", "a_module_that_nobody_has"),
        ("my_rewards:missing", "my_rewards has no missing"),
        ("my_rewards:Holder.missing", "my_rewards has no Holder.missing"),
        ("my_rewards:constant", "constant is not a function"),
        ("my_rewards:no_arguments", "takes no sample"),
    ],
)
def test_a_path_that_leads_to_no_reward_is_refused_at_once(path: str, phrase: str) -> None:
    with pytest.raises(UserError, match=re.escape(phrase)) as caught:
        build_reward(RewardOptions(custom_rm_path=path))
    assert "\n" not in str(caught.value)
    assert path in str(caught.value) or "takes no sample" in phrase


async def cancels_itself(sample: Sample) -> float:
    if sample.index == 1:
        inner = asyncio.ensure_future(asyncio.sleep(60))
        inner.cancel()
        await inner
    return 1.0


async def cancels_its_batch(samples: list[Sample]) -> list[float]:
    raise asyncio.CancelledError


@pytest.mark.parametrize(("function", "failed"), [(cancels_itself, [1]), (cancels_its_batch, [0, 1, 2])])
def test_a_function_that_is_cancelled_from_within_fails_its_samples(function: Any, failed: list[int]) -> None:
    rater = CustomRater(function)
    samples = [Sample(index, 0, "", prompt_tokens=np.array([1])) for index in range(3)]
    try:
        for outcomes in (list(rater.rate(samples)), list(asyncio.run(rater.rate_async(samples)))):
            assert [place for place, one in enumerate(outcomes) if isinstance(one, RuntimeError)] == failed
    finally:
        rater.close()


def test_who_gives_up_on_rewards_cancels_them() -> None:
    ended = threading.Event()

    async def waits(sample: Sample) -> float:
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()
        return 0.0

    rater = CustomRater(waits)

    async def give_up() -> None:
        task = asyncio.ensure_future(rater.rate_async([Sample(0, 0, "", prompt_tokens=np.array([1]))]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    try:
        asyncio.run(give_up())
        assert ended.wait(20)
    finally:
        rater.close()
