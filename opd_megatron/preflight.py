"""What must hold before the first step: the student's weights, the teacher, and that samples fit."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from opd_megatron.assembly import Parts
from opd_megatron.config.errors import UserError, refuse
from opd_megatron.config.resolve import (
    checkpoint_architecture,
    is_self_taught,
    starting_point,
    student_architecture,
    teacher_architecture,
    teacher_folder,
)
from opd_megatron.config.targets import named_models
from opd_megatron.config.validate_opd import idle_opd_options
from opd_megatron.data.prompts import PromptRecord, text_of_records
from opd_megatron.flow import StudentIdsTeacher
from opd_megatron.flow.target_models import check_megatron, check_reference_scores, check_references
from opd_megatron.objectives.advantages import chosen_estimator
from opd_megatron.questions import LogProbs
from opd_megatron.teacher.connect import part_of_prompts, servers_of
from opd_megatron.teacher.megatron import MegatronTeacher
from opd_megatron.teacher.own_engine import EngineTeacher
from opd_megatron.teacher.preflight import (
    JUDGED_TEXTS,
    JUDGED_TOKENS,
    Finding,
    Student,
    check_privileged_length,
    text_samples,
)
from opd_megatron.teacher.sglang_preflight import preflight_sglang
from opd_megatron.teacher.throughput import RunSizes

logger = logging.getLogger(__name__)


def _finite(tensors: Iterable[tuple[str, Tensor]], source: Path) -> Iterator[tuple[str, Tensor]]:
    """Pass the student's first weights on; raises ``UserError`` at one that holds NaN or infinity."""
    broken = None
    for name, tensor in tensors:  # to the end, because all ranks take part
        if broken is None and not bool(tensor.isfinite().all()):
            broken = name
        yield name, tensor
    if broken is not None:
        raise UserError(f"{source}: parameter {broken} holds NaN or infinity: the student's weights are damaged")


def _first_weights(parts: Parts, done: int) -> None:
    """Give the engine, where there is one, the weights that the first rollout is sampled with, and look at them."""
    tensors = _finite(parts.trainer.export_weights(), starting_point(parts.options).folder)
    if parts.engine is not None:
        parts.engine.update_weights(tensors, str(done))
    else:
        deque(tensors, maxlen=0)


def preflight(parts: Parts, done: int) -> list[str]:
    """Find out what must hold before the step after ``done`` rollouts: of the student's weights and of the teacher.

    Returns warnings, raises ``UserError`` or TeacherError.
    """
    options = parts.options
    refuse([*_unknown_ids(parts), *_short_contexts(parts)])
    _first_weights(parts, done)
    found = check_references(options, _plain_student(parts))
    check_reference_scores(options, parts.trainer, Student(parts.tokenizer))
    notes = []
    objective = options.objective
    rewarded = objective.loss_type == "policy_loss" and options.reward.rm_type != "zero"
    if rewarded and chosen_estimator(objective).compares_samples and options.rollout.n_samples_per_prompt == 1:
        notes.append(
            f"{objective.advantage_estimator} with one sample per prompt: every group's advantage is 0, the task "
            "reward teaches nothing"
        )
    notes += _length_notes(parts)
    idle = idle_opd_options(options)
    if idle:
        why = "recorded rollouts hold the teacher's scores" if options.opd.use_opd else "distillation is off"
        notes.append(f"{why}: {', '.join(idle)} of the --config file have no effect")
    for finding in [*_check_teacher(parts), *found]:
        if finding.warning:
            notes.append(finding.text)
        else:
            logger.info("teacher, %s: %s", finding.check, finding.text)
    return notes


def _plain_student(parts: Parts) -> Student:
    data = parts.options.data
    settings = json.loads(data.apply_chat_template_kwargs) if data.apply_chat_template else None
    vocab_size = student_architecture(parts.options).vocab_size
    return Student(parts.tokenizer, chat_template_kwargs=settings, vocab_size=vocab_size)


def _unknown_ids(parts: Parts) -> Iterator[str]:
    """Faults of a tokenizer whose ids, those of the prompts or of the end, the student has no row for."""
    size, end = student_architecture(parts.options).vocab_size, parts.tokenizer.eos_token_id
    model = f"the model of --hf-checkpoint has a vocabulary of {size} tokens: is the tokenizer its own?"
    if end is not None and end >= size:
        yield f"the tokenizer's end token has the id {end}, {model}"
    sets = {f"--eval-prompt-data {item.name}": item.records for item in parts.evaluation_sets}
    if parts.prompts is not None:
        sets["--prompt-data"] = parts.prompts.records
    for flag, records in sets.items():
        for record in records:
            highest = int(record.prompt_tokens.max(initial=0))
            if highest >= size:
                yield f"{flag}: row {record.index} (counted from 0) has the id {highest}, {model}"
                break


def _short_contexts(parts: Parts) -> Iterator[str]:
    """Faults of Megatron teachers and references that are made for fewer positions than a sample can have."""
    options = parts.options
    if parts.prompts is None:
        return
    longest = min(_longest_sample(parts), student_architecture(options).max_position_embeddings)
    models = [(flag, folder, checkpoint_architecture(folder, flag)) for _, flag, folder in named_models(options)]
    folder = teacher_folder(options)
    if folder is not None:
        models.append(("--opd-teacher-load", folder, teacher_architecture(options)))
    for flag, folder, model in models:
        if longest > model.max_position_embeddings:
            yield (
                f"{flag} {folder} is made for {model.max_position_embeddings} positions, prompt and response can have "
                f"{longest} tokens: lower --rollout-max-response-len or --rollout-max-prompt-len, or choose another"
            )


def _check_teacher(parts: Parts) -> list[Finding]:
    options, teacher = parts.options, parts.teacher
    if teacher is None:
        return []
    if isinstance(teacher, EngineTeacher):
        return teacher.preflight(_longest_sample(parts), options.opd.opd_overlong)
    if is_self_taught(options) and isinstance(teacher, MegatronTeacher):
        positions = student_architecture(options).max_position_embeddings
        return check_privileged_length(_longest_sample(parts), positions, options.opd.opd_overlong)
    paths = options.checkpoint
    positions = student_architecture(options).max_position_embeddings
    same_temperature = options.rollout.rollout_temperature == 1.0 or isinstance(teacher, MegatronTeacher)
    records = parts.prompts.records if parts.prompts is not None else []

    def student_log_probs(texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return parts.trainer.ask(LogProbs("student"), text_samples(texts))

    student = replace(
        _plain_student(parts),
        folders=[folder for folder in (paths.load, paths.ref_load, paths.hf_checkpoint) if folder is not None],
        log_probs=student_log_probs if same_temperature else None,
        texts=text_of_records(records, parts.tokenizer, count=JUDGED_TEXTS, longest=min(JUDGED_TOKENS, positions)),
    )
    if isinstance(teacher, MegatronTeacher):
        return check_megatron(teacher, student)
    prompts = [len(record.prompt_tokens) for record in records]
    sizes = RunSizes(
        samples=options.samples_per_rollout,
        group=options.rollout.n_samples_per_prompt,
        prompt_tokens=int(np.median(prompts)) if prompts else 1,
        response_tokens=options.training_response_len,
        steps=parts.num_rollouts,
    )
    return [
        finding
        for server in servers_of(teacher.servers if isinstance(teacher, StudentIdsTeacher) else teacher)
        for finding in preflight_sglang(
            server,
            student,
            rollout_temperature=options.rollout.rollout_temperature,
            allow_sampling_mismatch=options.opd.opd_allow_sampling_mismatch,
            longest_sample=_longest_sample(parts),
            overlong=options.opd.opd_overlong,
            sizes=sizes.part(part_of_prompts(options, server.name, [record.metadata for record in records])),
        )
        if not (is_self_taught(options) and finding.check == "same model")
    ]


def _length_notes(parts: Parts) -> list[str]:
    """Warnings where prompt and response can be longer than the positions that the student is made for."""
    options, positions = parts.options, student_architecture(parts.options).max_position_embeddings
    sets = {f"--eval-prompt-data {item.name}": item.records for item in parts.evaluation_sets}
    lengths = dict.fromkeys(sets, options.eval_max_response_len)
    if parts.prompts is not None and parts.flow is not None:
        sets["--prompt-data"] = parts.prompts.records
        lengths["--prompt-data"] = options.training_response_len
    notes = []
    for flag, records in sets.items():
        prompt = _longest_prompt(parts, records)
        if prompt + lengths[flag] > positions:
            notes.append(
                f"{flag}: prompts of up to {prompt} tokens and responses of up to {lengths[flag]} do not fit the "
                f"{positions} positions of the model: they are cut there and count as truncated"
            )
    return notes


def _longest_prompt(parts: Parts, records: Sequence[PromptRecord]) -> int:
    prompt = max((len(record.prompt_tokens) for record in records), default=0)
    return min(prompt, parts.options.rollout.rollout_max_prompt_len or prompt)


def _longest_sample(parts: Parts) -> int:
    """The most tokens of a prompt, as the teacher sees it, and its response."""
    records: Sequence[PromptRecord] = parts.prompts.records if parts.prompts is not None else []
    seen = max(
        (len(record.teacher_prompt_tokens) for record in records if record.teacher_prompt_tokens is not None), default=0
    )
    return max(seen, _longest_prompt(parts, records)) + parts.options.training_response_len
