"""The declared options as flags: names, types, the reading of their values, ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 2**31 - 1
"""Largest whole number of an option that declares no maximum: one that every library takes as a size or a seed."""


LARGEST_FLOAT32 = 3.4e38


class BadValueError(ValueError):
    """A value that its option does not take; the message follows the flag and the value."""


@dataclass(frozen=True)
class Flag:
    """One option as the command line sees it.

    ``kind`` is the type of one entry, ``width`` how many entries make one value (2 for a pair) and ``many`` whether
    the option holds a tuple of values. ``optional`` options may be None.
    """

    name: str
    group: str
    kind: type
    width: int
    many: bool
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The flag as it is typed, ``--opd-kl-coef``."""
        return flag_of(self.name)

    @property
    def switch(self) -> bool:
        return self.kind is bool

    def show(self, value: Any) -> str:
        """``value`` (an entry, a pair, or a tuple of them) as messages and dumps may print it."""
        if isinstance(value, tuple | list):
            return " ".join(self.show(entry) for entry in value)
        if isinstance(value, bool):
            return str(value).lower()
        return " ".join(self.masked(value).split())

    def masked(self, value: Any) -> str:
        """An entry as text without its secret parts, its line breaks kept."""
        return str(self.metadata["show"](value))

    def read(self, entry: Any) -> Any:
        """Turn text, or a scalar of a configuration file, into a checked entry; raises :class:`BadValueError`."""
        value = _convert(self.kind, entry)
        limits = self.metadata
        if limits["choices"] is not None and value not in limits["choices"]:
            near = suggestion(str(value), limits["choices"])
            raise BadValueError(f"is unknown: choose {spoken(limits['choices'])}{near}")
        if not self.switch and not isinstance(value, str):
            _check_bounds(value, limits)
        if self.width == 1:
            self.check(value)
        return value

    def check(self, value: Any) -> None:
        """Apply the option's own check to one whole value; raises :class:`BadValueError`."""
        fault = self.metadata["check"](value) if self.metadata["check"] else None
        if fault:
            raise BadValueError(fault)


def _convert(kind: type, entry: Any) -> Any:
    if kind is bool:
        if isinstance(entry, bool):
            return entry
        if isinstance(entry, str) and entry.lower() in ("true", "false"):
            return entry.lower() == "true"
        raise BadValueError("must be true or false")
    if kind is str:
        if not isinstance(entry, str):
            raise BadValueError("must be text: put it in quotes")
        if not entry.strip():
            raise BadValueError("is empty")
        return entry
    what = "a whole number" if kind is int else "a number"
    if isinstance(entry, bool) or (kind is int and isinstance(entry, float)):
        raise BadValueError(f"must be {what}")
    try:
        return kind(entry)
    except (TypeError, ValueError, OverflowError):
        raise BadValueError(f"must be {what}") from None


def _check_bounds(value: float, limits: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadValueError("must be finite")
    if limits["minimum"] is not None and value < limits["minimum"]:
        raise BadValueError(f"must be at least {limits['minimum']:g}")
    if limits["above"] is not None and value <= limits["above"]:
        raise BadValueError(f"must be above {limits['above']:g}")
    maximum = limits["maximum"]
    if maximum is None and isinstance(value, int):
        maximum = MOST
    if maximum is not None and value > maximum:
        raise BadValueError(f"must be at most {maximum if isinstance(maximum, int) else format(maximum, 'g')}")
    if limits["below"] is not None and value >= limits["below"]:
        raise BadValueError(f"must be below {limits['below']:g}")
    if abs(value) > LARGEST_FLOAT32:
        raise BadValueError("is too large for a 32-bit number")


def flag_of(name: str) -> str:
    """How the option ``name`` is typed."""
    return "--" + name.replace("_", "-")


def spoken(words: Iterable[Any]) -> str:
    """``a, b or c``."""
    *most, last = [str(word) for word in words]
    return f"{', '.join(most)} or {last}" if most else last


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`` (did you mean ...?)`` with the nearest of ``known``, or nothing where none is near."""
    names = [str(word) for word in known]
    begun = [word for word in names if word.startswith(name)] if len(name) >= 4 else []
    near = begun[:1] or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


def _entry_type(annotation: Any) -> tuple[type, int, bool, bool]:
    """(kind, width, many, optional) of a field's annotation; raises ``TypeError`` if it is not one of the forms."""
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        optional, annotation = True, inner[0]
    if annotation in (bool, int, float, str):
        return annotation, 1, False, optional
    if typing.get_origin(annotation) is tuple:
        entry = typing.get_args(annotation)[0]
        if typing.get_origin(entry) is tuple:
            parts = typing.get_args(entry)
            return parts[0], len(parts), True, optional
        return entry, 1, True, optional
    raise TypeError(f"an option cannot have the type {annotation}")


def group_title(group: type) -> str:
    """First line of the group's docstring."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0]


def collect_flags(groups: Mapping[str, type]) -> dict[str, Flag]:
    """Flags of all option groups by field name; raises ``TypeError`` if two groups declare one name."""
    flags: dict[str, Flag] = {}
    for group_name, group in groups.items():
        hints = typing.get_type_hints(group)
        for item in dataclasses.fields(group):
            if item.name in flags:
                raise TypeError(f"{item.name} is declared by {flags[item.name].group} and {group_name}")
            kind, width, many, optional = _entry_type(hints[item.name])
            flags[item.name] = Flag(item.name, group_name, kind, width, many, optional, item.default, item.metadata)
    return flags


def _help_text(flag: Flag) -> str:
    text = str(flag.metadata["help"])
    if flag.metadata["unit"]:
        text += f", in {flag.metadata['unit']}"
    if flag.metadata["required"]:
        text += " [required]"
    elif flag.switch:
        text += f" [default: {'on' if flag.default else 'off'}]"
    elif flag.default not in (None, ()):
        text += f" [default: {flag.show(flag.default)}]"
    return text.replace("%", "%%")


def help_parser(
    flags: Mapping[str, Flag], groups: Mapping[str, type], prog: str, description: str
) -> argparse.ArgumentParser:
    """The argparse parser that formats ``--help``."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        allow_abbrev=False,
        epilog="A switch that a configuration file turned on is turned off by --FLAG=false.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or TOML file of options; the command line wins")
    for group_name, group in groups.items():
        section = parser.add_argument_group(group_title(group))
        for flag in flags.values():
            if flag.group != group_name:
                continue
            if flag.switch:
                section.add_argument(flag.text, action="store_true", help=_help_text(flag))
                continue
            choices = flag.metadata["choices"]
            metavar = flag.metadata["metavar"] or ("{" + ",".join(map(str, choices)) + "}" if choices else None)
            if metavar is None:
                metavar = {int: "INT", float: "FLOAT"}.get(flag.kind, "TEXT")
            nargs: int | str | None = flag.width if flag.width > 1 else "+" if flag.many else None
            section.add_argument(flag.text, metavar=metavar, nargs=nargs, help=_help_text(flag))
    return parser


_NUMBER = re.compile(r"-(\d|\.\d|inf(inity)?$|nan$)", re.IGNORECASE)


def looks_like_flag(token: str) -> bool:
    """Whether a command line token starts a new flag: a leading minus that is no negative number and no sentence.

    What follows an equals sign may be a sentence.
    """
    name = token.partition("=")[0]
    return len(token) > 1 and token.startswith("-") and not _NUMBER.match(token) and not re.search(r"\s", name)


def unknown_flag(token: str, flags: Sequence[str]) -> str:
    """The fault of a misspelt flag, with the nearest name."""
    name = token.lstrip("-").replace("_", "-")
    return f"{token}: unknown flag{suggestion(name, flags, '--') or ' (see --help)'}"
