"""Start servers for the length of one job, and end exactly the processes that were started.

As a program it runs a command beside a server, for examples and scripts::

    python -m opd_megatron.servers --log teacher.log \\
        --server "python -m sglang.launch_server --model-path DIR --host 127.0.0.1 --port {port}" \\
        -- python train.py ... --opd-teacher-url {url}

``{port}`` is a free port, ``{url}`` the server's address. The exit code is the command's, and 2 if the server
does not start.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import requests

from opd_megatron.config.errors import UserError
from opd_megatron.system import free_port

logger = logging.getLogger(__name__)

LOG_TAIL = 20
"""Lines of the server's log that are shown when it fails to start."""
END_TIMEOUT = 10.0
"""Seconds that a server has to end by itself before its process group is killed."""
_POLL = 0.25


_PR_SET_PDEATHSIG = 1
_C_LIBRARY = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """In the child: let the kernel kill it when its parent is gone, as those of SGLang do."""
    _C_LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start_server(
    command: Sequence[str],
    *,
    log_path: str | Path,
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> LocalServer:
    """Start ``command``, with ``{port}`` in it replaced by a free port, as the leader of a process group of its own.

    Output is added to ``log_path``, and ``environment`` to this process's. It is not waited for. Raises
    :class:`UserError` if there is no such program. Whoever calls this calls :meth:`LocalServer.end`, and lives as long
    as the server: on Linux it is killed when the thread that started it ends, so that nothing is left of a job that
    was itself killed.
    """
    port = free_port() if port is None else port
    log_path = Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    arguments = [part.replace("{port}", str(port)) for part in command]
    with log_path.open("ab") as log:
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            raise UserError(f"cannot start the server {shlex.join(arguments)}: {error}") from error
    return LocalServer(f"http://127.0.0.1:{port}", process, log_path)


@contextlib.contextmanager
def local_server(
    command: Sequence[str], *, log_path: str | Path, port: int | None = None, start_timeout: float = 600.0
) -> Iterator[LocalServer]:
    """Run ``command``, with ``{port}`` in it replaced, as a server on this machine until the block is left.

    Entered when the server is healthy: ``GET /health`` answers 200, which SGLang gives after generating a token.
    Output goes to ``log_path``. Raises :class:`UserError`, after logging the last lines of it, if the process ends
    or ``start_timeout`` seconds pass before. On leaving, the server's process group is ended, and nothing else.
    """
    Path(log_path).unlink(missing_ok=True)
    server = start_server(command, log_path=log_path, port=port)
    try:
        server.wait_until_healthy(start_timeout)
        yield server
    finally:
        server.end()


class LocalServer:
    """A server process, the leader of a process group of its own."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.url = url
        self.process = process
        self.log_path = log_path

    def wait_until_healthy(self, timeout: float) -> None:
        """Return when the server can generate; raises :class:`UserError` as :func:`local_server` says."""
        deadline = time.monotonic() + timeout
        reason = f"was not healthy after {timeout:g} s"
        while time.monotonic() < deadline:
            if self.has_ended():
                reason = "ended while starting"
                break
            with contextlib.suppress(requests.RequestException), requests.Session() as session:
                session.trust_env = False
                if session.get(self.url + "/health", timeout=30).status_code == 200:
                    return
            time.sleep(_POLL)
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
        logger.error("the last lines of %s:\n%s", self.log_path, "\n".join(lines))
        raise UserError(f"the server {reason}; read {self.log_path}")

    def end(self) -> None:
        """Ask the server to end, and then end what is left of its group."""
        # Only the leader is asked: SGLang takes a worker that ends on its own for a crash to be diagnosed.
        if not self.has_ended():
            self.process.terminate()
        deadline = time.monotonic() + END_TIMEOUT
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(_POLL)
        self.kill()

    def kill(self) -> None:
        """End every process of the group at once, as a crash of the machine would; harmless when repeated."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def has_ended(self) -> bool:
        """Whether the leader has ended, which stays unreaped: its id must name this group until the group is killed."""
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_beside(server: LocalServer, command: Sequence[str]) -> int:
    """Run ``command`` with ``{url}`` replaced; returns its exit code, 128 + n after signal n.

    SIGTERM and Ctrl-C are the command's to answer: it may want to save before it ends. Raises :class:`UserError` if
    there is no such command.
    """
    try:
        process = subprocess.Popen([part.replace("{url}", server.url) for part in command])
    except OSError as error:
        raise UserError(f"cannot run {shlex.join(command)}: {error}") from error

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # A terminal sends Ctrl-C to both processes, so only SIGTERM is passed on.
    before = signal.signal(signal.SIGTERM, pass_on), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    return code if code >= 0 else 128 - code


def _end_with_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="run a command beside a server")
    parser.add_argument("--server", required=True, metavar="COMMAND", help="the server; {port} is replaced")
    parser.add_argument("--log", required=True, metavar="FILE", help="the server's output")
    parser.add_argument("--port", type=int, help="port of the server (default: a free one)")
    parser.add_argument("--start-timeout", type=float, default=600.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("command", nargs="+", help="the command after --; {url} is replaced")
    options = parser.parse_args(arguments)
    # So that the server is also ended when this program is told to stop before the command runs.
    signal.signal(signal.SIGTERM, _end_with_signal)
    try:
        print(f"starting the server, log in {options.log}", flush=True)
        began = time.monotonic()
        with local_server(
            shlex.split(options.server), log_path=options.log, port=options.port, start_timeout=options.start_timeout
        ) as server:
            print(f"the server is ready at {server.url} after {time.monotonic() - began:.0f} s", flush=True)
            return run_beside(server, options.command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
