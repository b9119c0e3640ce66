"""Predict the memory of a run, per rank and by what takes it, and propose a layout that fits; nothing is loaded.

    python tools/estimate_memory.py --hf-checkpoint Qwen3-8B --bf16 --actor-num-gpus-per-node 8
    python tools/estimate_memory.py --hf-checkpoint Qwen3-8B --bf16 --device-memory 80GiB --world-size 8

Takes every flag of ``train.py``. Of the folders only ``config.json`` is read; in place of ``--hf-checkpoint`` the
MODEL_ARGS of ``scripts/models`` do. See docs/memory.md for what is counted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from opd_megatron.config.architecture import architecture_from_model_args
from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.errors import RunError, refuse
from opd_megatron.config.layouts import layout_and_run_faults, tried_layouts
from opd_megatron.config.memory import Models, RankMemory, estimate
from opd_megatron.config.memory_report import (
    LABELS,
    as_json,
    candidate_table,
    gib,
    layout_flags,
    layout_sizes,
    memory_table,
)
from opd_megatron.config.options import Options
from opd_megatron.config.parse import joined_options, option_groups, parse_groups
from opd_megatron.config.resolve import knows_teacher, student_architecture, teacher_architecture
from opd_megatron.config.validate_opd import opd_faults
from opd_megatron.config.vocab_chunks import DeviceKind

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(MB|GB|MiB|GiB)")


def _size_fault(value: str) -> str | None:
    return None if _SIZE.fullmatch(value) else "must be a size such as 80GiB (MB, GB, MiB, GiB)"


@dataclass(frozen=True)
class EstimateOptions:
    """Estimate"""

    device_memory: str | None = option(
        None, "memory of one device, e.g. 80GiB; with --world-size a layout that fits is looked for", check=_size_fault
    )
    world_size: int | None = option(None, "ranks to find a layout for", minimum=1)
    gpus_per_node: int = option(8, "ranks of a node, for --world-size", minimum=1)
    reserve: str = option(
        "4GiB",
        "what of --device-memory is left to CUDA, communication buffers and fragmentation",
        check=_size_fault,
    )
    device: str = option("cuda", "what the run will be on", choices=("cuda", "cpu"))
    json: bool = option(False, "print JSON, sizes in bytes")


def main(argv: Sequence[str]) -> None:
    parsed = parse_groups(
        argv,
        {"estimate": EstimateOptions, **option_groups()},
        prog="estimate_memory.py",
        description="Predict the memory of a run of train.py per rank, and propose a layout that fits.",
    )
    asked, options = parsed[EstimateOptions], joined_options(parsed)
    refuse([*_faults(asked, options), *opd_faults(options)])
    if options.checkpoint.hf_checkpoint is None:
        student = architecture_from_model_args(options.model)
    else:
        student = student_architecture(options)
    teacher = teacher_architecture(options) if knows_teacher(options) else None
    models = Models.of(options, student, teacher)
    if asked.world_size is None:
        _print_estimate(asked, options, models)
    else:
        _print_proposal(asked, options, models)


def _faults(asked: EstimateOptions, options: Options) -> list[str]:
    faults = []
    if asked.world_size is not None:
        if asked.device_memory is None:
            faults.append("--world-size looks for a layout that fits: give --device-memory, e.g. 80GiB")
        if asked.world_size > asked.gpus_per_node and asked.world_size % asked.gpus_per_node:
            faults.append(f"--world-size {asked.world_size} is no multiple of --gpus-per-node {asked.gpus_per_node}")
        chosen = [
            name
            for name in ("tensor_model", "context", "pipeline_model", "expert_model", "expert_tensor")
            if f"{name}_parallel_size" in options.given
        ]
        faults += [
            f"--{name.replace('_', '-')}-parallel-size is what --world-size looks for: leave out one of them"
            for name in chosen
        ]
    if asked.device_memory is not None and _usable(asked) <= 0:
        faults.append(f"--reserve {asked.reserve} leaves nothing of --device-memory {asked.device_memory}")
    return faults


def _bytes(size: str) -> int:
    match = _SIZE.fullmatch(size)
    assert match is not None  # checked when it was parsed
    return int(float(match[1]) * UNITS[match[2]])


def _usable(asked: EstimateOptions) -> int:
    assert asked.device_memory is not None
    return _bytes(asked.device_memory) - _bytes(asked.reserve)


def _kind(asked: EstimateOptions) -> DeviceKind:
    return "cpu" if asked.device == "cpu" else "cuda"


def _print_estimate(asked: EstimateOptions, options: Options, models: Models) -> None:
    refuse(layout_and_run_faults(options, models))
    memory = estimate(options, models, _kind(asked))
    fits = None if asked.device_memory is None else memory.total <= _usable(asked)
    if asked.json:
        print(json.dumps(as_json(options, memory) | ({} if fits is None else {"fits": fits}), indent=2))
        return
    sizes = ", ".join(f"{name} {size}" for name, size in layout_sizes(options).items())
    print(f"The rank that needs most of {options.world_size} ({sizes}), in pipeline stage {memory.stage}:")
    print(memory_table(memory))
    if fits is not None:
        room = f"{gib(_usable(asked))} GiB ({asked.device_memory} less --reserve {asked.reserve})"
        print(f"{'fits into' if fits else 'too large for'} {room}")


def _print_proposal(asked: EstimateOptions, options: Options, models: Models) -> None:
    assert asked.world_size is not None
    per_node = min(asked.world_size, asked.gpus_per_node)
    cluster = dataclasses.replace(
        options.cluster, actor_num_nodes=asked.world_size // per_node, actor_num_gpus_per_node=per_node
    )
    options = dataclasses.replace(options, cluster=cluster)
    tried = tried_layouts(options, models, device=_kind(asked), usable=_usable(asked))
    best = tried[-1] if tried[-1].fits else None
    if asked.json:
        layouts = [as_json(item.options, item.memory) | {"fits": item.fits} for item in tried]
        print(json.dumps({"proposal": layouts[-1]["layout"] if best else None, "tried": layouts}, indent=2))
    else:
        print(candidate_table(tried))
    if best is None:
        least = min((item.memory for item in tried), key=lambda memory: memory.total)
        raise RunError(
            f"no layout of {asked.world_size} ranks fits into {gib(_usable(asked))} GiB: {_advice(options, least)}"
        )
    if not asked.json:
        print(f"\nProposed: {layout_flags(best.options) or 'no model parallelism'}\n\n{memory_table(best.memory)}")


def _advice(options: Options, least: RankMemory) -> str:
    """What takes most of the layout that needs least, and what to do about it."""
    name, count = max(least.device_parts.items(), key=lambda part: part[1])
    remedies = {
        "gradients": None if options.optimizer.bf16 else "--bf16",
        "optimizer": None if options.optimizer.use_distributed_optimizer else "--use-distributed-optimizer",
        "activations": "--recompute-granularity full" if options.parallel.recompute_granularity != "full" else None,
        "rollout": "a smaller --rollout-engine-batch-size",
        "teacher": "--offload-teacher" if not options.offload.offload_teacher else None,
    }
    remedy = remedies.get(name) or "more ranks"
    return f"the least is {gib(least.total)} GiB, of which {gib(count)} are {LABELS[name]}: try {remedy}"


if __name__ == "__main__":
    sys.exit(run_cli(main))
