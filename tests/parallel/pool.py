"""A pool of ranks that stays up between tests: importing torch and Megatron costs more than any of them."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.system import free_port

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, rendezvous: Rendezvous) -> None:
    """Do what comes through the pipe until it closes."""
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = True, function(rendezvous, *arguments)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send(answer)


class WorkerPool:
    """``size`` processes that meet in one process group; a task that fails or takes too long ends them all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.work"])
        # one server imports the libraries, and the ranks are forked from it
        with _environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}):
            forkserver.ensure_running()
        port = free_port()
        for rank in range(self.size):
            here, there = context.Pipe()
            rendezvous = Rendezvous(rank=rank, world_size=self.size, local_rank=rank, port=port)
            worker = context.Process(target=_serve, args=(there, rendezvous), daemon=True)
            worker.start()
            there.close()
            self._workers.append((worker, here))

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> list[Any]:
        """``function(rendezvous, *arguments)`` on every rank; the results by rank.

        Raises ``AssertionError`` with the traceback of the rank that failed first, or after ``seconds``.
        """
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send((function, arguments))
        deadline = time.monotonic() + seconds
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise AssertionError(f"ranks {sorted(waiting.values())} did not answer in {seconds:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    good, result = connection.recv()
                except EOFError:
                    good, result = False, "the process died"
                if not good:
                    self.close()
                    raise AssertionError(f"rank {waiting[connection]}: {result}")
                results[waiting[connection]] = result
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        for worker, connection in self._workers:
            connection.close()
            worker.kill()
        for worker, _ in self._workers:
            worker.join(10)
        self._workers = []
