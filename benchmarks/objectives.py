"""What each objective teaches the quickstart's student from the same number of samples: accuracy, reverse KL, seconds.

    python -m benchmarks.objectives --out runs/objectives                            # every row, seeds 1 to 3
    python -m benchmarks.objectives --out runs/objectives --only grpo opd --seeds 1  # two rows from one start

A seed is a start of its own: the quickstart's stages make its problems, teacher and weak student in ``--out`` (or
``--models`` names the folders of finished quickstarts). Each row is one run of ``train.py`` with the quickstart's
settings and the flags of :data:`ROWS`, one after the other, on one thread. The student is then measured on held-out
problems, with the reverse KL from the logits of transformers. ``--out`` gets ``objectives.json``, ``objectives.png``
and a folder per row and seed; what has a ``result.json`` there, made with the same flags, is not run again.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from examples.on_policy_distillation.quickstart.evaluate import MAX_NEW_TOKENS, pass_rates, reverse_kl
from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.errors import RunError, UserError
from opd_megatron.config.parse import parse_groups
from opd_megatron.data.prompts import PromptRecord, load_prompt_records
from opd_megatron.data.rows import write_jsonl
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.observe.run_folder import read_metrics
from opd_megatron.rollout.engine import SamplingParams
from opd_megatron.rollout.generate import generate_samples
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.rollout.prompt import new_sample
from opd_megatron.sample import Status
from opd_megatron.system import replacing

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "examples" / "on_policy_distillation" / "quickstart"
TEACHER, STUDENT = "teacher_hf", "student_before_hf"
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

PROMPTS, SPOKEN = "prompts", "teacher's samples"
"""Data of a row: the quickstart's problems, or answers to them that the teacher sampled at temperature 1."""

OPD = "--use-opd --opd-type megatron --rm-type zero --advantage-estimator none"
GRPO = "--rm-type column_arithmetic --advantage-estimator grpo --lr 3e-4"
DISTRIBUTION = f"{OPD} --opd-loss distribution --lr 2e-3"
TAUGHT = "--opd-student-data-fraction 0.5 --opd-data-source teacher"
TIP = f"{DISTRIBUTION} --opd-token-select top --opd-token-score soft_or"
SFT = "--loss-type sft_loss --label-key response --lr 2e-3"
"""Rates that suit the noise of each: 1e-3 (the quickstart's) for the sampled term, more for gradients without it.

PACED leaves the term to few prompts while the student solves few: 5e-4."""


@dataclass(frozen=True)
class Row:
    """An objective: its flags, the samples of a prompt, and the data with the number of prompts (None: all)."""

    title: str
    flags: str
    group: int = 1
    data: str = PROMPTS
    prompts: int | None = None


ROWS = {
    "grpo": Row("GRPO", GRPO, group=8),
    "opd": Row("OPD, sampled", OPD),
    "opd-baseline": Row("OPD, sampled, optimal baseline", f"{OPD} --opd-baseline optimal"),
    "opd-grpo": Row("OPD + GRPO", f"--use-opd --opd-type megatron {GRPO}", group=8),
    "full": Row("distribution, whole vocabulary", DISTRIBUTION),
    "top8": Row("distribution, top-8 + tail", f"{DISTRIBUTION} --opd-support teacher_topk --opd-top-k 8"),
    "forward-kl": Row("forward KL", f"{DISTRIBUTION} --opd-divergence forward_kl"),
    "jsd": Row("JSD", f"{DISTRIBUTION} --opd-divergence jsd"),
    "gkd": Row("GKD, half the teacher's samples", f"{DISTRIBUTION} {TAUGHT}"),
    "sft": Row("SFT, fresh teacher samples", SFT, data=SPOKEN),
    "sft-128": Row("SFT, 128 prompts", SFT, data=SPOKEN, prompts=128),
    "tip-50": Row("TIP, 50 % of the tokens", f"{TIP} --opd-token-ratio 0.5"),
    "tip-10": Row("TIP, 10 % of the tokens", f"{TIP} --opd-token-ratio 0.1"),
    "paced": Row("PACED", f"{DISTRIBUTION} --lr 5e-4 --rm-type column_arithmetic --opd-prompt-weight paced", group=8),
    "extrapolation": Row("extrapolation, 1.25", f"{DISTRIBUTION} --opd-reward-scale 1.25"),
    "full-128": Row("distribution, 128 prompts", DISTRIBUTION, prompts=128),
    "opd-128": Row("OPD, sampled, optimal baseline, 128 prompts", f"{OPD} --opd-baseline optimal", prompts=128),
}


def known_row(name: str) -> str | None:
    """What is wrong with the name of a row."""
    return None if name in ROWS else f"is no row: there are {', '.join(ROWS)}"


@dataclass(frozen=True)
class BenchmarkOptions:
    """Objectives"""

    out: str = option("", "folder of models, runs and results", metavar="DIR", required=True)
    only: tuple[str, ...] = option(tuple(ROWS), "rows to run (default: all)", metavar="ROW", check=known_row)
    seeds: tuple[int, ...] = option((1, 2, 3), "starts", metavar="SEED", minimum=0)
    steps: int = option(200, "optimizer steps of a row", minimum=1)
    samples: int = option(128, "samples of a step, a multiple of 8", minimum=8)
    models: str | None = option(
        None, "finished quickstarts to take the models from, {seed} in the name (default: made in --out)", metavar="DIR"
    )


@dataclass(frozen=True)
class Start:
    """One seed: the folder of its quickstart, and what was measured there before any row."""

    seed: int
    folder: Path
    records: list[PromptRecord]


def child(command: Sequence[str | Path], log: Path) -> None:
    """Run to the end with the output in ``log``; raises ``RunError`` with its last lines if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **QUIET, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    with log.open("w", encoding="utf-8") as stream:
        ended = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY)
    if ended.returncode:
        tail = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
        raise RunError(f"{log}: ended with code {ended.returncode}: {tail}")


def make_models(folder: Path, seed: int) -> None:
    """The quickstart's problems, teacher and weak student in ``folder``, which appears when they are complete."""
    building = folder.with_name(f"{folder.name}.tmp")
    script = f"""set -euo pipefail
        here={shlex.quote(str(QUICKSTART))} RUN_ROOT={shlex.quote(str(building))} SEED={seed}
        python={shlex.quote(sys.executable)}
        source "$here/stages.sh"; prepare; train_teacher; train_student"""
    child(["bash", "-c", script], folder.with_name(f"{folder.name}.log"))
    building.rename(folder)


def start_of(options: BenchmarkOptions, seed: int) -> Start:
    """The models of a seed, made where they are missing; raises ``UserError`` for a folder without them."""
    folder = Path(options.out).resolve() / "models" / f"seed-{seed}"
    if options.models is not None:
        folder = Path(options.models.replace("{seed}", str(seed))).resolve()
    elif not folder.exists():
        print(f"seed {seed}: making the quickstart's teacher and student", flush=True)
        make_models(folder, seed)
    if not (folder / TEACHER).is_dir() or not (folder / STUDENT).is_dir():
        raise UserError(f"{folder} has no {TEACHER} and {STUDENT}: name finished quickstarts with --models")
    return Start(seed, folder, records_of(folder, folder / "heldout.jsonl"))


def records_of(folder: Path, rows: Path | str) -> list[PromptRecord]:
    """Prompts of a file for the models of ``folder``."""
    return load_prompt_records(
        str(rows),
        tokenizer=load_tokenizer(folder / TEACHER),
        input_key="prompt",
        label_key="label",
        metadata_key="metadata",
        apply_chat_template=False,
        chat_template_kwargs={},
    )


def teacher_samples(options: BenchmarkOptions, start: Start) -> tuple[Path, float]:
    """A file with an answer of the teacher to as many problems as a row has samples, and the seconds it took.

    Answers that reach the length limit are left out: what is learned from a label ends with the end token.
    """
    wanted = options.steps * options.samples
    path = Path(options.out).resolve() / "teacher_samples" / f"seed-{start.seed}-{wanted}.jsonl"
    took = path.with_suffix(".seconds")
    if not path.exists():
        begun = time.perf_counter()
        folder = start.folder / TEACHER
        records = records_of(start.folder, f"{start.folder / 'data' / 'prompts.jsonl'}@[0:{wanted}]")
        engine = LocalEngine(folder, load_tokenizer(folder))
        engine.update_weights(load_file(folder / "model.safetensors").items(), "hf")
        samples = [new_sample(record, place, place) for place, record in enumerate(records)]
        sampling = SamplingParams(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)
        for first in range(0, len(samples), 512):
            generate_samples(engine, samples[first : first + 512], sampling, (start.seed, 0, first), None)
        engine.close()
        ended = [sample for sample in samples if sample.status is not Status.TRUNCATED]
        write(took, str(time.perf_counter() - begun))
        write_jsonl(path, ({"prompt": s.prompt, "response": s.response, "label": s.label} for s in ended))
    return path, float(took.read_text(encoding="utf-8"))


def train_command(options: BenchmarkOptions, row: Row, start: Start, run_dir: Path, data: Path) -> list[str]:
    """``train.py`` with the settings of the quickstart's distillation and the flags of the row."""
    models = start.folder
    part = "" if row.prompts is None else f"@[0:{row.prompts}]"
    return [
        *(sys.executable, str(REPOSITORY / "train.py"), "--hf-checkpoint", str(models / STUDENT)),
        *(("--opd-teacher-load", str(models / TEACHER)) if "--use-opd" in row.flags else ()),
        *("--prompt-data", f"{data}{part}", "--rollout-shuffle", "--rollout-max-response-len", str(MAX_NEW_TOKENS)),
        *("--rollout-batch-size", str(options.samples // row.group), "--n-samples-per-prompt", str(row.group)),
        *("--num-rollout", str(options.steps), "--micro-batch-size", str(options.samples)),
        *("--lr", "1e-3", "--lr-warmup-iters", str(min(5, options.steps - 1)), "--lr-decay-style", "linear"),
        *("--adam-beta2", "0.95", "--weight-decay", "0", "--clip-grad", "1.0", "--calculate-per-token-loss"),
        *("--make-vocab-size-divisible-by", "2", "--seed", str(start.seed), "--no-tensorboard"),
        *("--eval-prompt-data", "dev", str(models / "data" / "dev.jsonl"), "--eval-label-key", "label"),
        *("--eval-rm-type", "column_arithmetic", "--eval-interval", str(max(1, options.steps // 10))),
        *("--num-logged-samples", "0", "--no-save-optim", "--save-hf", str(run_dir / "student_hf")),
        *("--run-dir", str(run_dir)),
        *shlex.split(row.flags),  # last: a row may have settings of its own
    ]


def measured(folder: Path, start: Start) -> dict[str, float]:
    """pass@1 of a model on the held-out problems, greedy and at temperature 1, and its distance from the teacher."""
    greedy, sampled, answers = pass_rates(folder, start.records, start.seed)
    return {"greedy": greedy, "sampled": sampled, "reverse_kl": reverse_kl(folder, start.folder / TEACHER, answers)}


def stored(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """A finished result made with ``key``, or None."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if found.get("made_with") == key else None


def write(path: Path, text: str) -> None:
    """A file that appears whole."""
    with replacing(path) as stream:
        stream.write(text)


def end_point(options: BenchmarkOptions, start: Start, name: str) -> dict[str, Any]:
    """The measurements of the teacher or of the student that every row starts from."""
    path = Path(options.out).resolve() / "models" / f"seed-{start.seed}-{name}.json"
    key = {"folder": str(start.folder / name)}
    result = stored(path, key)
    if result is None:
        result = {"made_with": key, **measured(start.folder / name, start)}
        write(path, json.dumps(result))
    return result


def run_row(options: BenchmarkOptions, name: str, start: Start) -> dict[str, Any]:
    """The result of a row from one start, measured unless it is known already."""
    row = ROWS[name]
    folder = Path(options.out).resolve() / "rows" / name / f"seed-{start.seed}"
    key = {"flags": row.flags, "group": row.group, "data": row.data, "prompts": row.prompts}
    key |= {"models": str(start.folder), "steps": options.steps, "samples": options.samples}
    result = stored(folder / "result.json", key)
    if result is not None:
        return result
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.perf_counter()
    data, spent = start.folder / "data" / "prompts.jsonl", 0.0
    if row.data == SPOKEN:
        data, spent = teacher_samples(options, start)
    run_dir = folder / "run"
    child(train_command(options, row, start, run_dir, data), folder / "train.log")
    lines = read_metrics(run_dir / "metrics.jsonl")
    evaluating = sum(line.get("perf/evaluate_seconds", 0.0) for line in lines)
    result = {
        "made_with": key,
        **measured(run_dir / "student_hf", start),
        "seconds": spent + sum(line.get("perf/step_seconds", 0.0) for line in lines) - evaluating,
        "curve": [[line["step"], line["eval/dev/pass@1"]] for line in lines if "eval/dev/pass@1" in line],
        "wall_seconds": time.perf_counter() - begun,
    }
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    write(folder / "result.json", json.dumps(result))
    return result


def rows_done(options: BenchmarkOptions) -> Iterator[dict[str, Any]]:
    """Everything known after each row that is done."""
    result: dict[str, Any] = {
        "steps": options.steps,
        "samples": options.samples,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread, nice {os.nice(0)}",
        "ends": {TEACHER: {}, STUDENT: {}},
        "rows": {name: {} for name in options.only},
    }
    starts = [start_of(options, seed) for seed in options.seeds]
    for start in starts:
        for name in result["ends"]:
            result["ends"][name][str(start.seed)] = end_point(options, start, name)
    for start in starts:
        for name in options.only:
            found = run_row(options, name, start)
            result["rows"][name][str(start.seed)] = found
            print(
                f"seed {start.seed}, {ROWS[name].title}: greedy {found['greedy']:.3f}, temperature 1 "
                f"{found['sampled']:.3f}, reverse KL {found['reverse_kl']:.4f}, {found['seconds']:.0f} s",
                flush=True,
            )
            yield result


def steps_to(result: dict[str, Any], seed: str, name: str, share: float) -> float:
    """The first measured step with ``share`` of the teacher's greedy pass@1 on development problems; infinity: none."""
    goal = share * result["ends"][TEACHER][seed]["greedy"]
    return next((step for step, rate in result["rows"][name][seed]["curve"] if rate >= goal), float("inf"))


def render(result: dict[str, Any]) -> str:
    """The result as a table for README.md: means over the seeds, and the least of them in brackets."""
    lines = [
        f"{result['samples']} samples x {result['steps']} steps; mean over the starts (least); {result['machine']}",
        "",
        "| objective | greedy | temperature 1 | reverse KL | steps to 90 % of the teacher | s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, title in ((TEACHER, "teacher"), (STUDENT, "student before")):
        lines.append(f"| {title} | {_cells(list(result['ends'][name].values()))} | | |")
    for name, seeds in result["rows"].items():
        if not seeds:
            continue
        reached = [steps_to(result, seed, name, 0.9) for seed in seeds]
        steps = ", ".join("-" if step == float("inf") else f"{step:.0f}" for step in reached)
        seconds = statistics.mean(found["seconds"] for found in seeds.values())
        lines.append(f"| {ROWS[name].title} | {_cells(list(seeds.values()))} | {steps} | {seconds:.0f} |")
    return "\n".join(lines)


def _cells(found: Sequence[dict[str, Any]]) -> str:
    rates = [[one[key] for one in found] for key in ("greedy", "sampled")]
    cells = [f"{statistics.mean(values):.3f} ({min(values):.3f})" for values in rates]
    return " | ".join([*cells, f"{statistics.mean(one['reverse_kl'] for one in found):.4f}"])


def draw(result: dict[str, Any], path: Path) -> None:
    """pass@1 on development problems over the steps, and the ends at temperature 1: a mean and each start."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {name: list(seeds.values()) for name, seeds in result["rows"].items() if seeds}
    figure = Figure(figsize=(13, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    colors = colormaps["tab20"]
    for place, found in enumerate(rows.values()):
        steps = [step for step, _ in found[0]["curve"]]
        rates_RS = np.array([[rate for _, rate in one["curve"]] for one in found])
        left.plot(steps, rates_RS.mean(axis=0), color=colors(place % 20))
        height = len(rows) - 1 - place
        right.barh(height, np.mean([one["sampled"] for one in found]), color=colors(place % 20), alpha=0.6)
        right.plot([one["sampled"] for one in found], [height] * len(found), "k.", markersize=5)
    teacher = result["ends"][TEACHER].values()
    left.axhline(float(np.mean([one["greedy"] for one in teacher])), color="grey", linestyle="--", linewidth=1)
    right.axvline(float(np.mean([one["sampled"] for one in teacher])), color="grey", linestyle="--", linewidth=1)
    left.set(xlabel="step (colours as on the right)", ylabel="pass@1, greedy, development problems", ylim=(-0.02, 1.03))
    right.set(xlabel="pass@1 at temperature 1, held-out problems (dashed: teacher)", xlim=(0, 1.03))
    right.set_yticks(range(len(rows)), [ROWS[name].title for name in reversed(rows)])
    with replacing(path, "wb") as stream:
        figure.savefig(stream, format="png")


def main(argv: Sequence[str]) -> None:
    """Run the rows and keep table, numbers and picture up to date after each."""
    parsed = parse_groups(
        argv, {"benchmark": BenchmarkOptions}, prog="objectives.py", description=str(__doc__).split("\n\n")[0]
    )
    options = parsed[BenchmarkOptions]
    if options.samples % 8:
        raise UserError(f"--samples {options.samples}: must be a multiple of 8")
    torch.set_num_threads(1)
    disable_progress_bar()
    out, result = Path(options.out), {}
    for result in rows_done(options):
        write(out / "objectives.json", json.dumps(result, indent=2) + "\n")
        draw(result, out / "objectives.png")
    print(render(result))


if __name__ == "__main__":
    os.nice(10)
    sys.exit(run_cli(main))
