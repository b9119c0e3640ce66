"""Which tokens the distillation term is made of: scores, and two ways to choose by them (TIP, arXiv 2604.14084).

Two numbers say how much there is to learn at a token: the student's entropy over that of the uniform distribution,
``h = H(S) / ln V``, and its divergence from the teacher, ``d = JSD(S, T) / ln 2``, both in [0, 1].

Shape legend: ``N`` response tokens of **the whole rollout**, sample after sample. Everything is float64 and without
gradient; nothing depends on how the rollout is split later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from opd_megatron.objectives.catalogue import Catalogue

TokenScore: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(h, d) -> score``, all of one shape; ``h`` and ``d`` are rescaled to [0, 1] and so is the score."""

TOKEN_SCORES: Catalogue[TokenScore] = Catalogue("Scores of tokens", "--opd-token-score")
_TIP = "TIP, arXiv 2604.14084"
_PROOF = "test_token_selection.py::test_scores_are_those_of_their_formulas"

TOKEN_SCORES.register(
    "entropy",
    lambda entropy, divergence: entropy,
    title="student's entropy",
    formula=r"$h = H(S) / \ln V$",
    source=_TIP,
    proof=_PROOF,
)
TOKEN_SCORES.register(
    "divergence",
    lambda entropy, divergence: divergence,
    title="divergence from the teacher",
    formula=r"$d = \mathrm{JSD}(S, T) / \ln 2$",
    source=_TIP,
    proof=_PROOF,
)
TOKEN_SCORES.register(
    "low_entropy_high_divergence",
    lambda entropy, divergence: (1 - entropy) * divergence,
    title="low entropy with high divergence",
    formula=r"$(1 - h)\thinspace d$",
    source=_TIP,
    proof=_PROOF,
)
TOKEN_SCORES.register(
    "soft_or",
    lambda entropy, divergence: entropy + divergence - entropy * divergence,
    title="soft-or of entropy and divergence",
    formula=r"$h + d - h d$",
    source=_TIP,
    proof=_PROOF,
)

TOKEN_SELECTIONS: Catalogue[None] = Catalogue("Selections of tokens", "--opd-token-select")
TOKEN_SELECTIONS.describe(
    "the highest scores",
    "--opd-token-select top --opd-token-ratio R",
    formula=r"$w_t = \frac{\sum_u v_u}{\sum_{u\ \mathrm{kept}} v_u}$ for the $\lceil \rho N \rceil$ highest scores, "
    "else 0; $v$: weights in the loss",
    source=_TIP,
    proof="test_token_selection.py::test_the_highest_scores_are_kept_and_the_term_keeps_its_size",
)
TOKEN_SELECTIONS.describe(
    "sampled by score",
    "--opd-token-select sample --opd-token-ratio R",
    formula=r"$w_t = 1 / \pi_t$ with probability $\pi_t = \min(1, c\thinspace s_t + \epsilon)$, else 0; "
    r"$\sum_t \pi_t = \rho N$",
    source="Horvitz and Thompson, 1952; scores of arXiv 2604.14084",
    proof="test_token_selection.py::test_the_expected_loss_of_sampled_tokens_is_that_of_all_tokens",
)


def rescaled(values_N: Tensor, eligible_N: Tensor) -> Tensor:
    """``(x - min) / (max - min)`` over the eligible tokens, 0 where all of them are equal and at the others."""
    values_N = values_N.double()
    known_E = values_N[eligible_N]
    if not len(known_E):
        return torch.zeros_like(values_N)
    least, spread = known_E.min(), known_E.max() - known_E.min()
    scale = torch.where(spread > 0, spread, 1.0)
    return torch.where(eligible_N, (values_N - least) / scale, 0.0)


def token_scores(name: str, entropy_N: Tensor, divergence_N: Tensor | None, eligible_N: Tensor) -> Tensor:
    """The score ``name`` of :data:`TOKEN_SCORES`, ``[N]`` in [0, 1]; 0 where not ``eligible_N`` (bool).

    ``entropy_N`` and ``divergence_N`` (None: not known) are each brought to [0, 1] by the least and the largest value
    of the eligible tokens, so their units do not matter. Raises ``ValueError`` for a score that needs what is None.
    """
    if divergence_N is None and name != "entropy":
        raise ValueError(f"score {name} needs the divergence from the teacher")
    entropy_N = rescaled(entropy_N, eligible_N)
    divergence_N = torch.zeros_like(entropy_N) if divergence_N is None else rescaled(divergence_N, eligible_N)
    return torch.where(eligible_N, TOKEN_SCORES[name](entropy_N, divergence_N), 0.0)


def top_tokens(
    scores_N: Tensor, eligible_N: Tensor, sizes_N: Tensor, *, ratio: float, least: float | None = None
) -> Tensor:
    """What multiplies each token's term, ``[N]``, where the ``ceil(ratio * eligible)`` highest scores are kept.

    ``sum(sizes) / sum(sizes of the kept)`` over the eligible tokens at a kept one, else 0: with ``sizes_N``, how much
    each token counts in the loss, the weighted mean keeps its size and is the mean over the kept tokens. Of equal
    scores the first ones are kept. ``least`` leaves out lower scores in any case. This is another objective than the
    one over all tokens: what it never looks at is never learnt.
    """
    places_E = eligible_N.nonzero()[:, 0]
    count = max(math.ceil(ratio * len(places_E) - 1e-9), 1)  # 0.1 * 30 is a little above 3
    order_E = scores_N[places_E].argsort(descending=True, stable=True)
    kept_K = places_E[order_E[:count]]
    if least is not None:
        kept_K = kept_K[scores_N[kept_K] >= least]
    weights_N = torch.zeros(len(scores_N), dtype=torch.float64)
    kept = float(sizes_N[kept_K].double().sum())
    if kept > 0:
        weights_N[kept_K] = float(sizes_N[places_E].double().sum()) / kept
    return weights_N


def keep_probabilities(scores_E: Tensor, *, ratio: float, floor: float) -> Tensor:
    """``min(1, c * score + eps)`` with ``eps = floor * ratio``, ``[E]``; ``c`` is such that they sum to ``ratio * E``.

    ``scores_E`` are >= 0, ``0 < ratio <= 1`` and ``0 < floor <= 1``, so each probability is at least ``eps`` and no
    weight ``1 / probability`` above ``1 / eps``. Where the tokens with a score are fewer than are to be kept, the rest
    is shared equally by those of score 0. Raises ``ValueError`` where ``ratio`` or ``floor`` is not in its range: a
    token that is never kept cannot be made up for by a weight.
    """
    if not (0.0 < ratio <= 1.0 and 0.0 < floor <= 1.0):
        raise ValueError(f"ratio {ratio} and floor {floor} of sampled tokens must be above 0 and at most 1")
    scores_E = scores_E.double()
    count, least = len(scores_E), floor * ratio
    if not count:
        return scores_E
    sorted_E, order_E = scores_E.sort(descending=True, stable=True)
    # entry m: the m highest scores have probability 1, the others share what is left above the floor by their scores
    number_E = torch.arange(count, dtype=torch.float64)
    left_E = ratio * count - number_E - least * (count - number_E)
    rest_E = sorted_E.flip(0).cumsum(0).flip(0)
    factor_E = left_E / rest_E.clamp(min=torch.finfo(torch.float64).tiny)
    settled_E = (factor_E * sorted_E + least <= 1.0 + 1e-12) | (sorted_E == 0)
    certain = int(settled_E.long().argmax())
    by_score = sorted_E[certain] > 0
    share_E = sorted_E[certain:] / rest_E[certain] if by_score else torch.full_like(left_E[certain:], 1.0)
    if not by_score:
        share_E = share_E / len(share_E)
    probabilities_E = torch.ones_like(sorted_E)
    probabilities_E[order_E[certain:]] = (least + left_E[certain] * share_E).clamp(max=1.0)
    return probabilities_E


def sampled_tokens(
    scores_N: Tensor, eligible_N: Tensor, uniform_N: Tensor, *, ratio: float, floor: float
) -> tuple[Tensor, Tensor]:
    """What multiplies the term of each token where tokens are kept by chance, and their probabilities, ``[N]`` each.

    A token is kept where ``uniform_N``, independent numbers of [0, 1), is below its probability ``pi`` of
    :func:`keep_probabilities`, and weighs ``1 / pi``. The divisor of the loss stays that of all tokens, so that the
    expectation over the choice is the loss of all eligible tokens, and its gradient theirs, whatever the scores.
    Others than the eligible tokens have weight and probability 0.
    """
    probabilities_N = torch.zeros(len(scores_N), dtype=torch.float64)
    probabilities_N[eligible_N] = keep_probabilities(scores_N[eligible_N], ratio=ratio, floor=floor)
    kept_N = uniform_N < probabilities_N
    return torch.where(kept_N, 1 / torch.where(kept_N, probabilities_N, 1.0), 0.0), probabilities_N
