"""How an option is declared: a frozen dataclass field whose metadata carries all that the command line shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    metavar: str | tuple[str, ...] | None = None,
    check: Callable[[Any], str | None] | None = None,
    show: Callable[[Any], str] = str,
    required: bool = False,
) -> Any:
    """Declare one option; the flag is the field's name with dashes and the type its annotation.

    ``bool`` fields become switches (default False). ``tuple[str, ...]`` takes one or more values,
    ``tuple[tuple[str, str], ...]`` is a repeatable pair. ``minimum``/``maximum`` are inclusive and ``above``/``below``
    exclusive bounds of a number. A whole number has a maximum in any case (``flags.MOST``), a float must be finite and
    a text not empty. ``check`` is asked about each value (of a tuple, about each entry) and returns what is wrong with
    it, e.g. ``must be a port``, or None. ``show`` turns an entry into what messages and dumps may print of it.
    ``required`` says that the option must be given (the options of ``train.py`` use ``validate`` instead, as most
    depend on others).
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "metavar": metavar,
        "check": check,
        "show": show,
        "required": required,
    }
    return dataclasses.field(default=default, metadata=metadata)
