"""The choices of ``--policy-loss``: from advantages and importance ratios to the loss of each token.

Shape legend: ``N`` response positions of a micro-batch, all its samples concatenated. ``r = p / p_old`` is the ratio of
the current policy to the one whose log-probabilities are the old ones. Minimising a loss raises the probability of
tokens with ``A > 0``; its gradient flows through ``log_probs_N`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.config.user_code import load_function
from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.log_probs import importance_ratio
from opd_megatron.objectives.sequences import Sequences


@dataclass(frozen=True)
class PolicyTerms:
    """What a policy loss sees of a micro-batch; tensors are ``[N]``, and only ``log_probs_N`` has a gradient.

    ``advantages_N`` include the distillation term. At positions where ``mask_N`` is false all values are 0, and the
    loss there does not count. ``sequences`` knows which response each position is of and adds up over responses, parts
    on other ranks included.
    """

    log_probs_N: Tensor
    old_log_probs_N: Tensor
    advantages_N: Tensor
    mask_N: Tensor
    sequences: Sequences
    options: ObjectiveOptions


PolicyLoss: TypeAlias = Callable[[PolicyTerms], tuple[Tensor, dict[str, Tensor]]]
"""Loss ``[N]`` and metrics by name, ``[N]`` each, which are averaged as the loss is. Names begin with ``train/``."""


def clipped_policy_loss(
    ratio_N: Tensor,
    advantages_N: Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token loss ``[N]`` and where it is clipped, bool ``[N]``; a clipped token has no gradient.

    ``max(-r A, -clip(r, 1 - eps_clip, 1 + eps_clip_high) A)`` (PPO, arXiv 1707.06347); ``eps_clip_high`` (default
    ``eps_clip``) widens the upper side (clip-higher of DAPO, arXiv 2503.14476); with ``eps_clip_c`` the loss of a
    negative advantage is at most ``-eps_clip_c * A``, however large r is (dual clip, arXiv 1912.09729).
    """
    advantages_N = advantages_N.detach()
    upper = eps_clip if eps_clip_high is None else eps_clip_high
    loss_N = -ratio_N * advantages_N
    bound_N = -ratio_N.detach().clamp(1.0 - eps_clip, 1.0 + upper) * advantages_N
    clipped_N = bound_N > loss_N
    loss_N = torch.where(clipped_N, bound_N, loss_N)
    if eps_clip_c is not None:
        ceiling_N = -eps_clip_c * advantages_N
        exceeds_N = (advantages_N < 0) & (loss_N > ceiling_N)
        loss_N = torch.where(exceeds_N, ceiling_N, loss_N)
        clipped_N = clipped_N | exceeds_N
    return loss_N, clipped_N


def ppo_clip(terms: PolicyTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate with the ratio of each token, clip-higher and dual clip (:func:`clipped_policy_loss`)."""
    options = terms.options
    ratio_N = importance_ratio(terms.log_probs_N, terms.old_log_probs_N)
    loss_N, clipped_N = clipped_policy_loss(
        ratio_N, terms.advantages_N, options.eps_clip, options.eps_clip_high, options.eps_clip_c
    )
    return loss_N, {"train/pg_clipfrac": clipped_N}


def gspo(terms: PolicyTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO (arXiv 2507.18071): PPO's surrogate with the response's ratio ``s = exp(mean_t (log p - log p_old))``.

    In its token form (GSPO-token, section 4.3 there), ``s_t = sg(s) * p_t / sg(p_t)``. Where the advantage is the same
    for all tokens of a response this has the value and the gradient of ``max(-s A, -clip(s) A)``. Where advantages
    differ by token, as with a distillation term, the sequence form would give every token the mean of all, which is not
    the policy gradient; the token form gives each its own. The exponent is limited as that of a token's ratio.
    """
    options = terms.options
    log_ratio_N = terms.sequences.mean(terms.log_probs_N - terms.old_log_probs_N, terms.mask_N)
    ratio_N = importance_ratio(terms.log_probs_N, terms.log_probs_N - log_ratio_N.to(terms.log_probs_N.dtype))
    loss_N, clipped_N = clipped_policy_loss(
        ratio_N, terms.advantages_N, options.eps_clip, options.eps_clip_high, options.eps_clip_c
    )
    return loss_N, {"train/pg_clipfrac": clipped_N, "train/sequence_ratio": ratio_N}


def cispo(terms: PolicyTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO (arXiv 2506.13585): ``-sg(clip(r, 1 - eps_clip, 1 + eps_clip_high)) * A * log p``.

    The weight is clipped, not the token: every token keeps a gradient. ``eps_clip`` 1 leaves out the lower bound, as
    the paper does. Between the bounds the gradient is that of ``-r A``. ``train/pg_clipfrac`` counts clipped weights.
    """
    options = terms.options
    upper = options.eps_clip if options.eps_clip_high is None else options.eps_clip_high
    ratio_N = importance_ratio(terms.log_probs_N, terms.old_log_probs_N).detach()
    weight_N = ratio_N.clamp(max(0.0, 1.0 - options.eps_clip), 1.0 + upper)
    return -weight_N * terms.advantages_N * terms.log_probs_N, {"train/pg_clipfrac": weight_N != ratio_N}


POLICY_LOSSES: Catalogue[PolicyLoss] = Catalogue("Policy losses", "--policy-loss")
POLICY_LOSSES.register(
    "ppo_clip",
    ppo_clip,
    title="PPO clip",
    formula=r"$\max(-\rho A, -\mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon_{\mathrm{high}}) A)$",
    source="arXiv 1707.06347",
    proof="test_policy_loss.py::test_against_the_formula_on_random_tokens",
)
POLICY_LOSSES.describe(
    "clip-higher (DAPO)",
    "--eps-clip-high",
    formula=r"$\epsilon_{\mathrm{high}} > \epsilon$",
    source="arXiv 2503.14476",
    proof="test_policy_loss.py::test_clip_higher_widens_the_upper_side_only",
)
POLICY_LOSSES.describe(
    "dual clip",
    "--eps-clip-c",
    formula=r"at most $-c_{\mathrm{dual}} A$ where $A < 0$",
    source="arXiv 1912.09729",
    proof="test_expected_losses.py::test_dual_clip_has_the_gradient_of_the_bounded_surrogate",
)
POLICY_LOSSES.register(
    "gspo",
    gspo,
    title="GSPO, GSPO-token",
    formula=r"PPO clip with $\rho_t \leftarrow \mathrm{sg}(s) S(a_t) / \mathrm{sg}(S(a_t))$, "
    r"$s = \exp \overline{\log \rho}$ over the response",
    source="arXiv 2507.18071",
    proof="test_expected_losses.py::test_gspo_is_the_sequence_form_where_the_advantage_is_the_responses",
)
POLICY_LOSSES.register(
    "cispo",
    cispo,
    title="CISPO",
    formula=r"$-\mathrm{sg}(\mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon_{\mathrm{high}}))\thinspace A \log S$",
    source="arXiv 2506.13585",
    proof="test_expected_losses.py::test_cispo_has_the_gradient_of_the_surrogate_with_truncated_weights",
)
POLICY_LOSSES.describe(
    "a loss of one's own",
    "--custom-loss-path package.module:function",
    formula="$L_t$ of a function",
    source="",
    proof="test_own_objectives.py::test_a_loss_of_ones_own_is_weighted_and_reported_like_all_others",
)
POLICY_LOSSES.describe(
    "entropy bonus",
    "--entropy-coef H",
    formula=r"$-h\thinspace H(S(\cdot \mid s_t))$ in the loss, over the whole vocabulary",
    source="Williams and Peng, 1991",
    proof="test_losses.py::test_entropy_bonus_raises_the_entropy",
)
POLICY_LOSSES.describe(
    "several passes over a rollout",
    "--ppo-epochs N",
    formula=r"$S_{\mathrm{old}}$ and $d_t$ stay those of the weights that sampled",
    source="arXiv 1707.06347",
    proof="e2e/test_objectives.py::test_passes_over_a_rollout_are_optimizer_steps_of_the_schedule",
)


def chosen_policy_loss(options: ObjectiveOptions) -> PolicyLoss:
    """That of ``--policy-loss``, or the user's own.

    ``--custom-loss-path`` names a function ``(PolicyTerms) -> (loss_N, metrics)``, see :data:`PolicyLoss`. Raises
    ``UserError`` if it cannot be imported, or, when it is called, if it returns something else.
    """
    path = options.custom_loss_path
    if path is None:
        return POLICY_LOSSES[options.policy_loss]
    function = load_function(path, "--custom-loss-path")

    def loss(terms: PolicyTerms) -> tuple[Tensor, dict[str, Tensor]]:
        answer: Any = function(terms)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise UserError(f"{path}: returned a {type(answer).__name__}, not a loss and a mapping of metrics")
        loss_N, metrics = answer[0], dict(answer[1])
        for name, value_N in {"loss": loss_N, **metrics}.items():
            if not isinstance(value_N, Tensor) or value_N.shape != terms.log_probs_N.shape:
                raise UserError(f"{path}: {name} is not a tensor of the {len(terms.log_probs_N)} positions")
        if any(not name.startswith("train/") for name in metrics):
            raise UserError(f"{path}: names of metrics begin with train/, not {sorted(metrics)}")
        if terms.log_probs_N.requires_grad and not loss_N.requires_grad:
            raise UserError(f"{path}: the loss has no gradient: make it of log_probs_N, undetached")
        return loss_N, metrics

    return loss
