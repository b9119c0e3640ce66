"""Functions of the user's own, named by import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

from opd_megatron.config.errors import UserError


def load_function(path: str, flag: str) -> Callable[..., Any]:
    """Import ``package.module:function``; raises :class:`UserError` naming ``flag`` and what is missing.

    An error inside the module other than a missing import propagates as it is: it is a bug with a traceback.
    """
    module_name, separator, attribute = path.partition(":")
    if not separator or not module_name or not attribute:
        raise UserError(f"{flag} {path}: write it as package.module:function")
    try:
        function: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{flag} {path}: cannot import {module_name} ({error}); is it on PYTHONPATH?") from error
    for name in attribute.split("."):
        if not hasattr(function, name):
            raise UserError(f"{flag} {path}: {module_name} has no {attribute}")
        function = getattr(function, name)
    if not callable(function):
        raise UserError(f"{flag} {path}: {attribute} is not a function")
    return cast(Callable[..., Any], function)
