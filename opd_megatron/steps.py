"""What the loop does in each phase of a step; every function works on the samples of one rollout."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd_megatron.assembly import Parts
from opd_megatron.config.checkpoint_paths import inspect_checkpoint, step_folder_name
from opd_megatron.config.critic import has_critic
from opd_megatron.config.options import OpdOptions, Options
from opd_megatron.config.resolve import (
    estimates_advantages,
    hears_feedback,
    measures_diagnostics,
    measures_exact_kl,
    needs_teacher_hidden,
)
from opd_megatron.diagnostics import diagnose, look_at_samples
from opd_megatron.flow import StudentIdsTeacher, score_rollout
from opd_megatron.flow.masking import complete_unscored, leave_out_failed
from opd_megatron.flow.prefix import train_on_prefix
from opd_megatron.flow.recorded import recorded_samples
from opd_megatron.flow.student_pass import ask_student
from opd_megatron.flow.targets import score_references
from opd_megatron.megatron.checkpoint import write_hf_folder
from opd_megatron.megatron.write_errors import writing
from opd_megatron.objectives.advantages import chosen_estimator, task_advantages
from opd_megatron.objectives.distribution import divergence_metrics
from opd_megatron.objectives.log_probs import log_ratio
from opd_megatron.objectives.mismatch import mismatch_statistics
from opd_megatron.objectives.opd import future_distances
from opd_megatron.observe.plots import PASS_AT_1
from opd_megatron.observe.run_folder import RunFolder
from opd_megatron.rollout.generate import rollout_metrics
from opd_megatron.rollout.given import origin_metrics
from opd_megatron.rollout.sft import sft_samples
from opd_megatron.sample import Sample, sampled_by_student, write_samples
from opd_megatron.teacher.megatron import MegatronTeacher
from opd_megatron.teacher.own_engine import EngineTeacher
from opd_megatron.valuing import add_values, value_metrics

logger = logging.getLogger(__name__)


def due(step: int, interval: int | None, is_last: bool) -> bool:
    """Whether something that happens every ``interval`` steps, and at the end, happens at ``step``."""
    return is_last or (interval is not None and step % interval == 0)


def make_samples(parts: Parts, rollout_id: int, metrics: dict[str, float]) -> list[Sample]:
    """Samples of a rollout: recorded, from labels (SFT), or sampled by the student of ``rollout_id`` updates.

    All but those of SFT have their task rewards, and the scores of a teacher that takes sample by sample.
    """
    options = parts.options
    recorded = options.rollout.load_debug_rollout_data
    if recorded is not None:
        samples = recorded_samples(options, Path(recorded.replace("{rollout_id}", str(rollout_id))))
    elif parts.flow is None:
        assert parts.prompts is not None
        assert options.rollout.rollout_batch_size is not None
        samples = sft_samples(parts.prompts.next_batch(options.rollout.rollout_batch_size), parts.tokenizer)
    else:
        assert parts.engine is not None
        parts.sync_engine(str(rollout_id))
        rollout = parts.flow.make(rollout_id)
        samples = rollout.samples
        metrics |= rollout.metrics
    train_on_prefix(samples, options.opd.opd_prefix_len if options.opd.use_opd else None)
    own = sampled_by_student(samples)
    if options.opd.use_opd and (options.opd.opd_student_data_fraction < 1 or len(own) < len(samples)):
        metrics |= origin_metrics(samples)
    if hears_feedback(options):
        heard = sum(sample.teacher_prompt_tokens is not None for sample in samples)
        metrics["opd/feedback_frac"] = heard / len(samples)
    if own:
        metrics |= rollout_metrics(own)
        if options.objective.loss_type != "sft_loss":
            metrics |= _reward_metrics(own)
    return samples


def _reward_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """``reward/*``; a sample without a reward gets 0."""
    for sample in samples:
        if sample.reward is None:
            sample.reward = 0.0
    rewards = np.array([sample.reward for sample in samples], dtype=np.float64)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0,
        "reward/max": float(rewards.max()),
        "reward/min": float(rewards.min()),
        "reward/error_frac": sum(sample.reward_error is not None for sample in samples) / len(samples),
    }


def compare_greedily(parts: Parts, samples: Sequence[Sample], rollout_id: int, metrics: dict[str, float]) -> None:
    """Give each sample the reward of the greedy response to its prompt, where the estimator compares with it.

    The greedy responses are seen by nobody else; recorded samples keep what was recorded.
    """
    objective = parts.options.objective
    samples = sampled_by_student(samples)
    compares = objective.loss_type != "sft_loss" and chosen_estimator(objective).needs_greedy
    if not samples or not compares or not estimates_advantages(parts.options):
        return
    if parts.generator is not None:
        greedy = parts.generator.greedy(samples, rollout_id)
        if parts.reward is not None:
            parts.reward.score(greedy)
        rewards = {sample.group_index: sample.reward or 0.0 for sample in greedy}
        for sample in samples:
            sample.greedy_reward = rewards[sample.group_index]
    metrics["reward/greedy_mean"] = float(np.mean([sample.greedy_reward for sample in samples]))


def rest_engine(parts: Parts, metrics: dict[str, float]) -> None:
    """Let the engine give its memory back until it is needed again, and report on it."""
    if parts.flow is not None and parts.engine is not None:
        metrics |= parts.engine.metrics()
        parts.engine.rest()


def teach(parts: Parts, samples: Sequence[Sample], rollout_id: int, metrics: dict[str, float]) -> None:
    """Attach the scores of a teacher that takes whole rollouts. Evaluation never comes here."""
    assert parts.teacher is not None
    if isinstance(parts.teacher, StudentIdsTeacher):
        metrics |= parts.teacher.teach(samples)
        return
    if isinstance(parts.teacher, MegatronTeacher):
        opd = parts.options.opd
        measured = measures_exact_kl(opd, rollout_id) or measures_diagnostics(opd, rollout_id)
        parts.teacher.keep_hidden = (measured or needs_teacher_hidden(parts.options)) and parts.exact_kl_possible
    assert not isinstance(parts.teacher, EngineTeacher)  # which is asked sample by sample
    score_rollout(parts.options, parts.teacher, samples)


def record(parts: Parts, samples: Sequence[Sample], rollout_id: int, folder: RunFolder) -> None:
    """Write a few samples for the reader, and all of them where a recording is asked for."""
    options = parts.options
    if options.run.num_logged_samples:
        shown = [
            {
                "prompt": sample.prompt,
                "response": sample.response,
                "label": sample.label,
                "reward": sample.reward,
                "status": str(sample.status),
                "response_length": sample.response_length,
            }
            for sample in samples[: options.run.num_logged_samples]
        ]
        folder.write_samples(rollout_id, shown)
    if options.rollout.save_debug_rollout_data is not None:
        write_samples(options.rollout.save_debug_rollout_data.replace("{rollout_id}", str(rollout_id)), samples)


def learn(parts: Parts, samples: Sequence[Sample], rollout_id: int, metrics: dict[str, float]) -> None:
    """Compute advantages over the whole rollout, take its optimizer steps and report them."""
    options = parts.options
    if options.opd.use_opd:
        complete_unscored(options, samples)
    answers = ask_student(options, parts.trainer, samples, rollout_id)
    if options.objective.loss_type == "policy_loss":
        _add_advantages(parts, samples)
        metrics |= value_metrics(samples)
    if options.opd.use_opd:
        leave_out_failed(options, samples)
        metrics |= parts.weighting.apply(samples, rollout_id, answers)
        failed = sum(sample.teacher_failure is not None for sample in samples)
        metrics.setdefault("opd/teacher_failed_frac", failed / len(samples))
        metrics["opd/only"] = float(not estimates_advantages(options))
        metrics |= divergence_metrics(options.opd, rollout_id)
        metrics |= diagnose(parts, samples, rollout_id, answers)
    trained, log_probs = parts.trainer.train(samples, rollout_id)
    metrics |= trained
    if options.objective.loss_type == "sft_loss":
        return
    # The log-probabilities under the weights that sampled: with several optimizer steps those computed beforehand.
    student = [
        current if sample.old_log_probs is None else sample.old_log_probs
        for sample, current in zip(samples, log_probs, strict=True)
    ]
    metrics |= _engine_gap(samples, student) | _mismatch(parts.options, samples, student)
    own = [place for place, sample in enumerate(samples) if not sample.from_data]
    samples, student = [samples[place] for place in own], [student[place] for place in own]
    metrics |= look_at_samples(options, samples, student)


def _add_advantages(parts: Parts, samples: Sequence[Sample]) -> None:
    """Advantages of what the student sampled, which alone makes their statistics; responses of the data have 0."""
    objective = parts.options.objective
    score_references(parts.options, parts.trainer, samples)
    for sample in samples:
        sample.advantages = np.zeros(sample.response_length, dtype=np.float32)
        if parts.options.opd.use_opd and parts.options.opd.opd_kl_discount > 0:
            sample.opd_future = np.zeros(sample.response_length, dtype=np.float32)
    samples = sampled_by_student(samples)
    if not samples:
        return
    kls = None
    if objective.kl_coef > 0:
        kls = [log_ratio(torch.tensor(sample.old_log_probs), torch.tensor(sample.ref_log_probs)) for sample in samples]
    # Without a reward every estimator gives 0, also those that would ask for a greedy response first.
    estimated = estimates_advantages(parts.options) or has_critic(parts.options)
    estimator = objective if estimated else replace(objective, advantage_estimator="none")
    advantages = task_advantages(
        estimator,
        [float(sample.reward or 0.0) for sample in samples],
        [sample.group_index for sample in samples],
        [sample.loss_mask for sample in samples],
        kls,
        [float(sample.greedy_reward) for sample in samples if sample.greedy_reward is not None] or None,
        add_values(parts.trainer, objective, samples, kls),
    )
    if parts.options.opd.use_opd and parts.options.opd.opd_kl_discount > 0:
        _add_futures(parts.options.opd, samples)
    for sample, values in zip(samples, advantages, strict=True):
        sample.advantages = values.numpy()
        sample.validate()


def _add_futures(opd: OpdOptions, samples: Sequence[Sample]) -> None:
    scores = [sample.teacher_scores for sample in samples]
    futures = future_distances(
        [sample.old_log_probs for sample in samples if sample.old_log_probs is not None],
        [sample.target_log_probs for sample in samples if sample.target_log_probs is not None],
        [sample.loss_mask for sample in samples],
        [score.valid_T for score in scores if score is not None],
        discount=opd.opd_kl_discount,
        limit=opd.opd_log_ratio_clip,
    )
    for sample, future in zip(samples, futures, strict=True):
        sample.opd_future = future.float().numpy()


def _engine_gap(samples: Sequence[Sample], student: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean and largest difference of the engine's and the trainer's log-probabilities on trained tokens."""
    gaps = [
        np.abs(sample.rollout_log_probs - log_probs)[sample.loss_mask]
        for sample, log_probs in zip(samples, student, strict=True)
        if sample.rollout_log_probs is not None
    ]
    gap = np.concatenate(gaps) if gaps else np.zeros(0)
    if not len(gap):
        return {}
    return {"rollout/train_logprob_gap": float(gap.mean()), "rollout/train_logprob_gap_max": float(gap.max())}


def _mismatch(options: Options, samples: Sequence[Sample], student: Sequence[np.ndarray]) -> dict[str, float]:
    """``rollout/mismatch_*`` of the samples that know how probable the engine found them."""
    known = [
        (sample.rollout_log_probs, log_probs, sample.loss_mask)
        for sample, log_probs in zip(samples, student, strict=True)
        if sample.rollout_log_probs is not None
    ]
    engine, trainer, masks = zip(*known, strict=True) if known else ((), (), ())
    return mismatch_statistics(engine, trainer, masks, options.objective)


def check_engine(options: Options, metrics: dict[str, float]) -> None:
    """Warn if the engine that sampled does not speak with the weights that are trained."""
    limit = 0.1 if options.optimizer.bf16 else 1e-3
    gap = metrics.get("rollout/train_logprob_gap", 0.0)
    if gap > limit:
        logger.warning(
            "engine and trainer differ by %.2g in mean log-probability (more than %g): they may hold other weights, "
            "see docs/troubleshooting.md",
            gap,
            limit,
        )


def write_hf(parts: Parts, target: Path) -> None:
    """Write the student as a Hugging Face folder, which appears whole or not at all."""
    with writing(target):
        write_hf_folder(parts.trainer.export_weights(), target, parts.hf_folder)


def shown(metrics: dict[str, float]) -> dict[str, float]:
    """The numbers of the progress line."""
    names = {
        "loss": "train/loss",
        "reward": "reward/mean",
        "reverse KL": "opd/reverse_kl",
        "length": "rollout/response_length_mean",
    }
    return {label: metrics[name] for label, name in names.items() if name in metrics} | passed(metrics)


def passed(metrics: Mapping[str, float]) -> dict[str, float]:
    """``eval/<set>/pass@1`` as ``<set> pass@1``."""
    found = {name: PASS_AT_1.fullmatch(name) for name in metrics}
    return {f"{match['set']} pass@1": metrics[name] for name, match in found.items() if match}


def closing_line(options: Options, folder: RunFolder, plots: Sequence[Path]) -> str:
    """Where the reader of a run's output finds what the run has left."""
    files = [folder.metrics_file.name, folder.summary_file.name, *([f"{folder.plots.name}/"] if plots else [])]
    latest = inspect_checkpoint(options.save_folder).latest
    checkpoint = "none" if latest is None else options.save_folder / step_folder_name(latest)
    return f"finished: {folder.path} ({', '.join(files)}), last checkpoint: {checkpoint}"


def logging_arguments(options: Options) -> dict[str, Any]:
    """Where metrics go besides metrics.jsonl."""
    wandb = None
    if options.run.use_wandb:
        wandb = {
            "project": options.run.wandb_project,
            "group": options.run.wandb_group,
            "name": options.run.wandb_run_name,
        }
    return {"tensorboard": not options.run.no_tensorboard, "wandb": wandb}


def summary(parts: Parts, last: dict[str, Any], seconds: float, signal: int | None) -> dict[str, Any]:
    """What ``summary.json`` says at the end of a run."""
    return {
        "rollouts": last.get("step", 0),
        "finished": signal is None,
        "seconds": seconds,
        "checkpoints": str(parts.options.save_folder),
        "last": last,
    }
