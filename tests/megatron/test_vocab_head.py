"""The vocabulary head against dense float64 arithmetic: values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import OpdOptions
from opd_megatron.megatron.distribution import DistributionTerm, Record
from opd_megatron.megatron.vocab_head import (
    Mixture,
    Side,
    selected_log_probs,
    target_divergence,
    target_moments,
    token_log_probs,
    top_k,
)
from opd_megatron.objectives import divergences
from opd_megatron.objectives.log_probs import LOG_PROB_FLOOR
from tests.megatron.vocab_head_cases import (
    BETAS,
    CASES,
    TOKENS,
    K,
    Problem,
    chunks_of,
    dense_divergence,
    error,
    expected,
    make_problem,
    ours,
    weighted,
    without,
)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    with chunks_of(4):
        yield


def leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.hidden_Nh.clone().requires_grad_(), problem.weight_Vh.clone().requires_grad_()


def found(problem: Problem, case: str) -> tuple[Tensor, ...]:
    """Outputs and gradients of a kernel."""
    hidden, weight = leaves(problem)
    outputs = ours(problem, case, hidden, weight)
    return outputs, *torch.autograd.grad(weighted(problem, outputs), (hidden, weight))


def settings(problem: Problem) -> dict[str, object]:
    return {"temperature": problem.temperature, "vocab_size": problem.vocab_size, "group": None}


@every_case
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("temperature", "chunk", "teacher_padded"), [(1.0, 4, 16), (0.6, 1, 24), (1.7, TOKENS, 11), (1.0, 100, 16)]
)
def test_values_and_gradients_equal_the_dense_ones(
    case: str, dtype: torch.dtype, temperature: float, chunk: int, teacher_padded: int
) -> None:
    problem = make_problem(temperature=temperature, teacher_padded=teacher_padded)
    with chunks_of(chunk):
        pairs = zip(found(problem.to(dtype), case), expected(problem, case), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == dtype
        assert error(mine, theirs) < TOLERANCES[dtype]


@every_case
def test_gradcheck(case: str) -> None:
    problem = make_problem(1)
    problem = replace(problem, weight_Vh=problem.weight_Vh[: problem.vocab_size])
    assert torch.autograd.gradcheck(lambda hidden, weight: ours(problem, case, hidden, weight), leaves(problem))


@every_case
def test_rows_of_padding_get_no_gradient(case: str) -> None:
    problem = make_problem()
    _, _, gradient = found(problem, case)
    assert torch.count_nonzero(gradient[problem.vocab_size :]) == 0
    assert torch.count_nonzero(gradient[: problem.vocab_size]) > 0


@pytest.mark.parametrize("outputs", [[0], [1], [0, 1]])
def test_outputs_without_a_gradient_add_nothing(outputs: list[int]) -> None:
    problem = make_problem()
    zeros = torch.zeros_like(problem.factors_NX)
    zeros[:, outputs] = problem.factors_NX[:, outputs]
    problem = replace(problem, factors_NX=zeros)
    hidden, weight = leaves(problem)
    both = token_log_probs(hidden, weight, problem.target_N, **settings(problem))  # type: ignore[arg-type]
    loss = torch.stack([(both[place] * problem.factors_NX[:, place]).sum() for place in outputs]).sum()
    for mine, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected(problem, "tokens")[1:], strict=True):
        assert error(mine, theirs) < 1e-10


@every_case
def test_a_shared_embedding_gets_both_gradients(case: str) -> None:
    problem = make_problem(2)
    inputs = torch.arange(TOKENS) % problem.vocab_size

    def gradient(from_dense: bool) -> Tensor:
        weight = problem.weight_Vh.clone().requires_grad_()
        hidden = torch.tanh(weight[inputs])
        if from_dense:
            # the same loss, linearised at its dense gradients
            _, grad_hidden, grad_weight = expected(replace(problem, hidden_Nh=hidden.detach()), case)
            loss = (hidden * grad_hidden).sum() + (weight * grad_weight).sum()
        else:
            loss = weighted(problem, ours(problem, case, hidden, weight))
        return torch.autograd.grad(loss, weight)[0]

    assert error(gradient(False), gradient(True)) < 1e-10


@every_case
def test_large_logits_stay_finite(case: str) -> None:
    problem = make_problem()
    problem = replace(problem, hidden_Nh=problem.hidden_Nh * 300, teacher_Nk=problem.teacher_Nk * 300)
    for tensor in found(problem.to(torch.float32), case):
        assert torch.isfinite(tensor).all()


def test_log_probabilities_of_large_logits_are_exact() -> None:
    problem = make_problem()
    problem = replace(problem, hidden_Nh=problem.hidden_Nh * 300)
    for mine, theirs in zip(found(problem, "selected"), expected(problem, "selected"), strict=True):
        assert error(mine, theirs) < 1e-10


@every_case
def test_no_tokens_are_legal(case: str) -> None:
    outputs, hidden, weight = found(make_problem().tokens(slice(0, 0)), case)
    assert outputs.shape[0] == hidden.shape[0] == 0
    assert torch.count_nonzero(weight) == 0


@every_case
def test_backward_keeps_no_tensor_of_tokens_times_vocabulary(case: str) -> None:
    problem = make_problem(vocab_size=512, padded=512, teacher_padded=520)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(problem, case, *leaves(problem))
    weight = problem.weight_Vh.numel()
    assert weight < TOKENS * problem.vocab_size
    assert max(tensor.numel() for tensor in saved) == weight


@every_case
def test_low_precision_inputs_give_float32_statistics_and_their_own_gradients(case: str) -> None:
    problem = make_problem(2).to(torch.bfloat16)
    hidden, weight = leaves(problem)
    outputs = ours(problem, case, hidden, weight)
    assert outputs.dtype == torch.float32
    gradients = torch.autograd.grad(weighted(problem, outputs), (hidden, weight))
    reference = expected(problem.to(torch.float64), case)
    assert error(outputs, reference[0]) < 0.05
    for mine, theirs in zip(gradients, reference[1:], strict=True):
        assert mine.dtype == torch.bfloat16
        assert error(mine, theirs) < 0.05


def test_many_chunks_of_low_precision_add_up_in_float32() -> None:
    """4096 equal parts: in bfloat16 the sum would stop at 256 times one part."""
    tokens = 4096
    hidden = torch.ones(tokens, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    log_probs, _ = token_log_probs(
        hidden, weight, torch.zeros(tokens, dtype=torch.int64), temperature=1.0, vocab_size=4, group=None
    )
    (gradient,) = torch.autograd.grad(log_probs.sum(), weight)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.75, -0.25, -0.25, -0.25]).bfloat16() * tokens)


def test_models_of_different_precision_meet() -> None:
    problem = make_problem(3)
    teacher = problem.to(torch.bfloat16)
    mixed = replace(
        problem.to(torch.float32), teacher_Nk=teacher.teacher_Nk, teacher_weight_Vk=teacher.teacher_weight_Vk
    )
    rounded = teacher.to(torch.float64)
    exact = replace(problem, teacher_Nk=rounded.teacher_Nk, teacher_weight_Vk=rounded.teacher_weight_Vk)
    for mine, theirs in zip(found(mixed, "full:jsd_0.3"), expected(exact, "full:jsd_0.3"), strict=True):
        assert mine.dtype == torch.float32
        assert error(mine, theirs) < 0.02


@pytest.mark.parametrize("teacher_padded", [16, 24, 11])
def test_paddings_of_the_vocabulary_may_differ(teacher_padded: int) -> None:
    problem = make_problem(3, teacher_padded=teacher_padded)
    kl = ours(problem, "full:reverse_kl", *leaves(problem)).detach()
    assert error(kl, expected(problem, "full:reverse_kl")[0]) < 1e-10
    assert (kl > 0).all()


def test_a_vocabulary_larger_than_a_weight_is_refused() -> None:
    problem = make_problem(teacher_padded=11)
    with pytest.raises(ValueError, match="too few for 12 tokens"):
        ours(replace(problem, vocab_size=12), "full:reverse_kl", *leaves(problem))


@pytest.mark.parametrize("k", [1, K, 11])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_top_k_and_the_mass_of_the_rest(k: int, dtype: torch.dtype) -> None:
    problem = make_problem(4)
    logits = problem.hidden_Nh @ problem.weight_Vh[: problem.vocab_size].t() / problem.temperature
    top, ids = torch.log_softmax(logits, dim=-1).topk(k)
    small = problem.to(dtype)
    record = top_k(small.hidden_Nh, small.weight_Vh, k, **settings(problem))  # type: ignore[arg-type]
    assert torch.equal(record.ids_NK, ids)
    assert error(record.log_probs_NK, top) < TOLERANCES[dtype]
    tail = without(torch.log_softmax(logits, dim=-1), ids).logsumexp(-1)
    torch.testing.assert_close(record.tail_log_mass_N.double(), tail, rtol=0, atol=TOLERANCES[dtype])


def test_the_mass_of_a_small_tail_is_exact() -> None:
    """One minus the listed probabilities would be rounding noise."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[40.0], [0.0], [1.0]])
    exact = torch.log_softmax(weight.double().t(), dim=-1)[0, 1:].logsumexp(0)
    record = top_k(hidden, weight, 1, temperature=1.0, vocab_size=3, group=None)
    assert record.tail_log_mass_N.item() == pytest.approx(exact.item(), rel=1e-6)
    weight.requires_grad_()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    _, rest, _ = selected_log_probs(hidden, weight, ids, temperature=1.0, vocab_size=3, group=None)
    assert rest.item() == pytest.approx(exact.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(rest.sum(), weight)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([-1.0, 0.26894142, 0.73105858]))


@pytest.mark.parametrize("k", [0, 12])
def test_more_or_fewer_tokens_than_exist_are_refused(k: int) -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match=f"the {k} most probable of 11 tokens"):
        top_k(problem.hidden_Nh, problem.weight_Vh, k, **settings(problem))  # type: ignore[arg-type]


def test_ids_that_are_no_tokens_take_nothing_from_the_rest() -> None:
    problem = make_problem(5)
    ids = problem.ids_NK.clone()
    ids[:4, 1], ids[4:, 2] = -1, problem.vocab_size
    hidden, weight = leaves(problem)
    logs, rest, entropy = selected_log_probs(hidden, weight, ids, **settings(problem))  # type: ignore[arg-type]
    absent = (ids < 0) | (ids >= problem.vocab_size)
    assert torch.equal(logs == -torch.inf, absent)
    dense = torch.log_softmax(hidden @ weight[: problem.vocab_size].t() / problem.temperature, dim=-1)
    expected_rest = without(dense, ids.masked_fill(absent, -1)).logsumexp(-1)
    assert error(rest, expected_rest.detach()) < 1e-10
    gradients = torch.autograd.grad(
        (logs * torch.ones_like(logs)).sum() + 2 * rest.sum() + entropy.sum(), (hidden, weight)
    )
    picked = dense.gather(1, ids.masked_fill(absent, 0)).masked_fill(absent, 0.0).sum()
    loss = picked + 2 * expected_rest.sum() - (dense.exp() * dense).sum()
    for mine, theirs in zip(gradients, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert error(mine, theirs) < 1e-10


def impossible_tokens(problem: Problem) -> tuple[Problem, Problem]:
    """A record with entries and tails of no mass, and the same with those entries in the tail."""
    top, tail = problem.top_log_probs_NK.clone(), problem.tail_log_mass_N.clone()
    top[0, 1:], tail[1] = -torch.inf, -torch.inf
    top[2, 2], tail[2] = -torch.inf, -torch.inf
    ids = problem.ids_NK.clone()
    ids[0, 1:] = ids[0, 0]
    record = replace(problem, ids_NK=ids, top_log_probs_NK=top, tail_log_mass_N=tail)
    return record, replace(record, ids_NK=ids.masked_fill(top == -torch.inf, -1))


@pytest.mark.parametrize("name", BETAS)
def test_what_the_teacher_rules_out_gives_finite_gradients(name: str) -> None:
    record, merged = impossible_tokens(make_problem(6))
    hidden, weight = leaves(record)
    log_probs = torch.log_softmax(hidden @ weight[: record.vocab_size].t() / record.temperature, dim=-1)
    rest = without(log_probs, merged.ids_NK).logsumexp(-1, keepdim=True)
    absent = merged.ids_NK < 0
    # such an entry as a class of its own, with next to no mass on either side, adds nothing
    top = log_probs.gather(1, merged.ids_NK.clamp(min=0)).masked_fill(absent, LOG_PROB_FLOOR)
    student = torch.cat([top, rest], dim=1)
    teacher = torch.cat([merged.top_log_probs_NK, merged.tail_log_mass_N[:, None]], dim=1).clamp(min=LOG_PROB_FLOOR)
    value = dense_divergence(student, teacher, BETAS[name])
    reference = torch.autograd.grad(weighted(record, value[:, None]), (hidden, weight))
    outputs, *gradients = found(record, f"record:{name}")
    assert error(outputs[:, 0], value.detach()) < 1e-10
    for mine, theirs in zip(gradients, reference, strict=True):
        assert torch.isfinite(mine).all()
        assert error(mine, theirs) < 1e-10


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("kept", [[0, 3, 4, 8], []])
def test_masked_tokens_leave_no_trace(name: str, kept: list[int]) -> None:
    problem = make_problem(7)
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    mask[kept] = True
    top = problem.top_log_probs_NK.masked_fill(~mask[:, None], torch.nan)
    tail = problem.tail_log_mass_N.masked_fill(~mask, torch.nan)
    ids = problem.ids_NK.masked_fill(~mask[:, None], 10**6)
    hidden, weight = leaves(problem)
    divergence = divergences.jensen_shannon(BETAS[name])
    term = DistributionTerm(OpdOptions(), divergence, settings(problem))
    value = term(Side(hidden, weight), Record(ids, top, tail), mask)
    gradients = torch.autograd.grad(weighted(problem, value[:, None]), (hidden, weight))
    only = replace(problem, factors_NX=problem.factors_NX * mask[:, None])
    reference = expected(only, f"record:{name}")
    assert error(value, (reference[0] * mask[:, None])[:, 0]) < 1e-10
    for mine, theirs in zip(gradients, reference[1:], strict=True):
        assert error(mine, theirs) < 1e-10


def test_a_token_that_no_loss_uses_gives_no_nan_whatever_its_record_holds() -> None:
    problem = make_problem(8)
    top = problem.top_log_probs_NK.clone()
    top[2] = torch.nan
    hidden, weight = leaves(problem)
    value = ours(replace(problem, top_log_probs_NK=top), "record:reverse_kl", hidden, weight)
    gradients = torch.autograd.grad(value[:2].sum(), (hidden, weight))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_mixture_of_one_is_that_model_bit_for_bit() -> None:
    problem = make_problem(9)
    teacher, other = Side(problem.teacher_Nk, problem.teacher_weight_Vk), Side(problem.hidden_Nh, problem.weight_Vh)
    plain = found(problem, "full:reverse_kl")
    for parts in ([(1.0, teacher)], [(1.0, teacher), (0.0, other)]):
        hidden, weight = leaves(problem)
        value = target_divergence(
            hidden,
            weight,
            Mixture(tuple(parts)),
            divergences.reverse_kl,
            **settings(problem),  # type: ignore[arg-type]
        )
        gradients = torch.autograd.grad(weighted(problem, value[:, None]), (hidden, weight))
        for mine, theirs in zip((value.detach()[:, None], *gradients), plain, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("target", ["arithmetic", "extrapolated-arithmetic"])
def test_moments_of_a_mixture_are_the_dense_ones(target: str) -> None:
    problem = make_problem(9, teacher_padded=24)
    kl, _ = target_moments(problem.hidden_Nh, problem.weight_Vh, problem.target(target), **settings(problem))  # type: ignore[arg-type]
    assert error(kl[:, None], expected(problem, f"{target}:reverse_kl")[0]) < 1e-10


@pytest.mark.parametrize(("weights", "arithmetic"), [((0.5, 0.4), False), ((1.5, -0.5), True)])
def test_weights_of_no_mixture_are_refused(weights: tuple[float, float], arithmetic: bool) -> None:
    side = Side(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"the weights .* of a"):
        Mixture(tuple((weight, side) for weight in weights), arithmetic)
