"""Functions of the user's own: whether their import paths lead to one."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.user_code import load_function


def function_faults(options: Options) -> Iterator[str]:
    """Every import path that leads nowhere, of the functions that the run will call.

    The modules are imported, as the run would do: whatever else says that a name is there may be wrong.
    """
    objective, rollout = options.objective, options.rollout
    paths = [
        ("--custom-rm-path", options.reward.custom_rm_path),
        ("--custom-advantage-path", objective.custom_advantage_path),
        ("--custom-loss-path", objective.custom_loss_path),
    ]
    if rollout.load_debug_rollout_data is None:
        paths += [
            ("--custom-generate-function-path", rollout.custom_generate_function_path),
            ("--dynamic-filter-path", rollout.dynamic_filter_path),
        ]
    for flag, path in paths:
        if path is None:
            continue
        try:
            load_function(path, flag)
        except UserError as error:
            yield str(error)
