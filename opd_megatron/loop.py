"""The training loop: rollout, reward and teacher at once -> train -> update weights -> evaluate -> save."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from opd_megatron import steps
from opd_megatron.assembly import Parts, assemble
from opd_megatron.cluster.group import TrainerError
from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.dump import dump_yaml
from opd_megatron.config.errors import RunError, refuse
from opd_megatron.config.options import Options
from opd_megatron.config.validate_paths import earlier_run_faults
from opd_megatron.evaluation import evaluate_student, goal_reached
from opd_megatron.flow import scores_later
from opd_megatron.flow.clock import teacher_wait
from opd_megatron.interrupt import Interrupt, resume_command, unwinding_at_sigterm
from opd_megatron.observe.alarms import Alarms
from opd_megatron.observe.log import configure_logging
from opd_megatron.observe.metrics import MetricLogger
from opd_megatron.observe.plots import plot_run
from opd_megatron.observe.progress import Progress
from opd_megatron.observe.run_folder import RunFolder
from opd_megatron.preflight import preflight
from opd_megatron.rollout.engine import BrokenWeightsError
from opd_megatron.run_lock import run_lock
from opd_megatron.sample import Sample

logger = logging.getLogger(__name__)


def run(options: Options) -> None:
    """Run from the options to the last rollout, or to the end of the step in which a signal arrives.

    Raises ``UserError`` for bad input found while building the parts, ``TeacherError``, ``RewardError`` or
    ``FilterError`` where a rollout could not be made (the state before it is saved), and ``SystemExit`` (128 + signal)
    after an interrupted run was saved.
    """
    configure_logging()
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(unwinding_at_sigterm())
        stack.enter_context(run_lock(options.run_folder))
        refuse(list(earlier_run_faults(options)))  # another run may have come and gone since the options were judged
        parts = stack.enter_context(assemble(options))
        state = parts.trainer.resume()
        done = restore(parts, state)
        for warning in preflight(parts, done):
            logger.warning("%s", warning)
        folder = RunFolder(options.run_folder)
        folder.write_config(dump_yaml(options))
        with (
            Interrupt() as interrupt,
            MetricLogger(folder, first_step=done + 1 if done else 0, **steps.logging_arguments(options)) as metrics,
            Progress("train", parts.num_rollouts, done=done) as progress,
        ):
            last: dict[str, Any] = train(parts, done, folder, metrics, progress, interrupt)
        folder.write_summary(steps.summary(parts, last, time.perf_counter() - started, interrupt.signal))
        plots = plot_run(folder.metrics_file, folder.plots)
        closing = steps.closing_line(options, folder, plots)
    interrupt.exit_if_set(options)
    print(closing, flush=True)


def restore(parts: Parts, state: dict[str, Any] | None) -> int:
    """Rollouts that are behind us: 0, or those of the checkpoint the trainer resumed from."""
    if state is None:
        return 0
    if parts.prompts is not None and state.get("prompts") is not None:
        parts.prompts.load_state_dict(state["prompts"])
    parts.weighting.load_state_dict(state.get("pass_rates", {}))
    logger.info("resumed after rollout %d", state["rollouts"])
    return int(state["rollouts"])


def train(
    parts: Parts, done: int, folder: RunFolder, metrics: MetricLogger, progress: Progress, interrupt: Interrupt
) -> dict[str, Any]:
    """All remaining rollouts. Step 0 of the metrics is the first evaluation, step k what follows rollout k."""
    earlier = folder.read_metrics() if done else []
    alarms = Alarms(earlier)
    last: dict[str, Any] = earlier[-1] if earlier else {}
    if done == 0 and parts.evaluation_sets and not parts.options.evaluation.skip_eval_before_train:
        first = evaluate_student(parts, 0)
        last = metrics.log(0, first)
        for name, value in steps.passed(first).items():
            logger.info("before training: %s %.4g", name, value)
    for step in range(done + 1, parts.num_rollouts + 1):
        rollout_id = step - 1
        found: dict[str, float] = {}
        with saved_before(parts, rollout_id):
            with progress.phase("rollout"):
                samples = steps.make_samples(parts, rollout_id, found)
                steps.compare_greedily(parts, samples, rollout_id, found)
                steps.rest_engine(parts, found)
            if scores_later(parts.teacher):
                with progress.phase("teacher"):
                    steps.teach(parts, samples, rollout_id, found)
        steps.record(parts, samples, rollout_id, folder)
        with progress.phase("train"):
            steps.learn(parts, samples, rollout_id, found)
        if not trained_tokens(samples):
            logger.warning("rollout %d has no token to train on: are the prompts too long?", rollout_id)
        if step == done + 1:
            steps.check_engine(parts.options, found)
        is_last = step == parts.num_rollouts
        if parts.evaluation_sets and steps.due(step, parts.options.evaluation.eval_interval, is_last):
            with progress.phase("evaluate"):
                found |= evaluate_student(parts, step)
        interrupted = interrupt.signal is not None and not is_last
        reached = goal_reached(parts.options, found)
        shown, passed = steps.shown(found), steps.passed(found)
        found |= progress.finish_step(tokens=trained_tokens(samples), shown=shown, always=bool(passed))
        found |= teacher_wait(found)
        found["perf/trainer_peak_memory_gib"] = parts.trainer.peak_memory_bytes() / 2**30
        # The line comes before the checkpoint: a resumed run forgets lines that have no checkpoint, but could not make
        # up for one that is missing.
        line = metrics.log(step, found)
        last = {**last, **line}
        for warning in alarms.see(line):
            logger.warning("%s, see docs/troubleshooting.md", warning)
        if steps.due(step, parts.options.checkpoint.save_interval, is_last or interrupted or reached):
            with progress.phase("save"):
                save(parts, step)
        if reached or is_last:
            interrupt.signal = None  # one that came during the last step stopped nothing
        if interrupted or reached:
            break
    return last


@contextmanager
def saved_before(parts: Parts, rollouts: int) -> Iterator[None]:
    """Where the next rollout cannot be made or scored, save the state after ``rollouts`` rollouts and say how to go on.

    The prompts go back to where they stood, so that the resumed run makes this rollout anew.
    """
    position = parts.prompts.state_dict() if parts.prompts is not None else None
    try:
        yield
    except RunError as error:
        if rollouts > 0 and not isinstance(error, TrainerError | BrokenWeightsError):
            if parts.prompts is not None and position is not None:
                parts.prompts.load_state_dict(position)
            if rollouts not in inspect_checkpoint(parts.options.save_folder).steps:
                save(parts, rollouts)
            print(f"stopped and saved; resume with: {resume_command(parts.options, sys.argv)}", flush=True)
        raise


def save(parts: Parts, step: int) -> None:
    """Write a checkpoint, and Hugging Face weights where they are asked for."""
    options = parts.options
    run_state = {
        "rollouts": step,
        "prompts": parts.prompts.state_dict() if parts.prompts is not None else None,
        "pass_rates": parts.weighting.state_dict(),
    }
    parts.trainer.save(options.save_folder, step, parts.hf_folder, run_state)
    if options.checkpoint.save_hf is not None:
        steps.write_hf(parts, Path(options.checkpoint.save_hf.replace("{rollout_id}", str(step))))


def trained_tokens(samples: Sequence[Sample]) -> int:
    """Response tokens of a rollout that are trained on."""
    return int(sum(sample.loss_mask.sum() for sample in samples))
