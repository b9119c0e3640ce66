"""Evaluation: pass@k, its standard error, and what evaluation does not do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.options import Options, RolloutOptions, TrainingOptions
from opd_megatron.rollout.engine import SamplingParams
from opd_megatron.rollout.evaluate import evaluate, pass_at_k
from opd_megatron.rollout.generate import RolloutGenerator
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.sample import Sample, Status
from tests.rollout.records import Record

RECORDS = [Record("1+2="), Record("33-4="), Record("5=")]
SAMPLING = SamplingParams(max_new_tokens=6)


class FixedReward:
    """The rewards it was given, in order."""

    def __init__(self, rewards: Sequence[float | None]) -> None:
        self.rewards = rewards

    def score(self, samples: Sequence[Sample]) -> None:
        for sample, reward in zip(samples, self.rewards, strict=True):
            sample.reward = reward


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n: int) -> None:
    for passed, k in itertools.product(range(n + 1), range(1, n + 1)):
        outcomes = [1] * passed + [0] * (n - passed)
        subsets = [max(subset) for subset in itertools.combinations(outcomes, k)]
        assert pass_at_k(n, passed, k) == pytest.approx(np.mean(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "passed", "k"), [(2, 3, 1), (2, -1, 1), (2, 1, 3), (2, 1, 0)])
def test_pass_at_k_outside_its_domain_is_refused(n: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, passed, k)


def test_metrics_of_a_set(engine: LocalEngine) -> None:
    rewards = [1, 0, 0, 0, 0, 1, 0.5, 1, 1, 0.5, 0, 0, 0.2, 0, 0]
    metrics, samples = evaluate(
        engine,
        RECORDS,
        name="sums",
        reward=FixedReward(rewards),
        sampling=SAMPLING,
        n_samples=5,
        seed=1,
        rollout_id=2,
    )
    passed = [1, 3, 0]
    for k in (1, 2, 4):
        estimates = [pass_at_k(5, count, k) for count in passed]
        assert metrics[f"eval/sums/pass@{k}"] == pytest.approx(np.mean(estimates))
        assert metrics[f"eval/sums/pass@{k}_se"] == pytest.approx(np.std(estimates, ddof=1) / np.sqrt(3))
    assert metrics["eval/sums/reward_mean"] == pytest.approx(np.mean(rewards))
    assert metrics["eval/sums/response_length_mean"] == np.mean([sample.response_length for sample in samples])
    truncated = [sample.status is Status.TRUNCATED for sample in samples]
    assert metrics["eval/sums/truncated_frac"] == np.mean(truncated)
    assert set(metrics) == {
        *(f"eval/sums/pass@{k}{suffix}" for k in (1, 2, 4) for suffix in ("", "_se")),
        "eval/sums/reward_mean",
        "eval/sums/response_length_mean",
        "eval/sums/truncated_frac",
    }
    assert [sample.group_index for sample in samples] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(sample.teacher_scores is None for sample in samples)


def _evaluate(engine: LocalEngine, **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "name": "a",
        "reward": FixedReward([0.0] * 6),
        "sampling": SAMPLING,
        "n_samples": 2,
        "seed": 1,
        "rollout_id": 0,
    } | changes
    return [sample.response_tokens.tolist() for sample in evaluate(engine, RECORDS, **settings)[1]]


def test_streams_repeat_and_differ_from_those_of_training(engine: LocalEngine, tokenizer: Any) -> None:
    first = _evaluate(engine)
    assert first == _evaluate(engine)
    options = Options(
        rollout=RolloutOptions(rollout_max_response_len=6, n_samples_per_prompt=2), training=TrainingOptions(seed=1)
    )
    training = RolloutGenerator(engine, tokenizer, options).generate(RECORDS, 0)
    assert first != [sample.response_tokens.tolist() for sample in training]
    for change in ({"name": "b"}, {"seed": 2}, {"rollout_id": 1}):
        assert first != _evaluate(engine, **change)


def test_evaluation_has_sampling_parameters_of_its_own(engine: LocalEngine) -> None:
    greedy = _evaluate(engine, sampling=SamplingParams(temperature=0.0, max_new_tokens=3))
    assert greedy[::2] == greedy[1::2]
    assert max(map(len, greedy)) == 3


def test_long_prompts_are_empty_responses(engine: LocalEngine) -> None:
    assert [len(tokens) == 0 for tokens in _evaluate(engine, max_prompt_len=4)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def test_one_prompt_has_no_standard_error(engine: LocalEngine) -> None:
    metrics, _ = evaluate(
        engine,
        RECORDS[:1],
        name="a",
        reward=FixedReward([1.0]),
        sampling=SAMPLING,
        n_samples=1,
        seed=0,
        rollout_id=0,
    )
    assert metrics["eval/a/pass@1"] == 1.0
    assert not any("_se" in key for key in metrics)


def test_a_set_without_prompts_or_rewards_is_an_error(engine: LocalEngine) -> None:
    with pytest.raises(ValueError, match="gave none to sample 3"):
        _evaluate(engine, reward=FixedReward([0.0, 1.0, 0.0, None, 1.0, 1.0]))
    with pytest.raises(ValueError, match="no prompts"):
        evaluate(engine, [], name="a", reward=FixedReward([]), sampling=SAMPLING, n_samples=1, seed=0, rollout_id=0)
