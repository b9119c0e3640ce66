"""Run tools one after another on the ranks of ``torchrun``, in one start of Python: ``ranks.py JOBS.json``.

``JOBS.json`` is a list of ``[tool, [argument, ...]]``.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from opd_megatron.megatron import distributed


def run_jobs(file: str) -> None:
    for tool, arguments in json.loads(Path(file).read_text(encoding="utf-8")):
        importlib.import_module(f"tools.{tool}").main(arguments)
    distributed.shutdown()


if __name__ == "__main__":
    run_jobs(sys.argv[1])
