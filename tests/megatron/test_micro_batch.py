"""From samples to tensors: which hidden row predicts which token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opd_megatron.megatron.batching import BatchingRule, balanced_shares, fill_by_tokens, plan
from opd_megatron.megatron.micro_batch import SequenceLayout, build
from opd_megatron.megatron.packing import ContextSplit, describe
from opd_megatron.questions import LogProbs
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
    batch = build(samples, (0, 1, 2), device=CPU, layout=SequenceLayout())
    assert batch.tokens_bs.tolist() == [[1, 2, 3, 4], [6, 7, 8, 0], [10, 0, 0, 0]]
    assert batch.position_ids_bs.tolist() == [[0, 1, 2, 3]] * 3
    assert batch.targets_N.tolist() == [4, 5, 7, 8, 9]
    # the rows belong to hidden states [s, b, h]: what the model read at each of them is the token before the target
    assert batch.tokens_bs.t().flatten()[batch.rows_N].tolist() == [3, 4, 6, 7, 8]
    assert batch.lengths == (2, 3, 0)


def test_length_is_rounded_up_for_sequence_parallelism() -> None:
    batch = build([_sample([1, 2], [3, 4])], (0,), device=CPU, layout=SequenceLayout(length_multiple=4))
    assert batch.tokens_bs.tolist() == [[1, 2, 3, 0]]
    assert batch.rows_N.tolist() == [1, 2]


@pytest.mark.parametrize("layout", [SequenceLayout(), SequenceLayout(packed=True)], ids=["padded", "packed"])
def test_split_and_join_are_inverse(layout: SequenceLayout) -> None:
    samples = make_samples(3)
    batch = build(samples, (4, 2, 9), device=CPU, layout=layout)
    arrays = [np.arange(sample.response_length) + 100 * sample.index for sample in samples]
    joined = batch.join(arrays)
    back = batch.split(joined)
    assert list(back) == [4, 2, 9]
    assert all(np.array_equal(back[place], arrays[place]) for place in back)
    with pytest.raises(ValueError, match="values for a response of"):
        batch.join([array[1:] for array in arrays])


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 7 has an empty prompt"):
        build([_sample([], [1, 2], 7)], (0,), device=CPU, layout=SequenceLayout())


def test_packed_sequences_lie_end_to_end() -> None:
    samples = [_sample([1, 2, 3], [4, 5]), _sample([6], []), _sample([7], [8, 9, 10], 1)]
    batch = build(samples, (0, 1, 2), device=CPU, layout=SequenceLayout(packed=True, length_multiple=4))
    assert batch.tokens_bs.tolist() == [[1, 2, 3, 4, 7, 8, 9, 0]]
    assert batch.position_ids_bs.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.rows_N.tolist() == [2, 3, 4, 5, 6]
    assert batch.targets_N.tolist() == [4, 5, 8, 9, 10]
    assert batch.packed is not None
    assert batch.packed.cu_seqlens_q.tolist() == [0, 4, 4, 7, 8]
    assert batch.sequences_bsn is None


def test_routers_learn_which_sequence_a_position_is_of() -> None:
    samples = [_sample([1, 2, 3], [4, 5]), _sample([6], []), _sample([7], [8, 9, 10], 1)]
    first, last, padding = [1, 0, 0], [0, 0, 1], [0, 0, 0]
    packed = SequenceLayout(packed=True, length_multiple=4, for_experts=True)
    batch = build(samples, (0, 1, 2), device=CPU, layout=packed)
    assert batch.sequences_bsn is not None
    assert batch.sequences_bsn[0].int().tolist() == [first] * 4 + [last] * 3 + [padding]
    padded = build(samples, (0, 1, 2), device=CPU, layout=SequenceLayout(for_experts=True))
    assert padded.sequences_bsn is not None
    assert padded.sequences_bsn.int().tolist() == [[first] * 4, [padding] * 4, [last] * 3 + [padding]]


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_share_every_token_in_a_zigzag(size: int) -> None:
    samples = make_samples(5)
    layouts = [SequenceLayout(packed=True, split=ContextSplit(size, rank)) for rank in range(size)]
    batches = [build(samples, range(len(samples)), device=CPU, layout=layout) for layout in layouts]
    assert len({batch.tokens_bs.shape for batch in batches}) == 1
    split = ContextSplit(2, 0)
    assert split.positions(8).tolist() == [0, 1, 6, 7]
    assert split.positions(8, rank=1).tolist() == [2, 3, 4, 5]
    for place, sample in enumerate(samples):
        held = np.concatenate([batch.offsets[place] for batch in batches])
        assert sorted(held) == list(range(sample.response_length))
        whole = sum(batch.split(batch.targets_N)[place] for batch in batches)
        assert np.array_equal(whole, sample.response_tokens)
    for batch in batches:
        inputs, positions = batch.tokens_bs[0][batch.rows_N], batch.position_ids_bs[0][batch.rows_N]
        expected = [
            (sample.tokens[len(sample.prompt_tokens) - 1 + offset], len(sample.prompt_tokens) - 1 + offset)
            for sample, offsets in zip(samples, batch.offsets, strict=True)
            for offset in offsets
        ]
        assert list(zip(inputs.tolist(), positions.tolist(), strict=True)) == expected


@pytest.mark.parametrize("size", [1, 2])
def test_attention_rows_show_a_query_exactly_its_past(size: int) -> None:
    lengths = [12, 4, 8, 0, 4]
    for rank in range(size):
        split = ContextSplit(size, rank)
        packed = describe(lengths, split, for_torch=True)
        assert packed.rows_T is not None
        # a token's identity, as every rank's rows number it: sequence * 100 + position
        names = [
            np.concatenate([100 * i + split.positions(length, r) for i, length in enumerate(lengths)])
            for r in range(size)
        ]
        everyone = torch.from_numpy(np.concatenate(names))
        seen = []
        for bucket in packed.buckets:
            queries, keys = torch.from_numpy(names[rank])[bucket.queries_bq], everyone[bucket.keys_bk]
            causal = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril()
            mask = causal.expand(len(queries), -1, -1) if bucket.mask_b1qk is None else bucket.mask_b1qk[:, 0]
            seen += [
                (int(queries[b, q]), sorted(keys[b][mask[b, q]].tolist()))
                for b in range(len(queries))
                for q in range(queries.shape[1])
            ]
        for row, name in enumerate(names[rank]):
            first = name // 100 * 100
            assert seen[int(packed.rows_T[row])] == (name, list(range(first, name + 1)))


def test_an_empty_micro_batch_has_a_token_and_no_rows() -> None:
    split = ContextSplit(2, 1)
    for layout in (
        SequenceLayout(for_experts=True),
        SequenceLayout(packed=True, length_multiple=2, split=split, for_experts=True),
    ):
        batch = build(make_samples(0), (), device=CPU, layout=layout)
        assert batch.tokens_bs.numel() > 0
        assert len(batch.rows_N) == len(batch.targets_N) == 0
        assert batch.sequences_bsn is not None
        assert not batch.sequences_bsn.any()
        assert batch.split(torch.zeros(0)) == {}
        assert batch.join([np.ones(3, dtype=np.float32)]).shape == (0,)


def test_a_plan_holds_every_sample_once_and_as_many_micro_batches_everywhere() -> None:
    lengths = [5, 30, 7, 2, 19, 3, 40, 11, 6]
    for rule in (BatchingRule(2), BatchingRule(max_tokens=40), BatchingRule(3, count_multiple=4)):
        plans = plan(lengths, rule, ranks=2, cost=float)
        assert sorted(place for batches in plans for places in batches for place in places) == list(range(9))
        assert len({len(batches) for batches in plans}) == 1
        assert len(plans[0]) % rule.count_multiple == 0
    assert plan([4, 9, 6], BatchingRule(1), ranks=2, cost=float) == [[(1,), (0,)], [(2,), ()]]


def test_dynamic_micro_batches_fit_and_are_few() -> None:
    lengths = [5, 30, 7, 2, 19, 3, 41, 11, 6]
    filled = fill_by_tokens(range(9), lengths, 40)
    taken = [sum(lengths[place] for place in places) for places in filled]
    assert (6,) in filled
    assert all(total <= 40 for places, total in zip(filled, taken, strict=True) if places != (6,))
    assert len(filled) == 4
    costs = [float(length**2) for length in lengths]
    loads = [sum(costs[place] for place in share) for share in balanced_shares(costs, 3)]
    assert max(loads) == max(costs)


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
    found = trainer.ask(LogProbs("student"), samples)
    assert sorted(found) == list(range(len(samples)))
    model = load_reference(folders["qwen2"])
    for place, sample in enumerate(samples):
        assert found[place].dtype == np.float32
        expected = reference_log_probs(model, sample, temperature).detach().numpy()
        np.testing.assert_allclose(found[place], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1])
def test_a_token_outside_the_vocabulary_is_an_error(folders: dict[str, Path], token: int) -> None:
    """The padded columns exist in memory; they are no tokens. All models are asked for, in each pass."""
    trainer = make_trainer(folders["qwen2"], reference=folders["qwen2"], loss_type="sft_loss")
    samples = make_samples(1)
    samples[-1] = _sample([1, token], [2])
    for passes in (
        lambda: trainer.ask(LogProbs("student"), samples),
        lambda: trainer.ask(LogProbs("reference"), samples),
        lambda: trainer.train(samples),
    ):
        with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary of {VOCAB_SIZE}"):
            passes()


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
