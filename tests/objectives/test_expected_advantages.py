"""Expected gradients of the advantage estimators, by summing over every group of responses.

For each estimator the gradient of the loss ``-sum_i A_i log p(response i) / n`` of a group of n, in expectation over
the group, against autograd of what the estimator is said to maximise.

Shape legend: ``S`` all responses, ``G`` all groups of ``n`` of them, ``T`` tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.estimators import ADVANTAGE_ESTIMATORS, RewardBatch
from opd_megatron.objectives.log_probs import log_ratio
from tests.objectives.enumeration import Language, Policy, relative_error

LANGUAGE = Language(3, 2)
UNEVEN = Language(3, 3, end=2)
EXACT = {"rtol": 0.0, "atol": 1e-10}


def rewards_of(language: Language, seed: int = 6) -> Tensor:
    """A reward per response, with ties."""
    return torch.randint(-2, 3, (len(language),), generator=torch.Generator().manual_seed(seed)).double()


def advantages(
    estimator: str,
    language: Language,
    rewards_S: Tensor,
    size: int,
    *,
    options: ObjectiveOptions | None = None,
    kls_ST: Tensor | None = None,
    greedy: float | None = None,
    values_ST: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Members ``[G, n]`` of every group (with order), and the advantages ``[G, n, T]`` of their tokens."""
    members_Gn = torch.tensor(list(itertools.product(range(len(language)), repeat=size)))
    flat = members_Gn.flatten()
    kls_ST = torch.zeros(language.mask_ST.shape, dtype=torch.float64) if kls_ST is None else kls_ST
    batch = RewardBatch(
        rewards_S[flat],
        torch.arange(len(members_Gn)).repeat_interleave(size).tolist(),
        list(language.mask_ST[flat]),
        list(kls_ST[flat]),
        None if greedy is None else torch.full((len(flat),), greedy, dtype=torch.float64),
        None if values_ST is None else list(values_ST[flat]),
    )
    found = ADVANTAGE_ESTIMATORS[estimator].estimate(batch, options or ObjectiveOptions())
    return members_Gn, torch.stack(list(found)).view(*members_Gn.shape, -1)


def expected_ascent(policy: Policy, members_Gn: Tensor, advantages_GnT: Tensor) -> Tensor:
    """Gradient of ``sum_i sum_t A_it log p_it / n``, in expectation over groups from the policy."""
    log_probs_ST = policy.log_probs_ST()
    probs_G = policy.probs_S().detach()[members_Gn].prod(1)
    terms_G = (advantages_GnT * log_probs_ST[members_Gn]).sum((1, 2)) / members_Gn.shape[1]
    return policy.gradient((probs_G * terms_G).sum())


@pytest.fixture
def policy() -> Policy:
    return Policy(LANGUAGE, 1)


@pytest.mark.parametrize("size", [2, 3])
def test_leaving_one_out_is_unbiased(policy: Policy, size: int) -> None:
    rewards_S = rewards_of(LANGUAGE)
    got = expected_ascent(policy, *advantages("rloo", LANGUAGE, rewards_S, size))
    torch.testing.assert_close(got, policy.gradient((policy.probs_S() * rewards_S).sum()), **EXACT)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("estimator", ["grpo", "opo", "gpg", "reinforce_plus_plus_baseline"])
def test_the_groups_mean_shrinks_the_gradient_by_its_own_share(policy: Policy, estimator: str, size: int) -> None:
    """A response is part of its own baseline; whitening, which follows REINFORCE++-baseline, is left out here."""
    rewards_S = rewards_of(LANGUAGE)
    options = ObjectiveOptions(disable_grpo_std_normalization=True)
    members_Gn, found = advantages(estimator, LANGUAGE, rewards_S, size, options=options)
    if estimator == "gpg":  # its scale is that of all groups together, and is looked at below
        found = found * ((found.abs().sum((1, 2)) > 0).sum().item() / len(members_Gn))
    exact = policy.gradient((policy.probs_S() * rewards_S).sum())
    torch.testing.assert_close(expected_ascent(policy, members_Gn, found), (size - 1) / size * exact, **EXACT)


def test_grpo_divided_by_the_standard_deviation(policy: Policy) -> None:
    """In a group of two it maximises the wins over a response of the policy as it is, whatever their size."""
    rewards_S = rewards_of(LANGUAGE)
    got = expected_ascent(policy, *advantages("grpo", LANGUAGE, rewards_S, 2))
    difference_SS = rewards_S[:, None] - rewards_S[None, :]
    wins_SS = difference_SS / 2 / (difference_SS.abs() / 2**0.5 + 1e-6)
    probs_S = policy.probs_S()
    exact = policy.gradient((probs_S[:, None] * probs_S.detach()[None, :] * wins_SS).sum())
    torch.testing.assert_close(got, exact, **EXACT)
    assert relative_error(got, policy.gradient((probs_S * rewards_S).sum())) > 0.1


def test_the_length_weighted_baseline_weighs_wins_by_the_others_length() -> None:
    policy = Policy(UNEVEN, 3)
    rewards_S = rewards_of(UNEVEN)
    got = expected_ascent(policy, *advantages("opo", UNEVEN, rewards_S, 2))
    lengths_S = UNEVEN.mask_ST.sum(1).double()
    share_SS = lengths_S[None, :] / (lengths_S[:, None] + lengths_S[None, :])
    probs_S = policy.probs_S()
    wins_SS = share_SS * (rewards_S[:, None] - rewards_S[None, :])
    exact = policy.gradient((probs_S[:, None] * probs_S.detach()[None, :] * wins_SS).sum())
    torch.testing.assert_close(got, exact, **EXACT)
    assert relative_error(got, policy.gradient((probs_S * rewards_S).sum()) / 2) > 0.01


@pytest.mark.parametrize("size", [1, 2])
def test_a_greedy_baseline_is_unbiased(policy: Policy, size: int) -> None:
    rewards_S = rewards_of(LANGUAGE)
    got = expected_ascent(policy, *advantages("remax", LANGUAGE, rewards_S, size, greedy=0.7))
    torch.testing.assert_close(got, policy.gradient((policy.probs_S() * rewards_S).sum()), **EXACT)


def test_the_scale_of_gpg_makes_up_for_groups_without_a_signal() -> None:
    """With two prompts, a group with a signal counts double as often as the other group has none."""
    language = Language(2, 2)
    rewards_S = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    policies = [Policy(language, seed) for seed in (1, 2)]
    members_Gn = torch.tensor(list(itertools.product(range(len(language)), repeat=2)))
    probs = [policy.probs_S().detach()[members_Gn].prod(1) for policy in policies]
    expected = [torch.zeros(1, dtype=torch.float64)] * 2
    for first, second in itertools.product(range(len(members_Gn)), repeat=2):
        flat = torch.cat([members_Gn[first], members_Gn[second]])
        batch = RewardBatch(
            rewards_S[flat],
            [0, 0, 1, 1],
            list(language.mask_ST[flat]),
            [torch.zeros(2, dtype=torch.float64)] * 4,
        )
        found = torch.stack(list(ADVANTAGE_ESTIMATORS["gpg"].estimate(batch, ObjectiveOptions())))[:, 0]
        weight = probs[0][first] * probs[1][second] / 2
        for number in (0, 1):
            mine = slice(2 * number, 2 * number + 2)
            log_probs = policies[number].log_probs_ST().sum(1)[flat[mine]]
            expected[number] = expected[number] + weight * (found[mine] * log_probs).sum()
    quiet = [
        (probs[number] * (rewards_S[members_Gn[:, 0]] == rewards_S[members_Gn[:, 1]])).sum().item() for number in (0, 1)
    ]
    for number in (0, 1):
        exact = policies[number].gradient((policies[number].probs_S() * rewards_S).sum())
        got = policies[number].gradient(expected[number])
        torch.testing.assert_close(got, (1 + quiet[1 - number]) * exact / 2, **EXACT)


@pytest.mark.parametrize("kl_coef", [0.0, 0.8])
def test_returns_are_unbiased_with_a_kl_in_the_reward(kl_coef: float) -> None:
    """REINFORCE++ before whitening, discount 1, responses of different lengths."""
    policy, reference = Policy(UNEVEN, 3), Policy(UNEVEN, 4)
    rewards_S = rewards_of(UNEVEN)
    kls_ST = log_ratio(policy.log_probs_ST(), reference.log_probs_ST())
    options = ObjectiveOptions(kl_coef=kl_coef)
    found = advantages("reinforce_plus_plus", UNEVEN, rewards_S, 1, options=options, kls_ST=kls_ST)
    probs_S = policy.probs_S()
    kl = (probs_S * (policy.log_probs_ST() - reference.log_probs_ST().detach()).sum(1)).sum()
    exact = policy.gradient((probs_S * rewards_S).sum() - kl_coef * kl)
    torch.testing.assert_close(expected_ascent(policy, *found), exact, **EXACT)


def values_by_prefix(language: Language, of_prefix: Callable[[int, tuple[int, ...]], float]) -> Tensor:
    """``[S, T]`` values that depend on what stands before each token, 0 at padding."""
    rows = [
        [of_prefix(t, tuple(response[:t].tolist())) for t in range(language.length)]
        for response in language.responses_ST
    ]
    return torch.where(language.mask_ST, torch.tensor(rows, dtype=torch.float64), 0.0)


def wrong_values(language: Language) -> Tensor:
    """A critic that is wrong everywhere, and differently after every prefix."""
    return values_by_prefix(
        language, lambda t, prefix: 1.5 - t + sum((k + 2) * token for k, token in enumerate(prefix))
    )


def exact_values(policy: Policy, rewards_ST: Tensor) -> Tensor:
    """What token rewards ``[S, T]`` of the rest of the response add up to on the policy's way from each prefix."""
    language, probs_S = policy.language, policy.probs_S().detach()

    def rest(t: int, prefix: tuple[int, ...]) -> float:
        begins_S = (language.responses_ST[:, :t] == torch.tensor(prefix, dtype=torch.int64)).all(1)
        weights_S = probs_S * begins_S
        return float((weights_S * rewards_ST[:, t:].sum(1)).sum() / weights_S.sum())

    return values_by_prefix(language, rest)


def last_token_rewards(language: Language, rewards_S: Tensor) -> Tensor:
    """``[S, T]``: the reward of each response at its last token."""
    place_S = language.mask_ST.sum(1) - 1
    return torch.zeros(language.mask_ST.shape, dtype=torch.float64).scatter(1, place_S[:, None], rewards_S[:, None])


@pytest.mark.parametrize("kl_coef", [0.0, 0.8])
def test_at_lambda_1_no_value_biases_generalised_advantages(kl_coef: float) -> None:
    """The advantage is the return minus a number that the action cannot change, however wrong the critic is."""
    policy, reference = Policy(UNEVEN, 3), Policy(UNEVEN, 4)
    rewards_S = rewards_of(UNEVEN)
    kls_ST = log_ratio(policy.log_probs_ST(), reference.log_probs_ST())
    options = ObjectiveOptions(kl_coef=kl_coef, lambd=1.0)
    found = advantages(
        "ppo", UNEVEN, rewards_S, 1, options=options, kls_ST=kls_ST, values_ST=wrong_values(UNEVEN)
    )  # fmt: skip
    probs_S = policy.probs_S()
    kl = (probs_S * (policy.log_probs_ST() - reference.log_probs_ST().detach()).sum(1)).sum()
    exact = policy.gradient((probs_S * rewards_S).sum() - kl_coef * kl)
    torch.testing.assert_close(expected_ascent(policy, *found), exact, **EXACT)


@pytest.mark.parametrize("lambd", [1.0, 0.7, 0.0])
def test_with_exact_values_every_lambda_is_unbiased(lambd: float) -> None:
    policy, rewards_S = Policy(UNEVEN, 3), rewards_of(UNEVEN)
    exact = policy.gradient((policy.probs_S() * rewards_S).sum())
    options = ObjectiveOptions(lambd=lambd)
    values_ST = exact_values(policy, last_token_rewards(UNEVEN, rewards_S))
    found = advantages("ppo", UNEVEN, rewards_S, 1, options=options, values_ST=values_ST)
    torch.testing.assert_close(expected_ascent(policy, *found), exact, **EXACT)
    wrong = advantages("ppo", UNEVEN, rewards_S, 1, options=options, values_ST=wrong_values(UNEVEN))
    is_unbiased = relative_error(expected_ascent(policy, *wrong), exact) < 1e-9
    assert is_unbiased == (lambd == 1.0), "below 1 the gradient is only as good as the critic"


@pytest.mark.parametrize("estimator", ["rloo", "remax"])
def test_unbiased_estimators_take_a_kl_in_the_reward(policy: Policy, estimator: str) -> None:
    reference = Policy(LANGUAGE, 4)
    rewards_S = rewards_of(LANGUAGE)
    kls_ST = log_ratio(policy.log_probs_ST(), reference.log_probs_ST())
    options = ObjectiveOptions(kl_coef=0.5)
    found = advantages(estimator, LANGUAGE, rewards_S, 2, options=options, kls_ST=kls_ST, greedy=0.3)
    probs_S = policy.probs_S()
    kl = (probs_S * (policy.log_probs_ST() - reference.log_probs_ST().detach()).sum(1)).sum()
    exact = policy.gradient((probs_S * rewards_S).sum() - 0.5 * kl)
    torch.testing.assert_close(expected_ascent(policy, *found), exact, **EXACT)


@pytest.mark.parametrize("estimator", ["rloo", "remax"])
def test_a_baseline_saves_variance(policy: Policy, estimator: str) -> None:
    """Against the reward alone, with rewards that are all positive."""
    rewards_S = rewards_of(LANGUAGE) + 3
    greedy = float(rewards_S[policy.probs_S().argmax()])

    def noise(found: Callable[[], tuple[Tensor, Tensor]]) -> float:
        members_Gn, advantages_GnT = found()
        log_probs_ST = policy.log_probs_ST()
        probs_G = policy.probs_S().detach()[members_Gn].prod(1)
        terms_G = (advantages_GnT * log_probs_ST[members_Gn]).sum((1, 2)) / 2
        gradients = torch.stack([policy.gradient(term) for term in terms_G])
        return ((probs_G[:, None] * gradients**2).sum() - (probs_G[:, None] * gradients).sum(0).square().sum()).item()

    with_baseline = noise(lambda: advantages(estimator, LANGUAGE, rewards_S, 2, greedy=greedy))
    assert with_baseline < 0.7 * noise(lambda: advantages("remax", LANGUAGE, rewards_S, 2, greedy=0.0))
