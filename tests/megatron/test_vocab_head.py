"""The vocabulary head against dense float64 arithmetic: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opd_megatron.megatron import vocab_head
from opd_megatron.megatron.vocab_head import reverse_kl, token_log_probs

TOKENS, HIDDEN, VOCAB, PADDED = 9, 6, 11, 16


def _inputs(seed: int = 0, padding: float = 50.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output weight whose padding rows would dominate every sum, and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, dtype=torch.float64, generator=generator)
    weight[VOCAB:] *= padding
    target = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def _dense(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax(hidden @ weight[:VOCAB].t() / temperature, dim=-1)
    return log_probs.gather(1, target[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def _ours(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return token_log_probs(hidden, weight, target, temperature=temperature, vocab_size=VOCAB, group=None)


def _weighted(outputs: tuple[Tensor, Tensor], which: str) -> Tensor:
    """A scalar whose gradient differs at each token, of the log-probabilities, the entropies or both."""
    factors = torch.linspace(-1.0, 2.0, TOKENS, dtype=torch.float64)
    log_probs, entropy = outputs
    terms = {"log_probs": log_probs * factors, "entropy": entropy * factors.flip(0)}
    return sum((terms[name] for name in which.split("+")), start=torch.zeros(())).sum()


@pytest.mark.parametrize("chunk_elements", [2**26, 2 * VOCAB + 1, 1])
@pytest.mark.parametrize("which", ["log_probs", "entropy", "log_probs+entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradients_equal_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch, temperature: float, which: str, chunk_elements: int
) -> None:
    monkeypatch.setattr(vocab_head, "CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, target = _inputs()
    found, expected = _ours(hidden, weight, target, temperature), _dense(hidden, weight, target, temperature)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    mine = torch.autograd.grad(_weighted(found, which), (hidden, weight))
    theirs = torch.autograd.grad(_weighted(expected, which), (hidden, weight))
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_head, "CHUNK_ELEMENTS", 3 * VOCAB)
    hidden, weight, target = _inputs(1, padding=1.0)
    assert torch.autograd.gradcheck(lambda h, w: _ours(h, w, target, 0.8), (hidden, weight))


def test_rows_of_padding_get_no_gradient() -> None:
    hidden, weight, target = _inputs()
    (gradient,) = torch.autograd.grad(_weighted(_ours(hidden, weight, target, 1.0), "log_probs+entropy"), weight)
    assert torch.count_nonzero(gradient[VOCAB:]) == 0
    assert torch.count_nonzero(gradient[:VOCAB]) > 0


def test_large_logits_stay_finite() -> None:
    hidden, weight, target = _inputs()
    hidden, weight = (hidden.detach() * 100).requires_grad_(), weight.detach().requires_grad_()
    found, expected = _ours(hidden, weight, target, 1.0), _dense(hidden, weight, target, 1.0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(_weighted(found, "log_probs+entropy"), (hidden, weight))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_no_tokens_are_legal() -> None:
    hidden, weight, target = _inputs()
    log_probs, entropy = _ours(hidden[:0], weight, target[:0], 1.0)
    (gradient,) = torch.autograd.grad(log_probs.sum() + entropy.sum(), weight)
    assert log_probs.shape == entropy.shape == (0,)
    assert torch.count_nonzero(gradient) == 0


def test_backward_keeps_no_tensor_of_tokens_times_vocabulary() -> None:
    tokens, hidden_size, vocab = 64, 4, 512
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_log_probs(
            hidden, weight, torch.zeros(tokens, dtype=torch.int64), temperature=0.7, vocab_size=vocab, group=None
        )
    assert saved
    assert max(tensor.numel() for tensor in saved) <= max(vocab * hidden_size, tokens * hidden_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_give_float32_statistics(dtype: torch.dtype) -> None:
    hidden, weight, target = _inputs(2)
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    log_probs, entropy = _ours(hidden, weight, target, 1.0)
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected, _ = _dense(hidden.double(), weight.double(), target, 1.0)
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("chunk_elements", [2**26, 2 * VOCAB + 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_reverse_kl_equals_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, temperature: float, chunk_elements: int
) -> None:
    monkeypatch.setattr(vocab_head, "CHUNK_ELEMENTS", chunk_elements)
    student_hidden, student_weight, _ = _inputs(3)
    generator = torch.Generator().manual_seed(4)
    teacher_hidden = torch.randn(TOKENS, 2 * HIDDEN, dtype=torch.float64, generator=generator)
    teacher_weight = torch.randn(PADDED, 2 * HIDDEN, dtype=torch.float64, generator=generator)
    student = torch.log_softmax(student_hidden.detach() @ student_weight[:VOCAB].t() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_hidden @ teacher_weight[:VOCAB].t() / temperature, dim=-1)
    expected = (student.exp() * (student - teacher)).sum(-1)
    settings: dict[str, Any] = {"temperature": temperature, "vocab_size": VOCAB, "group": None}
    single = (tensor.float() for tensor in (student_hidden, student_weight, teacher_hidden, teacher_weight))
    found = reverse_kl(*single, **settings)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (found > 0).all()


def test_models_that_split_the_vocabulary_differently_are_refused() -> None:
    hidden, weight, _ = _inputs()
    with pytest.raises(ValueError, match="split the vocabulary alike"):
        reverse_kl(hidden, weight, hidden, weight[:VOCAB], temperature=1.0, vocab_size=VOCAB, group=None)
