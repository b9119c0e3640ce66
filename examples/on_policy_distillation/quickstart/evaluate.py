"""Score the quickstart's three models on the held-out problems and write summary.json and the picture.

Only the Hugging Face folders count here: the models speak through the local engine, and the reverse KL is computed
from the logits of transformers, not of the trainer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.options import RewardOptions
from opd_megatron.config.parse import parse_groups
from opd_megatron.data.prompts import PromptRecord, load_prompt_records
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.observe.plots import plot_quickstart
from opd_megatron.observe.run_folder import RunFolder, read_metrics
from opd_megatron.reward import build_reward
from opd_megatron.rollout.engine import SamplingParams
from opd_megatron.rollout.evaluate import evaluate
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.sample import Sample

MODELS = {"teacher": "teacher_hf", "before": "student_before_hf", "after": "student_after_hf"}
MAX_NEW_TOKENS = 44


@dataclass(frozen=True)
class Arguments:
    """Quickstart evaluation"""

    root: str | None = option(None, "folder of the quickstart", metavar="DIR", required=True)
    seed: int = option(1, "seed of the sampled answers", minimum=0)
    opd_seconds: float | None = option(None, "how long the distillation took", unit="seconds", minimum=0.0)


def pass_rates(folder: Path, records: Sequence[PromptRecord], seed: int) -> tuple[float, float, list[Sample]]:
    """pass@1 greedy and at temperature 1, and the samples at temperature 1."""
    engine = LocalEngine(folder, load_tokenizer(folder))
    engine.update_weights(load_file(folder / "model.safetensors").items(), "hf")
    reward = build_reward(RewardOptions(rm_type="column_arithmetic"))
    rates: list[float] = []
    samples: list[Sample] = []
    for temperature in (0.0, 1.0):
        metrics, samples = evaluate(
            engine,
            records,
            name="heldout",
            reward=reward,
            sampling=SamplingParams(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS),
            n_samples=1,
            seed=seed,
            rollout_id=0,
        )
        rates.append(metrics["eval/heldout/pass@1"])
    reward.close()
    engine.close()
    return rates[0], rates[1], samples


def batches(samples: Sequence[Sample]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded ids ``[B, L]`` and a mask ``[B, L - 1]`` of the positions that predict a response token."""
    for start in range(0, len(samples), 128):
        part = samples[start : start + 128]
        longest = max(len(sample.tokens) for sample in part)
        ids, mask = np.zeros((len(part), longest), dtype=np.int64), np.zeros((len(part), longest - 1), dtype=np.bool_)
        for row, sample in enumerate(part):
            ids[row, : len(sample.tokens)] = sample.tokens
            mask[row, len(sample.prompt_tokens) - 1 : len(sample.tokens) - 1] = True
        yield torch.from_numpy(ids), torch.from_numpy(mask)


@torch.inference_mode()
def reverse_kl(student_folder: Path, teacher_folder: Path, samples: Sequence[Sample]) -> float:
    """Mean over response tokens of KL(student || teacher), exact over the vocabulary, in nats."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (student_folder, teacher_folder)
    )
    total = tokens = 0.0
    for ids, mask in batches(samples):
        log_s, log_t = (torch.log_softmax(model(ids).logits[:, :-1], dim=-1) for model in (student, teacher))
        kl = (log_s.exp() * (log_s - log_t)).sum(-1)[mask]
        total += float(kl.double().sum())
        tokens += kl.numel()
    return total / tokens


def main(argv: Sequence[str]) -> None:
    """Write ``summary.json`` and ``plots/learning.png`` under the quickstart's folder."""
    arguments = parse_groups(argv, {"arguments": Arguments}, prog="evaluate.py", description=str(__doc__))[Arguments]
    root = Path(str(arguments.root))
    records = load_prompt_records(
        str(root / "heldout.jsonl"),
        tokenizer=load_tokenizer(root / MODELS["teacher"]),
        input_key="prompt",
        label_key="label",
        metadata_key="metadata",
        apply_chat_template=False,
        chat_template_kwargs={},
    )
    greedy, sampled, answers = {}, {}, {}
    for name, folder in MODELS.items():
        greedy[name], sampled[name], answers[name] = pass_rates(root / folder, records, arguments.seed)
    teacher_folder = root / MODELS["teacher"]
    steps = [record for record in read_metrics(root / "opd" / "metrics.jsonl") if "opd/reverse_kl" in record]
    summary = {
        "teacher_pass@1": greedy["teacher"],
        "student_pass@1_before": greedy["before"],
        "student_pass@1_after": greedy["after"],
        "teacher_pass@1_t1": sampled["teacher"],
        "student_pass@1_before_t1": sampled["before"],
        "student_pass@1_after_t1": sampled["after"],
        "reverse_kl_first": reverse_kl(root / MODELS["before"], teacher_folder, answers["before"]),
        "reverse_kl_last": reverse_kl(root / MODELS["after"], teacher_folder, answers["after"]),
        "opd_steps": len(steps),
        "opd_seconds": arguments.opd_seconds,
        "seed": arguments.seed,
    }
    RunFolder(root).write_summary(summary)
    picture = plot_quickstart(
        root / "opd" / "metrics.jsonl",
        root / "plots" / "learning.png",
        eval_set="dev",
        teacher=greedy["teacher"],
        student_before=greedy["before"],
    )
    print(json.dumps(summary, indent=2))
    print(f"picture: {picture}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
