"""From the hidden rows of a micro-batch to its loss: what an objective asks for is collected here.

An objective declares its inputs as the fields of a dataclass (:class:`~opd_megatron.objectives.losses.PolicyInputs`),
and :class:`LossInputs` has a property of the same name for each. A further input is a field there and a property here;
a further loss is an entry of :data:`LOSSES`. The trainer knows none of them.

Shape legend: ``N`` response tokens that this rank predicts, sample after sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.options import OpdOptions, Options
from opd_megatron.config.resolve import (
    learns_from_chosen_tokens,
    learns_given_tokens,
    measures_exact_kl,
    sampled_tokens_learn,
)
from opd_megatron.config.targets import more_teachers, opd_reference_name, teacher_weights
from opd_megatron.megatron.distribution import DistributionTerm, Record
from opd_megatron.megatron.forward import head_log_probs
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.teacher_rows import TeacherRows
from opd_megatron.megatron.vocab_head import Mixture, Side, Target, target_moments
from opd_megatron.objectives.distribution import chosen_divergence, opd_coefficient
from opd_megatron.objectives.divergences import Divergence, jensen_shannon
from opd_megatron.objectives.losses import PolicyInputs, policy_objective, sft_objective
from opd_megatron.objectives.sequences import Sequences
from opd_megatron.objectives.statistics import weighted_statistic
from opd_megatron.sample import Sample, TeacherScores

Statistics = dict[str, Tensor]
"""Metrics that can be summed over micro-batches and ranks, see :mod:`opd_megatron.objectives.statistics`."""

BASELINES: dict[str, int | None] = {"none": None, "kl": 0, "optimal": 1}
"""Which of the exact moments ``--opd-baseline`` subtracts."""

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class StepLoss:
    """The loss of any micro-batch of one optimizer step, called on the last pipeline stage.

    ``loss_weights`` hold one ``[T]`` array for each of ``samples`` that the step trains on. ``kept_rows`` are those of
    the frozen models by name, where the exact KL is measured or whole distributions are compared. ``rollout_id`` says
    where the schedules of the distillation term are. The call returns the loss, and with it the statistics and this
    rank's log-probabilities by place in ``samples``.
    """

    options: Options
    student: HiddenStateModel
    samples: Sequence[Sample]
    loss_weights: Sequence[np.ndarray]
    kept_rows: Mapping[str, TeacherRows] = field(default_factory=dict)
    rollout_id: int = 0
    term_weights: Sequence[np.ndarray] | None = None
    """Weights of the distillation term where it has places of its own, those of the prompt; else it has the loss's."""

    def __call__(self, batch: MicroBatch, rows_Nh: Tensor) -> tuple[Tensor, tuple[Statistics, dict[int, np.ndarray]]]:
        inputs = LossInputs(self, batch, rows_Nh)
        loss, statistics = LOSSES[self.options.objective.loss_type](inputs)
        if self.term_weights is not None:
            loss, statistics = _with_prompts(inputs, loss, statistics)
        return loss, (statistics | inputs.exact_statistics(), batch.split(inputs.log_probs_N))


class LossInputs:
    """Everything that a loss may want of one micro-batch: made when it is first asked for, ``[N]`` on the device."""

    def __init__(self, step: StepLoss, batch: MicroBatch, rows_Nh: Tensor) -> None:
        self.options, self.student, self.batch, self.rows_Nh = step.options, step.student, batch, rows_Nh
        self._step = step
        self.rollout_id = step.rollout_id

    def collect(self, kind: type[Inputs]) -> Inputs:
        """The dataclass ``kind`` with each of its fields taken from the property of that name."""
        return kind(**{item.name: getattr(self, item.name) for item in fields(kind)})  # type: ignore[arg-type]

    @cached_property
    def _head(self) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and sampled_tokens_learn(self.options)):
            return self._of_sampled_tokens()

    def _of_sampled_tokens(self) -> tuple[Tensor, Tensor]:
        temperature = self.options.rollout.rollout_temperature
        heard_N, old_N = self.opd_weights_N, self.old_log_probs_N
        if heard_N is None or old_N is None or not learns_from_chosen_tokens(self.options):
            return head_log_probs(self.student, self.batch, self.rows_Nh, temperature)
        # what the loss does not hear of costs no logits: its numbers are those from before the step
        places_M = (heard_N * self.loss_mask_N).nonzero()[:, 0]
        part = replace(self.batch, targets_N=self.batch.targets_N.index_select(0, places_M))
        found = head_log_probs(self.student, part, self.rows_Nh.index_select(0, places_M), temperature)
        before = old_N, _required(self._of_samples(lambda sample: sample.entropies), "entropies")
        log_probs_N, entropy_N = (
            whole_N.index_copy(0, places_M, part_M) for whole_N, part_M in zip(before, found, strict=True)
        )
        return log_probs_N, entropy_N

    @property
    def log_probs_N(self) -> Tensor:
        """Of the response tokens under the weights in training, at the rollout temperature.

        With a gradient where the loss has one through them. Tokens that the loss says nothing of may have those of the
        weights that sampled, and entropies likewise.
        """
        return self._head[0]

    @property
    def entropy_N(self) -> Tensor:
        """With a gradient where the objective has an entropy bonus."""
        entropy_N = self._head[1]
        return entropy_N if self.options.objective.entropy_coef > 0 else entropy_N.detach()

    @cached_property
    def loss_weights_N(self) -> Tensor:
        return self.batch.join(self._step.loss_weights)

    @cached_property
    def loss_mask_N(self) -> Tensor:
        return self.batch.join([sample.loss_mask for sample in self._step.samples])

    @property
    def advantages_N(self) -> Tensor:
        return _required(self._of_samples(lambda sample: sample.advantages), "advantages")

    @property
    def old_log_probs_N(self) -> Tensor | None:
        """None where the weights in training are those that sampled."""
        return self._of_samples(lambda sample: sample.old_log_probs)

    @property
    def rollout_log_probs_N(self) -> Tensor | None:
        """Of the engine that sampled; None where no correction asks for them."""
        if not self.options.objective.use_tis:
            return None
        return _required(self._of_samples(lambda sample: sample.rollout_log_probs), "rollout log-probabilities")

    @cached_property
    def sequences(self) -> Sequences:
        """The responses of the positions, whose parts context-parallel ranks share."""
        return self.batch.sequences(parallel_state.get_context_parallel_group())

    @property
    def ref_log_probs_N(self) -> Tensor | None:
        return self._of_samples(lambda sample: sample.ref_log_probs)

    @property
    def teacher_log_probs_N(self) -> Tensor | None:
        if not self.options.opd.use_opd:
            return None
        return _required(self._of_samples(lambda sample: sample.target_log_probs), "teacher scores")

    @cached_property
    def teacher_valid_N(self) -> Tensor | None:
        if not self.options.opd.use_opd:
            return None
        return self._of_teacher(lambda scores: scores.valid_T)

    @property
    def opd_baseline_N(self) -> Tensor | None:
        place = BASELINES[self.options.opd.opd_baseline]
        return None if place is None or self.exact_moments is None else self.exact_moments[place]

    @property
    def opd_weights_N(self) -> Tensor | None:
        """None where all of them are 1."""
        weights_N = self._of_samples(lambda sample: sample.opd_weights)
        if self._step.term_weights is None:
            return weights_N
        share_N = self.batch.join(self._step.term_weights) / torch.where(self.loss_mask_N, self.loss_weights_N, 1.0)
        return share_N if weights_N is None else share_N * weights_N

    @property
    def opd_future_N(self) -> Tensor | None:
        """What the discount adds of the tokens that follow; None without one."""
        return self._of_samples(lambda sample: sample.opd_future)

    @cached_property
    def opd_given_N(self) -> Tensor | None:
        """Bool: tokens of responses that the student did not make, where they teach by themselves; None without any."""
        samples = self._step.samples
        if not learns_given_tokens(self.options) or not any(sample.from_data for sample in samples):
            return None
        return self.batch.join([np.full(sample.response_length, sample.from_data) for sample in samples])

    @cached_property
    def prompt_weights_N(self) -> Tensor | None:
        """Weights of the distillation term at the prompt's tokens, 0 at all others; None where it has none there."""
        if self._step.term_weights is None:
            return None
        return torch.where(self.loss_mask_N, 0.0, self.batch.join(self._step.term_weights))

    @cached_property
    def opd_divergence_N(self) -> Tensor | None:
        """With a gradient; None where the distillation term is of sampled tokens."""
        opd = self.options.opd
        if not opd.use_opd or opd.opd_loss != "distribution":
            return None
        compared_N = self._scored_N if self.opd_weights_N is None else self._scored_N & (self.opd_weights_N != 0)
        if self.opd_given_N is not None:
            compared_N = compared_N & ~self.opd_given_N
        if self.prompt_weights_N is not None:
            compared_N = compared_N | (self.prompt_weights_N > 0)
        return self._compared(opd, chosen_divergence(opd, self.rollout_id), self._target(), compared_N)

    @property
    def jensen_shannon_N(self) -> Tensor:
        """Of weight 1/2 between student and teacher where the teacher scored, else 0; over the term's own support."""
        plain = replace(self.options.opd, opd_entropy_aware=0.0)
        return self._compared(plain, jensen_shannon(0.5), self._teacher_side(), self._scored_N)

    @property
    def _scored_N(self) -> Tensor:
        return self.loss_mask_N if self.teacher_valid_N is None else self.loss_mask_N & self.teacher_valid_N

    def _compared(self, opd: OpdOptions, divergence: Divergence, target: Target | Record, places_N: Tensor) -> Tensor:
        """``[N]``; only the places are looked at, the others have 0."""
        head = {
            "temperature": self._opd_temperature,
            "vocab_size": self._shared_vocab_size,
            "group": parallel_state.get_tensor_model_parallel_group(),
        }
        term = DistributionTerm(opd, divergence, head)
        return term(Side(self.rows_Nh, self.student.head_weight()), target, places_N)

    @cached_property
    def _teacher_hidden(self) -> Target | None:
        """The teacher, or the mixture of several, on the device; None where hidden rows were not kept."""
        names = ["teacher", *more_teachers(self.options)]
        if any(name not in self._step.kept_rows for name in names):
            return None
        sides = [self._step.kept_rows[name].of(self.batch) for name in names]
        if len(sides) == 1:
            return sides[0]
        weights = teacher_weights(self.options, len(sides))
        mixture = self.options.opd.opd_teacher_mixture
        return Mixture(tuple(zip(weights, sides, strict=True)), arithmetic=mixture == "arithmetic")

    @property
    def _shared_vocab_size(self) -> int:
        """Tokens that all models know; the ids above are of none, as rows that pad an embedding are."""
        others = [rows.vocab_size for rows in self._step.kept_rows.values()]
        return min([self.student.architecture.vocab_size, *others])

    def _target(self) -> Target | Record:
        """What the divergence compares with: the teacher, or ``teacher^L reference^(1 - L)``."""
        reference, scale = opd_reference_name(self.options), self.options.opd.opd_reward_scale
        if reference is None or self._teacher_hidden is None:
            return self._teacher_side()
        side = self._step.kept_rows[reference].of(self.batch)
        return Mixture(((scale, self._teacher_hidden), (1.0 - scale, side)))

    def _teacher_side(self) -> Target | Record:
        if self._teacher_hidden is not None:
            return self._teacher_hidden
        record = [
            self._of_teacher(read)
            for read in (lambda s: s.top_ids_TK, lambda s: s.top_log_probs_TK, lambda s: s.tail_log_mass_T)
        ]
        ids_NK, log_probs_NK, tail_N = (_required(part, "teacher distributions") for part in record)
        # Such a record is at temperature 1; at another one only its own tokens can be compared, rescaled.
        return Record(ids_NK.long(), log_probs_NK / self._opd_temperature, tail_N)

    @property
    def _opd_temperature(self) -> float:
        return self.options.opd.opd_temperature or self.options.rollout.rollout_temperature

    @cached_property
    def exact_moments(self) -> tuple[Tensor, Tensor] | None:
        """KL(student || teacher) over the vocabulary and the baseline of least variance, without gradient.

        None where the teacher's hidden rows were not kept.
        """
        if self._teacher_hidden is None:
            return None
        return target_moments(
            self.rows_Nh.detach(),
            self.student.head_weight(),
            self._teacher_hidden,
            temperature=self.options.rollout.rollout_temperature,
            vocab_size=self._shared_vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
        )

    def exact_statistics(self) -> Statistics:
        """``opd/reverse_kl_exact``, the mean over scored tokens, in the rollouts that measure it."""
        due = measures_exact_kl(self.options.opd, self.rollout_id) or self.options.opd.opd_baseline != "none"
        if not due or self.exact_moments is None:
            return {}
        exact_kl_N, mask_N = self.exact_moments[0], self._scored_N
        return {"opd/reverse_kl_exact": torch.stack([exact_kl_N[mask_N].double().sum(), mask_N.sum().double()])}

    def _of_samples(self, read: Callable[[Sample], np.ndarray | None]) -> Tensor | None:
        """Join what all samples have, or None if none has it; what only some have is an error."""
        arrays = [read(sample) for sample in self._step.samples]
        present = [array for array in arrays if array is not None]
        if not present:
            return None
        if len(present) != len(arrays):
            raise ValueError("some samples of the rollout lack a field that others have")
        return self.batch.join(present)

    def _of_teacher(self, read: Callable[[TeacherScores], np.ndarray | None]) -> Tensor | None:
        return self._of_samples(lambda sample: None if sample.teacher_scores is None else read(sample.teacher_scores))


def _required(joined_N: Tensor | None, what: str) -> Tensor:
    if joined_N is None:
        raise ValueError(f"the samples have no {what}")
    return joined_N


def _policy_loss(inputs: LossInputs) -> tuple[Tensor, Statistics]:
    opd = inputs.options.opd
    coefficient = opd_coefficient(opd, inputs.rollout_id) if opd.use_opd else None
    return policy_objective(inputs.collect(PolicyInputs), inputs.options.objective, coefficient, opd)


def _with_prompts(inputs: LossInputs, loss: Tensor, statistics: Statistics) -> tuple[Tensor, Statistics]:
    """The loss with the divergence at the prompt's tokens, which is part of ``train/loss`` and ``train/opd_loss``."""
    divergence_N, weights_N = inputs.opd_divergence_N, inputs.prompt_weights_N
    assert divergence_N is not None
    assert weights_N is not None
    added = (weights_N * divergence_N).sum()
    coefficient = opd_coefficient(inputs.options.opd, inputs.rollout_id)
    of_prompts = weighted_statistic(divergence_N, weights_N)
    found = statistics | {"train/opd_prompt_divergence": of_prompts}
    for name, factor in (("train/loss", coefficient), ("train/opd_loss", 1.0)):
        total, weight = statistics[name]
        found[name] = torch.stack([total + factor * of_prompts[0], weight])
    return loss + coefficient * added, found


def _sft_loss(inputs: LossInputs) -> tuple[Tensor, Statistics]:
    return sft_objective(inputs.log_probs_N, inputs.loss_weights_N, inputs.loss_mask_N)


LOSSES: dict[str, Callable[[LossInputs], tuple[Tensor, Statistics]]] = {
    "policy_loss": _policy_loss,
    "sft_loss": _sft_loss,
}
"""From ``--loss-type`` to what it makes of the inputs: the loss, a scalar, and its statistics."""
