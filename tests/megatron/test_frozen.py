"""Frozen models with a precision and micro-batches of their own, and what is kept of the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_megatron.megatron.frozen import FrozenScorer
from opd_megatron.megatron.teacher_rows import TeacherRows
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import LogProbs
from opd_megatron.sample import TeacherScores
from tests.megatron.support import (
    load_reference,
    make_samples,
    make_trainer,
    reference_log_probs,
)


def _distil(trainer: MegatronTrainer) -> dict[str, float]:
    """Metrics of a step with the exact KL."""
    samples = make_samples(3)
    scores = trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    for place, sample in enumerate(samples):
        sample.teacher_scores = TeacherScores(log_probs_T=scores[place])
    metrics = trainer.train(samples).metrics
    assert metrics is not None
    return metrics


def _dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize(("bf16", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_the_teacher_has_a_precision_of_its_own(
    folders: dict[str, Path], teacher_folder: Path, bf16: bool, dtype: str
) -> None:
    """A float32 teacher is exact beside a bfloat16 student, and the other way round it is rounded."""
    trainer = make_trainer(
        folders["qwen2"],
        teacher=teacher_folder,
        reference=folders["qwen2"],
        bf16=bf16,
        opd_teacher_dtype=dtype,
        use_opd=True,
    )
    assert _dtypes(trainer.scorers.frozen["teacher"].model) == {getattr(torch, dtype)}
    own = torch.bfloat16 if bf16 else torch.float32
    assert _dtypes(trainer.student) == _dtypes(trainer.scorers.frozen["reference"].model) == {own}
    samples, model = make_samples(3), load_reference(teacher_folder)
    scores = trainer.ask(LogProbs("teacher"), samples)
    with torch.no_grad():
        expected = np.concatenate([reference_log_probs(model, sample).numpy() for sample in samples])
    error = np.abs(np.concatenate([scores[place] for place in range(len(samples))]) - expected).max()
    assert error < 1e-5 if bf16 else 1e-4 < error < 0.3
    assert _distil(trainer)["opd/reverse_kl_exact"] > 0.1


@pytest.mark.parametrize("own", [{"opd_teacher_micro_batch_size": 4}, {"opd_teacher_max_tokens_per_gpu": 50}])
def test_the_teacher_s_micro_batches_change_nothing_but_their_size(
    folders: dict[str, Path], teacher_folder: Path, own: dict[str, int]
) -> None:
    settings: dict[str, Any] = {"teacher": teacher_folder, "use_opd": True, "opd_baseline": "kl"}
    expected = _distil(make_trainer(folders["qwen3"], **settings))
    trainer = make_trainer(folders["qwen3"], **settings, **own)
    seen: list[int] = []
    model = trainer.scorers.frozen["teacher"].model
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numel()))
    assert _distil(trainer) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    if "opd_teacher_micro_batch_size" in own:
        assert len(seen) == 3
    else:
        assert max(seen) <= 50
        assert len(seen) < 12


def test_hidden_states_are_kept_in_half_the_bytes(
    folders: dict[str, Path], teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_kept: list[int] = []
    keep = TeacherRows.keep

    def counted(self: TeacherRows, *arguments: Any) -> None:
        keep(self, *arguments)
        bytes_kept.append(sum(rows.nbytes for rows in self._rows.values()))

    monkeypatch.setattr(TeacherRows, "keep", counted)
    settings: dict[str, Any] = {"teacher": teacher_folder, "use_opd": True}
    exact = _distil(make_trainer(folders["qwen3"], **settings))["opd/reverse_kl_exact"]
    most = max(bytes_kept)
    bytes_kept.clear()
    rounded = _distil(make_trainer(folders["qwen3"], **settings, opd_teacher_hidden_dtype="bfloat16"))
    tokens = sum(sample.response_length for sample in make_samples(3))
    assert (most, max(bytes_kept)) == (tokens * 48 * 4, tokens * 48 * 2)
    assert rounded["opd/reverse_kl_exact"] != exact
    assert rounded["opd/reverse_kl_exact"] == pytest.approx(exact, rel=1e-2)


def test_nothing_of_the_teacher_is_kept_where_nobody_asks(
    folders: dict[str, Path], teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rows(*arguments: Any) -> None:
        raise AssertionError("hidden rows were kept")

    monkeypatch.setattr(TeacherRows, "keep", no_rows)
    trainer = make_trainer(folders["qwen3"], teacher=teacher_folder, use_opd=True)
    assert isinstance(trainer.scorers.frozen["teacher"], FrozenScorer)
    assert len(trainer.ask(LogProbs("teacher"), make_samples(3))) == 12
