"""Combinations of options of the rollout engine that cannot work, or have no effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import EngineOptions, Options
from opd_megatron.config.resolve import teacher_answers

_STARTED_ONLY = (
    "rollout_num_engines",
    "rollout_num_gpus_per_engine",
    "sglang_python",
    "sglang_mem_fraction_static",
    "sglang_base_gpu_id",
    "sglang_server_args",
)
"""How servers are started, which those of ``--rollout-engine-url`` are already."""

MAX_STOP_STRINGS = 32
"""Stop strings that SGLang takes in one request."""


def engine_faults(options: Options) -> Iterator[str]:
    """Every fault of the engine's options among themselves and with those of the rollout."""
    given = options.given
    if options.engine.rollout_engine == "local":
        has_effect = {"rollout_engine"}
        if teacher_answers(options) and options.opd.opd_type == "sglang":
            has_effect.add("rollout_engine_timeout")
        names = [item.name for item in dataclasses.fields(EngineOptions)]
        for name in (name for name in names if name in given and name not in has_effect):
            yield f"{flag_of(name)} goes with --rollout-engine sglang only"
        return
    if "rollout_engine_batch_size" in given:
        yield (
            "--rollout-engine-batch-size is for the local engine: leave it out "
            "(a server's batches are sized by --sglang-server-args='--max-running-requests N')"
        )
    if options.engine.rollout_engine_url:
        for name in (name for name in _STARTED_ONLY if name in given):
            yield f"{flag_of(name)} has no effect on the servers of --rollout-engine-url: leave one of them out"
    elif options.engine.rollout_engine_api_key_env is not None:
        yield (
            "--rollout-engine-api-key-env goes with --rollout-engine-url only: servers that the run starts are reached "
            "from this machine alone"
        )
    yield from _shared_gpu_faults(options)
    if options.engine.rollout_weight_transfer == "distributed" and options.engine.rollout_weights_dir is not None:
        yield "--rollout-weights-dir has no effect with --rollout-weight-transfer distributed: leave one of them out"
    if options.rollout.load_debug_rollout_data is not None:
        yield "--rollout-engine sglang has nothing to sample with --load-debug-rollout-data: leave it out"
    elif options.objective.loss_type == "sft_loss" and not options.evaluation.eval_prompt_data:
        yield "--rollout-engine sglang has nothing to sample with --loss-type sft_loss and no evaluation: leave it out"
    if len(options.rollout.rollout_stop) > MAX_STOP_STRINGS:
        yield f"--rollout-stop takes at most {MAX_STOP_STRINGS} strings with --rollout-engine sglang"


def _shared_gpu_faults(options: Options) -> Iterator[str]:
    """Servers that are put beside the trainer, and would begin among its GPUs.

    Sharing all of them (base 0) is a layout of its own, and which GPUs a Ray cluster has is known to it alone.
    """
    engine, ranks = options.engine, options.cluster.actor_num_gpus_per_node
    first = engine.sglang_base_gpu_id
    if engine.rollout_engine_url or engine.sglang_free_memory or options.cluster.ray_address is not None:
        return
    if 0 < first < ranks:
        last = first + engine.rollout_num_engines * engine.rollout_num_gpus_per_engine - 1
        yield (
            f"--sglang-base-gpu-id {first}: the rollout engines would have GPUs {first} to {last} of this machine and "
            f"the trainer 0 to {ranks - 1} (--actor-num-gpus-per-node): begin at {ranks}, name servers elsewhere with "
            "--rollout-engine-url, or let them take turns with --sglang-free-memory"
        )
