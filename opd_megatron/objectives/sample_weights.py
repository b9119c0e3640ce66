"""How much each prompt and each response counts in the distillation term.

Shape legend: ``B`` samples and ``P`` prompts of **the whole rollout**. Everything is float64 and fixed before the
rollout is split, so that no weight depends on micro-batches or layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from opd_megatron.objectives.catalogue import Catalogue

PROMPT_WEIGHTS: Catalogue[Callable[..., Tensor]] = Catalogue("Weights of prompts and samples", "--opd-prompt-weight")


def group_numbers(groups: Sequence[Hashable]) -> tuple[Tensor, int]:
    """``[B]`` int64 number of each sample's prompt, in the order of their first samples, and how many there are."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return torch.tensor([numbers[group] for group in groups], dtype=torch.int64), len(numbers)


def group_means(values_B: Tensor, groups: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """``[P]`` mean of the samples of each prompt, in the order of :func:`group_numbers`, and their number."""
    prompt_B, prompts = group_numbers(groups)
    sums_P, counts_P = torch.zeros(2, prompts, dtype=torch.float64)
    sums_P.index_add_(0, prompt_B, values_B.double())
    counts_P.index_add_(0, prompt_B, torch.ones(len(prompt_B), dtype=torch.float64))
    return sums_P / counts_P, counts_P


def paced_weights(
    pass_rates_P: Tensor, *, alpha: float = 1.0, beta: float = 1.0, samples_P: Tensor | None = None
) -> Tensor:
    """``p^alpha (1 - p)^beta`` of each prompt's pass rate ``p``, over its mean: mean 1 over the prompts, ``[P]``.

    PACED (arXiv 2603.11178): what the student always solves teaches nothing, and what it never solves is noise. With
    ``samples_P``, the number ``n`` of the samples that each ``p`` was estimated from, times
    ``(n / (n - 1))^min(alpha, beta)``: ``p (1 - p) n / (n - 1)`` is an unbiased estimate of the variance of a pass,
    which matters where prompts have different ``n``. All are 0 where every prompt's is.
    """
    pass_rates_P = pass_rates_P.double()
    # in logarithms and relative to the largest, or large powers would make all of them 0
    logs_P = torch.xlogy(alpha, pass_rates_P) + torch.xlogy(beta, 1 - pass_rates_P)
    weights_P = torch.exp(logs_P - logs_P.max().clamp(min=-1e300)) if len(logs_P) else logs_P
    if samples_P is not None:
        weights_P = weights_P * (samples_P / (samples_P - 1).clamp(min=1)) ** min(alpha, beta)
    mean = weights_P.mean() if len(weights_P) else torch.ones(())
    return weights_P / mean if mean > 0 else torch.zeros_like(weights_P)


def reward_weights(rewards_B: Tensor, groups: Sequence[Hashable], beta: float) -> Tensor:
    """``n exp(r / beta) / sum_group exp(r / beta)``: a softmax over the prompt's ``n`` responses, of mean 1, ``[B]``.

    A small ``beta`` leaves the term to the best responses, a large one to all alike. Raises ``ValueError`` unless
    ``beta`` is above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta {beta} of the rewards' softmax is not above 0")
    prompt_B, prompts = group_numbers(groups)
    rewards_B = rewards_B.double()
    highest_P = torch.full((prompts,), -torch.inf, dtype=torch.float64)
    highest_P = highest_P.scatter_reduce(0, prompt_B, rewards_B, "amax")
    odds_B = torch.exp((rewards_B - highest_P[prompt_B]) / beta)
    means_P, _ = group_means(odds_B, groups)
    return odds_B / means_P[prompt_B]


def counted_samples(
    rewards_B: Tensor,
    truncated_B: Tensor,
    lengths_B: Tensor,
    *,
    on: str = "all",
    pass_above: float = 0.5,
    mask_truncated: bool = False,
    longest: int | None = None,
) -> Tensor:
    """``[B]`` bool: the responses that the term is made of.

    Those with a reward above ``pass_above`` (``on`` correct) or not (incorrect), that were not cut at
    the length limit (with ``mask_truncated``) and have at most ``longest`` tokens (None: any number).
    """
    correct_B = rewards_B > pass_above
    counted_B = {"all": torch.ones_like(correct_B), "correct": correct_B, "incorrect": ~correct_B}[on]
    if mask_truncated:
        counted_B = counted_B & ~truncated_B
    return counted_B if longest is None else counted_B & (lengths_B <= longest)


PROMPT_WEIGHTS.register(
    "paced",
    paced_weights,
    title="PACED",
    formula=r"$w = p^\alpha (1-p)^\beta$ over its mean over prompts",
    source="arXiv 2603.11178",
    proof="test_sample_weights.py::test_paced_weights_have_mean_one_and_follow_their_prompts",
    more_flags="--opd-paced-alpha A --opd-paced-beta B",
)
PROMPT_WEIGHTS.describe(
    "PACED, pass rate of the group",
    "--opd-prompt-weight paced --opd-pass-rate group",
    formula=r"$p^\alpha (1-p)^\beta\thinspace (\frac{n}{n-1})^{\min(\alpha, \beta)}$ of the passes among $n$ samples",
    source="unbiased variance",
    proof="test_sample_weights.py::test_the_corrected_estimate_of_the_variance_of_a_pass_is_unbiased",
)
PROMPT_WEIGHTS.describe(
    "PACED, pass rate of the run",
    "--opd-prompt-weight paced --opd-pass-rate running",
    formula="$p$: mean over all samples of the prompt so far",
    source="arXiv 2603.11178",
    proof="flow/test_weighting.py::test_a_running_pass_rate_counts_all_rollouts_and_survives_a_resume",
)
PROMPT_WEIGHTS.describe(
    "PACED, pass rate that is known",
    "--opd-prompt-weight paced --opd-pass-rate metadata",
    formula="$p$: a number of the prompt's metadata",
    source="arXiv 2603.11178",
    proof="flow/test_weighting.py::test_a_pass_rate_in_the_metadata_is_taken_as_it_is_and_must_be_there",
)
PROMPT_WEIGHTS.describe(
    "softmax of rewards",
    "--opd-reward-beta B",
    formula=r"$w_i = n\thinspace e^{r_i / B} / \sum_j e^{r_j / B}$ over the prompt's $n$ responses",
    source="reward-weighted regression, Peters and Schaal, 2007",
    proof="test_sample_weights.py::test_reward_weights_are_a_softmax_of_mean_one",
)
PROMPT_WEIGHTS.describe(
    "outcome and length masks",
    "--opd-on --opd-mask-truncated --opd-mask-longer-than --opd-mask-special-tokens",
    formula="$w = 0$ where the mask says so, else 1",
    source="",
    proof="test_sample_weights.py::test_masks_leave_out_what_they_name",
)
