"""How good the student is by now: the evaluation sets of a run, and whether it is good enough to stop."""

from __future__ import annotations

from opd_megatron.assembly import Parts
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.rollout.engine import SamplingParams
from opd_megatron.rollout.evaluate import evaluate


def evaluate_student(parts: Parts, step: int) -> dict[str, float]:
    """``eval/<set>/*`` of the student after ``step`` rollouts."""
    options, engine, scorer = parts.options, parts.engine, parts.evaluation_reward
    assert engine is not None
    assert scorer is not None
    parts.sync_engine(str(step))
    sampling = SamplingParams(
        temperature=options.evaluation.eval_temperature,
        top_p=options.evaluation.eval_top_p,
        max_new_tokens=options.eval_max_response_len,
        stop=options.rollout.rollout_stop,
    )
    metrics: dict[str, float] = {}
    for evaluation_set in parts.evaluation_sets:
        found, _ = evaluate(
            engine,
            evaluation_set.records,
            name=evaluation_set.name,
            reward=scorer,
            sampling=sampling,
            n_samples=options.evaluation.n_samples_per_eval_prompt,
            seed=options.training.seed,
            rollout_id=step,
            max_prompt_len=options.rollout.rollout_max_prompt_len,
        )
        metrics |= found
    return metrics | engine.metrics()


def goal_reached(options: Options, metrics: dict[str, float]) -> bool:
    """Whether ``--stop-eval-metric`` was measured in this step and is good enough to end the run.

    Raises ``UserError`` if an evaluation ran and has no such metric.
    """
    metric, goal = options.evaluation.stop_eval_metric, options.evaluation.stop_eval_value
    if metric is None or goal is None or not any(name.startswith("eval/") for name in metrics):
        return False
    if metric not in metrics:
        known = ", ".join(sorted(name for name in metrics if name.startswith("eval/")))
        raise UserError(f"--stop-eval-metric {metric} is not measured; there are {known}")
    return metrics[metric] >= goal
