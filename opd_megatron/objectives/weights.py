"""How much each token counts in the loss of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.tensors import TokenArray, as_mask


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
    masks = [as_mask(mask_T) for mask_T in loss_masks]
    counts = [int(mask_T.sum()) for mask_T in masks]
    tokens, sequences = sum(counts), sum(count > 0 for count in counts)
    weights = []
    for mask_T, count in zip(masks, counts, strict=True):
        divisor = tokens if per_token else sequences * count
        if length_divisor is not None:
            divisor = len(masks) * length_divisor
        weights.append(mask_T.float() / max(divisor, 1))
    return weights


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
