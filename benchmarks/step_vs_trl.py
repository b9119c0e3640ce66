"""Time of one step of on-policy distillation in this project and in TRL's DistillationTrainer, on the same work.

    python benchmarks/step_vs_trl.py --steps 20

The quickstart's models with random weights, 128 prompts of 10 tokens, one response of exactly 44 tokens each (the end
token is a token like any other), one optimizer step, float32. Here: the sampled term with a Megatron teacher in one
process; TRL: reverse KL over the whole vocabulary (beta 1). Both stay alive in processes of their own and take turns
step by step, first one and then the other going first, so that a busy machine slows both; the ratio is the median of
the turns' ratios. README.md beside this file says how the environment with TRL is made and what counts as a step.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Output, processor, publish

from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError

HERE = Path(__file__).resolve().parent
OURS, TRL = "opd_megatron", "TRL"
Step = dict[str, Any]

# Threads that wait for each other by spinning take a step from under one second to many when anything else runs on
# the machine. The environment's own choice wins.
WAIT_POLICY = {"OMP_WAIT_POLICY": "passive"}

# hidden, ffn, layers, query heads, key/value heads, head size: those of examples/on_policy_distillation/quickstart
SHAPES = {"teacher": (128, 384, 4, 4, 4, 32), "student": (96, 288, 2, 4, 2, 24)}


def even(value: int) -> str | None:
    """What is wrong with an odd number: TRL takes the prompts in two micro-batches."""
    return "must be even" if value % 2 else None


@dataclass(frozen=True)
class BenchmarkOptions(Output):
    """Step against TRL"""

    steps: int = option(20, "measured steps of each side", minimum=1)
    warmup: int = option(3, "steps of each side that are not measured", minimum=0)
    threads: int = option(2, "threads of each side", minimum=1)
    prompts: int = option(128, "prompts of a step (an even number)", minimum=2, check=even)
    new_tokens: int = option(44, "length of every response", unit="tokens", minimum=1)
    opd_exact_kl_interval: int = option(
        1, "how often this project measures the exact KL beside the sampled one (0: never)", minimum=0
    )
    trl_venv: str = option(".venv-trl", "environment with TRL", metavar="DIR")


class Side:
    """A measured process that has been started; it makes one step whenever asked."""

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        self.name = name
        self._log = log
        # Libraries read the count when they load; the sides set torch's own as well.
        environment = WAIT_POLICY | os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )

    def answer(self) -> dict[str, Any]:
        """The next line of the side; raises ``RuntimeError`` with the end of its log if it died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"the side {self.name} ended with code {self._process.wait()}:\n{tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self) -> Step:
        """Make one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process without waiting for what it would still do."""
        self._process.kill()
        self._process.communicate()


def trl_python(folder: str) -> Path:
    """The interpreter of the environment with TRL; raises :class:`UserError` that says how to make one."""
    python = Path(folder) / "bin" / "python"
    if not python.is_file():
        requirements = (HERE / "requirements-trl.txt").relative_to(HERE.parent)
        raise UserError(
            f"--trl-venv {folder}: no environment here; make it with: python3 -m venv {folder} && "
            f"{folder}/bin/pip install -r {requirements}"
        )
    return python


def write_inputs(folder: Path, options: BenchmarkOptions) -> None:
    """Both models with random weights, the tokenizer, the prompts and the sizes, as both sides read them."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from opd_megatron.data.column_arithmetic import build_tokenizer, sample_problems
    from opd_megatron.data.rows import write_jsonl

    problems = sample_problems(32 * options.prompts, seed=1, held_out=False)
    prompt_length = len(problems[0].prompt())
    for seed, (name, (hidden, ffn, layers, heads, groups, head_size)) in enumerate(SHAPES.items()):
        tokenizer = build_tokenizer(folder / name)
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_size,
            max_position_embeddings=max(64, prompt_length + options.new_tokens),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    write_jsonl(folder / "prompts.jsonl", ({"prompt": item.prompt(), "label": item.answer()} for item in problems))
    work = {"prompts": options.prompts, "new_tokens": options.new_tokens, "learning_rate": 1e-4}
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")


def measure(sides: Sequence[Side], warmup: int, steps: int) -> dict[str, list[Step]]:
    """Steps of all sides, which take turns and take turns at going first; the warm-up is left out."""
    found: dict[str, list[Step]] = {side.name: [] for side in sides}
    for turn in range(warmup + steps):
        for side in sides if turn % 2 == 0 else reversed(sides):
            step = side.step()
            if turn >= warmup:
                found[side.name].append(step)
    return found


def summarize(steps: Sequence[Step]) -> dict[str, Any]:
    """Medians of a side, the quartiles of its seconds, and its largest memory; every step made the same tokens."""
    (tokens,) = {step["tokens"] for step in steps}
    seconds = [step["seconds"] for step in steps]
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    median = statistics.median(seconds)
    phases = steps[0].get("phases", {})
    return {
        "seconds_per_step": median,
        "seconds_quartiles": [quartiles[0], quartiles[2]],
        "cpu_seconds_per_step": statistics.median(step["cpu_seconds"] for step in steps),
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / median,
        "peak_memory_mib": max(step["peak_memory_bytes"] for step in steps) / 2**20,
        "phases": {name: statistics.median(step["phases"][name] for step in steps) for name in phases},
    }


def median_ratio(ours: Sequence[Step], theirs: Sequence[Step], field: str) -> float:
    """Median over the turns of ours / theirs."""
    return statistics.median(a[field] / b[field] for a, b in zip(ours, theirs, strict=True))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "wait_policy": (WAIT_POLICY | os.environ)["OMP_WAIT_POLICY"],
    }


def render(result: dict[str, Any]) -> str:
    """The result for a reader."""
    sizes, host = result["sizes"], result["machine"]
    lines = [
        f"{sizes['prompts']} prompts x 1 response of {sizes['new_tokens']} tokens, one optimizer step, float32, "
        f"{sizes['threads']} threads, median of {sizes['steps']} steps after {sizes['warmup']}",
        f"{host['processor']}, {host['cores']} cores, load {host['load_average']:.1f}, Python {host['python']}, "
        f"OMP_WAIT_POLICY={host['wait_policy']}",
        f"{'':14}{'s/step':>8}{'quartiles':>16}{'CPU s/step':>12}{'tokens/s':>10}{'peak MiB':>10}{'at start':>10}",
    ]
    for name, side in result["sides"].items():
        low, high = side["seconds_quartiles"]
        lines.append(
            f"{name:14}{side['seconds_per_step']:8.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{side['cpu_seconds_per_step']:12.3f}{side['tokens_per_second']:10.0f}{side['peak_memory_mib']:10.0f}"
            f"{side['start_memory_mib']:10.0f}"
        )
    lines.append(f"ratio {OURS} / {TRL}: {result['ratio']:.2f} (CPU seconds: {result['cpu_ratio']:.2f})")
    for name, side in result["sides"].items():
        lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in side["versions"].items()))
        if side["phases"]:
            lines.append("  " + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in side["phases"].items()))
    return "\n".join(lines)


def run(options: BenchmarkOptions, folder: Path) -> dict[str, Any]:
    """Measure in ``folder`` and return everything that is known."""
    python = trl_python(options.trl_venv)
    write_inputs(folder, options)
    arguments = [str(folder), str(options.threads)]
    flags = ["--opd-exact-kl-interval", str(options.opd_exact_kl_interval)]
    commands = {
        OURS: [sys.executable, str(HERE / "opd_side.py"), *arguments, *flags],
        TRL: [str(python), str(HERE / "trl_side.py"), *arguments],
    }
    before = machine()
    sides: list[Side] = []
    try:
        facts = {}
        for name, command in commands.items():
            sides.append(Side(name, command, options.threads, folder / f"{name}.log"))
            facts[name] = sides[-1].answer()
        steps = measure(sides, options.warmup, options.steps)
    finally:
        for side in sides:
            side.close()
    summaries = {
        name: summarize(steps[name]) | {"start_memory_mib": facts[name].pop("peak_memory_bytes") / 2**20} | facts[name]
        for name in commands
    }
    return {
        "ratio": median_ratio(steps[OURS], steps[TRL], "seconds"),
        "cpu_ratio": median_ratio(steps[OURS], steps[TRL], "cpu_seconds"),
        "sides": summaries,
        "sizes": {
            name: getattr(options, name)
            for name in ("prompts", "new_tokens", "threads", "steps", "warmup", "opd_exact_kl_interval")
        },
        "machine": before,
        "steps": steps,
    }


def main(argv: Sequence[str]) -> None:
    def run_in_own_folder(options: BenchmarkOptions) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="step-vs-trl-") as folder:
            return run(options, Path(folder))

    publish(argv, BenchmarkOptions, program="step_vs_trl.py", about=str(__doc__), run=run_in_own_folder, render=render)


if __name__ == "__main__":
    sys.exit(run_cli(main))
