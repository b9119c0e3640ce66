"""Weights of the distillation term in layouts that share the samples, the tokens or the vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.megatron.support import assert_same_tensors
from tests.parallel import work
from tests.parallel.pool import WorkerPool
from tests.parallel.test_layouts import LAYOUTS, Alone, assert_same_metrics, reporting

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("name", ["tp2-sp", "cp2", "pp2", "dp2-dynamic"])
def test_chosen_tokens_and_their_loss_are_the_same(
    two: WorkerPool, alone: Alone, folders: dict[str, Path], name: str
) -> None:
    """Packed on the left, padded sequences of a single process on the right, in micro-batches of another size."""
    parts = two.run(work.chosen_tokens, folders["qwen3"], LAYOUTS[name], folders["teacher"])
    plain = (("qkv_format", "bshd"), ("micro_batch_size", 5))
    answers, metrics, gradients = alone(work.chosen_tokens, folders["qwen3"], plain, folders["teacher"])
    for part in parts:
        for mine, theirs in zip(part[0], answers, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    assert metrics["train/opd_divergence"] > 0.1
    assert_same_tensors(parts[0][2], gradients, 1e-4)
    assert_same_metrics(reporting([[part[1]] for part in parts]), [metrics], 1e-4)
