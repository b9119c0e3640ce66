"""The critic of PPO: a second model in training, with its own optimizer and schedule, in the student's layout.

It sees tokens, loss masks and returns, and nothing of a teacher: no distillation term reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.checkpoint_paths import resolve_step
from opd_megatron.config.critic import critic_optimizer, critic_schedule_steps
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import StartingPoint
from opd_megatron.megatron import checkpoint
from opd_megatron.megatron.batching import MicroBatches
from opd_megatron.megatron.chunks import Entries
from opd_megatron.megatron.forward import run_micro_batches
from opd_megatron.megatron.frozen import build_of_kind
from opd_megatron.megatron.hf_weights import initialize_weights
from opd_megatron.megatron.learner import (
    apply_gradients,
    mean_over_steps,
    step_loss_weights,
    sum_over_data_parallel,
)
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.moe import set_load_balancing
from opd_megatron.megatron.offload import DeviceMemory, HostStore, let_leave
from opd_megatron.megatron.optimizer import build_optimizer, build_scheduler, gather_weights, wrap_model
from opd_megatron.megatron.schedule import keep_place
from opd_megatron.megatron.scoring import merge_parts
from opd_megatron.megatron.value_model import ValueModel
from opd_megatron.objectives.statistics import finalize_statistics, merge_statistics
from opd_megatron.objectives.values import value_objective
from opd_megatron.sample import Sample

PREFIX = "critic."
"""What stands before the names of the critic's tensors in a checkpoint of the student."""
_PARTS = ("critic weights", "critic gradients", "critic optimizer")
"""Names of what may leave the device."""


def holds_critic(folder: Path) -> bool:
    """Whether a step folder was saved with a critic."""
    return not (folder / "config.json").exists() and checkpoint.stores(folder, f"{PREFIX}value_head.weight")


def first_weights(options: Options, start: StartingPoint) -> StartingPoint:
    """Where the critic begins: a resumed run's own critic; else ``--critic-load``; else where the student does."""
    resumes = start.source == "load" and not options.checkpoint.finetune
    if resumes and holds_critic(start.folder):
        return start
    if options.objective.critic_load is not None:
        return StartingPoint("ref_load", resolve_step(options.objective.critic_load))
    return start


class Critic:
    """The value model of one rank, with what trains it. All methods are collective."""

    def __init__(
        self,
        options: Options,
        architecture: ModelArchitecture,
        start: StartingPoint,
        num_rollouts: int,
        memory: DeviceMemory,
        store: HostStore,
    ) -> None:
        self.options, self.memory = options, memory
        self.chunks = build_of_kind(ValueModel, options, architecture)
        first = first_weights(options, start)
        try:
            self._fill(first)
        except UserError as error:
            if first is start:
                raise
            raise UserError(f"--critic-load {error}: a critic has the student's architecture") from error
        set_load_balancing(self.chunks, options)
        settings = critic_optimizer(options)
        self.wrapped = wrap_model(self.chunks, settings)
        self.optimizer = build_optimizer(self.wrapped, settings)
        self.scheduler = build_scheduler(self.optimizer, settings, *critic_schedule_steps(options, num_rollouts))
        let_leave(memory, store, options.offload, self.chunks, self.optimizer, prefix="critic ")

    def _fill(self, start: StartingPoint) -> None:
        """A critic's weights where the folder has them; else a model's, below a head that says 0."""
        if start.source == "random":
            initialize_weights(self.chunks, self.options.training.seed)
        elif not holds_critic(start.folder):
            checkpoint.load_model_folder(self.chunks, start.folder)
        for chunk in self.chunks:
            chunk.add_head()
        if start.source != "random" and holds_critic(start.folder):
            checkpoint.load_model_folder(self.chunks, start.folder, PREFIX)

    @torch.no_grad()
    def values(self, samples: Sequence[Sample], steps: Sequence[MicroBatches]) -> dict[int, np.ndarray]:
        """``[T]`` float32: what the critic expects before each response token, by place in ``samples``.

        ``steps`` are this rank's micro-batches of each optimizer step.
        """

        def last_stage(batch: MicroBatch, values_N1: Tensor) -> dict[int, np.ndarray]:
            return batch.split(values_N1[:, 0])

        micro_batches = [places for step in steps for places in step]
        with self.memory.holding("critic weights"):
            return merge_parts(
                run_micro_batches(
                    self.chunks, self.chunks[-1], samples, micro_batches, last_stage, with_gradients=False
                )
            )

    def train(self, samples: Sequence[Sample], steps: Sequence[MicroBatches]) -> dict[str, float]:
        """Take the optimizer steps of a rollout, whose samples have values and returns; their metrics.

        As many as the student takes, with the same weights of tokens. The loss is measured on the last stage. Raises
        ``RunError`` if a gradient is not finite.
        """
        offload = self.options.offload
        needed = _PARTS[:2] if offload.offload_optimizer else _PARTS
        per_step, with_tokens = [], []
        with self.memory.holding(*needed):
            for number, micro_batches in [*enumerate(steps)] * self.options.objective.ppo_epochs:
                weights = step_loss_weights(self.options, samples, number)
                loss = ValueLoss(samples, weights, self.options.objective.value_clip)
                per_step.append(self._step(samples, micro_batches, loss))
                if any(weight.any() for weight in weights):
                    with_tokens.append(per_step[-1])
            if offload.offload_train:
                gather_weights(self.wrapped)
        return mean_over_steps(with_tokens or per_step)

    def _step(self, samples: Sequence[Sample], micro_batches: MicroBatches, loss: ValueLoss) -> dict[str, float]:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = run_micro_batches(self.wrapped, self.chunks[-1], samples, micro_batches, loss, with_gradients=True)
        offload = self.options.offload
        norm, rate, _ = apply_gradients(
            self.wrapped,
            self.optimizer,
            self.scheduler,
            holding=self.memory.holding("critic optimizer"),
            forget_copies=offload.offload_optimizer or offload.offload_train,
            rate_flag="--critic-lr",
        )
        metrics = {"train/critic_grad_norm": norm, "train/critic_lr": rate}
        if parallel_state.is_pipeline_last_stage():
            metrics |= finalize_statistics(sum_over_data_parallel(merge_statistics(results)))
        return metrics

    def saved(self, *, with_optimizer: bool) -> tuple[Entries, dict[str, Any]]:
        """What a checkpoint of the student holds of the critic: this rank's pieces, and what is not sharded.

        Inside :meth:`on_device`.
        """
        gather_weights(self.wrapped)
        optimizer = self.optimizer if with_optimizer else None
        entries, common = checkpoint.entries_of(self.chunks, optimizer, self.scheduler)
        return checkpoint.renamed(entries, PREFIX), {"critic": common}

    def on_device(self) -> Any:
        """A context in which weights and optimizer are on the device."""
        return self.memory.holding("critic weights", "critic optimizer")

    def resume(self, source: Path) -> None:
        """Go on as the critic in a step folder of a run, whose weights it has; a new one begins if there is none.

        Raises ``UserError`` if there is none and ``--critic-load`` does not say where a new one comes from, or if
        its optimizer's state is not there.
        """
        if not holds_critic(source):
            if self.options.objective.critic_load is None:
                raise UserError(
                    f"{source} was saved without a critic: name the weights that a new one begins with by --critic-load"
                )
            return
        if self.options.checkpoint.no_load_optim:
            return
        with self.on_device():
            common = checkpoint.read_common(source)
            saved = common.get("critic", {})
            checkpoint.load_optimizer(source, saved, self.chunks, self.optimizer, self.scheduler, PREFIX)
        keep_place(self.scheduler, self.options, common["run"], of_critic=True)


@dataclass(frozen=True)
class ValueLoss:
    """The critic's loss of any micro-batch of one optimizer step, called on the last pipeline stage.

    ``loss_weights`` hold one ``[T]`` array for each of ``samples`` that the step trains on.
    """

    samples: Sequence[Sample]
    loss_weights: Sequence[np.ndarray]
    value_clip: float

    def __call__(self, batch: MicroBatch, values_N1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return value_objective(
            values_N1[:, 0],
            batch.join([_present(sample.values, "values") for sample in self.samples]),
            batch.join([_present(sample.returns, "returns") for sample in self.samples]),
            batch.join(self.loss_weights),
            batch.join([sample.loss_mask for sample in self.samples]),
            self.value_clip,
        )


def _present(array: np.ndarray | None, what: str) -> np.ndarray:
    if array is None:
        raise ValueError(f"the critic is trained on samples with {what}")
    return array
