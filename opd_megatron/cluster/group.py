"""The trainer as the loop sees it: a group of ranks behind one set of calls, in this process or in Ray actors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.frozen import ModelName
from opd_megatron.megatron.trainer import MegatronTrainer, TrainerSpec, TrainResult, peak_memory_bytes
from opd_megatron.megatron.write_errors import writing
from opd_megatron.sample import Sample


class TrainerError(RunError):
    """A rank of the trainer failed; the message names it and its error."""


class TrainerGroup(Protocol):
    """All ranks of the trainer. Results are merged and in the order of the samples."""

    def resume(self) -> dict[str, Any] | None:
        """Restore a trainer's state if the run starts from one; its run state, or None."""

    def score(
        self,
        name: ModelName,
        samples: Sequence[Sample],
        *,
        keep_hidden: bool = False,
        temperature: float | None = None,
    ) -> list[np.ndarray]:
        """Log-probabilities ``[T]`` float32 of each response under a model, at the rollout temperature or another."""

    def values(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """What the critic expects before each response token, ``[T]`` float32 per sample."""

    def top_ids(self, samples: Sequence[Sample], k: int) -> list[np.ndarray]:
        """Ids ``[T, k]`` int32 of the student's most probable tokens at each response position."""

    def token_statistics(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Log-probability, entropy and divergence from the teacher ``[T, 3]`` float32 of each response."""

    def token_diagnostics(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """What student and teacher think at each response token: structured arrays ``[T]``."""

    def gradient_diagnostics(self, samples: Sequence[Sample], rollout_id: int) -> dict[str, float]:
        """Parts and noise of the gradient of the first optimizer step that the samples will make."""

    def train(self, samples: Sequence[Sample], rollout_id: int = 0) -> tuple[dict[str, float], list[np.ndarray]]:
        """Take the optimizer steps of a rollout; metrics, and the student's log-probabilities before them."""

    def export_weights(self, name: ModelName = "student") -> Iterable[tuple[str, Tensor]]:
        """The student, or a frozen model, as Hugging Face tensors."""

    def save(self, folder: Path, step: int, hf_folder: Path, run_state: dict[str, Any]) -> None:
        """Write a checkpoint."""

    def peak_memory_bytes(self) -> int:
        """The largest memory of any rank so far."""

    def close(self) -> None:
        """End the ranks; safe to repeat."""


def merge_arrays(parts: Iterable[dict[int, np.ndarray]], count: int) -> list[np.ndarray]:
    """Arrays by place from all ranks, in order; raises ``RuntimeError`` if a place is missing."""
    merged: dict[int, np.ndarray] = {}
    for part in parts:
        merged.update(part)
    if sorted(merged) != list(range(count)):
        raise RuntimeError(f"the trainer's ranks returned {len(merged)} of {count} samples")
    return [merged[place] for place in range(count)]


def merge_results(results: Sequence[TrainResult], count: int) -> tuple[dict[str, float], list[np.ndarray]]:
    """One rank reports the metrics; log-probabilities come from all data-parallel ranks."""
    (metrics,) = [result.metrics for result in results if result.metrics is not None]
    return metrics, merge_arrays([result.log_probs for result in results], count)


class LocalTrainerGroup:
    """World size 1: the trainer runs in this process, so a debugger and a profiler see it."""

    def __init__(self, spec: TrainerSpec) -> None:
        self._trainer = MegatronTrainer(spec, Rendezvous())

    def resume(self) -> dict[str, Any] | None:
        return self._trainer.resume()

    def score(
        self,
        name: ModelName,
        samples: Sequence[Sample],
        *,
        keep_hidden: bool = False,
        temperature: float | None = None,
    ) -> list[np.ndarray]:
        scored = self._trainer.score(name, samples, keep_hidden=keep_hidden, temperature=temperature)
        return merge_arrays([scored], len(samples))

    def values(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        return merge_arrays([self._trainer.values(samples)], len(samples))

    def top_ids(self, samples: Sequence[Sample], k: int) -> list[np.ndarray]:
        return merge_arrays([self._trainer.top_ids(samples, k)], len(samples))

    def token_statistics(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        return merge_arrays([self._trainer.token_statistics(samples)], len(samples))

    def token_diagnostics(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        return merge_arrays([self._trainer.token_diagnostics(samples)], len(samples))

    def gradient_diagnostics(self, samples: Sequence[Sample], rollout_id: int) -> dict[str, float]:
        return self._trainer.gradient_diagnostics(samples, rollout_id)

    def train(self, samples: Sequence[Sample], rollout_id: int = 0) -> tuple[dict[str, float], list[np.ndarray]]:
        return merge_results([self._trainer.train(samples, rollout_id)], len(samples))

    def export_weights(self, name: ModelName = "student") -> Iterable[tuple[str, Tensor]]:
        return self._trainer.export_weights(name)

    def save(self, folder: Path, step: int, hf_folder: Path, run_state: dict[str, Any]) -> None:
        with writing(folder):
            self._trainer.save(folder, step, hf_folder, run_state)

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes()

    def close(self) -> None:
        self._trainer.close()


def start_trainer_group(spec: TrainerSpec) -> TrainerGroup:
    """In this process for world size 1, else one Ray actor per rank."""
    if spec.options.world_size == 1:
        return LocalTrainerGroup(spec)
    from opd_megatron.cluster.ray_group import RayTrainerGroup

    return RayTrainerGroup(spec)
