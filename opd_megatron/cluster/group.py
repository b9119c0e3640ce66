"""The trainer as the loop sees it: a group of ranks behind one set of calls, in this process or in Ray actors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.trainer import MegatronTrainer, TrainerSpec, TrainResult
from opd_megatron.questions import Question
from opd_megatron.sample import Sample


class TrainerError(RunError):
    """A rank of the trainer failed; the message names it and its error."""


class TrainerGroup(ABC):
    """All ranks of the trainer. What they find is merged here, and is in the order of the samples."""

    @abstractmethod
    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What a method of the trainer returns on each rank, in their order; what it yields as a whole."""

    @abstractmethod
    def close(self) -> None:
        """End the ranks; safe to repeat."""

    def ask(self, question: Question, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See :class:`~opd_megatron.questions.Respondent`."""
        return merge_arrays(self._all("ask", question, samples), len(samples))

    def gradient_diagnostics(self, samples: Sequence[Sample], rollout_id: int) -> dict[str, float]:
        """Parts and noise of the gradient of the first optimizer step that the samples will make."""
        found: dict[str, float] = self._all("gradient_diagnostics", samples, rollout_id)[0]
        return found

    def train(self, samples: Sequence[Sample], rollout_id: int = 0) -> tuple[dict[str, float], list[np.ndarray]]:
        """Take the optimizer steps of a rollout; metrics, and the student's log-probabilities before them."""
        results: list[TrainResult] = self._all("train", samples, rollout_id)
        (metrics,) = [result.metrics for result in results if result.metrics is not None]
        return metrics, merge_arrays([result.log_probs for result in results], len(samples))

    def resume(self) -> dict[str, Any] | None:
        """Restore a trainer's state if the run starts from one; its run state, or None."""
        return self._all("resume")[0]

    def export_weights(self, name: str = "student") -> Iterable[tuple[str, Tensor]]:
        """The student, or a frozen model, as Hugging Face tensors."""
        exported: Iterable[tuple[str, Tensor]] = self._all("export_weights", name)[0]
        return exported

    def save(self, folder: Path, step: int, hf_folder: Path, run_state: dict[str, Any]) -> None:
        """Write a checkpoint; raises ``RunError`` if it cannot be written."""
        self._all("save", folder, step, hf_folder, run_state)

    def peak_memory_bytes(self) -> int:
        """The largest memory of any rank so far."""
        return int(max(self._all("peak_memory_bytes")))


def merge_arrays(parts: Iterable[dict[int, np.ndarray]], count: int) -> list[np.ndarray]:
    """Arrays by place from all ranks, in order; raises ``RuntimeError`` if a place is missing."""
    merged: dict[int, np.ndarray] = {}
    for part in parts:
        merged.update(part)
    if sorted(merged) != list(range(count)):
        raise RuntimeError(f"the trainer's ranks returned {len(merged)} of {count} samples")
    return [merged[place] for place in range(count)]


class LocalTrainerGroup(TrainerGroup):
    """World size 1: the trainer runs in this process, so a debugger and a profiler see it."""

    def __init__(self, spec: TrainerSpec) -> None:
        self._trainer = MegatronTrainer(spec, Rendezvous())

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self._trainer, method)(*arguments)]

    def close(self) -> None:
        self._trainer.close()


def start_trainer_group(spec: TrainerSpec) -> TrainerGroup:
    """In this process for world size 1, else one Ray actor per rank."""
    if spec.options.world_size == 1:
        return LocalTrainerGroup(spec)
    from opd_megatron.cluster.ray_group import RayTrainerGroup

    return RayTrainerGroup(spec)
