"""What the rollout needs of a prompt, and how a prompt becomes a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from opd_megatron.sample import Sample


class Prompt(Protocol):
    """One row of a prompt set; ``index`` is its row, ``prompt_tokens`` int64 ``[P]``.

    ``teacher_prompt_tokens`` are what the teacher sees in their place, None where that is the same. ``extras`` are
    further fields of the row that options name.
    """

    @property
    def prompt(self) -> Any: ...
    @property
    def prompt_tokens(self) -> np.ndarray: ...
    @property
    def label(self) -> Any: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def index(self) -> int: ...
    @property
    def teacher_prompt_tokens(self) -> np.ndarray | None: ...
    @property
    def extras(self) -> Mapping[str, Any]: ...


def new_sample(record: Prompt, index: int, group_index: int) -> Sample:
    """A sample of this prompt with an empty response."""
    return Sample(
        index=index,
        group_index=group_index,
        prompt=record.prompt,
        prompt_tokens=record.prompt_tokens,
        label=record.label,
        metadata=dict(record.metadata),
        teacher_prompt_tokens=record.teacher_prompt_tokens,
    )
