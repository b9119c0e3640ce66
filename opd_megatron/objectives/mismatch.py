"""How far the rollout engine's policy is from the trainer's, on the tokens that the engine sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.kl import kl_estimate
from opd_megatron.objectives.log_probs import LOG_RATIO_LIMIT, log_ratio
from opd_megatron.objectives.tensors import TokenArray, as_float64, as_mask


def mismatch_statistics(
    rollout_log_probs: Sequence[TokenArray],
    trainer_log_probs: Sequence[TokenArray],
    loss_masks: Sequence[TokenArray],
    options: ObjectiveOptions,
) -> dict[str, float]:
    """``rollout/mismatch_*`` of a rollout; one ``[T]`` per sample and argument, both under the weights that sampled.

    With ``w = p_trainer / p_engine`` of each unmasked token:

    - ``_ratio_mean``, ``_ratio_max``: mean (1 in expectation, whatever the policies) and largest of ``w``;
    - ``_k3``: mean of ``w - 1 - log w``, which estimates KL(engine||trainer) in nats and is never negative;
    - ``_outside_frac``: share outside ``tis_clip_low`` to ``tis_clip``, whether or not ``--use-tis`` acts on it.

    ``rollout/mismatch_sequence_*`` are the same of whole responses, whose ``w`` is the product over their tokens.
    Exponents are limited to 20. No unmasked token gives no metrics.
    """
    per_token, per_sequence = [], []
    for rollout_T, trainer_T, loss_mask_T in zip(rollout_log_probs, trainer_log_probs, loss_masks, strict=True):
        mask_T = as_mask(loss_mask_T)
        if mask_T.any():
            per_token.append(log_ratio(as_float64(trainer_T)[mask_T], as_float64(rollout_T)[mask_T]))
            per_sequence.append(per_token[-1].sum())
    if not per_token:
        return {}
    tokens, sequences = torch.cat(per_token), torch.stack(per_sequence)
    return _statistics("rollout/mismatch", tokens, options) | _statistics(
        "rollout/mismatch_sequence", sequences, options
    )


def _statistics(prefix: str, log_weights: Tensor, options: ObjectiveOptions) -> dict[str, float]:
    weights = log_weights.clamp(max=LOG_RATIO_LIMIT).exp()
    outside = (weights < options.tis_clip_low) | (weights > options.tis_clip)
    return {
        f"{prefix}_ratio_mean": weights.mean().item(),
        f"{prefix}_ratio_max": weights.max().item(),
        f"{prefix}_k3": kl_estimate("k3", -log_weights).mean().item(),
        f"{prefix}_outside_frac": outside.double().mean().item(),
    }
