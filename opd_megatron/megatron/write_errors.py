"""What a full disk looks like from inside the libraries that write weights, as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from opd_megatron.config.errors import RunError

_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
"""Parts of torch's writer that stand in the ``RuntimeError`` of a write that failed."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write into a :class:`RunError` that names ``folder`` and the reason; other errors pass."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise RunError(f"{folder} cannot be written ({reason}): what was there before is as it was") from error


def _reason(error: BaseException) -> str | None:
    """Why a write failed; None if it did not fail because of the disk."""
    if isinstance(error, CheckpointException):
        # of each rank that failed the error and its traceback
        return next((reason for cause, _ in error.failures.values() if (reason := _reason(cause))), None)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    if isinstance(error, SafetensorError):
        return text
    if isinstance(error, RuntimeError) and any(part in text for part in _TORCH_WRITER):
        return f"the disk is full or failing: {text[:200]}"
    return None
