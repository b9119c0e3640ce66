"""The one exception that means: the user's input is wrong."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do; programs exit with code 2."""


def refuse(faults: Sequence[str]) -> None:
    """Raise one :class:`UserError` that names all ``faults`` of a stage; do nothing if there is none."""
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
