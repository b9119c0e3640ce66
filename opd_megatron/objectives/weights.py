"""How much each token counts in the loss of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.tensors import TokenArray, joined, owners


def token_loss_weights(
    loss_masks: Sequence[TokenArray], per_token: bool, length_divisor: int | None = None
) -> list[Tensor]:
    """One float32 ``[T]`` per sample of **one whole optimizer step**; masked tokens weigh 0.

    ``per_token``: ``1 / (unmasked tokens of the step)`` each. Else the mean over sequences of their token means:
    ``1 / (sequences of the step * unmasked tokens of this one)``, where only sequences with an unmasked token count.
    Either way they sum to 1, or to 0 in a step without unmasked tokens. With ``length_divisor``
    ``1 / (samples of the step * length_divisor)``: a divisor that what was sampled cannot change, so that expected
    gradients are those of sums, and long responses count for all their tokens (Dr. GRPO, arXiv 2503.20783). The weights
    are fixed before the step is split, so a sum over micro-batches and data-parallel ranks is its loss in every layout.
    """
    lengths = [len(mask_T) for mask_T in loss_masks]
    mask_N, owner_N = joined(loss_masks).bool(), owners(lengths)
    counts_B = torch.zeros(len(lengths), dtype=torch.int64).index_add_(0, owner_N, mask_N.long())
    divisors_B = counts_B.sum().expand_as(counts_B) if per_token else (counts_B > 0).sum() * counts_B
    if length_divisor is not None:
        divisors_B = torch.full_like(counts_B, len(lengths) * length_divisor)
    weights_N = mask_N.float() / divisors_B.clamp(min=1).float()[owner_N]
    return list(weights_N.split(lengths))


def step_weights(objective: ObjectiveOptions, loss_masks: Sequence[TokenArray]) -> list[Tensor]:
    """:func:`token_loss_weights` as the options want them."""
    return token_loss_weights(loss_masks, objective.calculate_per_token_loss, objective.loss_length_divisor)


def scored_opd_weights(loss_weights: Sequence[Tensor], scored: Sequence[bool]) -> list[Tensor]:
    """What multiplies the distillation term where the teacher failed for some samples of **one whole optimizer step**.

    One float32 ``[T]`` per sample: ``N / N_scored`` where ``scored``, else 0. ``N`` is the sum of ``loss_weights``
    (:func:`token_loss_weights`) over all samples of the step and ``N_scored`` that over the scored ones, so that the
    term's weighted mean keeps its size: it is the mean over the scored samples. Without a scored token all are 0.
    """
    total = sum(float(weights_T.double().sum()) for weights_T in loss_weights)
    kept = sum(float(weights_T.double().sum()) for weights_T, known in zip(loss_weights, scored, strict=True) if known)
    factor = total / kept if kept > 0 else 0.0
    return [
        torch.full_like(weights_T, factor if known else 0.0, dtype=torch.float32)
        for weights_T, known in zip(loss_weights, scored, strict=True)
    ]


AGGREGATIONS: Catalogue[None] = Catalogue("Averages over tokens", "")
AGGREGATIONS.describe(
    "mean over sequences of token means",
    "(default)",
    formula=r"$w = 1 / (B' l)$, $B'$ sequences with an unmasked token, $l$ of them in this one",
    source="arXiv 2402.03300",
    proof="test_losses.py::test_weights_sum_to_one_and_average_as_they_say",
)
AGGREGATIONS.describe(
    "mean over tokens",
    "--calculate-per-token-loss",
    formula=r"$w = 1 / \sum l$",
    source="arXiv 2503.14476",
    proof="test_losses.py::test_weights_sum_to_one_and_average_as_they_say",
)
AGGREGATIONS.describe(
    "sequence sum with a constant divisor",
    "--loss-length-divisor D",
    formula="$w = 1 / (B D)$, $B$ samples of the step",
    source="arXiv 2503.20783",
    proof="test_expected_losses.py::test_only_a_constant_divisor_leaves_the_expected_gradient",
)
