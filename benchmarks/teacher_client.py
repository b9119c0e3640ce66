"""Rate of the teacher's client against the best that a script can do, with a real SGLang server.

    python -m benchmarks.teacher_client --sglang-python .venv-sglang/bin/python     # 4 minutes

The script posts the same samples in batches and turns each answer into arrays; it knows neither faults nor retries.
Several numbers of posts and of threads are tried, and the fastest takes turns with the client. The server's prefix
cache is emptied before each turn. Prints requests per second of both, the median of the turns' ratios, and the largest
difference of the scores from transformers. A short run of the training loop, whose student samples in several batches
and more slowly than the teacher scores, then gives the share of a step that waits for the teacher alone, beside the
rates of both: response tokens per second that the engine samples while the teacher scores, and that the teacher scores
when it has the machine for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import binascii
import concurrent.futures
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import requests
import torch
from transformers import AutoModelForCausalLM

import train
from opd_megatron.data.column_arithmetic import sample_problems
from opd_megatron.observe.run_folder import read_metrics
from opd_megatron.sample import Sample, TeacherScores, read_samples
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.sglang.served import make_model, served

REPOSITORY = Path(__file__).parents[1]
TIMEOUT = 120.0
WAYS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2)]
"""Numbers of posts and of threads that are tried for the script."""
PROMPTS = 256
"""Of a rollout of the training loop, one sample each."""
DECODED_TOGETHER = 32


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sglang-python", default=".venv-sglang/bin/python", help="interpreter of SGLang's environment"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256, help="of each sample, a quarter of them its prompt")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--top-k", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--rollouts", type=int, default=4, help="of the training loop (0: leave it out)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    return parser.parse_args(argv)


def make_samples(count: int, tokens: int, vocab_size: int, seed: int) -> list[Sample]:
    generator = np.random.default_rng(seed)
    # Without the last id, which the server reports as 0.
    ids = generator.integers(vocab_size - 1, size=(count, tokens))
    prompt = tokens // 4
    return [
        Sample(index, index, "", prompt_tokens=row[:prompt], response_tokens=row[prompt:])
        for index, row in enumerate(ids)
    ]


@dataclass(frozen=True)
class Script:
    """What a script does: ``parts`` posts of equal size from ``threads`` threads, read into arrays."""

    url: str
    top_k: int
    parts: int
    threads: int

    def __str__(self) -> str:
        return f"{self.parts} posts from {self.threads} threads"

    def run(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        chunks = [list(chunk) for chunk in np.array_split(np.arange(len(samples)), self.parts)]
        with (
            requests.Session() as session,
            concurrent.futures.ThreadPoolExecutor(self.threads) as threads,
        ):
            session.trust_env = False
            session.headers["Content-Type"] = "application/json"
            found = threads.map(lambda chunk: self._post(session, [samples[index] for index in chunk]), chunks)
            return list(itertools.chain.from_iterable(found))

    def _post(self, session: requests.Session, samples: Sequence[Sample]) -> list[np.ndarray]:
        payload = {
            "input_ids": [sample.tokens.tolist() for sample in samples],
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": [len(sample.prompt_tokens) - 1 for sample in samples],
        }
        if self.top_k:
            payload |= {"top_logprobs_num": self.top_k}
            payload |= dict.fromkeys(("return_flat_raw_top_logprobs", "return_flat_raw_top_logprobs_b64"), True)
        response = session.post(self.url + "/generate", data=orjson.dumps(payload), timeout=TIMEOUT)
        response.raise_for_status()
        found = []
        for answer in orjson.loads(response.content):
            meta = answer["meta_info"]
            found.append(np.array([entry[0] for entry in meta["input_token_logprobs"][1:]], dtype=np.float32))
            if self.top_k:
                read_top_k(meta)
        return found


def read_top_k(meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The top-k log-probabilities and ids ``[T, K]`` of one answer, in the form that is read fastest."""
    values, ids = (
        np.frombuffer(binascii.a2b_base64(meta[f"input_top_logprobs_{name}_flat_b64"]), dtype)
        for name, dtype in (("val", "<f4"), ("idx", "<i4"))
    )
    shape = meta["input_top_logprobs_shape"]
    return values.reshape(shape), ids.reshape(shape)


class Client:
    """The project's teacher, whose connections live from one turn to the next as they do in a run."""

    def __init__(self, url: str, vocab_size: int, top_k: int) -> None:
        self.teacher = SGLangTeacher([url], vocab_size=vocab_size, top_k=top_k)
        self._runner = asyncio.Runner()

    def run(self, samples: Sequence[Sample]) -> list[TeacherScores]:
        async def gather() -> list[TeacherScores]:
            return await asyncio.gather(*map(self.teacher.score_one, samples))

        return self._runner.run(gather())

    def close(self) -> None:
        self._runner.run(self.teacher.aclose())
        self._runner.close()


def timed(url: str, run: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample]) -> tuple[float, Any]:
    """Seconds and result of ``run`` with an empty prefix cache."""
    requests.post(url + "/flush_cache", timeout=TIMEOUT).raise_for_status()
    began = time.perf_counter()
    found = run(samples)
    return time.perf_counter() - began, found


def compare(url: str, model: Any, arguments: argparse.Namespace, top_k: int) -> dict[str, Any]:
    """The client and the fastest script in turns; each turn has samples of its own."""
    vocab_size = model.config.vocab_size

    def samples(seed: int) -> list[Sample]:
        return make_samples(arguments.samples, arguments.tokens, vocab_size, seed)

    tried = [Script(url, top_k, parts, threads) for parts, threads in WAYS]
    tried[0].run(samples(0))
    seconds = {script: min(timed(url, script.run, samples(seed))[0] for seed in (1, 2)) for script in tried}
    script = min(seconds, key=lambda candidate: seconds[candidate])
    client = Client(url, vocab_size, top_k)
    turns: list[tuple[float, float]] = []
    difference = 0.0
    try:
        client.run(samples(0))
        for turn in range(arguments.turns):
            mine = samples(100 + turn)
            runs: list[Callable[[Sequence[Sample]], Any]] = [script.run, client.run]
            order = (0, 1) if turn % 2 else (1, 0)
            found = {place: timed(url, runs[place], mine) for place in order}
            turns.append((found[0][0], found[1][0]))
            if turn == 0:
                difference = largest_difference(model, mine, found[1][1])
    finally:
        client.close()
    count = arguments.samples
    return {
        "top_k": top_k,
        "script": str(script),
        "script_requests_per_second": count / statistics.median(turn[0] for turn in turns),
        "client_requests_per_second": count / statistics.median(turn[1] for turn in turns),
        "ratio": statistics.median(turn[0] / turn[1] for turn in turns),
        "largest_difference_from_transformers": difference,
    }


def largest_difference(model: Any, samples: Sequence[Sample], scores: Sequence[TeacherScores]) -> float:
    """Of the client's log-probabilities from those of transformers in float32."""
    worst = 0.0
    for sample, score in zip(samples, scores, strict=True):
        tokens = torch.as_tensor(sample.tokens)
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0].double().log_softmax(-1)
        expected = log_probs[:-1].gather(1, tokens[1:, None])[-sample.response_length :, 0].numpy()
        worst = max(worst, float(np.abs(expected - score.log_probs_T).max()))
    return worst


def waiting_share(url: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Share of the step that the loop waits for the teacher, and the rates of engine and teacher in tokens per second.

    The first step, which opens connections, is left out.
    """
    student = make_model(folder / "student", vocab_size=0, hidden=256, layers=8, seed=1)
    prompts = folder / "prompts.jsonl"
    problems = sample_problems(PROMPTS, 3, held_out=False)
    rows = [json.dumps({"prompt": problem.prompt(), "label": problem.answer()}) for problem in problems]
    prompts.write_text("\n".join(rows) + "\n", encoding="utf-8")
    argv = ["--use-opd", "--opd-type", "sglang", "--opd-teacher-url", url, "--advantage-estimator", "none"]
    argv += ["--hf-checkpoint", str(student), "--prompt-data", str(prompts), "--run-dir", str(folder / "run")]
    argv += ["--rollout-batch-size", str(PROMPTS), "--rollout-engine-batch-size", str(DECODED_TOGETHER)]
    argv += ["--rollout-max-response-len", "128", "--num-rollout", str(arguments.rollouts), "--micro-batch-size", "64"]
    argv += ["--n-samples-per-prompt", "1", "--rm-type", "zero", "--lr", "1e-3", "--no-tensorboard"]
    train.main([*argv, "--save-debug-rollout-data", str(folder / "rollout_{rollout_id}.jsonl")])
    lines = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if line["step"] > 1]
    samples = [list(read_samples(folder / f"rollout_{line['step'] - 1}.jsonl")) for line in lines]
    sampled = [sum(sample.response_length for sample in rollout) for rollout in samples]
    engine = statistics.median(
        tokens / line["perf/sampling_seconds"] for tokens, line in zip(sampled, lines, strict=True)
    )
    client = Client(url, arguments.vocab_size, 0)
    try:
        client.run(samples[0])
        teacher = statistics.median(
            tokens / timed(url, client.run, rollout)[0] for tokens, rollout in zip(sampled, samples, strict=True)
        )
    finally:
        client.close()
    return {
        "teacher_wait_frac": statistics.fmean(line["perf/teacher_wait_frac"] for line in lines),
        "seconds_per_step": statistics.fmean(line["perf/step_seconds"] for line in lines),
        "engine_tokens_per_second": engine,
        "teacher_tokens_per_second": teacher,
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = make_model(folder / "teacher", vocab_size=arguments.vocab_size, hidden=128, layers=4, seed=0)
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        print(
            f"{arguments.samples} samples of {arguments.tokens} tokens, a quarter of them prompt; hidden 128, "
            f"4 layers, vocabulary {arguments.vocab_size}, float32; {os.cpu_count()} "
            f"{platform.processor() or platform.machine()} cores, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        with served(arguments.sglang_python, teacher, folder / "server.log") as url:
            rates = [compare(url, model, arguments, top_k) for top_k in arguments.top_k]
            for found in rates:
                print(
                    f"top-{found['top_k']}: client {found['client_requests_per_second']:.0f}/s, script "
                    f"{found['script_requests_per_second']:.0f}/s ({found['script']}), ratio {found['ratio']:.2f}; "
                    f"from transformers {found['largest_difference_from_transformers']:.1e}",
                    flush=True,
                )
            step = waiting_share(url, folder, arguments) if arguments.rollouts else None
            if step is not None:
                engine, teacher_rate = step["engine_tokens_per_second"], step["teacher_tokens_per_second"]
                print(
                    f"training step of {step['seconds_per_step']:.2f} s, {PROMPTS} samples, {DECODED_TOGETHER} decoded "
                    f"together: {100 * step['teacher_wait_frac']:.1f} % of it waiting for the teacher; engine "
                    f"{engine:.0f}, teacher {teacher_rate:.0f} tokens/s, ratio {teacher_rate / engine:.1f}"
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"rates": rates, "step": step}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
