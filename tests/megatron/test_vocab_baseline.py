"""Exact KL and the baseline of least variance against dense float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_megatron.megatron.vocab_head import Side, shard, target_moments
from tests.megatron.live_bytes import LiveBytes

N, H, K, V, PADDED = 13, 6, 9, 11, 16


def dense(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    log_s, log_t = student_NV.double().log_softmax(-1), teacher_NV.double().log_softmax(-1)
    p, d = log_s.exp(), log_s - log_t
    # squared length of the score of each action: |onehot - p|^2
    squares = (torch.eye(V, dtype=torch.float64) - p[:, None]).square().sum(-1)
    return (p * d).sum(-1), (p * squares * d).sum(-1) / (p * squares).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("chunk", "block"), [(3, 2 * V), (10**6, 3 * V), (10**6, 10**6)])
def test_moments_equal_the_dense_ones(
    temperature: float, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "chunk_tokens", lambda rows, device: chunk)
    monkeypatch.setattr(shard, "BLOCK_ELEMENTS", {"cpu": block})
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, size, generator=generator) for size in (H, K))
    student_weight, teacher_weight = (torch.randn(PADDED, size, generator=generator) for size in (H, K))
    kl_N, baseline_N = target_moments(
        student, student_weight, Side(teacher, teacher_weight), temperature=temperature, vocab_size=V, group=None
    )
    exact_kl_N, exact_baseline_N = dense(
        student @ student_weight[:V].t() / temperature, teacher @ teacher_weight[:V].t() / temperature
    )
    torch.testing.assert_close(kl_N.double(), exact_kl_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(baseline_N.double(), exact_baseline_N, rtol=1e-4, atol=1e-4)


def test_memory_is_below_three_chunks_and_does_not_grow_with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, chunk = 4000, 64
    monkeypatch.setattr(shard, "CHUNK_ELEMENTS", {"cpu": chunk * columns})
    monkeypatch.setattr(shard, "LEAST_CHUNK_TOKENS", 1)
    monkeypatch.setattr(shard, "BLOCK_ELEMENTS", {"cpu": 4 * columns})
    weight = torch.randn(columns, H)
    peaks = {}
    for tokens in (128, 512):
        rows = torch.randn(tokens, H)
        with LiveBytes() as counter:
            target_moments(rows, weight, Side(rows, weight), temperature=0.9, vocab_size=columns, group=None)
        peaks[tokens] = counter.peak
        assert 2 * 4 * chunk * columns < counter.peak <= 3 * 4 * chunk * columns
    # two results and a token's statistics of a chunk
    assert peaks[512] - peaks[128] <= 8 * (512 - 128)


def test_a_certain_student_has_a_finite_baseline() -> None:
    student = torch.tensor([[200.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    kl_N, baseline_N = target_moments(
        student, torch.eye(2), Side(teacher, torch.eye(2)), temperature=1.0, vocab_size=2, group=None
    )
    assert baseline_N.isfinite().all()
    torch.testing.assert_close(baseline_N, kl_N)
