"""What the options of a command line are judged to be, without a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_options
from opd_megatron.config.validate import validate


def accept(arguments: str, folders: Mapping[str, Path]) -> None:
    """Judge ``arguments``, in which ``$name`` stands for an input; an error where they are refused."""
    validate(parse_options(Template(arguments).substitute(folders).split()))


def refuse(arguments: str, folders: Mapping[str, Path]) -> str:
    """Why ``arguments`` are refused."""
    with pytest.raises(UserError) as refused:
        accept(arguments, folders)
    return str(refused.value)
