"""A program that waits for a teacher which never answers, with the signals of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from opd_megatron.config.cli import run_cli
from opd_megatron.flow import RolloutFlow, Stages
from opd_megatron.http_client import HttpClient, RetryPolicy
from opd_megatron.interrupt import Interrupt
from opd_megatron.sample import Sample, TeacherScores
from tests.flow.parts import Prompts, Reward, Source, Teacher


class Asking(Teacher):
    """Asks a server."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.client = HttpClient(url, kind="teacher server", timeout=600.0)

    async def score_one(self, sample: Sample) -> TeacherScores:
        await self.client.post("/generate", {"index": sample.index}, RetryPolicy(0, 0.1))
        return TeacherScores(np.zeros(sample.response_length))

    async def aclose(self) -> None:
        await self.client.aclose()


def main(argv: Sequence[str]) -> None:
    flow = RolloutFlow(Stages(Source(2), Prompts(), batch=4, copies=2, reward=Reward(), teacher=Asking(argv[0])))
    with Interrupt():
        try:
            flow.make(0)
        finally:
            flow.close()
    print("not interrupted")


if __name__ == "__main__":
    raise SystemExit(run_cli(main, sys.argv[1:]))
