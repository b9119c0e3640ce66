"""What the ranks do in the tests of predicted memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from opd_megatron.config.head_memory import head_bytes
from opd_megatron.config.memory import Models, estimate_stage
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.trainer import MegatronTrainer
from tests.megatron.live_bytes import held_bytes, measured_head, saved_activations
from tests.megatron.support import make_spec


def predicted_and_measured(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Bytes of this rank by what takes them; the head's only on the last pipeline stage."""
    trainer = MegatronTrainer(make_spec(folder, **flags), rendezvous)
    models, stage = Models(trainer.spec.architecture), parallel_state.get_pipeline_model_parallel_rank()
    predicted = estimate_stage(trainer.options, models, stage, "cpu").device_parts
    activations = saved_activations(trainer)
    found = {name: (predicted[name], count) for name, count in held_bytes(trainer).items() if count}
    found["activations"] = predicted["activations"], activations
    if parallel_state.is_pipeline_last_stage():
        found["head"] = (
            head_bytes(trainer.options, models.student, models.keeping_rows(trainer.options), "cpu"),
            _head(trainer.student, flags),
        )
    return found


def _head(model: HiddenStateModel, flags: dict[str, Any]) -> int:
    weight = model.head_weight()
    rows = flags["micro_batch_size"] * flags["rollout_max_response_len"] // flags.get("context_parallel_size", 1)
    group = parallel_state.get_tensor_model_parallel_group()
    return measured_head(rows, weight.shape[1], weight.shape[0], model.architecture.vocab_size, weight.dtype, group)
