"""What the ranks do in the layout tests; the single process does the same for comparison."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ParallelOptions
from opd_megatron.config.resolve import StartingPoint, resolve_step
from opd_megatron.flow.weighting import OpdWeighting
from opd_megatron.megatron import distributed
from opd_megatron.megatron.checkpoint import load_weights, save_checkpoint
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.exchange import exchange
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import LogProbs, StudentTokens, TopIds
from opd_megatron.sample import Sample, TeacherScores
from tests.megatron.support import (
    GRADIENT_FLAGS,
    VOCAB_SIZE,
    WHOLE_RESPONSES,
    exported,
    logits,
    make_samples,
    make_spec,
    off_policy_samples,
    optimizer_state,
    step_gradients,
)

LOSSES: dict[str, dict[str, Any]] = {
    "sft": {"loss_type": "sft_loss"},
    "opd": {"use_opd": True, "opd_kl_coef": 0.7, "calculate_per_token_loss": True},
}
TRAINING: dict[str, Any] = {"lr": 2e-3, "lr_warmup_iters": 3, "lr_decay_style": "cosine", "num_rollouts": 12}
STEPS = 10
TOP = 3
"""How many of the student's likeliest tokens are asked for."""


def _trainer(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any]) -> MegatronTrainer:
    return MegatronTrainer(make_spec(folder, **flags), rendezvous)


def voices(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """What a freshly loaded model says and exports."""
    trainer = _trainer(rendezvous, folder, flags)
    samples = make_samples(0)
    return {
        "log_probs": trainer.ask(LogProbs("student"), samples),
        "top_ids": trainer.ask(TopIds(TOP), samples),
        "logits": logits(trainer, samples) if parallel_state.is_pipeline_last_stage() else _join_in(trainer),
        "exported": exported(trainer),
    }


def _join_in(trainer: MegatronTrainer) -> dict[int, Any]:
    """Take the part of an earlier stage in :func:`tests.megatron.support.logits`, which has no results there."""
    logits(trainer, make_samples(0))
    return {}


def gradients(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], loss: str
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics of the first step and every parameter's gradient."""
    return step_gradients(_trainer(rendezvous, folder, flags | LOSSES[loss] | GRADIENT_FLAGS), make_samples(1))


def whole_responses(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of a step whose loss sums over whole responses, which ranks may share."""
    return step_gradients(_trainer(rendezvous, folder, flags | WHOLE_RESPONSES | GRADIENT_FLAGS), off_policy_samples(1))


def step_and_scores(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Tensor], dict[int, Any]]:
    """Metrics and gradients of a step at a temperature other than 1, and the log-probabilities before it.

    Every token has a weight of its own in the distillation term, a fifth of them 0.
    """
    terms: dict[str, Any] = {"entropy_coef": 0.01, "rollout_temperature": 0.8, "calculate_per_token_loss": True}
    trainer = _trainer(rendezvous, folder, flags | LOSSES["opd"] | GRADIENT_FLAGS | terms)
    samples, random = make_samples(1), np.random.default_rng(5)
    for sample in samples:
        sample.opd_weights = random.uniform(0, 2, sample.response_length).astype(np.float32)
        sample.opd_weights[random.random(sample.response_length) < 0.2] = 0
    scores = trainer.ask(LogProbs("student"), make_samples(1))
    return *step_gradients(trainer, samples), scores


def losses(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], loss: str, steps: int = STEPS
) -> list[dict[str, float]]:
    """Metrics of the first steps on recorded rollouts."""
    trainer = _trainer(rendezvous, folder, TRAINING | flags | LOSSES[loss])
    return [trainer.train(make_samples(number)).metrics or {} for number in range(steps)]


def nothing_to_learn(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any]
) -> tuple[list[dict[str, float]], list[str]]:
    """Metrics of three steps, of which the second has no gradient, and the weights that this step moved."""
    trainer = _trainer(rendezvous, folder, TRAINING | flags)
    unrewarded = make_samples(1)
    for sample in unrewarded:
        sample.advantages = np.zeros(sample.response_length, dtype=np.float32)
    metrics = [trainer.train(make_samples(0)).metrics or {}]
    before = exported(trainer)
    metrics.append(trainer.train(unrewarded).metrics or {})
    moved = [name for name, tensor in exported(trainer).items() if not torch.equal(tensor, before[name])]
    return [*metrics, trainer.train(make_samples(2)).metrics or {}], moved


def distillation(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], teacher: Path) -> list[dict[str, float]]:
    """Metrics of steps with a Megatron teacher, two optimizer steps per rollout, at a temperature other than 1."""
    settings = (
        TRAINING
        | flags
        | {
            "use_opd": True,
            "opd_baseline": "optimal",
            "global_batch_size": 6,
            "rollout_temperature": 0.8,
        }
    )
    trainer = MegatronTrainer(make_spec(folder, teacher=teacher, **settings), rendezvous)
    found = []
    for number in range(3):
        samples = make_samples(number)
        hear_teacher(trainer, samples)
        remember(trainer, samples)
        found.append(trainer.train(samples).metrics or {})
    return found


def self_distillation(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any]) -> list[dict[str, float]]:
    """As :func:`distillation` with the student as its own teacher, behind prompts of other lengths."""
    taught = {"use_opd": True, "opd_type": "megatron", "opd_teacher": "self", "opd_self_weights": "current"}
    settings = TRAINING | taught | flags | {"opd_loss": "distribution", "advantage_estimator": "none"}
    trainer = MegatronTrainer(make_spec(folder, **settings, global_batch_size=6), rendezvous)
    found = []
    for number in range(2):
        samples, random = make_samples(number), np.random.default_rng(number)
        for sample in samples:
            sample.teacher_prompt_tokens = random.integers(0, VOCAB_SIZE, int(random.integers(1, 20)))
        scores = hear_teacher(trainer, samples)
        remember(trainer, samples)
        found.append(trainer.train(samples).metrics or {})
        if found[-1]:
            found[-1]["scores"] = sum(float(scores_T.sum()) for scores_T in scores)
    return found


def chosen_tokens(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], teacher: Path
) -> tuple[list[Any], dict[str, float], dict[str, Tensor]]:
    """What the student says of each token, and metrics and gradients of a step on those that are chosen by it."""
    settings: dict[str, Any] = {
        "use_opd": True,
        "opd_loss": "distribution",
        "opd_token_select": "sample",
        "opd_token_score": "soft_or",
        "opd_prompt_weight": "paced",
        "opd_pass_above": 1.0,
        "advantage_estimator": "none",
    }
    trainer = MegatronTrainer(make_spec(folder, teacher=teacher, **flags | settings | GRADIENT_FLAGS), rendezvous)
    samples = make_samples(1)
    hear_teacher(trainer, samples)
    answers = _everywhere(trainer.ask(StudentTokens(divergence=True), samples))
    known = [answers[place] for place in range(len(samples))]
    for place, sample in enumerate(samples):
        sample.advantages = np.zeros(sample.response_length, dtype=np.float32)
        sample.old_log_probs, sample.entropies = known[place]["student_log_prob"], known[place]["student_entropy"]
    OpdWeighting(trainer.options, ()).apply(samples, 0, known)
    metrics, found = step_gradients(trainer, samples)
    return [np.array(answer.tolist()) for answer in known], metrics, found


def own_groups(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], teacher: Path) -> bool:
    """Whether building the models of a distillation made process groups of a second layout."""
    distributed.initialize(rendezvous, make_spec(folder, **flags).options.parallel, seed=0)
    distributed._others.clear()
    MegatronTrainer(make_spec(folder, teacher=teacher, use_opd=True, **flags), rendezvous)
    return bool(distributed._others)


def brought_head_bytes(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], teacher: Path) -> int:
    """Bytes that the teacher's output weight takes in the student's layout after two rollouts were scored."""
    trainer = MegatronTrainer(make_spec(folder, teacher=teacher, use_opd=True, **flags), rendezvous)
    for number in range(2):
        trainer.ask(LogProbs("teacher", keep_hidden=True), make_samples(number))
    rows = trainer.scorers.kept_rows["teacher"]
    held = [rows._weight_Vh, *trainer.scorers.frozen["teacher"]._brought_head]
    storages = {tensor.data_ptr(): tensor.nbytes for tensor in held if tensor is not None}
    return sum(storages.values())


def exported_teacher(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], teacher: Path) -> dict[str, Tensor]:
    """What each rank gets of the teacher's weights before it scored anything."""
    trainer = MegatronTrainer(make_spec(folder, teacher=teacher, use_opd=True, **flags), rendezvous)
    return dict(trainer.export_weights("teacher"))


def exchange_of_missing(rendezvous: Rendezvous, held: dict[tuple[int, int], int]) -> str:
    """What :func:`exchange` says where the last rank wants a key that no rank has; ``held`` are rows by key."""
    distributed.initialize(rendezvous, ParallelOptions(), seed=0)
    tensors = {key: torch.ones(rows, 3) for key, rows in held.items()} if rendezvous.rank == 0 else {}
    try:
        exchange(tensors, [*held, (7, 0)] if rendezvous.rank == rendezvous.world_size - 1 else [])
    except ValueError as error:
        return str(error)
    return "nothing was wrong"


def hear_teacher(trainer: MegatronTrainer, samples: Sequence[Sample], name: str = "teacher") -> list[np.ndarray]:
    """Give the samples the scores of a frozen model, whose hidden rows are kept; the log-probabilities."""
    found = _everywhere(trainer.ask(LogProbs(name, keep_hidden=True), samples))
    for place, sample in enumerate(samples):
        sample.teacher_scores = TeacherScores(log_probs_T=found[place])
    return [found[place] for place in range(len(samples))]


def remember(trainer: MegatronTrainer, samples: Sequence[Sample]) -> None:
    """Give the samples the log-probabilities before the step."""
    old = _everywhere(trainer.ask(LogProbs("student"), samples))
    for place, sample in enumerate(samples):
        sample.old_log_probs = old[place]


def _everywhere(part: dict[int, Any]) -> dict[int, Any]:
    """What the controller does with the results of the ranks before it hands them on."""
    parts: list[dict[int, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return {place: array for one in parts for place, array in one.items()}


def save_weights(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], target: Path) -> None:
    save_checkpoint(target, "release", _trainer(rendezvous, folder, flags).chunks, hf_folder=folder)


def load_and_export(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], source: Path) -> dict[str, Tensor]:
    start = StartingPoint("ref_load", resolve_step(source))
    return exported(_trainer(rendezvous, folder, flags | {"start": start}))


def refusal(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], source: Path) -> str:
    """What loading weights says about a checkpoint that cannot be loaded."""
    trainer = _trainer(rendezvous, folder, flags)
    try:
        load_weights(trainer.chunks, source)
    except UserError as error:
        return str(error)
    return "loaded"


def resume(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], target: Path) -> list[str]:
    """What differs on this rank between three steps straight and two steps, a save, a resume and the third."""
    settings = TRAINING | flags | {"use_opd": True}
    straight, first = _trainer(rendezvous, folder, settings), _trainer(rendezvous, folder, settings)
    expected = [straight.train(make_samples(number)).metrics for number in range(3)]
    for number in range(2):
        first.train(make_samples(number))
    first.save(target, 2, folder, {"rollouts": 2})
    start = StartingPoint("load", resolve_step(target))
    second = _trainer(rendezvous, folder, settings | {"start": start})
    state = second.resume()
    assert state is not None
    assert state["rollouts"] == 2
    found = [second.train(make_samples(2)).metrics]
    pairs = {"weights": (exported(second), exported(straight))}
    pairs["optimizer"] = (optimizer_state(second), optimizer_state(straight))
    differing = [] if found == expected[2:] else ["metrics"]
    for what, (mine, theirs) in pairs.items():
        assert mine.keys() == theirs.keys()
        differing += [f"{what} {name}" for name in mine if not torch.equal(mine[name], theirs[name])]
    return differing


def train_and_save(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], rollouts: range, target: Path, source: Path | None
) -> None:
    """Train on ``rollouts``, from the checkpoint in ``source`` if there is one, and save in ``target``."""
    settings = TRAINING | {"use_opd": True} | flags
    if source is not None:
        settings["start"] = StartingPoint("load", resolve_step(source))
    trainer = _trainer(rendezvous, folder, settings)
    if source is not None:
        state = trainer.resume()
        assert state is not None
        assert state["rollouts"] == rollouts.start
    for number in rollouts:
        trainer.train(make_samples(number))
    trainer.save(target, rollouts.stop, folder, {"rollouts": rollouts.stop})


def first_step_after_resume(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], target: Path
) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Metrics of the first step, straight and of a run that resumes from a checkpoint made before it."""
    settings = TRAINING | flags | {"use_opd": True}
    straight = _trainer(rendezvous, folder, settings)
    straight.save(target, 0, folder, {})
    expected = straight.train(make_samples(0)).metrics
    resumed = _trainer(rendezvous, folder, settings | {"start": StartingPoint("load", resolve_step(target))})
    resumed.resume()
    return resumed.train(make_samples(0)).metrics, expected


def run_tool(rendezvous: Rendezvous, tool: str, arguments: list[str]) -> None:
    """A program of ``tools`` as ``torchrun`` would start it on this rank, in the process group of the pool."""
    distributed.initialize(rendezvous, ParallelOptions(), seed=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", rendezvous.rank), ("WORLD_SIZE", rendezvous.world_size)):
            patch.setenv(name, str(value))
        importlib.import_module(f"tools.{tool}").main(arguments)


def random_start(rendezvous: Rendezvous, folder: Path, flags: dict[str, Any]) -> dict[str, Tensor]:
    """Seeded random weights as this layout draws them."""
    return exported(_trainer(rendezvous, folder, flags | {"start": StartingPoint("random", folder), "seed": 3}))
