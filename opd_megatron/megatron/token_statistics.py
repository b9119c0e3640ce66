"""What the student says of each response token before a step: by it, tokens are chosen for the distillation term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from opd_megatron.config.options import Options
from opd_megatron.config.resolve import selects_by_divergence
from opd_megatron.megatron.forward import run_micro_batches
from opd_megatron.megatron.loss_inputs import LossInputs, StepLoss
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.scoring import merge_parts
from opd_megatron.megatron.teacher_rows import TeacherRows
from opd_megatron.sample import Sample


@torch.no_grad()
def token_statistics(
    chunks: Sequence[HiddenStateModel],
    options: Options,
    samples: Sequence[Sample],
    micro_batches: Sequence[tuple[int, ...]],
    kept_rows: Mapping[str, TeacherRows],
) -> dict[int, np.ndarray]:
    """``[T, 3]`` float32 of each response of this rank's ``micro_batches``, by its place in ``samples``.

    Log-probability of the token and entropy of its distribution at the rollout temperature, and the Jensen-Shannon
    divergence from the teacher in nats, where tokens are chosen by it and the teacher scored (else 0). They come from
    the ranks that report; all ranks call it. ``kept_rows`` are those of Megatron teachers.
    """
    compares = selects_by_divergence(options.opd)

    def last_stage(batch: MicroBatch, rows_Nh: Tensor) -> dict[int, np.ndarray]:
        inputs = LossInputs(StepLoss(options, chunks[-1], samples, (), kept_rows), batch, rows_Nh)
        divergence_N = inputs.jensen_shannon_N if compares else torch.zeros_like(inputs.entropy_N)
        return batch.split(torch.stack([inputs.log_probs_N, inputs.entropy_N, divergence_N], dim=1))

    return merge_parts(run_micro_batches(chunks, chunks[-1], samples, micro_batches, last_stage, with_gradients=False))
