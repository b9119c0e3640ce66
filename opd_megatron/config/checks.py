"""Checks of single values: each returns what is wrong in words that follow the flag and its value, or None."""

from __future__ import annotations

import json
import re
import shlex
from urllib.parse import SplitResult, urlsplit

MASK = "***"
"""Stands in every dump and message for the secret parts of an address."""

LONGEST_WAIT = 1e7
"""Largest time limit in seconds or minutes: within what sockets, timers and process groups take."""

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SET_NAME = re.compile(r"[\w.+-]+")


def import_path(value: str) -> str | None:
    """``package.module:function``."""
    return None if _IMPORT_PATH.fullmatch(value) else "must be written package.module:function"


def variable_name(value: str) -> str | None:
    """Name of an environment variable."""
    return None if _VARIABLE.fullmatch(value) else "must be the name of an environment variable"


def mask_unless_variable(value: str) -> str:
    """``value`` if it is the name of an environment variable, and not a key given in its place."""
    return value if _VARIABLE.fullmatch(value) else MASK


def json_mapping(value: str) -> str | None:
    """A JSON object."""
    try:
        parsed = json.loads(value)
    except ValueError as error:
        return f"is not JSON ({error})"
    return None if isinstance(parsed, dict) else "must be a JSON mapping such as '{\"enable_thinking\": false}'"


def off_or_positive(value: int) -> str | None:
    """-1 switches off; else a count of at least 1."""
    return "must be -1 (off) or at least 1" if value == 0 else None


def rollout_range(value: str) -> str | None:
    """``START:END``, counted from 0."""
    parts = value.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) >= int(parts[1]):
        return "must be written START:END with START below END, e.g. 0:200"
    return None


def prompt_template(value: str) -> str | None:
    """A text with a place for the prompt."""
    return None if "{prompt}" in value else "must hold {prompt}, where the student's prompt goes"


def named_path(value: tuple[str, str]) -> str | None:
    """The name of a named file appears in metric names."""
    return None if _SET_NAME.fullmatch(value[0]) else f"name {value[0]!r} may hold letters, digits and . _ + - only"


def _split(url: str) -> SplitResult | None:
    """The parts of ``url``, None where it is no address (a port that is no number, an unclosed bracket)."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def http_url(value: str) -> str | None:
    """``http://`` or ``https://`` and a host; secrets that a dump has masked must be given anew."""
    parts = _split(value)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", value):
        return "must be an address such as http://127.0.0.1:30000"
    if MASK in value:
        return f"has its secret parts masked by a dump ({MASK}): write the whole address"
    return None


def mask_url(url: str) -> str:
    """``url`` without its user name, password, query and fragment: fit for logs, dumps and messages."""
    parts = _split(url)
    if parts is None:
        # Not an address, so there is no telling where in it a secret could be.
        return MASK if "@" in url or "?" in url else url
    host = parts.netloc.rpartition("@")[2]
    user = f"{MASK}@" if "@" in parts.netloc else ""
    prefix = f"{parts.scheme}://" if parts.scheme and parts.netloc else f"{parts.scheme}:" if parts.scheme else ""
    path = MASK if "@" in parts.path else parts.path
    query = f"?{MASK}" if parts.query else ""
    fragment = f"#{MASK}" if parts.fragment else ""
    return prefix + user + host + path + query + fragment


_OWN_SERVER_FLAGS = {
    "--admin-api-key": "the servers listen on this machine alone",
    "--api-key": "the servers listen on this machine alone",
    "--base-gpu-id": "use --sglang-base-gpu-id",
    "--context-length": "it is the model's",
    "--dtype": "it is the trainer's",
    "--enable-memory-saver": "use --sglang-free-memory",
    "--host": "the servers listen on this machine alone",
    "--load-format": "the weights are the trainer's",
    "--mem-fraction-static": "use --sglang-mem-fraction-static",
    "--model": "it is --hf-checkpoint",
    "--model-path": "it is --hf-checkpoint",
    "--port": "a free one is taken",
    "--skip-tokenizer-init": "stop strings need the tokenizer",
    "--ssl-keyfile-password": "the servers listen on this machine alone, and a command line shows it to everybody",
    "--tensor-parallel-size": "use --rollout-num-gpus-per-engine",
    "--tp": "use --rollout-num-gpus-per-engine",
    "--tp-size": "use --rollout-num-gpus-per-engine",
    "--weight-version": "it names the trainer's step",
}
"""Flags of SGLang's server that the engine sets, and what a user does instead."""
_SECRET_SERVER_FLAGS = ("--admin-api-key", "--api-key", "--ssl-keyfile-password")
_SHORTEST_ABBREVIATION = 5
"""Characters of a flag from which on it may abbreviate another; SGLang's parser takes every unique beginning."""


def server_flags(value: str) -> str | None:
    """Flags of a server as a shell would read them, without those that the engine sets."""
    try:
        words = shlex.split(value)
    except ValueError as error:
        return f"cannot be read as flags ({error})"
    own = next(filter(None, map(_own_server_flag, words)), None)
    if own is not None:
        return f"{own} is set already: {_OWN_SERVER_FLAGS[own]}"
    return None if not words or words[0].startswith("-") else "must begin with a flag"


def mask_server_flags(value: str) -> str:
    """``value`` unless there is a secret among the flags."""
    return MASK if {_own_server_flag(word) for word in value.split()} & set(_SECRET_SERVER_FLAGS) else value


def _own_server_flag(word: str) -> str | None:
    """The flag of the engine's that ``word`` writes or abbreviates, if any."""
    flag = word.partition("=")[0]
    if flag in _OWN_SERVER_FLAGS or len(flag) < _SHORTEST_ABBREVIATION:
        return flag if flag in _OWN_SERVER_FLAGS else None
    return next((own for own in _OWN_SERVER_FLAGS if own.startswith(flag)), None)
