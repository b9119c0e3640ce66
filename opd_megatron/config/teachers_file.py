"""``--opd-teachers FILE``: the teachers of a run by name, in YAML, TOML or JSON.

::

    math:
      urls: [http://10.0.0.1:30000, http://10.0.0.2:30000]
      api_key_env: MATH_TEACHER_KEY
    code:
      urls: https://code.example
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.config import checks
from opd_megatron.config.config_file import load_mapping
from opd_megatron.config.flags import suggestion

ENDINGS = (".yaml", ".yml", ".toml", ".json")
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class TeacherEntry:
    """The addresses of one teacher's replicas, and the environment variable of their API key."""

    name: str
    urls: tuple[str, ...]
    api_key_env: str | None = None


def read_teachers(path: str) -> tuple[list[TeacherEntry], list[str]]:
    """The teachers in the order of the file, and every fault found; addresses in faults are masked."""
    content, fault = load_mapping(Path(path), ENDINGS)
    faults = [fault] if fault else [] if content else ["names no teacher"]
    entries = []
    for name, entry in content.items():
        found = list(_faults(name, entry))
        faults += [f"{name}: {text}" for text in found]
        if not found:
            urls = entry["urls"]
            entries.append(
                TeacherEntry(name, (urls,) if isinstance(urls, str) else tuple(urls), entry.get("api_key_env"))
            )
    return entries, [f"--opd-teachers {path}: {text}" for text in faults]


def _faults(name: Any, entry: Any) -> Iterator[str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield "a teacher's name may hold letters, digits and . _ + - only"
    if not isinstance(entry, Mapping):
        yield "must be a mapping with urls, and api_key_env if the server asks for a key"
        return
    for key in entry:
        if key not in ("urls", "api_key_env"):
            yield f"{key}: unknown key{suggestion(str(key), ('urls', 'api_key_env')) or ' (known: urls, api_key_env)'}"
    urls = entry.get("urls")
    if isinstance(urls, str):
        urls = [urls]
    if not isinstance(urls, list) or not urls:
        yield "urls must be an address or a list of them"
        return
    for url in urls:
        fault = checks.http_url(url) if isinstance(url, str) else "must be an address such as http://127.0.0.1:30000"
        if fault:
            yield f"urls {checks.mask_url(str(url))} {fault}"
    variable = entry.get("api_key_env")
    if variable is not None and (not isinstance(variable, str) or checks.variable_name(variable)):
        yield "api_key_env must be the name of an environment variable"
