"""The trainer of one rank: the student with its optimizer, and the frozen models that score the same samples.

Every rank gets the whole rollout and works on its own share of it. All methods are collective: each rank calls them in
the same order with the same arguments. Results come from the ranks that hold them (last pipeline stage, first tensor
rank) and are empty elsewhere; the controller merges them.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.critic import has_critic
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import (
    StartingPoint,
    check_optimizer_kind,
    optimizer_kind,
    schedule_steps,
)
from opd_megatron.megatron import checkpoint, cpu, distributed
from opd_megatron.megatron.batching import MicroBatches
from opd_megatron.megatron.chunks import Entries
from opd_megatron.megatron.critic import Critic
from opd_megatron.megatron.forward import check_tokens, run_micro_batches
from opd_megatron.megatron.frozen import FrozenModel, ModelName, build_from_options
from opd_megatron.megatron.gradient_diagnostics import gradient_diagnostics
from opd_megatron.megatron.hf_weights import export_hf_weights, initialize_weights
from opd_megatron.megatron.learner import (
    SKIPPED_STEPS,
    apply_gradients,
    of_rollout,
    step_loss_weights,
    sum_over_data_parallel,
)
from opd_megatron.megatron.loss_inputs import StepLoss
from opd_megatron.megatron.moe import router_statistics, set_load_balancing
from opd_megatron.megatron.offload import DeviceMemory, HostStore, let_leave
from opd_megatron.megatron.optimizer import (
    build_optimizer,
    build_scheduler,
    gather_weights,
    wrap_model,
)
from opd_megatron.megatron.prompts import PromptReading
from opd_megatron.megatron.schedule import keep_place, schedule_state
from opd_megatron.megatron.scorers import Scorers
from opd_megatron.megatron.scoring import merge_parts, reports, response_top_ids
from opd_megatron.megatron.step_folders import remove_old_steps
from opd_megatron.megatron.student_tokens import student_tokens
from opd_megatron.megatron.write_errors import writing
from opd_megatron.objectives.statistics import finalize_statistics, merge_statistics
from opd_megatron.questions import LogProbs, Question, StudentTokens, TopIds, Values
from opd_megatron.sample import Sample


@dataclass(frozen=True)
class TrainerSpec:
    """All that a rank needs to build its models; picklable, the same on every rank."""

    options: Options
    architecture: ModelArchitecture
    start: StartingPoint
    num_rollouts: int
    frozen: dict[ModelName, FrozenModel] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """Metrics of one rollout's optimizer steps, and the student's log-probabilities by place in the list of samples.

    ``log_probs`` hold the rank's share under the weights before the first optimizer step that saw the sample.
    ``metrics`` are means over the steps that had a token to train on (the others have no mean over tokens), and None on
    ranks other than the reporting one.
    """

    metrics: dict[str, float] | None
    log_probs: dict[int, np.ndarray]


class MegatronTrainer:
    """Builds the models of ``spec`` in the process group of ``rendezvous``."""

    def __init__(self, spec: TrainerSpec, rendezvous: distributed.Rendezvous) -> None:
        self.spec = spec
        self.options = spec.options
        distributed.initialize(rendezvous, self.options.parallel, seed=self.options.training.seed)
        self.chunks = build_from_options(self.options, spec.architecture)
        self.student = self.chunks[-1]
        if spec.start.source == "random":
            initialize_weights(self.chunks, self.options.training.seed)
        else:
            checkpoint.load_model_folder(self.chunks, spec.start.folder)
        set_load_balancing(self.chunks, self.options)
        self.wrapped = wrap_model(self.chunks, self.options.optimizer)
        self.optimizer = build_optimizer(self.wrapped, self.options.optimizer)
        decay, warmup = schedule_steps(self.options, spec.num_rollouts)
        self.scheduler = build_scheduler(self.optimizer, self.options.optimizer, decay, warmup)
        store = HostStore(None if self.options.offload.offload_dir is None else Path(self.options.offload.offload_dir))
        self.memory = DeviceMemory()
        let_leave(self.memory, store, self.options.offload, self.chunks, self.optimizer)
        self.critic: Critic | None = None
        if has_critic(self.options):
            start, length = spec.start, spec.num_rollouts
            self.critic = Critic(self.options, spec.architecture, start, length, self.memory, store)
        self.scorers = Scorers(self.options, spec.architecture, self.chunks, spec.frozen, self.memory, store)
        self.average = self.scorers.average

    def resume(self) -> dict[str, Any] | None:
        """Restore what ``--load`` holds beside the weights if the run goes on from a trainer's checkpoint.

        Raises ``UserError`` if its optimizer is of another kind than this run's.
        """
        options, start = self.options.checkpoint, self.spec.start
        if start.source != "load" or options.finetune or not checkpoint.has_training_state(start.folder):
            return None
        if self.average is not None:
            with self.memory.holding("teacher"):
                self.average.restore(start.folder)
        if self.critic is not None:
            self.critic.resume(start.folder)
        with self.memory.holding("weights", "optimizer"):
            state = checkpoint.load_training_state(
                start.folder,
                self.chunks,
                self.optimizer,
                self.scheduler,
                check=lambda state: check_optimizer_kind(self.options, state.get("optimizer", {})),
                with_optimizer=not options.no_load_optim,
                with_rng=not options.no_load_rng,
            )
        if not options.no_load_optim:
            keep_place(self.scheduler, self.options, state)
        return state

    def _share(self, samples: Sequence[Sample]) -> list[MicroBatches]:
        """This rank's micro-batches for each optimizer step: consecutive global batches, shared out over the ranks."""
        rank = parallel_state.get_data_parallel_rank()
        return [step[rank] for step in self.scorers.student.steps(samples)]

    def _micro_batches(self, samples: Sequence[Sample]) -> MicroBatches:
        """This rank's, one after the other; raises ``ValueError`` for a token outside the vocabulary."""
        check_tokens(samples, self.spec.architecture.vocab_size)
        return [places for step in self._share(samples) for places in step]

    def ask(self, question: Question, samples: Sequence[Sample]) -> dict[int, np.ndarray]:
        """The answer for this rank's share of ``samples``, by place in them: see :mod:`opd_megatron.questions`.

        Raises ``ValueError`` for a token outside the model's vocabulary, and for values without a critic.
        """
        match question:
            case LogProbs():
                return self.scorers.log_probs(question, samples)
            case Values():
                return self._values(samples)
            case TopIds(k):
                micro_batches = self._micro_batches(samples)
                with self.memory.holding("weights"):
                    return response_top_ids(self.chunks, samples, micro_batches, k)
            case StudentTokens():
                return self._student_tokens(question, samples)

    def _values(self, samples: Sequence[Sample]) -> dict[int, np.ndarray]:
        check_tokens(samples, self.spec.architecture.vocab_size)
        if self.critic is None:
            raise ValueError("--advantage-estimator ppo alone has a critic")
        return self.critic.values(samples, self._share(samples))

    def _student_tokens(self, question: StudentTokens, samples: Sequence[Sample]) -> dict[int, np.ndarray]:
        micro_batches = self._micro_batches(samples)
        # kept rows are of prompts, too
        compares = self.options.opd.opd_include_prompt and (question.divergence or question.diagnostics)
        reading = PromptReading.of(samples, compares)
        with self.memory.holding("weights"):
            return reading.cut(
                student_tokens(self.chunks, self.options, reading.read, micro_batches, self.scorers.kept_rows, question)
            )

    def gradient_diagnostics(self, samples: Sequence[Sample], rollout_id: int) -> dict[str, float]:
        """Shares and noise of the gradient of the first optimizer step, which is not taken: the same on every rank.

        See :func:`~opd_megatron.objectives.gradients.gradient_statistics`; with advantages as for :meth:`train`.
        """
        with self.memory.holding("weights", "gradients", "optimizer"):
            loss = self._step_loss(samples, 0, rollout_id)
            return gradient_diagnostics(self.wrapped, self.optimizer, loss, self._share(samples)[0])

    def _step_loss(self, samples: Sequence[Sample], number: int, rollout_id: int) -> StepLoss:
        """The loss of optimizer step ``number`` of a pass over the rollout."""
        reading = PromptReading.of(samples, self.options.opd.opd_include_prompt)
        weights = step_loss_weights(self.options, reading.read, number)
        term_weights = reading.step_weights(self.options, number)
        return StepLoss(
            self.options, self.student, reading.read, weights, self.scorers.kept_rows, rollout_id, term_weights
        )

    def train(self, samples: Sequence[Sample], rollout_id: int = 0) -> TrainResult:
        """Take the optimizer steps of one rollout; raises ``RunError`` if a gradient is not finite.

        ``rollout_id`` (from 0) says where the schedules of the objective are. The critic, where there is one, learns
        first, and in the rollouts of ``--num-critic-only-steps`` alone.
        """
        check_tokens(samples, self.spec.architecture.vocab_size)
        of_critic = {} if self.critic is None else self.critic.train(samples, self._share(samples))
        if rollout_id < self.options.objective.num_critic_only_steps:
            self.scorers.forget()
            return TrainResult(of_critic if self._is_reporter else None, self.ask(LogProbs("student"), samples))
        needed = ["weights", "gradients"] + ([] if self.options.offload.offload_optimizer else ["optimizer"])
        with self.memory.holding(*needed):
            result = self._train(samples, rollout_id)
            if self.options.offload.offload_train or self.average is not None:
                gather_weights(self.wrapped)
            if self.average is not None:
                with self.memory.holding("teacher"):
                    self.average.follow()
        return result if result.metrics is None else replace(result, metrics=result.metrics | of_critic)

    def _train(self, samples: Sequence[Sample], rollout_id: int) -> TrainResult:
        per_step: list[dict[str, float]] = []
        with_tokens: list[dict[str, float]] = []
        log_probs: dict[int, np.ndarray] = {}
        for number, micro_batches in [*enumerate(self._share(samples))] * self.options.objective.ppo_epochs:
            loss = self._step_loss(samples, number, rollout_id)
            metrics, found = self._optimizer_step(micro_batches, loss)
            per_step.append(metrics)
            if any(weight.any() for weight in loss.loss_weights):
                with_tokens.append(metrics)
            log_probs = found | log_probs  # those before the first step that saw the sample
        self.scorers.forget()
        log_probs = PromptReading.of(samples, self.options.opd.opd_include_prompt).cut(log_probs)
        return TrainResult(of_rollout(per_step, with_tokens) if self._is_reporter else None, log_probs)

    @property
    def _is_reporter(self) -> bool:
        return reports() and parallel_state.get_data_parallel_rank() == 0

    def _optimizer_step(
        self, micro_batches: list[tuple[int, ...]], loss: StepLoss
    ) -> tuple[dict[str, float], dict[int, np.ndarray]]:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = run_micro_batches(self.wrapped, self.student, loss.samples, micro_batches, loss, with_gradients=True)
        gradient_norm, learning_rate, taken = apply_gradients(
            self.wrapped,
            self.optimizer,
            self.scheduler,
            holding=self.memory.holding("optimizer"),
            forget_copies=self.options.offload.offload_optimizer or self.options.offload.offload_train,
            rate_flag="--lr",
        )
        metrics = {"train/grad_norm": gradient_norm, "train/lr": learning_rate, SKIPPED_STEPS: float(not taken)}
        metrics |= router_statistics(self.chunks)
        if parallel_state.is_pipeline_last_stage():
            metrics |= finalize_statistics(sum_over_data_parallel(merge_statistics([part[0] for part in results])))
        return metrics, merge_parts([part[1] for part in results])

    def export_weights(self, name: ModelName = "student") -> Iterator[tuple[str, Tensor]]:
        """Stream a model as Hugging Face tensors on rank 0 (see ``hf_weights.export_hf_weights``)."""
        model = self.scorers.student if name == "student" else self.scorers.frozen[name]
        with (
            self.memory.holding("weights" if name == "student" else name, *model.parts),
            distributed.using(model.groups),
        ):
            if "weights" in model.parts:
                gather_weights(self.wrapped)
            yield from export_hf_weights(model.chunks)

    def save(self, folder: Path, step: int, hf_folder: Path, run_state: dict[str, Any]) -> None:
        """Write a checkpoint from which :meth:`resume` continues, and remove those that are not to be kept.

        Raises ``RunError`` if it cannot be written.
        """
        options = self.options.checkpoint
        with writing(folder), ExitStack() as stack:
            stack.enter_context(self.memory.holding("weights", "optimizer"))
            beside: tuple[Entries, dict[str, Any]] = ({}, {})
            if self.critic is not None:
                stack.enter_context(self.critic.on_device())
                beside = self.critic.saved(with_optimizer=not options.no_save_optim)
            if self.average is not None:
                stack.enter_context(self.memory.holding("teacher"))
                beside = beside[0] | self.average.entries(to_write=True), beside[1]
            gather_weights(self.wrapped)
            checkpoint.save_checkpoint(
                folder,
                step,
                self.chunks,
                hf_folder=hf_folder,
                optimizer=None if options.no_save_optim else self.optimizer,
                scheduler=self.scheduler,
                run_state={**run_state, "optimizer": optimizer_kind(self.options), **schedule_state(self.options)},
                beside=beside,
            )
            if dist.get_rank() == 0:
                remove_old_steps(folder, step, options)

    def peak_memory_bytes(self) -> int:
        """Largest memory of this rank so far: allocated on the CUDA device, or resident on the host."""
        if cpu.has_cuda():
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Leave the process group."""
        distributed.shutdown()
