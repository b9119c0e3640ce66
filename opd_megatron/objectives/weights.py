"""How much each token counts in the loss of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_megatron.objectives.tensors import TokenArray, joined, owners


def token_loss_weights(loss_masks: Sequence[TokenArray], per_token: bool) -> list[Tensor]:
    """One float32 ``[T]`` per sample; over all samples of **one whole optimizer step** they sum to 1.

    ``per_token``: ``1 / (unmasked tokens of the step)`` each. Else the mean over sequences of their token means:
    ``1 / (sequences of the step * unmasked tokens of this one)``, where only sequences with an unmasked token count.
    Masked tokens weigh 0, so a step without unmasked tokens has zeros only. The weights are fixed before the step is
    split, so a sum over micro-batches and data-parallel ranks is its loss in every layout.
    """
    lengths = [len(mask_T) for mask_T in loss_masks]
    mask_N, owner_N = joined(loss_masks).bool(), owners(lengths)
    counts_B = torch.zeros(len(lengths), dtype=torch.int64).index_add_(0, owner_N, mask_N.long())
    divisors_B = counts_B.sum().expand_as(counts_B) if per_token else (counts_B > 0).sum() * counts_B
    weights_N = mask_N.float() / divisors_B.clamp(min=1).float()[owner_N]
    return list(weights_N.split(lengths))
