"""The loss of a micro-batch: everything between log-probabilities and the scalar that is backpropagated.

Shape legend: ``N`` response positions of the micro-batch, all its samples concatenated. A position whose loss mask is 0
(padding, text that the student did not write) may hold anything: it adds nothing to the loss, the gradient or a metric,
not even a NaN.

Every scalar is ``sum(loss_weights * loss)`` with weights that are fixed over the whole optimizer step
(:func:`~opd_megatron.objectives.weights.token_loss_weights`), so the sum over micro-batches and data-parallel ranks
is the loss of the step and nothing has to be divided later. Metrics are statistics
(:mod:`opd_megatron.objectives.statistics`) with the same weights, so they are means as the loss sees them and
``train/loss`` is the sum of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions, OpdOptions
from opd_megatron.objectives.corrections import importance_weights, off_policy_mask
from opd_megatron.objectives.kl import kl_loss
from opd_megatron.objectives.log_probs import importance_ratio
from opd_megatron.objectives.opd_losses import OPD_LOSSES, OpdEffect, OpdTerms, with_given
from opd_megatron.objectives.policy_loss import PolicyTerms, chosen_policy_loss
from opd_megatron.objectives.sequences import Sequences
from opd_megatron.objectives.statistics import weighted_statistic


@dataclass(frozen=True)
class PolicyInputs:
    """What the policy loss needs to know of each position; all ``[N]``, on one device.

    ``log_probs_N`` carry the gradient. ``sequences`` says which response a position is of. ``old_log_probs_N`` are the
    trainer's under the weights that sampled the rollout; None means that these are the current weights.
    ``rollout_log_probs_N`` are the engine's. ``advantages_N`` are task advantages without the
    distillation term. Teacher scores count where ``teacher_valid_N`` (None: everywhere); ``opd_baseline_N`` is
    subtracted from their distance and ``opd_future_N`` added to it (see
    :func:`~opd_megatron.objectives.opd.sampled_term`); ``opd_divergence_N`` carries the gradient of ``--opd-loss
    distribution``. Where ``opd_given_N`` (bool; None: nowhere) the student did not sample the token, which has its
    cross-entropy in place of the term. ``opd_weights_N`` (None: 1) multiply the whole distillation term. ``entropy_N``
    needs a gradient only where there is an entropy bonus. Raises ``ValueError`` on unequal shapes.
    """

    log_probs_N: Tensor
    advantages_N: Tensor
    loss_weights_N: Tensor
    loss_mask_N: Tensor
    sequences: Sequences
    old_log_probs_N: Tensor | None = None
    rollout_log_probs_N: Tensor | None = None
    teacher_log_probs_N: Tensor | None = None
    teacher_valid_N: Tensor | None = None
    opd_baseline_N: Tensor | None = None
    opd_weights_N: Tensor | None = None
    opd_future_N: Tensor | None = None
    opd_divergence_N: Tensor | None = None
    opd_given_N: Tensor | None = None
    ref_log_probs_N: Tensor | None = None
    entropy_N: Tensor | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor) and value.shape != self.log_probs_N.shape:
                raise ValueError(
                    f"{item.name} has shape {tuple(value.shape)}, log_probs_N {tuple(self.log_probs_N.shape)}"
                )
        if self.sequences.of_N.shape != self.log_probs_N.shape:
            raise ValueError(f"sequences are of {len(self.sequences.of_N)} positions, not {len(self.log_probs_N)}")


def policy_objective(
    inputs: PolicyInputs,
    objective: ObjectiveOptions,
    opd_coef: float | None,
    opd: OpdOptions = OpdOptions(),  # noqa: B008 - frozen
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss of a micro-batch and its statistics.

    ``w * surrogate(A - opd_coef * d) + kl_loss_coef * KL(S||ref) - entropy_coef * H`` with the surrogate of
    ``--policy-loss`` and ``w`` of :mod:`~opd_megatron.objectives.corrections` (1 unless asked for); ``opd_coef`` None
    means no distillation. ``d`` uses the old log-probabilities, so it stays fixed over the optimizer steps of a
    rollout. A distillation loss of sampled tokens is a mean over them, as the surrogate is, and has the importance
    weights of ``w``, with what ``--tis-mode mask`` leaves out, but not the mask of ``--use-opsm``: that goes by the
    sign of an advantage, which a loss has not, and by the sign of its own log-ratio what is left would be no KL. Raises
    ``ValueError`` where a term is asked for and its input is missing.
    """
    mask_N = inputs.loss_mask_N.bool()
    weights_N = _keep(inputs.loss_weights_N, mask_N)
    log_probs_N = _keep(inputs.log_probs_N, mask_N)
    old_N = log_probs_N if inputs.old_log_probs_N is None else _keep(inputs.old_log_probs_N, mask_N)
    old_N = old_N.detach()
    task_N = _keep(inputs.advantages_N, mask_N).detach()
    effect = OpdEffect() if opd_coef is None else _distillation(inputs, log_probs_N, old_N, mask_N, opd)
    coef = 0.0 if opd_coef is None else opd_coef
    advantages_N = task_N if effect.advantage_N is None else task_N + coef * effect.advantage_N
    terms = PolicyTerms(log_probs_N, old_N, advantages_N, mask_N, inputs.sequences, objective)
    loss_N, found = chosen_policy_loss(objective)(terms)
    importance_N, kept_N, weight_metrics = _corrections(inputs, terms)
    loss_N = _times(kept_N, _times(importance_N, loss_N))
    metrics = {
        "train/pg_loss": loss_N,
        **found,
        **weight_metrics,
        **effect.weighted_metrics,
        "train/ratio_mean": importance_ratio(log_probs_N, old_N),
        "train/advantage_mean": advantages_N,
        "train/task_advantage_abs_mean": task_N.abs(),
    }
    if effect.advantage_N is not None:
        metrics["train/opd_advantage_abs_mean"] = (advantages_N - task_N).abs()
    if effect.loss_N is not None:
        opd_loss_N = _times(importance_N if effect.of_samples else None, effect.loss_N)
        loss_N = loss_N + coef * opd_loss_N
        metrics["train/opd_loss"] = opd_loss_N
    if objective.use_kl_loss:
        ref_N = _keep(_required(inputs.ref_log_probs_N, "ref_log_probs_N", "use_kl_loss"), mask_N)
        kl_N = kl_loss(objective.kl_loss_type, log_probs_N, ref_N, old_N)
        loss_N = loss_N + objective.kl_loss_coef * kl_N
        metrics["train/kl_loss"] = kl_N
    if objective.entropy_coef > 0 or inputs.entropy_N is not None:
        entropy_N = _keep(_required(inputs.entropy_N, "entropy_N", "entropy_coef"), mask_N)
        loss_N = loss_N - objective.entropy_coef * entropy_N
        metrics["train/entropy"] = entropy_N
    metrics["train/loss"] = loss_N
    statistics = {name: weighted_statistic(values_N, weights_N) for name, values_N in metrics.items()}
    scored_N = weights_N * _scored(inputs, mask_N)
    statistics |= {name: weighted_statistic(values_N, scored_N) for name, values_N in effect.scored_metrics.items()}
    return (weights_N * loss_N).sum(), statistics


def sft_objective(log_probs_N: Tensor, loss_weights_N: Tensor, loss_mask_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted negative log-likelihood of given tokens, a scalar, and its statistics; all inputs ``[N]``."""
    mask_N = loss_mask_N.bool()
    weights_N = _keep(loss_weights_N, mask_N)
    loss_N = -_keep(log_probs_N, mask_N)
    return (weights_N * loss_N).sum(), {"train/loss": weighted_statistic(loss_N, weights_N)}


def _distillation(
    inputs: PolicyInputs, log_probs_N: Tensor, old_N: Tensor, mask_N: Tensor, opd: OpdOptions
) -> OpdEffect:
    teacher_N = _required(inputs.teacher_log_probs_N, "teacher_log_probs_N", "opd_coef")
    terms = OpdTerms(
        log_probs_N,
        old_N,
        teacher_N,
        _scored(inputs, mask_N),
        opd,
        baseline_N=inputs.opd_baseline_N,
        future_N=None if inputs.opd_future_N is None else _keep(inputs.opd_future_N, mask_N),
        divergence_N=inputs.opd_divergence_N,
    )
    effect = OPD_LOSSES[opd.opd_loss](terms)
    if inputs.opd_given_N is not None:
        effect = with_given(effect, log_probs_N, mask_N & inputs.opd_given_N)
    if inputs.opd_weights_N is None:
        return effect
    opd_weights_N = _keep(inputs.opd_weights_N, mask_N)
    parts = (effect.advantage_N, effect.loss_N)
    advantage_N, loss_N = (None if part_N is None else opd_weights_N * part_N for part_N in parts)
    weighted = {name: opd_weights_N * values_N for name, values_N in effect.weighted_metrics.items()}
    return replace(effect, advantage_N=advantage_N, loss_N=loss_N, weighted_metrics=weighted)


def _scored(inputs: PolicyInputs, mask_N: Tensor) -> Tensor:
    """Bool ``[N]``: tokens that are trained on by what the teacher scored."""
    if inputs.opd_given_N is not None:
        mask_N = mask_N & ~inputs.opd_given_N
    return mask_N if inputs.teacher_valid_N is None else mask_N & inputs.teacher_valid_N.bool()


def _corrections(inputs: PolicyInputs, terms: PolicyTerms) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
    """Importance weights and kept tokens, each None for 1 everywhere, and their metrics."""
    options, mask_N = terms.options, terms.mask_N
    importance_N: Tensor | None = None
    kept_N: Tensor | None = None
    metrics: dict[str, Tensor] = {}
    if options.use_tis:
        rollout_N = _keep(_required(inputs.rollout_log_probs_N, "rollout_log_probs_N", "use_tis"), mask_N)
        importance_N, outside_N = importance_weights(terms.old_log_probs_N, rollout_N, mask_N, terms.sequences, options)
        metrics |= {"train/tis_weight": importance_N, "train/tis_clipfrac": outside_N}
    if options.use_opsm:
        left_out_N = off_policy_mask(
            terms.log_probs_N, terms.old_log_probs_N, terms.advantages_N, mask_N, terms.sequences, options.opsm_delta
        )
        kept_N = (~left_out_N).to(terms.log_probs_N.dtype)
        metrics["train/opsm_masked_frac"] = left_out_N
    return importance_N, kept_N, metrics


def _times(weights_N: Tensor | None, values_N: Tensor) -> Tensor:
    return values_N if weights_N is None else weights_N * values_N


def _keep(values_N: Tensor, mask_N: Tensor) -> Tensor:
    # Selecting before any arithmetic keeps NaN and inf of masked positions out of the backward pass too: multiplying
    # them by 0 afterwards would not.
    return torch.where(mask_N, values_N, 0.0)


def _required(value: Tensor | None, name: str, needed_by: str) -> Tensor:
    if value is None:
        raise ValueError(f"{needed_by} needs {name}")
    return value
