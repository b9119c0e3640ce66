"""Dynamic filters: which groups of samples are worth training on, judged by their rewards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np

from opd_megatron.config.errors import RunError, UserError
from opd_megatron.config.options import RolloutOptions
from opd_megatron.config.user_code import load_function
from opd_megatron.sample import Sample

GroupFilter = Callable[[Sequence[Sample]], bool]
"""Whether the samples of one prompt, with their rewards, are kept."""


class FilterError(RunError):
    """A dynamic filter dropped more groups than the run allows, or failed."""


def unequal_rewards(samples: Sequence[Sample]) -> bool:
    """Not all rewards are the same: else every advantage of a group-normalised estimator is 0."""
    return len({sample.reward for sample in samples}) > 1


_BY_NAME: dict[str, GroupFilter | None] = {"none": None, "unequal_rewards": unequal_rewards}


def build_filter(options: RolloutOptions) -> GroupFilter | None:
    """The filter that ``--dynamic-filter`` or ``--dynamic-filter-path`` names, None for none.

    Raises :class:`UserError` if an import path leads to no plain function.
    """
    path = options.dynamic_filter_path
    if path is None:
        return _BY_NAME[options.dynamic_filter]
    function = load_function(path, "--dynamic-filter-path")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"--dynamic-filter-path {path}: an async function cannot be a filter: make it a plain one")

    def keep(samples: Sequence[Sample]) -> bool:
        try:
            verdict = function(list(samples))
        except Exception as error:
            raise FilterError(f"--dynamic-filter-path {path}: {type(error).__name__}: {error}") from error
        if not isinstance(verdict, (bool, np.bool_)):
            raise FilterError(f"--dynamic-filter-path {path}: returned {verdict!r}, not True (keep) or False (drop)")
        return bool(verdict)

    return keep
