"""The parts of a run, built from its options in the order in which they need each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
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
from opd_megatron.data.privileged import extra_keys, with_teacher_prompts
from opd_megatron.data.prompts import PromptRecord, PromptSet, load_prompt_records
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.flow import RolloutFlow, StudentIdsTeacher, policy_of, stages_of
from opd_megatron.flow.feedback import feedback_prompts
from opd_megatron.flow.target_models import combination, compares_distributions, megatron_teacher
from opd_megatron.flow.teacher_answers import megatron_voice, server_answer
from opd_megatron.flow.weighting import OpdWeighting, check_pass_rates
from opd_megatron.megatron import cpu
from opd_megatron.megatron.checkpoint import write_hf_folder
from opd_megatron.megatron.frozen import frozen_models
from opd_megatron.megatron.trainer import TrainerSpec
from opd_megatron.objectives.advantages import chosen_estimator
from opd_megatron.objectives.policy_loss import chosen_policy_loss
from opd_megatron.questions import LogProbs, TopIds
from opd_megatron.reward import RewardFunction, build_reward
from opd_megatron.rollout.engine import RolloutEngine
from opd_megatron.rollout.generate import RolloutGenerator
from opd_megatron.rollout.given import GivenResponses
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.rollout.sft import check_sft_lengths
from opd_megatron.rollout.sglang_build import sglang_engine
from opd_megatron.rollout.sglang_engine import SGLangEngine
from opd_megatron.teacher.connect import connect_server, connect_teachers
from opd_megatron.teacher.megatron import MegatronTeacher
from opd_megatron.teacher.own_engine import EngineTeacher
from opd_megatron.teacher.preflight import text_samples
from opd_megatron.teacher.routing import RoutedTeachers
from opd_megatron.teacher.sglang import SGLangTeacher

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

    def sync_engine(self, version: str) -> None:
        """Give the engine the student's weights unless it has this version already."""
        if self.engine is not None and self.engine.weight_version != version:
            self.engine.update_weights(self.trainer.export_weights(), version)


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
        GivenResponses(options, tokenizer).check(records, student_architecture(options).max_position_embeddings)
        if options.opd.use_opd:
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
            voice = megatron_voice(options, trainer, tokenizer)
            if voice is not None:
                stack.callback(voice.close)
            generator = RolloutGenerator(engine, tokenizer, options, voice)
            feedback = feedback_prompts(options, tokenizer)
            answer = server_answer(options, teacher, tokenizer, generator.sampling)
            flow = RolloutFlow(stages_of(options, generator, prompts, reward, teacher, feedback, answer))
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
    return trainer.ask(LogProbs("student", temperature=temperature), text_samples([tokens]))[0]


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
    question = TopIds(opd.opd_top_k or 1)
    return StudentIdsTeacher(servers, lambda samples: trainer.ask(question, samples), policy_of(options))
