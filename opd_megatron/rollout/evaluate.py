"""Evaluation: pass@k of an engine on a prompt set. It is given an engine and a reward, and no way to a teacher."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from opd_megatron.rollout.engine import RolloutEngine, SamplingParams
from opd_megatron.rollout.generate import generate_samples
from opd_megatron.rollout.prompt import Prompt, new_sample
from opd_megatron.sample import Sample, Status

PASS_ABOVE = 0.5
"""A response passes when its reward is above this: rewards of verifiers are 0 or 1, partial credit needs a bound."""


class Reward(Protocol):
    """Fills ``sample.reward`` of every sample."""

    def score(self, samples: Sequence[Sample]) -> None: ...


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that at least one of ``k`` responses passes, estimated without bias from ``samples`` responses.

    ``1 - C(n - c, k) / C(n, k)`` for ``c`` of ``n`` that passed; source: Chen et al. 2021, arXiv 2107.03374, eq. 1.
    Raises ``ValueError`` unless ``0 <= passed <= samples`` and ``1 <= k <= samples``.
    """
    if not (0 <= passed <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {passed} passed among {samples} is not defined")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def evaluate(
    engine: RolloutEngine,
    records: Sequence[Prompt],
    *,
    name: str,
    reward: Reward,
    sampling: SamplingParams,
    n_samples: int,
    seed: int,
    rollout_id: int,
    max_prompt_len: int | None = None,
) -> tuple[dict[str, float], list[Sample]]:
    """Metrics ``eval/<name>/*`` and the samples they come from, ``n_samples`` per prompt in order of the prompts.

    ``pass@k`` for k = 1, 2, 4, ... up to ``n_samples`` is the mean over prompts of :func:`pass_at_k`, and
    ``pass@k_se`` the standard error of that mean (the unbiased standard deviation over prompts divided by the root of
    their number; absent with one prompt). The rest: ``reward_mean``, ``response_length_mean`` in tokens and
    ``truncated_frac``. Random streams differ from those of training and between names. Raises ``ValueError`` if there
    is no prompt or the reward left a sample without a reward.
    """
    if not records:
        raise ValueError(f"evaluation set {name!r} has no prompts")
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, not {n_samples}")
    samples = [
        new_sample(record, group * n_samples + copy, group)
        for group, record in enumerate(records)
        for copy in range(n_samples)
    ]
    # Training streams have three numbers, these have four.
    stream = (seed, rollout_id, zlib.crc32(name.encode()))
    generate_samples(engine, samples, sampling, stream, max_prompt_len)
    reward.score(samples)
    missing = [sample.index for sample in samples if sample.reward is None]
    if missing:
        raise ValueError(f"evaluation set {name!r}: the reward gave none to sample {missing[0]}")
    rewards_PN = np.array([sample.reward for sample in samples], dtype=np.float64).reshape(len(records), n_samples)
    passed_P = (rewards_PN > PASS_ABOVE).sum(axis=1)
    metrics: dict[str, float] = {}
    k = 1
    while k <= n_samples:
        estimates_P = np.array([pass_at_k(n_samples, int(passed), k) for passed in passed_P])
        metrics[f"eval/{name}/pass@{k}"] = float(estimates_P.mean())
        if len(records) > 1:
            metrics[f"eval/{name}/pass@{k}_se"] = float(estimates_P.std(ddof=1) / math.sqrt(len(records)))
        k *= 2
    metrics[f"eval/{name}/reward_mean"] = float(rewards_PN.mean())
    metrics[f"eval/{name}/response_length_mean"] = float(np.mean([sample.response_length for sample in samples]))
    truncated = sum(sample.status is Status.TRUNCATED for sample in samples)
    metrics[f"eval/{name}/truncated_frac"] = truncated / len(samples)
    return metrics, samples
