"""An estimate of memory as text: a table, the layouts that were tried, and the line of ``--dry-run``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd_megatron.config.layouts import Candidate
from opd_megatron.config.memory import Models, RankMemory, estimate
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import knows_teacher, student_architecture, teacher_architecture

GIB = 2**30
LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "recomputed": "recomputed layers",
    "head": "vocabulary head",
    "teacher": "teacher",
    "reference": "reference",
    "critic": "critic",
    "rollout": "rollout engine (first rank)",
}
"""The parts of an estimate in words."""


def gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def memory_table(memory: RankMemory) -> str:
    """One line for each part that is there, in GiB."""
    rows = [(LABELS[name], gib(count)) for name, count in memory.device_parts.items() if count]
    rows += [("most at once", gib(memory.total))]
    if memory.host:
        rows.append(("on the host", gib(memory.host)))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {count:>9} GiB" for label, count in rows)


def layout_flags(options: Options) -> str:
    """The flags of a layout, without those that are at 1."""
    parallel = options.parallel
    names = ("tensor_model", "context", "pipeline_model", "expert_model", "expert_tensor")
    sizes = {f"{name}_parallel_size": getattr(parallel, f"{name}_parallel_size") for name in names}
    spread = parallel.expert_model_parallel_size > 1
    flags = [
        f"--{name.replace('_', '-')} {size}"
        for name, size in sizes.items()
        if size is not None and (size > 1 or (spread and name == "expert_tensor_parallel_size"))
    ]
    return " ".join([*flags, *(["--sequence-parallel"] if parallel.sequence_parallel else [])])


def candidate_table(tried: Sequence[Candidate]) -> str:
    """One line for each layout; the parts in GiB, those of both frozen models together, a critic's if there is one."""
    has_critic = any(candidate.memory.critic for candidate in tried)
    critic = ("critic",) if has_critic else ()
    parts_of = ("weights", "grads", "optim", "activ", "head", "frozen", *critic, "rollout", "total")
    rows = [["TP", "CP", "PP", "EP", "DP", *parts_of, ""]]
    for candidate in tried:
        memory = candidate.memory
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations + memory.recomputed,
            memory.head,
            memory.teacher + memory.reference,
            *((memory.critic,) if has_critic else ()),
            memory.rollout,
            memory.total,
        )
        sizes = [str(size) for size in layout_sizes(candidate.options).values()]
        rows.append([*sizes, *map(gib, parts), "fits" if candidate.fits else "too large"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def layout_sizes(options: Options) -> dict[str, int]:
    parallel = options.parallel
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "context": parallel.context_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "data": options.data_parallel_size,
    }


def as_json(options: Options, memory: RankMemory) -> dict[str, Any]:
    """A layout and its bytes for machines."""
    return {
        "layout": layout_sizes(options),
        "pipeline_stage": memory.stage,
        "device_bytes": memory.device_parts | {"total": memory.total},
        "host_bytes": memory.host,
    }


def memory_comment(options: Options) -> str:
    """A YAML comment for options that have passed ``validate``: what the rank that needs most would take on a GPU."""
    teacher = teacher_architecture(options) if knows_teacher(options) else None
    memory = estimate(options, Models.of(options, student_architecture(options), teacher), "cuda")
    parts = ", ".join(f"{LABELS[name]} {gib(count)}" for name, count in memory.device_parts.items() if count)
    return f"# estimated GiB of a rank on a GPU: {gib(memory.total)} ({parts})"
