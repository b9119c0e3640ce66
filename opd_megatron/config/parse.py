"""From a command line to frozen option groups; every fault of the command line is reported at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from opd_megatron.config.config_file import read_config_file
from opd_megatron.config.errors import refuse
from opd_megatron.config.flags import BadValueError, Flag, collect_flags, help_parser, looks_like_flag, unknown_flag
from opd_megatron.config.options import Options

Group = TypeVar("Group")

DESCRIPTION = (
    "Train a student by on-policy distillation and reinforcement learning on Megatron-Core. "
    "Options come from the command line and from --config FILE (YAML or TOML, the same names)."
)


@dataclass(frozen=True)
class ParsedGroups:
    """Option groups by class, ``parsed[ParallelOptions]``.

    ``given`` names the options set explicitly, ``typed`` those of them that stood on the command line.
    """

    groups: Mapping[type, Any]
    given: frozenset[str]
    typed: frozenset[str]

    def __getitem__(self, group: type[Group]) -> Group:
        return cast(Group, self.groups[group])


def option_groups() -> dict[str, type]:
    """The groups of :class:`Options` by field name."""
    return {
        item.name: cast(type, item.default_factory)
        for item in dataclasses.fields(Options)
        if item.default_factory is not dataclasses.MISSING
    }


def parse_options(argv: Sequence[str], prog: str = "train.py") -> Options:
    """The options of ``train.py``.

    Raises :class:`UserError` with all unknown flags and bad values on one line. ``--help`` prints and raises
    ``SystemExit(0)``.
    """
    return joined_options(parse_groups(argv, option_groups(), prog=prog, description=DESCRIPTION))


def joined_options(parsed: ParsedGroups) -> Options:
    """The options of ``train.py`` out of groups that have all of them, and maybe others."""
    values = {name: parsed.groups[group] for name, group in option_groups().items()}
    return Options(**values, given=parsed.given, typed=parsed.typed)


def parse_groups(argv: Sequence[str], groups: Mapping[str, type], *, prog: str, description: str) -> ParsedGroups:
    """Parse the options that the dataclasses in ``groups`` (by name) declare; ``--config`` is understood, too.

    The command line wins over the file. A flag given again replaces its value, except that options of several values
    collect them. Raises :class:`UserError`: first for all unknown flags and bad values, then for all missing options
    that are declared as ``required``.
    """
    flags = collect_flags(groups)
    if any(token in ("-h", "--help") for token in argv):
        help_parser(flags, groups, prog, description).print_help()
        raise SystemExit(0)
    line = _CommandLine(flags)
    line.read(argv)
    values: dict[str, Any] = {}
    faults = list(line.faults)
    if line.config is not None:
        values, file_faults = read_config_file(line.config, flags)
        faults += file_faults
    refuse(faults)
    values.update(line.values)
    refuse(
        [
            f"{flag.text} is missing: {flag.metadata['help']}"
            for flag in flags.values()
            if flag.metadata["required"] and flag.name not in values
        ]
    )
    built = {
        group: group(**{name: value for name, value in values.items() if flags[name].group == group_name})
        for group_name, group in groups.items()
    }
    return ParsedGroups(built, frozenset(values), frozenset(line.values))


@dataclass
class _CommandLine:
    """Reads tokens left to right and collects values and faults."""

    flags: Mapping[str, Flag]
    values: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    config: str | None = None

    def read(self, argv: Sequence[str]) -> None:
        position = 0
        while position < len(argv):
            token = argv[position]
            position += 1
            if not looks_like_flag(token):
                self.faults.append(f"{token!r}: unexpected argument{self._hint(argv[position - 2 : position - 1])}")
                continue
            end = position
            while end < len(argv) and not looks_like_flag(argv[end]):
                end += 1
            position += self._flag(token, argv[position:end])

    def _hint(self, before: Sequence[str]) -> str:
        """Why an argument is left over: a switch, or an option of one value, stands before it."""
        flag = self.flags.get(before[0].removeprefix("--").replace("-", "_")) if before else None
        return (
            f" ({flag.text} is a switch: leave the value out, or write {flag.text}=false)"
            if (flag and flag.switch)
            else " (values with spaces need quotes)"
        )

    def _flag(self, token: str, following: Sequence[str]) -> int:
        """Read one flag with the value tokens after it; returns how many of them it used."""
        typed, joined, attached = token.partition("=")
        name = typed.removeprefix("--").replace("-", "_")
        if not typed.startswith("--") or "_" in typed or (name not in self.flags and name != "config"):
            known = [flag.text.removeprefix("--") for flag in self.flags.values()]
            self.faults.append(unknown_flag(typed, [*known, "config", "help"]))
            return len(following)  # the values of a misspelt flag are no faults of their own
        entries = [attached] if joined else list(following)
        if name == "config":
            if not entries or not entries[0]:
                self.faults.append("--config: needs a file")
            elif self.config is not None:
                self.faults.append("--config: given twice")
            else:
                self.config = entries[0]
            return 0 if joined else min(1, len(following))
        flag = self.flags[name]
        if flag.switch:
            entries = [attached] if joined else ["true"]
        elif not flag.many:
            entries = entries[:1]
        try:
            self._store(flag, entries)
        except BadValueError as error:
            self.faults.append(f"{flag.text}: {error}")
        return 0 if joined or flag.switch else len(entries)

    def _store(self, flag: Flag, entries: Sequence[str]) -> None:
        if not entries:
            raise BadValueError("needs a value")
        if len(entries) % flag.width:
            raise BadValueError(f"takes {flag.width} values at a time: {' '.join(flag.metadata['metavar'])}")
        read: list[Any] = []
        for entry in entries:
            try:
                read.append(flag.read(entry))
            except BadValueError as error:
                self.faults.append(f"{flag.text} {flag.show(entry)}: {error}")
        if len(read) < len(entries):
            return
        if flag.width > 1:
            read = [tuple(read[start : start + flag.width]) for start in range(0, len(read), flag.width)]
            for value in read:
                flag.check(value)
        if flag.many:
            self.values[flag.name] = (*self.values.get(flag.name, ()), *read)
        else:
            self.values[flag.name] = read[0]
