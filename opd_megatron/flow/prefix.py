"""Responses of which only the beginning is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_megatron.sample import Sample


def train_on_prefix(samples: Sequence[Sample], length: int | None) -> None:
    """Take the tokens after the first ``length`` of each response out of the loss; None leaves all as they are.

    What an engine sampled ends there already; what a function of the user's own made, or a recording holds, may not.
    """
    if length is None:
        return
    for sample in samples:
        sample.loss_mask = sample.loss_mask & (np.arange(sample.response_length) < length)
