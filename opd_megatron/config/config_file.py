"""``--config FILE``: YAML or TOML with the names of the flags, flat or under the names of their groups."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_megatron.config.flags import BadValueError, Flag, spoken, suggestion

DERIVED = "derived"
"""Section of a dump that says what follows from the options; it is not read back."""


def read_config_file(path: str, flags: Mapping[str, Flag]) -> tuple[dict[str, Any], list[str]]:
    """Values by option name, and every fault found.

    Dashes and underscores are the same in a name. ``null`` leaves an option at its default, and so does a value equal
    to the default: it does not count as given, so that a dump of all options can be read back.
    """
    content, fault = load_mapping(Path(path))
    if fault:
        return {}, [f"--config {path}: {fault}"]
    values: dict[str, Any] = {}
    faults: list[str] = []
    groups = sorted({flag.group for flag in flags.values()})
    for key, entry in _entries(content, groups, faults):
        group, _, name = key.rpartition(".")
        known = [flag.name for flag in flags.values() if group in ("", flag.group)]
        if name not in known:
            elsewhere = f" (it belongs to {flags[name].group})" if name in flags else ""
            near = suggestion(name, known if group else [*known, *groups])
            faults.append(f"{key}: unknown key{elsewhere or near or ' (see --help)'}")
        elif name in values:
            faults.append(f"{key}: given twice")
        else:
            try:
                values[name] = _read(flags[name], entry)
            except BadValueError as error:
                faults.append(f"{key} {flags[name].show(entry)}: {error}")
    given = {name: value for name, value in values.items() if value != flags[name].default}
    return given, [f"--config {path}: {fault}" for fault in faults]


def load_mapping(path: Path, endings: Sequence[str] = (".yaml", ".yml", ".toml")) -> tuple[Mapping[str, Any], str]:
    """The file's mapping and an empty text, or an empty mapping and the fault. JSON is read as the YAML it is."""
    if path.suffix not in endings:
        return {}, f"the name must end in {spoken(endings)}"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return {}, "is not UTF-8 text"
    except OSError as error:
        return {}, f"cannot be read ({error.strerror})"
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text), ""
        except tomllib.TOMLDecodeError as error:
            return {}, f"is not TOML ({error})"
    return _load_yaml(text)


def _load_yaml(text: str) -> tuple[Mapping[str, Any], str]:
    import yaml  # here, because most runs have no configuration file and start faster without it

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in one mapping, of which YAML would keep the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"{key} is given twice")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return mapping

    try:
        content = yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:  # its own text quotes the line, which may hold a password
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        return {}, f"is not YAML ({' '.join(str(error.problem).split())}{where})"
    except (yaml.YAMLError, ValueError) as error:
        return {}, f"is not YAML ({' '.join(str(error).split())})"
    if content is None:
        return {}, ""
    if not isinstance(content, dict):
        return {}, "must be a mapping of names to values"
    return content, ""


def _entries(content: Mapping[str, Any], groups: Sequence[str], faults: list[str]) -> list[tuple[str, Any]]:
    """``(name, value)`` or ``(group.name, value)`` of every option in the file."""
    entries: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name == DERIVED and DERIVED not in groups:
            continue
        if isinstance(value, dict) and name in groups:
            entries += [(f"{name}.{str(inner).replace('-', '_')}", entry) for inner, entry in value.items()]
        elif name in groups and value is None:
            continue
        elif isinstance(value, dict):
            near = suggestion(name, groups)
            faults.append(f"{name}: is no group of options{near or f' (groups: {chr(44).join(groups)})'}")
        else:
            entries.append((name, value))
    return entries


def _read(flag: Flag, entry: Any) -> Any:
    if entry is None:
        if flag.default is None or flag.many:
            return flag.default
        raise BadValueError("needs a value")
    if not flag.many:
        if isinstance(entry, list | dict):
            raise BadValueError("takes one value")
        return flag.read(entry)
    if flag.width == 1:
        return tuple(flag.read(item) for item in (entry if isinstance(entry, list) else [entry]))
    if not isinstance(entry, list) or any(not isinstance(item, list) or len(item) != flag.width for item in entry):
        raise BadValueError(f"must be a list of lists of {flag.width} values")
    values = [tuple(flag.read(part) for part in item) for item in entry]
    for value in values:
        flag.check(value)
    return tuple(values)
