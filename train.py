"""Train a student: parse the options, refuse what cannot work, run the loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from opd_megatron.config.cli import run_cli
from opd_megatron.config.dump import dump_yaml
from opd_megatron.config.memory_report import memory_comment
from opd_megatron.config.parse import parse_options
from opd_megatron.config.validate import validate
from opd_megatron.data.prompts import check_prompt_file


def main(argv: Sequence[str]) -> None:
    """Run with the arguments ``argv``; raises :class:`UserError` before anything is created if they are wrong."""
    options = parse_options(argv)
    validate(options, check_prompt_file)
    if options.run.dry_run:
        print(dump_yaml(options), end="")
        print(memory_comment(options))
        return
    from opd_megatron.loop import run  # here, because it imports torch, which bad options need not wait for

    run(options)


if __name__ == "__main__":
    try:
        code = run_cli(main)
    except SystemExit as ended:  # how a run ends that was interrupted and saved
        if not isinstance(ended.code, int) or ended.code < 128:
            raise
        code = ended.code
    if code >= 128:
        # at once: the interpreter's own way out aborts where a thread of the engine is in the middle of a computation
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
