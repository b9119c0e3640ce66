"""Ten minutes of scoring by a real SGLang server behind a proxy that spoils one request in twenty.

    python -m benchmarks.soak_teacher --sglang-python .venv-sglang/bin/python --minutes 10

Every kind of fault of ``tests/sglang/faults.py`` occurs: broken and refused connections, time-outs, error statuses and
answers that are wrong within. A sample whose scoring fails is asked for again; each must be scored in the end, within
1e-4 of transformers. Prints memory and counts every half minute. Ends with exit code 1 if a score is wrong, a sample is
not scored, a call hangs, or the memory of this process grows by more than ``--memory-bound-mib``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.sglang import faults
from tests.sglang.proxy import FaultProxy, at_random
from tests.sglang.served import make_model, served

POOL = 256
"""Different samples; what is asked for are draws from them."""
ROUND = 64
"""Samples asked for at a time."""
TOP_K = 8
ROUND_LIMIT = 120.0
"""Seconds after which a round counts as hanging."""
ATTEMPTS = 10
"""Rounds in which a sample may fail before it counts as lost."""
TOLERANCE = 1e-4
FAULTS = [
    *(faults.refused(), faults.RESET, faults.RESET_MIDWAY, faults.CLOSED_MIDWAY, faults.CUT),
    *(faults.SILENT, faults.SILENT_MIDWAY, faults.UNAVAILABLE, faults.BUSY, faults.BUSY_FOR_A_WHILE),
    *faults.ERROR_FORMS,
    *(faults.OTHER_ID, faults.SHORTER, faults.LONGER, faults.NAN, faults.INFINITE, faults.POSITIVE, faults.NULL),
    *(faults.ABORTED, faults.SWAPPED, faults.LOST),
    *faults.TOP_K_FAULTS,
]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sglang-python", default=".venv-sglang/bin/python", help="interpreter of SGLang's environment"
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--fault-rate", type=float, default=0.05, help="share of requests that meet a fault")
    parser.add_argument("--memory-bound-mib", type=float, default=32.0, help="growth after the first quarter")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Pool:
    """Samples and what transformers says about them."""

    def __init__(self, model: Any, generator: np.random.Generator) -> None:
        self._generator = generator
        self.samples = [self._sample(index, model.config.vocab_size) for index in range(POOL)]
        self._expected = [self._log_probs(model, sample) for sample in self.samples]

    def _sample(self, index: int, vocab_size: int) -> Sample:
        prompt, response = (self._generator.integers(1, size, endpoint=True) for size in (30, 120))
        tokens = self._generator.integers(vocab_size, size=prompt + response)
        return Sample(index, index, "", prompt_tokens=tokens[:prompt], response_tokens=tokens[prompt:])

    @staticmethod
    def _log_probs(model: Any, sample: Sample) -> np.ndarray:
        tokens = torch.as_tensor(sample.tokens)
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0].double().log_softmax(-1)
        return log_probs[:-1].gather(1, tokens[1:, None])[-sample.response_length :, 0].numpy()

    def draw(self, count: int) -> list[int]:
        return self._generator.choice(POOL, size=count, replace=False).tolist()

    def error(self, index: int, scores: TeacherScores) -> float:
        """Largest difference from transformers, infinite where a token has no score."""
        if scores.log_probs_T.shape != self._expected[index].shape or not scores.valid_T.all():
            return float("inf")
        return float(np.abs(scores.log_probs_T - self._expected[index]).max())


class Soak:
    """Rounds of scoring with their counts."""

    def __init__(self, pool: Pool, teacher: SGLangTeacher) -> None:
        self._pool, self._teacher = pool, teacher
        self.scored = 0
        self.worst = 0.0
        self.failures: Counter[str] = Counter()
        self._left: dict[int, int] = {}

    async def round(self, fresh: bool = True) -> None:
        """Ask for what failed before and, with ``fresh``, fill up with other samples."""
        asked = list(self._left)
        if fresh:
            asked += [index for index in self._pool.draw(ROUND) if index not in self._left][: ROUND - len(asked)]
        calls = (self._teacher.score_one(self._pool.samples[index]) for index in asked)
        async with asyncio.timeout(ROUND_LIMIT):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for index, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, TeacherScores):
                self._left.pop(index, None)
                self.scored += 1
                self.worst = max(self.worst, self._pool.error(index, outcome))
            elif isinstance(outcome, TeacherFailure):
                self.failures[str(outcome.kind)] += 1
                self._left[index] = self._left.get(index, 0) + 1
            else:
                raise outcome
        if self.worst > TOLERANCE:
            raise SystemExit(f"error: a score is {self.worst:.2g} away from transformers")
        lost = [index for index, attempts in self._left.items() if attempts >= ATTEMPTS]
        if lost:
            raise SystemExit(f"error: sample {lost[0]} failed {ATTEMPTS} times: {dict(self.failures)}")

    async def finish(self) -> None:
        while self._left:
            await self.round(fresh=False)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


async def run(soak: Soak, proxy: FaultProxy, minutes: float) -> list[float]:
    """Rounds for ``minutes``; returns the resident memory after each."""
    memory: list[float] = []
    began = reported = time.monotonic()
    while time.monotonic() - began < 60 * minutes:
        await soak.round()
        proxy.asked.clear()
        memory.append(resident_mib())
        if time.monotonic() - reported > 30:
            reported = time.monotonic()
            print(
                f"{(reported - began) / 60:5.1f} min  {memory[-1]:6.0f} MiB  {soak.scored} scored, "
                f"{proxy.injected.total()} faults, {soak.failures.total()} failures asked again",
                flush=True,
            )
    await soak.finish()
    return memory


def growth(memory: Sequence[float]) -> float:
    """MiB between the second and the last quarter of the run, each as its median."""
    quarter = max(len(memory) // 4, 1)
    return statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter] or memory[:1])


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name) / "teacher", vocab_size=256, hidden=64, layers=2, seed=0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        pool = Pool(model, np.random.default_rng(arguments.seed))
        plan = at_random(FAULTS, arguments.fault_rate, arguments.seed)
        with served(arguments.sglang_python, folder, Path(name) / "server.log") as url, FaultProxy(url, plan) as proxy:
            teacher = SGLangTeacher(
                [proxy.url], vocab_size=model.config.vocab_size, top_k=TOP_K, timeout=5.0, max_retries=6, backoff=0.1
            )
            soak = Soak(pool, teacher)

            async def whole() -> list[float]:
                try:
                    return await run(soak, proxy, arguments.minutes)
                finally:
                    await teacher.aclose()

            memory = asyncio.run(whole())
            left = proxy.open_requests
    grown = growth(memory)
    print(
        f"{soak.scored} samples scored in {len(memory)} rounds, largest difference from transformers {soak.worst:.1e}; "
        f"{proxy.injected.total()} faults of {len(proxy.injected)} kinds; failures asked again: {dict(soak.failures)}; "
        f"memory grew by {grown:.1f} MiB; load {os.getloadavg()[0]:.1f}"
    )
    if grown > arguments.memory_bound_mib:
        sys.exit(f"error: the memory grew by {grown:.1f} MiB, more than {arguments.memory_bound_mib:g}")
    if left:
        sys.exit(f"error: {left} requests were left open")


if __name__ == "__main__":
    main()
