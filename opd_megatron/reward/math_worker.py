"""The process that runs math-verify: one JSON request a line on stdin, one JSON answer a line on stdout.

A request is ``{"label", "response", "limit"}``; an answer is ``{"correct": bool}``, ``{"error": text}`` (the label
cannot be read) or ``{"unjudged": text}`` (math-verify failed). Before the first request the worker says
``{"ready": true}`` or ``{"error": text}``.

Sympy can spend hours inside one integer power without ever coming back to the interpreter, where neither threads nor
Python's signal handlers help. So the limit (seconds) is a timer whose default action ends this process; it also holds
when the parent is gone. A limit on memory turns ``10^(10^10)`` into an exception.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any, TextIO

MEMORY_LIMIT = 4 << 30
"""Address space of the process in bytes."""

_DELIMITERS = ("$", "\\boxed", "\\(", "\\[")


def judge(label: str, response: str) -> dict[str, Any]:
    """Compare a response with a label; a label without LaTeX delimiters is read as the content of ``\\boxed{}``."""
    from math_verify import parse, verify

    marked = label if any(mark in label for mark in _DELIMITERS) else f"\\boxed{{{label}}}"
    gold = parse(marked, parsing_timeout=None)
    if not gold:
        return {"error": f"math-verify cannot read the label {label!r}"}
    return {"correct": bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))}


def _serve(requests: TextIO, answers: TextIO) -> None:
    logging.disable(logging.CRITICAL)
    try:
        judge("1", "$1$")  # the first parse builds tables, which must not count against a request
        ready: dict[str, Any] = {"ready": True}
    except ImportError as error:
        ready = {"error": f"math-verify cannot be imported ({error})"}
    answers.write(json.dumps(ready) + "\n")
    answers.flush()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    allowed = MEMORY_LIMIT if most == resource.RLIM_INFINITY else min(MEMORY_LIMIT, most)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, most))
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["limit"])
        try:
            answer = judge(request["label"], request["response"])
        except Exception as error:
            answer = {"unjudged": f"math-verify raised {type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve until stdin ends; whatever the libraries print goes to stderr."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
