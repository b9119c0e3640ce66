"""Random streams, filters and the choice of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from opd_megatron.rollout.engine import SamplingParams
from opd_megatron.rollout.sampling import (
    UniformStreams,
    choose_by_inverse_cdf,
    filter_log_probs,
    sample_tokens,
    sampling_log_probs,
)


def test_a_stream_depends_on_its_seed_and_position_only() -> None:
    together = UniformStreams([(1, 2, 3), (1, 2, 4), (12, 3)]).draw([0, 1, 2], 0, 50)
    alone = UniformStreams([(1, 2, 4)])
    pieces = [alone.draw([0], first, count)[0] for first, count in ((43, 7), (0, 1), (1, 2), (3, 40))]
    np.testing.assert_array_equal(np.concatenate([*pieces[1:], pieces[0]]), together[1])
    assert len({row.tobytes() for row in together}) == 3
    # (1, 2, 3) and (12, 3) must not run together into one key.
    assert abs(np.corrcoef(together)[np.triu_indices(3, 1)]).max() < 0.5


def test_streams_are_uniform() -> None:
    drawn = UniformStreams([(7, row) for row in range(200)]).draw(range(200), 5, 100)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 45  # 19 degrees of freedom: exceeded with probability 7e-4
    first_draws = drawn[:, 0]
    assert abs(first_draws.mean() - 0.5) < 4 / np.sqrt(12 * 200)


def test_inverse_cdf_gives_exact_frequencies_and_never_a_token_of_probability_zero() -> None:
    probs = torch.tensor([0.0, 0.1, 0.0, 0.25, 0.4, 0.25, 0.0], dtype=torch.float64)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    chosen = choose_by_inverse_cdf(probs.log().expand(4000, -1), grid)
    counts = torch.bincount(chosen, minlength=7)
    assert (counts - 4000 * probs).abs().max() <= 1
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for scale in torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5:
        assert choose_by_inverse_cdf((probs * scale).log().expand(2, -1), edges).tolist() == [1, 5]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_log_probs_are_those_of_the_whole_distribution_at_the_temperature(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 17, generator=generator)
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    sampling = SamplingParams(temperature=temperature, top_k=3, top_p=0.8)
    tokens, log_probs = sample_tokens(logits, sampling, uniforms)
    reference = torch.log_softmax(logits.double() / temperature, dim=-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), reference, rtol=0, atol=2e-6)
    assert log_probs.dtype == torch.float32


def test_greedy_takes_the_maximum_and_reports_temperature_one() -> None:
    logits = torch.randn(32, 11, generator=torch.Generator().manual_seed(1))
    tokens, log_probs = sample_tokens(logits, SamplingParams(temperature=0.0), None)
    assert torch.equal(tokens, logits.argmax(dim=-1))
    torch.testing.assert_close(log_probs, torch.log_softmax(logits, dim=-1).amax(dim=-1))


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(-1, 0.9), (-1, 0.3), (-1, 1e-6), (5, 1.0), (1, 1.0), (6, 0.7), (99, 0.5)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_filters_equal_transformers(top_k: int, top_p: float, temperature: float) -> None:
    logits = 2 * torch.randn(200, 23, generator=torch.Generator().manual_seed(top_k + 2))
    logits[:, 4] = logits[:, 7]  # ties
    expected = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1.0 else logits
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    filtered = filter_log_probs(sampling_log_probs(logits, temperature), top_k, top_p)
    # Which of two tied tokens at the rim of the nucleus stays is up to the sort.
    ties = [4, 7]
    others = [column for column in range(23) if column not in ties]
    assert torch.equal(filtered[:, others].isinf(), expected[:, others].isinf())
    assert torch.equal(filtered[:, ties].isinf().sum(1), expected[:, ties].isinf().sum(1))
    torch.testing.assert_close(torch.softmax(filtered, -1).amax(-1), torch.softmax(expected, -1).amax(-1))


def test_filtered_sampling_stays_inside_and_keeps_proportions() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]))
    grid = (torch.arange(900, dtype=torch.float64) + 0.5) / 900
    tokens, _ = sample_tokens(logits.expand(900, -1), SamplingParams(top_p=0.85), grid)
    assert torch.bincount(tokens, minlength=5).tolist() == [400, 300, 200, 0, 0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"max_new_tokens": 0},
        {"stop": ("",)},
        {"stop": "text"},
    ],
)
def test_parameters_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
