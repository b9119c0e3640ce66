"""What a loss asks for by name exists, and what the samples do not all have is an error."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from opd_megatron.config.options import ObjectiveOptions, OpdOptions
from opd_megatron.megatron.loss_inputs import BASELINES, LOSSES, LossInputs, StepLoss
from opd_megatron.megatron.micro_batch import SequenceLayout, build
from opd_megatron.objectives.losses import PolicyInputs
from tests.megatron.support import make_options, make_samples


def _choices(group: type, name: str) -> set[str]:
    (found,) = [item.metadata["choices"] for item in fields(group) if item.name == name]
    return set(found)


def test_every_choice_has_a_loss_a_baseline_and_its_inputs() -> None:
    assert set(LOSSES) == _choices(ObjectiveOptions, "loss_type")
    assert set(BASELINES) == _choices(OpdOptions, "opd_baseline")
    assert [item.name for item in fields(PolicyInputs) if not hasattr(LossInputs, item.name)] == []


def _inputs(samples: list[Any], **flags: Any) -> LossInputs:
    weights = [np.ones(sample.response_length, dtype=np.float32) for sample in samples]
    # the fields of the samples need no model
    step = StepLoss(make_options(**flags), None, samples, weights)  # type: ignore[arg-type]
    batch = build(samples, (3, 1), device=torch.device("cpu"), layout=SequenceLayout())
    return LossInputs(step, batch, torch.zeros(len(batch.targets_N), 4))


def test_fields_are_joined_in_the_order_of_the_micro_batch() -> None:
    samples = make_samples(seed=0)
    for place, sample in enumerate(samples):
        sample.ref_log_probs = np.full(sample.response_length, -float(place), dtype=np.float32)
    inputs = _inputs(samples, use_opd=True)
    lengths = [samples[place].response_length for place in (3, 1)]
    assert inputs.ref_log_probs_N is not None
    assert inputs.ref_log_probs_N.tolist() == [-3.0] * lengths[0] + [-1.0] * lengths[1]
    assert inputs.old_log_probs_N is None
    scores = samples[3].teacher_scores
    assert scores is not None
    assert inputs.teacher_valid_N is not None
    assert inputs.teacher_valid_N[: lengths[0]].tolist() == scores.valid_T.tolist()


def test_what_is_missing_is_an_error() -> None:
    samples = make_samples(seed=0)
    samples[5].old_log_probs = np.zeros(samples[5].response_length)
    with pytest.raises(ValueError, match="some samples of the rollout lack a field"):
        _ = _inputs(samples).old_log_probs_N
    for sample in samples:
        sample.advantages = sample.teacher_scores = None
    with pytest.raises(ValueError, match="no advantages"):
        _ = _inputs(samples).advantages_N
    with pytest.raises(ValueError, match="no teacher scores"):
        _ = _inputs(samples, use_opd=True).teacher_log_probs_N
    assert _inputs(samples).teacher_log_probs_N is None
