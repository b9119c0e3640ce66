"""Ctrl-C and SIGTERM while a rollout waits for its teacher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class SilentServer:
    """Takes requests, answers none, and knows whose connection is still open."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.asked = 0
        self.open = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        with self._lock:
            self.open += 1
        asked = False
        try:
            while data := connection.recv(65536):
                if b"POST" in data and not asked:
                    asked = True
                    with self._lock:
                        self.asked += 1
        except ConnectionResetError:
            pass
        with self._lock:
            self.open -= 1


@pytest.fixture
def server() -> Iterator[SilentServer]:
    server = SilentServer()
    yield server
    server.close()


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_gives_up_every_request_and_is_one_line(
    server: SilentServer, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.flow.waiting_run", server.url],
            stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        wait_for(lambda: server.asked == 8 or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        process.send_signal(number)
        wait_for(lambda: "once more to stop at once" in log.read_text())
        assert server.open == 8
        process.send_signal(number)
        assert process.wait(240) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
    assert "never retrieved" not in log.read_text()
    assert log.read_text().splitlines()[-1].startswith("interrupted: stopped at once")
    wait_for(lambda: server.open == 0)
