"""The choices of ``--advantage-estimator``: how rewards of a rollout become an advantage of each token.

An estimator sees the whole rollout and returns one ``[T]`` float64 advantage per sample; a positive one makes a token
more likely. Normalisation over the rollout and the loss mask are applied by its caller
(:func:`~opd_megatron.objectives.advantages.task_advantages`), and the distillation term comes after both.

Shape legend: ``B`` samples of the rollout, ``G`` groups (prompts), ``T`` response tokens of one sample (differs by
sample, may be 0), ``U`` its unmasked tokens. ``r`` is the reward of a response after ``--kl-coef`` has shaped it
(:meth:`RewardBatch.shaped_rewards`), and means are over the samples of its own prompt, however many there are. Where an
estimator compares the samples of a prompt, one that is alone has advantage 0, also after whitening. Calculations are in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.returns import discounted_returns, generalized_advantages

STD_EPSILON = 1e-6
"""Added to the standard deviation of a group's rewards."""


@dataclass(frozen=True)
class RewardBatch:
    """What an estimator sees of one rollout: a reward, a group index, a loss mask (bool ``[T]``) and KLs per sample.

    ``kls`` (``[T]``) are per-token estimates of KL(policy||reference); they hold 0 at masked tokens, and everywhere
    without ``--kl-coef``. Where the estimator asks for them, ``greedy_rewards_B`` are those of the greedy response to
    each sample's prompt, and ``values`` (``[T]``) the critic's before each token, which mean nothing at masked tokens.
    """

    rewards_B: Tensor
    group_indices: Sequence[int]
    loss_masks: Sequence[Tensor]
    kls: Sequence[Tensor]
    greedy_rewards_B: Tensor | None = None
    values: Sequence[Tensor] | None = None

    def shaped_rewards(self, options: ObjectiveOptions) -> Tensor:
        """``r - kl_coef * sum_t kl_t``, ``[B]``."""
        if not self.kls:
            return self.rewards_B
        return self.rewards_B - options.kl_coef * torch.stack([kl_T.sum() for kl_T in self.kls])

    def token_rewards(self, options: ObjectiveOptions) -> list[Tensor]:
        """``-kl_coef * kl_t`` of each unmasked token, the last also the reward of the response; ``[U]`` per sample."""
        earned = []
        for reward, mask_T, kl_T in zip(self.rewards_B, self.loss_masks, self.kls, strict=True):
            rewards_U = -options.kl_coef * kl_T[mask_T]
            rewards_U[-1:] += reward
            earned.append(rewards_U)
        return earned

    def lengths(self) -> Tensor:
        """Unmasked tokens of each response, ``[B]`` float64."""
        return torch.tensor([int(mask_T.sum()) for mask_T in self.loss_masks], dtype=torch.float64)

    def groups(self) -> Groups:
        """The samples' prompts."""
        return Groups(self.group_indices)

    def spread(self, values_B: Tensor) -> list[Tensor]:
        """Give every token of a response the value of the response."""
        return [value.expand(len(mask_T)) for value, mask_T in zip(values_B, self.loss_masks, strict=True)]

    def at_tokens(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Put values of unmasked tokens, ``[U]`` per sample, into their places of the response, 0 elsewhere."""
        found = []
        for values_U, mask_T in zip(values, self.loss_masks, strict=True):
            values_T = torch.zeros(len(mask_T), dtype=torch.float64)
            values_T[mask_T] = values_U
            found.append(values_T)
        return found


class Groups:
    """Samples that share a group index; groups may differ in size and lie in any order."""

    def __init__(self, group_indices: Sequence[int]) -> None:
        _, self.of_B = torch.unique(torch.tensor(group_indices, dtype=torch.int64), return_inverse=True)
        self.size_G = torch.bincount(self.of_B).double()

    def sum(self, values_B: Tensor) -> Tensor:
        """Sum over the samples of each group, ``[G]``."""
        return torch.zeros_like(self.size_G).index_add_(0, self.of_B, values_B)

    def centred(self, values_B: Tensor) -> Tensor:
        """Values minus the mean of their group, ``[B]``: exactly 0 where all are equal."""
        # Rounding would leave a trace of equal values after the subtraction of their mean, and a division by a standard
        # deviation would blow it up; their difference from any one of them is exact.
        first_G = torch.full_like(self.size_G, -torch.inf).scatter_reduce_(0, self.of_B, values_B, "amax")
        values_B = values_B - first_G[self.of_B]
        return values_B - (self.sum(values_B) / self.size_G)[self.of_B]


@dataclass(frozen=True)
class AdvantageEstimator:
    """``estimate`` gives one ``[T]`` float64 advantage per sample; its values at masked tokens are ignored."""

    estimate: Callable[[RewardBatch, ObjectiveOptions], Sequence[Tensor]]
    always_whitened: bool = False
    """Whitening belongs to the method, whatever ``--normalize-advantages`` says."""
    takes_kl: bool = True
    """The method has a reward that ``--kl-coef`` can shape."""
    compares_samples: bool = False
    """The advantage is relative to the other samples of the prompt: 0 where there are none."""
    needs_greedy: bool = False
    """The method compares with a greedy response to each prompt."""
    needs_values: bool = False
    """The method compares with what a critic expects."""


def grpo(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """``(r - mean) / (std + 1e-6)`` with the unbiased standard deviation (GRPO, arXiv 2402.03300).

    Without the division Dr. GRPO (arXiv 2503.20783), whose expected gradient is ``(n - 1) / n`` times that of the
    reward for groups of n; with it, that of ``sum_ab p(a) sg(p(b)) A(a, b)`` in a group of two. Responses without
    trained tokens count: their reward is part of the group.
    """
    groups = batch.groups()
    centred_B = groups.centred(batch.shaped_rewards(options))
    if not options.disable_grpo_std_normalization:
        std_G = (groups.sum(centred_B.square()) / (groups.size_G - 1).clamp(min=1)).sqrt()
        centred_B = centred_B / (std_G[groups.of_B] + STD_EPSILON)
    return batch.spread(centred_B)


def rloo(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """``r_i`` minus the mean of the others of its group, ``n / (n - 1) * (r_i - mean)`` (RLOO, arXiv 2402.14740).

    Its expected gradient is that of the expected reward: a response has no part in its own baseline.
    """
    groups = batch.groups()
    factor_G = groups.size_G / (groups.size_G - 1).clamp(min=1)
    return batch.spread(groups.centred(batch.shaped_rewards(options)) * factor_G[groups.of_B])


def opo(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """``r - sum_j l_j r_j / sum_j l_j`` over the group, ``l`` in unmasked tokens (OPO, arXiv 2505.23585).

    The baseline is the one of least variance where the squared norm of a response's score grows with its length. It
    contains the response itself: with equal lengths the expected gradient is ``(n - 1) / n`` times that of the reward,
    in general a win over response j counts with j's share of the group's tokens.
    """
    groups, lengths_B = batch.groups(), batch.lengths()
    centred_B = groups.centred(batch.shaped_rewards(options))
    tokens_G = groups.sum(lengths_B).clamp(min=1)
    return batch.spread(centred_B - (groups.sum(lengths_B * centred_B) / tokens_G)[groups.of_B])


def remax(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """``r`` minus the reward of the greedy response to the same prompt (ReMax, arXiv 2310.10505).

    The baseline does not depend on what was sampled, so the expected gradient is that of the expected reward; a prompt
    sampled once has a signal too. The greedy response is not trained on, and its reward is the task's alone. Raises
    ``ValueError`` without greedy rewards.
    """
    if batch.greedy_rewards_B is None:
        raise ValueError("remax needs the reward of the greedy response to each prompt")
    return batch.spread(batch.shaped_rewards(options) - batch.greedy_rewards_B)


def gpg(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """``G / G_signal * (r - mean)`` with ``G`` groups, ``G_signal`` of unequal rewards (GPG, arXiv 2504.02546).

    The scale makes up for groups that teach nothing, so that their number does not shrink the step. It counts groups
    whose rewards differ, not samples with a reward other than 0. A batch without any has advantages of 0.
    """
    groups = batch.groups()
    centred_B = groups.centred(batch.shaped_rewards(options))
    with_signal = int((groups.sum(centred_B.abs()) > 0).sum())
    return batch.spread(centred_B * (len(groups.size_G) / max(with_signal, 1)))


def reinforce_plus_plus(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """REINFORCE++ (arXiv 2501.03262): returns of token rewards, whitened over the batch.

    Token t earns ``-kl_coef * kl_t``, the last unmasked one also the reward of the response; the advantage is the
    return (the paper's discount is 1).
    """
    return batch.at_tokens([discounted_returns(rewards_U, options.gamma) for rewards_U in batch.token_rewards(options)])


def reinforce_plus_plus_baseline(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """REINFORCE++-baseline (arXiv 2501.03262): the group's mean is subtracted, the scale is the whole batch's."""
    return batch.spread(batch.groups().centred(batch.shaped_rewards(options)))


def ppo(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """PPO (arXiv 1707.06347): generalised advantages of token rewards and a critic's values.

    Token rewards are those of :func:`reinforce_plus_plus`, the sums those of
    :func:`~opd_megatron.objectives.returns.generalized_advantages` with ``--gamma`` and ``--lambd``. At lambda 1 the
    value is a baseline that depends on the prefix alone, so the expected gradient is that of the expected reward
    whatever the critic says; below 1 only where the values are those of the policy. A truncated response ends where it
    was cut. Raises ``ValueError`` without values.
    """
    return batch.at_tokens([advantages_U for advantages_U, _ in _generalized(batch, options)])


def critic_returns(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """What the critic of :func:`ppo` is to learn, advantage plus value before any normalisation: ``[T]``, masked 0."""
    return batch.at_tokens([returns_U for _, returns_U in _generalized(batch, options)])


def _generalized(batch: RewardBatch, options: ObjectiveOptions) -> list[tuple[Tensor, Tensor]]:
    """Advantages and returns ``[U]`` of each sample."""
    if batch.values is None:
        raise ValueError("ppo needs the critic's values")
    return [
        generalized_advantages(rewards_U, values_T[mask_T], options.gamma, options.lambd)
        for rewards_U, values_T, mask_T in zip(
            batch.token_rewards(options), batch.values, batch.loss_masks, strict=True
        )
    ]


def none(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """No task advantage: distillation alone."""
    return [torch.zeros_like(kl_T) for kl_T in batch.kls]


ADVANTAGE_ESTIMATORS: Catalogue[AdvantageEstimator] = Catalogue("Advantage estimators", "--advantage-estimator")
ADVANTAGE_ESTIMATORS.register(
    "grpo",
    AdvantageEstimator(grpo, compares_samples=True),
    title="GRPO",
    formula=r"$A = (r - \bar r) / (\mathrm{std}(r) + 10^{-6})$",
    source="arXiv 2402.03300",
    proof="test_expected_advantages.py::test_grpo_divided_by_the_standard_deviation",
)
ADVANTAGE_ESTIMATORS.describe(
    "Dr. GRPO",
    "--advantage-estimator grpo --disable-grpo-std-normalization",
    formula=r"$A = r - \bar r$",
    source="arXiv 2503.20783",
    proof="test_expected_advantages.py::test_the_groups_mean_shrinks_the_gradient_by_its_own_share",
)
ADVANTAGE_ESTIMATORS.register(
    "rloo",
    AdvantageEstimator(rloo, compares_samples=True),
    title="RLOO",
    formula=r"$A_i = r_i - \frac{1}{n-1} \sum_{j \ne i} r_j$",
    source="arXiv 2402.14740",
    proof="test_expected_advantages.py::test_leaving_one_out_is_unbiased",
)
ADVANTAGE_ESTIMATORS.register(
    "opo",
    AdvantageEstimator(opo, compares_samples=True),
    title="OPO",
    formula=r"$A = r - \sum_j l_j r_j / \sum_j l_j$",
    source="arXiv 2505.23585",
    proof="test_expected_advantages.py::test_the_length_weighted_baseline_weighs_wins_by_the_others_length",
)
ADVANTAGE_ESTIMATORS.register(
    "remax",
    AdvantageEstimator(remax, needs_greedy=True),
    title="ReMax",
    formula=r"$A = r - r_{\mathrm{greedy}}$",
    source="arXiv 2310.10505",
    proof="test_expected_advantages.py::test_a_greedy_baseline_is_unbiased",
)
ADVANTAGE_ESTIMATORS.register(
    "gpg",
    AdvantageEstimator(gpg, compares_samples=True),
    title="GPG",
    formula=r"$A = \frac{G}{G_{\mathrm{signal}}} (r - \bar r)$, $G_{\mathrm{signal}}$: groups of unequal rewards",
    source="arXiv 2504.02546",
    proof="test_expected_advantages.py::test_the_scale_of_gpg_makes_up_for_groups_without_a_signal",
)
ADVANTAGE_ESTIMATORS.register(
    "reinforce_plus_plus",
    AdvantageEstimator(reinforce_plus_plus, always_whitened=True),
    title="REINFORCE++",
    formula=r"$A_t = \sum_{u \ge t} \gamma^{u-t} r_u$, whitened; $r_u = -\beta x_u$, the last token also earns $r$",
    source="arXiv 2501.03262",
    proof="test_expected_advantages.py::test_returns_are_unbiased_with_a_kl_in_the_reward",
)
ADVANTAGE_ESTIMATORS.register(
    "reinforce_plus_plus_baseline",
    AdvantageEstimator(reinforce_plus_plus_baseline, always_whitened=True, compares_samples=True),
    title="REINFORCE++-baseline",
    formula=r"$A = r - \bar r$, whitened",
    source="arXiv 2501.03262",
    proof="test_expected_advantages.py::test_the_groups_mean_shrinks_the_gradient_by_its_own_share",
)
ADVANTAGE_ESTIMATORS.register(
    "ppo",
    AdvantageEstimator(ppo, needs_values=True),
    title="PPO, GAE",
    more_flags="--gamma G --lambd L",
    formula=r"$A_t = \sum_{u \ge t} (\gamma\lambda)^{u-t} (r_u + \gamma V_{u+1} - V_u)$, $r_u$ as in REINFORCE++, "
    r"$V = 0$ after the last token",
    source="arXiv 1506.02438, 1707.06347",
    proof="test_expected_advantages.py::test_at_lambda_1_no_value_biases_generalised_advantages",
)
ADVANTAGE_ESTIMATORS.register(
    "none",
    AdvantageEstimator(none, takes_kl=False),
    title="distillation alone",
    formula="$A = 0$",
    source="",
    proof="test_advantages.py::test_none_is_zero",
)
ADVANTAGE_ESTIMATORS.describe(
    "no task",
    "--rm-type zero",
    formula="$A = 0$; no reward is computed and no greedy response sampled",
    source="",
    proof="e2e/test_prefixes.py::test_without_a_task_nothing_is_computed_for_it",
)
ADVANTAGE_ESTIMATORS.describe(
    "an estimator of one's own",
    "--custom-advantage-path package.module:function",
    formula="$A$ of a function",
    source="",
    proof="test_own_objectives.py::test_an_estimator_of_ones_own_is_normalised_and_masked_like_all_others",
)
ADVANTAGE_ESTIMATORS.describe(
    "KL in the reward",
    "--kl-coef",
    formula=r"$r \leftarrow r - \beta \sum_t m_t x_t$, $x_t = \log S_{\mathrm{old}}(a_t) - \log R(a_t)$",
    source="arXiv 1909.08593",
    proof="test_expected_advantages.py::test_returns_are_unbiased_with_a_kl_in_the_reward",
)
ADVANTAGE_ESTIMATORS.describe(
    "whitening",
    "--normalize-advantages",
    formula=r"$A \leftarrow (A - \bar A) / \sqrt{\mathrm{var}(A) + 10^{-8}}$ over the rollout's unmasked tokens",
    source="arXiv 2006.05990",
    proof="test_advantages.py::test_whitening_uses_unmasked_tokens_only",
)
