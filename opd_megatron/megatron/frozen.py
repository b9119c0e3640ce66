"""Models that only score, by name: the reference and the teacher. Each has weights and sizes of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import torch
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.checkpoint_paths import Step
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options, ParallelOptions
from opd_megatron.config.resolve import (
    has_megatron_teacher,
    has_own_layout,
    is_self_taught,
    reference_folder,
    teacher_architecture,
    teacher_parallel,
    teaches_itself_by_average,
    teaches_itself_now,
)
from opd_megatron.config.targets import loads_reference, named_architectures, named_models
from opd_megatron.megatron import checkpoint, distributed
from opd_megatron.megatron.exchange import Key, exchange
from opd_megatron.megatron.model import HiddenStateModel, Model, build_chunks
from opd_megatron.megatron.scoring import Scorer

ModelName: TypeAlias = str
"""``student``, ``teacher``, or one of :mod:`opd_megatron.config.targets`."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FrozenModel:
    """A model that only scores: its architecture and the folder its weights come from.

    ``dtype``, ``micro_batch_size`` (samples), ``max_tokens`` (of one rank) and ``parallel``, the layout, are the
    student's where they are None. ``has_own_layout`` says that the layout's sizes are not the student's.
    """

    architecture: ModelArchitecture
    folder: Path
    step: Step | None = None
    dtype: str | None = None
    micro_batch_size: int | None = None
    max_tokens: int | None = None
    parallel: ParallelOptions | None = None
    has_own_layout: bool = False


def frozen_models(options: Options, student: ModelArchitecture) -> dict[ModelName, FrozenModel]:
    """The models with weights of their own that the objective needs; raises ``UserError`` where those are not there."""
    frozen: dict[ModelName, FrozenModel] = {}
    if loads_reference(options):
        frozen["reference"] = FrozenModel(student, _starting_weights(options, "the reference"))
    architectures = named_architectures(options)
    for name, _, named in named_models(options):
        frozen[name] = replace(teacher_model(options, architectures[name], Path(named)), step=None)
    if not has_megatron_teacher(options) or teaches_itself_now(options) or teaches_itself_by_average(options):
        return frozen
    folder = Path(str(options.opd.opd_teacher_load))
    if is_self_taught(options):
        folder = _starting_weights(options, "--opd-self-weights frozen")
    frozen["teacher"] = teacher_model(options, teacher_architecture(options), folder)
    return frozen


def _starting_weights(options: Options, needed_by: str) -> Path:
    folder = reference_folder(options)
    if folder is None:
        raise UserError(f"{needed_by} needs weights in --ref-load or --hf-checkpoint")
    return folder


def teacher_model(options: Options, architecture: ModelArchitecture, folder: Path) -> FrozenModel:
    """The teacher in ``folder`` as the ``--opd-teacher-*`` options want it."""
    opd = options.opd
    return FrozenModel(
        architecture,
        folder,
        opd.opd_teacher_ckpt_step,
        dtype=None if opd.opd_teacher_dtype == "same" else opd.opd_teacher_dtype,
        micro_batch_size=opd.opd_teacher_micro_batch_size,
        max_tokens=opd.opd_teacher_max_tokens_per_gpu,
        parallel=teacher_parallel(options, architecture),
        has_own_layout=has_own_layout(options),
    )


def build_from_options(
    options: Options,
    architecture: ModelArchitecture,
    dtype: str | None = None,
    parallel: ParallelOptions | None = None,
) -> list[HiddenStateModel]:
    """This rank's part of a model of the run, its weights not yet set; None means that of training."""
    return build_of_kind(HiddenStateModel, options, architecture, dtype, parallel)


def build_of_kind(
    kind: type[Model],
    options: Options,
    architecture: ModelArchitecture,
    dtype: str | None = None,
    parallel: ParallelOptions | None = None,
) -> list[Model]:
    """As :func:`build_from_options`, for a model that ends in something else than hidden states."""
    return build_chunks(
        architecture,
        parallel or options.parallel,
        dtype=DTYPES[dtype or ("bfloat16" if options.optimizer.bf16 else "float32")],
        make_vocab_size_divisible_by=options.model.make_vocab_size_divisible_by,
        router_dtype=options.model.moe_router_dtype,
        kind=kind,
    )


class FrozenScorer(Scorer):
    """A frozen model with its weights loaded; ranks are balanced for the work of ``planned_for``."""

    def __init__(self, spec: FrozenModel, options: Options, planned_for: ModelArchitecture) -> None:
        undivided = replace(spec.parallel or options.parallel, num_layers_per_virtual_pipeline_stage=None)
        groups = distributed.other_groups(undivided) if spec.has_own_layout else None
        with distributed.using(groups):
            (self.model,) = build_from_options(options, spec.architecture, spec.dtype, undivided)
            checkpoint.load_weights(self.model, spec.folder, spec.step)
        self.model.requires_grad_(False).eval()
        super().__init__(
            [self.model],
            options,
            planned_for,
            micro_batch_size=spec.micro_batch_size,
            max_tokens=spec.max_tokens,
            groups=groups,
        )
        self._brought_head: list[Tensor | None] = []

    def head_weight(self) -> Tensor | None:
        """Rows of the output weight for the student's columns on this rank; None where the student has no head.

        With a layout of its own they are brought once from the ranks that have them, and stay on the host.
        """
        if self.groups is None:
            return super().head_weight()
        if not self._brought_head:
            self._brought_head.append(self._bring_head(parallel_state.is_pipeline_last_stage()))
        return self._brought_head[0]

    def _bring_head(self, is_last: bool) -> Tensor | None:
        """See :meth:`head_weight`."""
        vocab_size, multiple = self.vocab_size, self._options.model.make_vocab_size_divisible_by
        own = self._columns(multiple, vocab_size)
        with distributed.using(self.groups):
            theirs = self._columns(multiple, vocab_size)
            has_head = parallel_state.is_pipeline_last_stage()
        cuts = {*range(0, vocab_size, own.step), *range(0, vocab_size, theirs.step), vocab_size}
        blocks = list(pairwise(sorted(cuts)))
        held: dict[Key, Tensor] = {}
        if has_head:
            weight_Vh = self.model.head_weight()
            first = theirs.start
            held = {(a, b): weight_Vh[a - first : b - first] for a, b in blocks if first <= a < theirs.stop}
        wanted = [(a, b) for a, b in blocks if own.start <= a < own.stop] if is_last else []
        found = exchange(held, wanted)
        if not is_last:
            return None
        rows = torch.zeros((own.step, self.model.architecture.hidden_size), dtype=self.model.config.params_dtype)
        for a, b in wanted:
            rows[a - own.start : b - own.start] = found[a, b]
        return rows

    def _columns(self, multiple: int, vocab_size: int) -> range:
        """The vocabulary's columns of this rank in the layout in use; the step is the rows of a shard with padding."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rows = self.model.architecture.padded_vocab_size(multiple, ranks) // ranks
        first = rows * parallel_state.get_tensor_model_parallel_rank()
        return range(first, min(first + rows, vocab_size), rows)
