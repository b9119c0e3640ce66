"""Exceptions that a user sees as one line: wrong input, and what outside the program ended a run."""

from __future__ import annotations

from collections.abc import Sequence


class RunError(RuntimeError):
    """Something outside the program ended a run: a teacher, a reward function, a rank. Programs exit with code 1.

    The message is one line that names what failed.
    """


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do; programs exit with code 2."""


def refuse(faults: Sequence[str]) -> None:
    """Raise one :class:`UserError` that names all ``faults`` of a stage; do nothing if there is none."""
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
