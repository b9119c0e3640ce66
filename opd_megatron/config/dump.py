"""The resolved configuration as YAML that ``--config`` reads back."""

from __future__ import annotations

import dataclasses
from typing import Any

from opd_megatron.config.config_file import DERIVED
from opd_megatron.config.flags import Flag, collect_flags
from opd_megatron.config.options import Options
from opd_megatron.config.parse import option_groups
from opd_megatron.config.resolve import knows_teacher, starting_point, student_architecture, teacher_architecture

_NOT_CONFIGURATION = ("dry_run",)


def dump_yaml(options: Options) -> str:
    """Every option under its group, and a section ``derived`` of what follows from them.

    Secret parts of addresses are masked. ``derived`` is for the reader and is ignored by ``--config``, so that a
    changed option changes all that depends on it. The options must have passed ``validate``.
    """
    import yaml  # here, so that option parsing starts without it

    groups = option_groups()
    content: dict[str, dict[str, Any]] = {name: {} for name in groups}
    for flag in collect_flags(groups).values():
        if flag.name not in _NOT_CONFIGURATION:
            content[flag.group][flag.name] = _printable(flag, getattr(getattr(options, flag.group), flag.name))
    content[DERIVED] = derived(options)
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)
    return text


def derived(options: Options) -> dict[str, Any]:
    """What follows from validated options: sizes, folders, and the models' architectures."""
    start = starting_point(options)
    values: dict[str, Any] = {
        "save": str(options.save_folder),
        "world_size": options.world_size,
        "data_parallel_size": options.data_parallel_size,
        "samples_per_rollout": options.samples_per_rollout,
        "global_batch_size": options.global_batch_size,
        "steps_per_rollout": options.steps_per_rollout,
        "label_key": options.label_key,
        "eval_max_response_len": options.eval_max_response_len,
        "start": {"source": start.source, "folder": str(start.folder)},
        "student": dataclasses.asdict(student_architecture(options)),
    }
    if knows_teacher(options):
        values["teacher"] = dataclasses.asdict(teacher_architecture(options))
    return values


def _printable(flag: Flag, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_printable(flag, entry) for entry in value]
    return flag.masked(value) if isinstance(value, str) else value
