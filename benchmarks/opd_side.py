"""This project's side of step_vs_trl.py: the phases of ``opd_megatron.loop``, one rollout per turn.

    python benchmarks/opd_side.py FOLDER THREADS [FLAGS of train.py ...]

``FOLDER`` is what step_vs_trl.py wrote. A step is what the loop does between two lines of its progress: give the engine
the new weights, sample, reward, score with the teacher, and train. Writing metrics and samples to the run folder is
left out on both sides.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from megatron.core import __version__ as megatron_version
from turns import Turns

from opd_megatron import steps
from opd_megatron.assembly import Parts, assemble
from opd_megatron.config.options import Options
from opd_megatron.config.parse import parse_options
from opd_megatron.config.validate import validate
from opd_megatron.data.prompts import check_prompt_file


def read_options(folder: Path, flags: Sequence[str]) -> Options:
    """The options that train.py would have; the whole rollout is one micro-batch and one optimizer step."""
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    argv = ["--use-opd", "--opd-type", "megatron", "--opd-teacher-load", str(folder / "teacher")]
    argv += ["--hf-checkpoint", str(folder / "student"), "--prompt-data", str(folder / "prompts.jsonl")]
    argv += ["--rollout-batch-size", str(work["prompts"]), "--micro-batch-size", str(work["prompts"])]
    argv += ["--rollout-ignore-eos", "--rollout-max-response-len", str(work["new_tokens"])]
    argv += ["--advantage-estimator", "none", "--rm-type", "zero", "--calculate-per-token-loss"]
    argv += ["--lr", str(work["learning_rate"]), "--weight-decay", "0", "--clip-grad", "1"]
    # The run never ends by itself: the driver says when it has seen enough.
    argv += ["--num-rollout", "1000000", "--run-dir", str(folder / "opd_run"), *flags]
    options = parse_options(argv)
    validate(options, check_prompt_file)
    return options


def run_step(parts: Parts, rollout_id: int) -> tuple[int, dict[str, float]]:
    """One rollout; returns its trained tokens and the seconds of each phase."""
    metrics: dict[str, float] = {}
    clock = [time.perf_counter()]
    parts.sync_engine(str(rollout_id))
    clock.append(time.perf_counter())
    samples = steps.make_samples(parts, rollout_id, metrics)
    clock.append(time.perf_counter())
    steps.teach(parts, samples, rollout_id, metrics)
    clock.append(time.perf_counter())
    steps.learn(parts, samples, rollout_id, metrics)
    clock.append(time.perf_counter())
    names = ("weight sync", "rollout", "teacher", "train")
    seconds = {name: end - start for name, start, end in zip(names, clock, clock[1:], strict=False)}
    return int(sum(sample.loss_mask.sum() for sample in samples)), seconds


def main(folder: Path, threads: int, flags: Sequence[str]) -> None:
    turns = Turns()
    torch.set_num_threads(threads)
    with assemble(read_options(folder, flags)) as parts:
        turns.ready(
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "megatron-core": megatron_version,
            }
        )
        rollout_id = 0
        while turns.wait():
            tokens, phases = run_step(parts, rollout_id)
            turns.done(tokens=tokens, phases=phases)
            rollout_id += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
