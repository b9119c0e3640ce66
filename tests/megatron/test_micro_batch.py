"""From samples to tensors: which hidden row predicts which token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opd_megatron.megatron.micro_batch import build, plan, rank_share
from opd_megatron.sample import Sample
from tests.megatron.support import (
    VOCAB_SIZE,
    exported,
    load_reference,
    make_samples,
    make_trainer,
    reference_log_probs,
)

CPU = torch.device("cpu")


def _sample(prompt: list[int], response: list[int], index: int = 0) -> Sample:
    return Sample(index=index, group_index=0, prompt="", prompt_tokens=prompt, response_tokens=response)  # type: ignore[arg-type]


def test_rows_select_the_inputs_before_each_response_token() -> None:
    samples = [_sample([1, 2, 3], [4, 5]), _sample([6], [7, 8, 9], 1), _sample([10, 11], [], 2)]
    batch = build(samples, (0, 1, 2), device=CPU)
    assert batch.tokens_bs.tolist() == [[1, 2, 3, 4], [6, 7, 8, 0], [10, 0, 0, 0]]
    assert batch.position_ids_bs.tolist() == [[0, 1, 2, 3]] * 3
    assert batch.targets_N.tolist() == [4, 5, 7, 8, 9]
    # the rows belong to hidden states [s, b, h]: what the model read at each of them is the token before the target
    assert batch.tokens_bs.t().flatten()[batch.rows_N].tolist() == [3, 4, 6, 7, 8]
    assert batch.lengths == (2, 3, 0)


def test_length_is_rounded_up_for_sequence_parallelism() -> None:
    batch = build([_sample([1, 2], [3, 4])], (0,), device=CPU, length_multiple=4)
    assert batch.tokens_bs.tolist() == [[1, 2, 3, 0]]
    assert batch.rows_N.tolist() == [1, 2]


def test_split_and_join_are_inverse() -> None:
    samples = make_samples(3)
    batch = build(samples, (4, 2, 9), device=CPU)
    arrays = [np.arange(sample.response_length) + 100 * sample.index for sample in samples]
    joined = batch.join(arrays)
    back = batch.split(joined)
    assert list(back) == [4, 2, 9]
    assert all(np.array_equal(back[place], arrays[place]) for place in back)
    with pytest.raises(ValueError, match="values for a response of"):
        batch.join([array[1:] for array in arrays])


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 7 has an empty prompt"):
        build([_sample([], [1, 2], 7)], (0,), device=CPU)


def test_ranks_share_all_samples_and_alike() -> None:
    samples = make_samples(0)
    shares = [rank_share(samples, rank, 2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(12))
    assert len(shares[0]) == len(shares[1])
    lengths = [sum(len(samples[place].tokens) for place in share) for share in shares]
    assert abs(lengths[0] - lengths[1]) <= max(len(sample.tokens) for sample in samples)
    assert plan([5, 1, 4, 2, 3], 2) == [(5, 1), (4, 2), (3,)]


@pytest.mark.parametrize("micro_batch_size", [1, 4, 12])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_transformers(
    folders: dict[str, Path], micro_batch_size: int, temperature: float
) -> None:
    """Mixed lengths, one-token prompts and empty responses; a row off by one gives other numbers altogether."""
    samples = make_samples(1)
    assert min(len(sample.prompt_tokens) for sample in samples) == 1
    assert min(sample.response_length for sample in samples) == 0
    trainer = make_trainer(folders["qwen2"], micro_batch_size=micro_batch_size, rollout_temperature=temperature)
    found = trainer.score("student", samples)
    assert sorted(found) == list(range(len(samples)))
    model = load_reference(folders["qwen2"])
    for place, sample in enumerate(samples):
        assert found[place].dtype == np.float32
        expected = reference_log_probs(model, sample, temperature).detach().numpy()
        np.testing.assert_allclose(found[place], expected, rtol=0, atol=1e-5)


def test_a_token_outside_the_vocabulary_is_an_error(folders: dict[str, Path]) -> None:
    """The padded columns exist in memory; they are no tokens."""
    with pytest.raises(ValueError, match=f"token {VOCAB_SIZE} is not in the vocabulary of {VOCAB_SIZE}"):
        make_trainer(folders["qwen2"]).score("student", [_sample([1], [VOCAB_SIZE])])


@pytest.mark.parametrize("loss_type", ["policy_loss", "sft_loss"])
def test_a_step_without_trained_tokens_changes_nothing(folders: dict[str, Path], loss_type: str) -> None:
    samples = make_samples(0, count=4)
    for sample in samples[:2]:
        sample.loss_mask[:] = False
    empty = [_sample([1, 2, 3], [], index) for index in range(2)]
    for sample in empty:
        sample.advantages = np.zeros(0, dtype=np.float32)
        sample.teacher_scores = make_samples(0)[2].teacher_scores
        assert sample.teacher_scores is not None
    trainer = make_trainer(
        folders["qwen3"],
        loss_type=loss_type,
        use_opd=loss_type == "policy_loss",
        rollout_batch_size=4,
        micro_batch_size=2,
        weight_decay=0.0,
        lr=1e-2,
    )
    before = exported(trainer)
    metrics = trainer.train(samples[:2] + empty).metrics
    assert metrics is not None
    assert metrics["train/grad_norm"] == 0.0
    after = exported(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_empty_micro_batch_beside_a_full_one_adds_nothing(folders: dict[str, Path]) -> None:
    """The whole micro-batch is empty responses; the step is that of the other samples."""
    full = [sample for sample in make_samples(5) if sample.response_length > 0][:2]
    empty = [sample for sample in make_samples(5) if sample.response_length == 0][:2]
    flags = {"use_opd": True, "micro_batch_size": 2, "lr": 1e-2}
    with_empty = make_trainer(folders["qwen2"], rollout_batch_size=4, **flags)
    without = make_trainer(folders["qwen2"], rollout_batch_size=2, **flags)
    first, second = with_empty.train(full + empty).metrics, without.train(full).metrics
    assert first is not None
    assert first == pytest.approx(second, rel=1e-5, nan_ok=True)
