"""What leaves the device: live bytes in every phase, and the same numbers as with everything on the device."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config.errors import RunError
from opd_megatron.config.resolve import StartingPoint, resolve_step
from opd_megatron.megatron import learner, offload
from opd_megatron.megatron.offload import HostStore, Part
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import LogProbs
from opd_megatron.sample import TeacherScores
from tests.megatron.support import (
    assert_equal_tensors,
    exported,
    make_samples,
    make_trainer,
    optimizer_state,
)

ALL = {"offload_teacher": True, "offload_optimizer": True, "offload_train": True}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32-distributed": {"use_distributed_optimizer": True},
    "bf16": {"bf16": True, "accumulate_allreduce_grads_in_fp32": True},
    "bf16-distributed": {"bf16": True, "use_distributed_optimizer": True},
    "sgd": {"optimizer": "sgd"},
}
TRAINING: dict[str, Any] = {"lr": 2e-3, "use_opd": True, "opd_baseline": "kl", "use_kl_loss": True, "kl_loss_coef": 0.1}


def _rollout(trainer: MegatronTrainer, number: int) -> dict[str, float]:
    """Score and train one rollout, as the loop does it."""
    samples = make_samples(number)
    scores = trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    references = trainer.ask(LogProbs("reference"), samples)
    for place, sample in enumerate(samples):
        sample.teacher_scores = TeacherScores(log_probs_T=scores[place])
        sample.ref_log_probs = references[place]
    metrics = trainer.train(samples).metrics
    assert metrics is not None
    assert metrics["opd/reverse_kl_exact"] > 0.1, "the teacher's rows outlast the scoring of the reference"
    return metrics


def _make(folders: dict[str, Path], teacher: Path, **flags: Any) -> MegatronTrainer:
    return make_trainer(folders["qwen3"], teacher=teacher, reference=folders["qwen3"], **TRAINING, **flags)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mapped", [False, True], ids=["memory", "file"])
def test_offloading_changes_no_bit(
    folders: dict[str, Path], teacher_folder: Path, tmp_path: Path, precision: str, mapped: bool
) -> None:
    """Weights, metrics and optimizer over three rollouts, with a save and a resume between them."""
    flags = PRECISIONS[precision]
    resident = _make(folders, teacher_folder, **flags)
    expected = [_rollout(resident, number) for number in range(3)]
    weights, state = exported(resident), optimizer_state(resident)
    away = flags | ALL | ({"offload_dir": str(tmp_path / "away")} if mapped else {})
    trainer = _make(folders, teacher_folder, **away)
    found = [_rollout(trainer, number) for number in range(2)]
    trainer.save(tmp_path, 2, folders["qwen3"], {"rollouts": 2})
    start = StartingPoint("load", resolve_step(tmp_path))
    for source in (trainer, _make(folders, teacher_folder, start=start, **away)):
        if source is not trainer:
            assert source.resume() is not None
        assert [*found, _rollout(source, 2)] == expected
        assert_equal_tensors(exported(source), weights)
        assert_equal_tensors(optimizer_state(source), state)
    if mapped:
        assert list((tmp_path / "away").iterdir()) == [], "the files have no names, so that none is left behind"


def _storages(tensors: Any) -> dict[int, int]:
    """Bytes of the storages behind tensors, by identity."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in found}


def _model_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


class Ledger:
    """Live bytes of each kind at the moments when models and the optimizer work, counted tensor by tensor."""

    def __init__(self, trainer: MegatronTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer = trainer
        self.seen: dict[str, list[dict[str, int]]] = {"teacher": [], "reference": [], "student": [], "step": []}
        for name, model in self._models().items():
            model.register_forward_pre_hook(lambda *_, name=name: self.seen[name].append(self.count()))
        step = learner.optimizer_step

        def counted(optimizer: Any) -> float:
            norm = step(optimizer)
            self.seen["step"].append(self.count())
            return norm

        monkeypatch.setattr(learner, "optimizer_step", counted)

    def _models(self) -> dict[str, torch.nn.Module]:
        frozen = {str(name): scorer.model for name, scorer in self.trainer.scorers.frozen.items()}
        return {"student": self.trainer.student, **frozen}

    def count(self) -> dict[str, int]:
        student = self.trainer.student
        found = {name: sum(_storages(model.parameters()).values()) for name, model in self._models().items()}
        gradients = _storages(parameter.main_grad for parameter in student.parameters())
        found["gradients"] = sum(gradients.values())
        others = {*_storages(student.parameters()), *gradients}
        state = _storages(tensor for tensor in offload.tensors_of(self.trainer.optimizer) if tensor.dim())
        found["optimizer"] = sum(size for key, size in state.items() if key not in others)
        return found


def _phases(
    trainer: MegatronTrainer, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, set[str]], dict[str, list[dict[str, int]]]]:
    """Which kinds have live bytes in each phase of the second rollout and between rollouts."""
    ledger = Ledger(trainer, monkeypatch)
    _rollout(trainer, 0)
    for counts in ledger.seen.values():
        counts.clear()
    _rollout(trainer, 1)
    ledger.seen["between"] = [ledger.count()]
    present = {
        phase: {kind for count in counts for kind in count if count[kind]} for phase, counts in ledger.seen.items()
    }
    return present, ledger.seen


EVERYTHING = {"student", "gradients", "optimizer", "teacher", "reference"}
TRAINED = {"student", "gradients", "optimizer"}


@pytest.mark.parametrize("precision", ["fp32", "bf16-distributed"])
@pytest.mark.parametrize(
    ("flags", "teacher", "student", "step", "between"),
    [
        ({}, EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING),
        (
            {"offload_teacher": True},
            TRAINED | {"teacher"},
            TRAINED,
            TRAINED,
            TRAINED,
        ),
        (
            {"offload_optimizer": True},
            EVERYTHING - {"optimizer"},
            EVERYTHING - {"optimizer"},
            EVERYTHING,
            EVERYTHING - {"optimizer"},
        ),
        (
            {"offload_train": True},
            {"teacher", "reference"},
            EVERYTHING,
            EVERYTHING,
            {"teacher", "reference"},
        ),
        (ALL, {"teacher"}, {"student", "gradients"}, TRAINED, set()),
    ],
    ids=["nothing", "teacher", "optimizer", "train", "all"],
)
def test_who_has_memory_on_the_device_in_each_phase(
    folders: dict[str, Path],
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    flags: dict[str, Any],
    teacher: set[str],
    student: set[str],
    step: set[str],
    between: set[str],
) -> None:
    trainer = _make(folders, teacher_folder, **PRECISIONS[precision], **flags)
    present, counts = _phases(trainer, monkeypatch)
    assert {phase: present[phase] for phase in ("teacher", "student", "step", "between")} == {
        "teacher": teacher,
        "student": student,
        "step": step,
        "between": between,
    }
    gone = {"teacher"} if "offload_teacher" in flags else set()
    assert present["reference"] == (teacher - gone) | {"reference"}
    parameters = _model_bytes(trainer.student)
    with trainer.memory.holding("weights"):
        numbers = sum(parameter.numel() for parameter in trainer.student.parameters())
        assert parameters == numbers * (2 if "bf16" in precision else 4)
    held = counts["step"][-1]
    assert held["student"] >= parameters
    assert held["gradients"] >= parameters
    assert held["optimizer"] >= numbers * (12 if "bf16" in precision else 8)


def _bytes_alive() -> int:
    """Storages of all tensors of numbers in this process; what lies on the host lies there as bytes."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return sum(_storages(tensor for tensor in tensors if tensor.is_floating_point()).values())


def test_no_copy_stays_on_the_device(folders: dict[str, Path], teacher_folder: Path, tmp_path: Path) -> None:
    before = _bytes_alive()
    trainer = _make(folders, teacher_folder, offload_dir=str(tmp_path), **ALL)
    whole = 0
    for number in range(2):
        _rollout(trainer, number)
        left = _bytes_alive() - before
        with trainer.memory.holding("weights", "gradients", "optimizer", "teacher", "reference"):
            whole = _bytes_alive() - before
    assert left < 0.01 * whole


def test_constant_contents_are_written_once_and_discarded_ones_never(tmp_path: Path) -> None:
    store, weight = HostStore(tmp_path), torch.arange(6.0).view(2, 3)
    view = weight[1]
    frozen = Part(lambda: [weight], store, constant=True)
    for _ in range(2):
        frozen.leave()
        assert weight.untyped_storage().nbytes() == 0
        frozen.come_back()
        assert view.tolist() == [3.0, 4.0, 5.0]
        weight.zero_()  # comes back as it was when it left first
    dropped = Part(lambda: [weight], store, discarded=True)
    weight.fill_(7.0)
    dropped.leave()
    dropped.come_back()
    assert weight.sum() == 0


def test_a_folder_without_space_ends_the_run_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"--offload-dir .*no room for 8 bytes \(No space left on device\)"):
        HostStore(tmp_path).take(8)
    assert list(tmp_path.iterdir()) == []
