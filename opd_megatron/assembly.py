"""The parts of a run, built from its options in the order in which they need each other."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_megatron.cluster.group import TrainerGroup, start_trainer_group
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import (
    has_megatron_teacher,
    is_self_taught,
    needs_student_ids,
    starting_point,
    student_architecture,
)
from opd_megatron.config.teachers_file import read_teachers
from opd_megatron.config.validate_opd import idle_opd_options
from opd_megatron.data.privileged import extra_keys, with_teacher_prompts
from opd_megatron.data.prompts import PromptRecord, PromptSet, load_prompt_records, text_of_records
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.flow import RolloutFlow, StudentIdsTeacher, policy_of, stages_of
from opd_megatron.flow.target_models import (
    check_megatron,
    check_references,
    combination,
    compares_distributions,
    megatron_teacher,
)
from opd_megatron.flow.weighting import OpdWeighting, check_pass_rates
from opd_megatron.megatron import cpu
from opd_megatron.megatron.checkpoint import write_hf_folder
from opd_megatron.megatron.frozen import frozen_models
from opd_megatron.megatron.trainer import TrainerSpec
from opd_megatron.objectives.advantages import chosen_estimator
from opd_megatron.objectives.policy_loss import chosen_policy_loss
from opd_megatron.reward import RewardFunction, build_reward
from opd_megatron.rollout.engine import RolloutEngine
from opd_megatron.rollout.generate import RolloutGenerator
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.rollout.sft import check_sft_lengths
from opd_megatron.rollout.sglang_build import sglang_engine
from opd_megatron.rollout.sglang_engine import SGLangEngine
from opd_megatron.teacher.connect import (
    check_prompt_routes,
    connect_server,
    connect_teachers,
    part_of_prompts,
    servers_of,
)
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
from opd_megatron.teacher.routing import RoutedTeachers
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_preflight import preflight_sglang
from opd_megatron.teacher.throughput import RunSizes

logger = logging.getLogger(__name__)

AnyTeacher: TypeAlias = MegatronTeacher | SGLangTeacher | RoutedTeachers | StudentIdsTeacher | EngineTeacher


@dataclass(frozen=True)
class EvaluationSet:
    """A named prompt set that is only evaluated."""

    name: str
    records: list[PromptRecord]


@dataclass(frozen=True)
class Parts:
    """Everything the loop works with; what a run does not need is None."""

    options: Options
    hf_folder: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet | None
    evaluation_sets: list[EvaluationSet]
    num_rollouts: int
    trainer: TrainerGroup
    engine: RolloutEngine | None
    generator: RolloutGenerator | None
    flow: RolloutFlow | None
    reward: RewardFunction | None
    evaluation_reward: RewardFunction | None
    teacher: AnyTeacher | None
    weighting: OpdWeighting
    exact_kl_possible: bool = False
    """Whether the exact KL can be measured: a Megatron teacher with the student's vocabulary."""


@contextmanager
def assemble(options: Options) -> Iterator[Parts]:
    """Build the parts and close them in reverse order; raises ``UserError`` if something on disk does not fit."""
    hf_folder = Path(str(options.checkpoint.hf_checkpoint))
    tokenizer = load_tokenizer(hf_folder)
    replayed = options.rollout.load_debug_rollout_data is not None
    data = options.data
    prompts = None
    if not replayed:
        records = _records(
            options, str(data.prompt_data), tokenizer, data.input_key, data.label_key, extra_keys(options)
        )
        records = with_teacher_prompts(options, records, tokenizer)
        if options.opd.use_opd:
            check_prompt_routes(options, (record.metadata for record in records))
            check_pass_rates(options, (record.metadata for record in records), f"--prompt-data {data.prompt_data}")
        prompts = PromptSet(records, data.rollout_shuffle, options.training.seed)
        if options.objective.loss_type == "sft_loss":
            check_sft_lengths(records, tokenizer, student_architecture(options).max_position_embeddings)
    sets = [
        EvaluationSet(name, _records(options, path, tokenizer, options.eval_input_key, options.eval_label_key))
        for name, path in options.evaluation.eval_prompt_data
    ]
    num_rollouts = _num_rollouts(options, prompts)
    chosen_estimator(options.objective), chosen_policy_loss(options.objective)  # before the models are built
    with ExitStack() as stack:
        reward = build_reward(options.reward) if options.has_training_reward else None
        if reward is not None:
            stack.callback(reward.close)
        evaluation_reward = reward
        if options.evaluation.eval_rm_type is not None:
            named = replace(options.reward, rm_type=options.evaluation.eval_rm_type, custom_rm_path=None)
            evaluation_reward = build_reward(named)
            stack.callback(evaluation_reward.close)
        engine = None
        samples_rollouts = options.objective.loss_type == "policy_loss" and not replayed
        if samples_rollouts or sets:
            engine = _engine(options, hf_folder, tokenizer, lambda tokens: _student_log_probs(trainer, tokens, 1.0))
            stack.callback(engine.close)
        trainer = start_trainer_group(_trainer_spec(options, num_rollouts))
        stack.callback(trainer.close)
        teacher = None if replayed else _teacher(options, trainer, engine)
        if teacher is not None:
            stack.callback(teacher.close)
        generator, flow = None, None
        if samples_rollouts and engine is not None and prompts is not None:
            generator = RolloutGenerator(engine, tokenizer, options)
            flow = RolloutFlow(stages_of(options, generator, prompts, reward, teacher))
            stack.callback(flow.close)
        yield Parts(
            options=options,
            hf_folder=hf_folder,
            tokenizer=tokenizer,
            prompts=prompts,
            evaluation_sets=sets,
            num_rollouts=num_rollouts,
            trainer=trainer,
            engine=engine,
            generator=generator,
            flow=flow,
            reward=reward,
            evaluation_reward=evaluation_reward,
            teacher=teacher,
            weighting=OpdWeighting(options, tokenizer.all_special_ids),
            exact_kl_possible=isinstance(teacher, MegatronTeacher) and compares_distributions(options),
        )


def _records(
    options: Options,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    input_key: str,
    label_key: str | None,
    extra: Sequence[str] = (),
) -> list[PromptRecord]:
    data = options.data
    return load_prompt_records(
        path,
        tokenizer=tokenizer,
        input_key=input_key,
        label_key=label_key,
        metadata_key=data.metadata_key,
        apply_chat_template=data.apply_chat_template,
        chat_template_kwargs=json.loads(data.apply_chat_template_kwargs),
        extra_keys=extra,
    )


def _num_rollouts(options: Options, prompts: PromptSet | None) -> int:
    if options.data.num_rollout is not None:
        return options.data.num_rollout
    if prompts is None or options.data.num_epoch is None or options.rollout.rollout_batch_size is None:
        raise UserError("--num-epoch needs --prompt-data: give --num-rollout with --load-debug-rollout-data")
    return prompts.rollouts_for_epochs(options.data.num_epoch, options.rollout.rollout_batch_size)


def _engine(
    options: Options,
    hf_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    reference: Callable[[np.ndarray], np.ndarray],
) -> RolloutEngine:
    """The engine that was asked for; ``reference`` are the trainer's log-probabilities, by which updates are proved."""
    if options.engine.rollout_engine == "sglang":
        return sglang_engine(
            options,
            hf_folder,
            tokenizer,
            write=partial(write_hf_folder, hf_folder=hf_folder),
            reference=reference,
            on_cpu=cpu.device().type == "cpu",
        )
    return LocalEngine(
        hf_folder,
        tokenizer,
        device=cpu.device(),
        dtype=torch.bfloat16 if options.optimizer.bf16 else torch.float32,
        max_batch_size=options.rollout.rollout_engine_batch_size,
    )


def _student_log_probs(trainer: TrainerGroup, tokens: np.ndarray, temperature: float | None = None) -> np.ndarray:
    """The trainer's log-probabilities of ``tokens[1:]`` at the rollout temperature, or another one."""
    return trainer.score("student", text_samples([tokens]), temperature=temperature)[0]


def _trainer_spec(options: Options, num_rollouts: int) -> TrainerSpec:
    architecture = student_architecture(options)
    start = starting_point(options)
    if start.source == "random":
        logger.warning("%s has no weights: the student starts at random (seed %d)", start.folder, options.training.seed)
    else:
        logger.info("the student starts from %s", start.folder)
    return TrainerSpec(options, architecture, start, num_rollouts, frozen_models(options, architecture))


def _teacher(options: Options, trainer: TrainerGroup, engine: RolloutEngine | None) -> AnyTeacher | None:
    opd = options.opd
    if not opd.use_opd:
        return None
    if has_megatron_teacher(options):
        return megatron_teacher(options, trainer)
    vocab_size = student_architecture(options).vocab_size
    if is_self_taught(options) and opd.opd_self_weights == "current":
        assert isinstance(engine, SGLangEngine)
        key = options.engine.rollout_engine_api_key_env
        return EngineTeacher(
            engine.addresses, lambda urls: connect_server(options, vocab_size, tuple(urls), key, name="self")
        )
    combine = combination(options, len(read_teachers(opd.opd_teachers)[0]) if opd.opd_teachers else 1)
    servers = connect_teachers(options, vocab_size, combine)
    if not needs_student_ids(options):
        return servers
    return StudentIdsTeacher(servers, lambda samples: trainer.top_ids(samples, opd.opd_top_k or 1), policy_of(options))


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
    _first_weights(parts, done)
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
    for finding in _check_teacher(parts):
        if finding.warning:
            notes.append(finding.text)
        else:
            logger.info("teacher, %s: %s", finding.check, finding.text)
    return notes


def _check_teacher(parts: Parts) -> list[Finding]:
    options, teacher = parts.options, parts.teacher
    if teacher is None:
        return check_references(options, Student(parts.tokenizer))
    if isinstance(teacher, EngineTeacher):
        return teacher.preflight(_longest_sample(parts), options.opd.opd_overlong)
    if is_self_taught(options) and isinstance(teacher, MegatronTeacher):
        positions = student_architecture(options).max_position_embeddings
        return check_privileged_length(_longest_sample(parts), positions, options.opd.opd_overlong)
    paths, data = options.checkpoint, options.data
    positions = student_architecture(options).max_position_embeddings
    same_temperature = options.rollout.rollout_temperature == 1.0 or isinstance(teacher, MegatronTeacher)
    records = parts.prompts.records if parts.prompts is not None else []

    def student_log_probs(texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return parts.trainer.score("student", text_samples(texts))

    student = Student(
        parts.tokenizer,
        folders=[folder for folder in (paths.load, paths.ref_load, paths.hf_checkpoint) if folder is not None],
        log_probs=student_log_probs if same_temperature else None,
        texts=text_of_records(records, parts.tokenizer, count=JUDGED_TEXTS, longest=min(JUDGED_TOKENS, positions)),
        chat_template_kwargs=json.loads(data.apply_chat_template_kwargs) if data.apply_chat_template else None,
    )
    if isinstance(teacher, MegatronTeacher):
        return check_megatron(teacher, student) + check_references(options, student)
    prompts = [len(record.prompt_tokens) for record in records]
    sizes = RunSizes(
        samples=options.samples_per_rollout,
        group=options.rollout.n_samples_per_prompt,
        prompt_tokens=int(np.median(prompts)) if prompts else 1,
        response_tokens=options.training_response_len,
        steps=parts.num_rollouts,
    )
    return check_references(options, student) + [
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
