"""SIGTERM and Ctrl-C end a run after the current step, saved."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from opd_megatron.config.checks import mask_url
from opd_megatron.config.options import Options

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def unwinding_at_sigterm() -> Iterator[None]:
    """Let SIGTERM raise ``SystemExit`` (128 + 15), so that a run that has only begun ends the servers it has started.

    Outside the main thread signals cannot be handled and nothing is installed.
    """
    try:
        before = signal.signal(signal.SIGTERM, _unwind)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unwind(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class Interrupt:
    """Notes the first SIGTERM or SIGINT in :attr:`signal`; a second one ends the process at once.

    Outside the main thread signals cannot be handled and nothing is installed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                return self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("%s: finishing this step and saving; once more to stop at once", signal.Signals(number).name)

    def exit_if_set(self, options: Options) -> None:
        """Print how to go on and raise ``SystemExit`` if a signal was noted."""
        if self.signal is None:
            return
        print(f"interrupted and saved; resume with: {resume_command(options, sys.argv)}", flush=True)
        raise SystemExit(128 + self.signal)


def resume_command(options: Options, argv: list[str]) -> str:
    """The command of this process with ``--load`` set to the folder of its checkpoints.

    What said how an earlier ``--load`` was to be read goes, and ``--no-load-optim`` comes where no optimizer is saved.
    Secrets in the teacher's address are masked, so that address has to be given anew.
    """
    replaced = ("--load", "--ckpt-step")
    dropped = ("--finetune", "--no-load-optim", "--no-load-rng")
    command = ["python", *argv]
    kept = [
        mask_url(word) if "://" in word else word
        for place, word in enumerate(command)
        if word not in dropped and word.partition("=")[0] not in replaced and command[place - 1] not in replaced
    ]
    without_optimizer = ["--no-load-optim"] if options.checkpoint.no_save_optim else []
    return shlex.join([*kept, "--load", str(options.save_folder), *without_optimizer])
