"""Weights of the policy loss for samples that come from another policy than the one that is trained.

Two policies may differ from the current one: that of the **rollout engine**, which computes the same weights with other
kernels, precisions or an older version, and the **old** one, the trainer's before the optimizer steps of the rollout.
The ratio of current to old policy belongs to the policy losses; here are the ratio of old to engine
(:func:`importance_weights`) and the masking of responses that have become unlikely (:func:`off_policy_mask`).

Shape legend: ``N`` response positions of a micro-batch, all its samples concatenated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.log_probs import importance_ratio, log_ratio
from opd_megatron.objectives.sequences import Sequences


def importance_weights(
    old_log_probs_N: Tensor,
    rollout_log_probs_N: Tensor,
    mask_N: Tensor,
    sequences: Sequences,
    options: ObjectiveOptions,
) -> tuple[Tensor, Tensor]:
    """Importance weights ``[N]`` of the trainer's old policy against the engine's, and where they are out of bounds.

    ``w = p_old / p_engine`` of each token, or, at the level of sequences, the product of these over the unmasked tokens
    of the response. Truncated importance sampling (TIS): ``clip(w, tis_clip_low, tis_clip)``; with ``tis_mode`` mask:
    ``w`` within the bounds and 0 outside (IcePop, arXiv 2510.18855, for tokens). Without bounds the sequence's weight
    makes the expectation over the engine's responses that over the old policy's; the token's weight corrects the token
    and leaves the distribution of its prefix. Truncation biases towards tokens of ratios below the bound.
    """
    log_weight_N = torch.where(mask_N, log_ratio(old_log_probs_N, rollout_log_probs_N), 0.0)
    if options.tis_level == "sequence":
        log_weight_N = sequences.sum(log_weight_N).to(log_weight_N.dtype)
    weight_N = importance_ratio(log_weight_N, torch.zeros_like(log_weight_N))
    limited_N = weight_N.clamp(options.tis_clip_low, options.tis_clip)
    outside_N = limited_N != weight_N
    if options.tis_mode == "mask":
        limited_N = torch.where(outside_N, 0.0, weight_N)
    return limited_N, outside_N


def off_policy_mask(
    log_probs_N: Tensor,
    old_log_probs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    sequences: Sequences,
    delta: float,
) -> Tensor:
    """Off-policy sequence masking (OPSM, arXiv 2512.02556): where tokens are left out, bool ``[N]``.

    Those of negative advantage in responses with ``mean_t (log p_old - log p) > delta`` over unmasked tokens: the
    policy has moved away from the response, and pushing it down further teaches about what it no longer says. The
    advantage is that of the token, distillation term included.
    """
    drift_N = sequences.mean(old_log_probs_N - log_probs_N, mask_N)
    return (advantages_N < 0) & (drift_N > delta)


CORRECTIONS: Catalogue[None] = Catalogue("Corrections of samples from another policy", "")
CORRECTIONS.describe(
    "truncated importance sampling",
    "--use-tis --tis-level token",
    formula=r"$L_t \leftarrow \mathrm{clip}(w_t, c_{\mathrm{low}}, c)\thinspace L_t$, "
    r"$w_t = S_{\mathrm{old}}(a_t) / S_{\mathrm{engine}}(a_t)$",
    source="Yao et al., *Your Efficient RL Framework Secretly Brings You Off-Policy RL Training*, 2025",
    proof="test_expected_losses.py::test_token_weights_correct_the_token_and_leave_the_prefix",
)
CORRECTIONS.describe(
    "truncated importance sampling of responses",
    "--use-tis --tis-level sequence",
    formula=r"$w = \prod_t S_{\mathrm{old}}(a_t) / S_{\mathrm{engine}}(a_t)$ for all tokens of the response",
    source="the same",
    proof="test_expected_losses.py::test_sequence_weights_give_the_on_policy_gradient",
)
CORRECTIONS.describe(
    "importance sampling of a distillation loss",
    "--use-tis --opd-loss kl_loss, --use-tis --opd-importance",
    formula=r"$w c \rho k_1$ and the like: the loss of sampled tokens has the weights above",
    source="the same",
    proof="test_expected_losses.py::test_importance_weights_bring_every_term_of_sampled_tokens_to_the_students_law",
)
CORRECTIONS.describe(
    "IcePop",
    "--use-tis --tis-mode mask",
    formula=r"$L_t \leftarrow w_t L_t$ where $c_{\mathrm{low}} \le w_t \le c$, else 0",
    source="arXiv 2510.18855",
    proof="test_expected_losses.py::test_icepop_is_the_surrogate_of_the_tokens_within_the_bounds",
)
CORRECTIONS.describe(
    "off-policy sequence masking",
    "--use-opsm",
    formula=r"$L_t \leftarrow 0$ where $A_t < 0$ and $\overline{-\log \rho} > \delta$ over the response",
    source="arXiv 2512.02556",
    proof="test_expected_losses.py::test_opsm_leaves_out_no_more_than_the_push_away_from_abandoned_responses",
)
