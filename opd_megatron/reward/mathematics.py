"""The reward ``math``: math-verify in worker processes, with a time limit that holds whatever it does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import Any

from opd_megatron.reward.base import RewardError, Unjudged, require_label
from opd_megatron.sample import Sample
from opd_megatron.threads import CallingThreads

MOST_WORKERS = 4

_PROGRAM = Path(__file__).with_name("math_worker.py")


class _Worker:
    """One worker process; used by one thread at a time and started again after it was ended."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._process: subprocess.Popen[str] | None = None

    def judge(self, label: str, response: str) -> float | Exception:
        process = self._process or self._start()
        answer = self._ask(process, {"label": label, "response": response, "limit": self._limit})
        if answer is None:
            status = process.wait()
            self.close()
            if status == -signal.SIGALRM:
                return Unjudged(f"math-verify did not finish in {self._limit:g} s")
            return Unjudged(f"math-verify's process ended with status {status}")
        if "unjudged" in answer:
            return Unjudged(answer["unjudged"])
        if "error" in answer:
            return ValueError(answer["error"])
        return float(answer["correct"])

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a question that was never read is still buffered
                    stream.close()

    def _start(self) -> subprocess.Popen[str]:
        # -P: the folder of the program must not shadow installed packages.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._process = process
        ready = self._read(process)
        if ready is None or "error" in ready:
            self.close()
            raise RewardError("--rm-type math: " + (ready["error"] if ready else "math-verify's process did not start"))
        return process

    def _ask(self, process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any] | None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read(process)

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> dict[str, Any] | None:
        assert process.stdout is not None
        line = process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None


class MathRater:
    """Judges responses by math-verify (``pip install math-verify``) in up to ``workers`` processes.

    The limit in seconds is for one response. Works in any thread, and in several at a time. The processes are started
    when they are first needed, stay for the next call, and end with this process.
    """

    takes_groups = False

    def __init__(self, limit: float, workers: int | None = None) -> None:
        count = workers or min(MOST_WORKERS, os.cpu_count() or 1)
        self._workers = [_Worker(limit) for _ in range(count)]
        self._idle: LifoQueue[_Worker] = LifoQueue()  # processes that run before those that would have to start
        for worker in reversed(self._workers):
            self._idle.put(worker)
        self._threads = CallingThreads(count, "math-verify")

    def rate(self, samples: Sequence[Sample]) -> list[float | Exception]:
        questions = _questions(samples)
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(self._judge, questions))

    async def rate_async(self, samples: Sequence[Sample]) -> list[float | Exception]:
        calls = [self._threads.call(self._judge, question) for question in _questions(samples)]
        return list(await asyncio.gather(*calls))

    def close(self) -> None:
        self._threads.close()
        for worker in self._workers:
            worker.close()

    def _judge(self, question: tuple[str, str]) -> float | Exception:
        worker = self._idle.get()
        try:
            return worker.judge(*question)
        finally:
            self._idle.put(worker)


def _questions(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    return [(require_label(sample, "math"), sample.response) for sample in samples]
