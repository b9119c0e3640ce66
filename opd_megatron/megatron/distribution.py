"""The divergence between student and teacher at each position of a micro-batch, for ``--opd-loss distribution``.

Shape legend: ``N`` response tokens that this rank predicts, ``M`` those of them that count, ``K`` listed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_megatron.config.options import OpdOptions
from opd_megatron.megatron.vocab_head import (
    Mixture,
    Side,
    Target,
    record_divergence,
    selected_log_probs,
    target_divergence,
    top_k,
)
from opd_megatron.objectives.divergences import Divergence, entropy_aware, forward_kl


class Record(NamedTuple):
    """A teacher's log-probabilities of ``K`` tokens and the log of the mass of all others."""

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_log_mass_N: Tensor

    def at(self, places_M: Tensor) -> Record:
        """Only some of the tokens."""
        return Record(*(values.index_select(0, places_M) for values in self))

    def entropy(self, *, renormalized: bool) -> Tensor:
        """``[N]`` in nats, of the K+1 classes, or of the K alone, rescaled."""
        if renormalized:
            logs_NX = self.log_probs_NK.log_softmax(-1)
        else:
            logs_NX = torch.cat([self.log_probs_NK, self.tail_log_mass_N[:, None]], dim=1)
        return torch.special.entr(logs_NX.exp()).sum(-1)


@dataclass(frozen=True)
class DistributionTerm:
    """``divergence`` over the support that the options want; ``head`` are the settings of the vocabulary head.

    ``head`` holds ``temperature``, ``vocab_size`` and ``group``.
    """

    options: OpdOptions
    divergence: Divergence
    head: dict[str, Any]

    def __call__(self, student: Side, teacher: Target | Record, mask_N: Tensor) -> Tensor:
        """``[N]`` with a gradient to the student, 0 where ``mask_N`` (bool) is false.

        ``D`` or, with ``--opd-entropy-aware``, what :func:`~opd_megatron.objectives.divergences.entropy_aware` makes of
        it and of the forward KL over the same support.
        """
        places_M = mask_N.nonzero()[:, 0]
        compared = self._compared(student.at(places_M), teacher.at(places_M))
        value_M = compared(self.divergence)
        if self.options.opd_entropy_aware > 0:
            value_M = entropy_aware(
                value_M,
                compared(forward_kl),
                self._teacher_entropy(teacher.at(places_M)),
                vocab_size=self.head["vocab_size"],
                weight=self.options.opd_entropy_aware,
            )
        return value_M.new_zeros(mask_N.shape).index_copy(0, places_M, value_M)

    def _compared(self, student: Side, teacher: Target | Record) -> Callable[[Divergence], Tensor]:
        if not isinstance(teacher, Record) and self.options.opd_support == "full":
            return lambda divergence: target_divergence(*student, teacher, divergence, **self.head)
        assert not isinstance(teacher, Mixture)  # whose most probable tokens nobody knows
        record = self._record(student, teacher) if isinstance(teacher, Side) else teacher
        renormalized = self.options.opd_tail == "renormalized"
        return lambda divergence: record_divergence(
            *student, *record, divergence, renormalized=renormalized, **self.head
        )

    @torch.no_grad()
    def _record(self, student: Side, teacher: Side) -> Record:
        """The teacher's log-probabilities of the ``--opd-top-k`` tokens that teacher or student finds likeliest."""
        assert self.options.opd_top_k is not None
        if self.options.opd_support == "teacher_topk":
            return Record(*top_k(*teacher, self.options.opd_top_k, **self.head))
        ids_MK = top_k(*student, self.options.opd_top_k, **self.head).ids_NK
        log_probs_MK, tail_M, _ = selected_log_probs(*teacher, ids_MK, **self.head)
        return Record(ids_MK, log_probs_MK, tail_M)

    @torch.no_grad()
    def _teacher_entropy(self, teacher: Target | Record) -> Tensor:
        """``[M]`` in nats; of a record that of its classes."""
        assert not isinstance(teacher, Mixture)
        if isinstance(teacher, Record):
            return teacher.entropy(renormalized=self.options.opd_tail == "renormalized")
        no_ids_M0 = torch.zeros((len(teacher.rows_Nh), 0), dtype=torch.int64, device=teacher.rows_Nh.device)
        return selected_log_probs(*teacher, no_ids_M0, **self.head)[2]
