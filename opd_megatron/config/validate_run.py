"""Everything else: sizes that must divide, layouts that must fit, options that contradict one another."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.errors import UserError
from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import (
    has_megatron_teacher,
    has_own_layout,
    schedule_steps,
    student_architecture,
    teacher_architecture,
    teacher_folder,
    teacher_parallel,
    weight_differences,
)
from opd_megatron.config.targets import loads_reference, named_architectures
from opd_megatron.config.validate_critic import critic_faults
from opd_megatron.config.validate_engine import engine_faults
from opd_megatron.config.validate_moe import (
    SizeName,
    expert_layout_faults,
    expert_model_faults,
    expert_option_faults,
    plain_size,
)
from opd_megatron.config.validate_objective import objective_faults
from opd_megatron.config.validate_paths import ROLLOUT_ID
from opd_megatron.config.validate_self import self_teacher_weight_faults


def run_faults(options: Options) -> list[str]:
    """Every fault of the run as a whole. Options that are still missing are not judged."""
    return [
        *_batch_faults(options),
        *layout_faults(options),
        *_model_faults(options),
        *_recompute_faults(options),
        *_offload_faults(options),
        *objective_faults(options),
        *self_teacher_weight_faults(options),
        *critic_faults(options),
        *_schedule_faults(options),
        *_data_faults(options),
        *engine_faults(options),
        *_checkpoint_faults(options),
        *_filter_faults(options),
        *_reward_and_evaluation_faults(options),
        *_logging_faults(options),
    ]


def _batch_faults(options: Options) -> Iterator[str]:
    rollout, training = options.rollout, options.training
    if rollout.rollout_batch_size is None:
        if training.global_batch_size is None:
            return
        samples = f"--global-batch-size {training.global_batch_size}"
    else:
        samples = (
            f"--rollout-batch-size {rollout.rollout_batch_size} x --n-samples-per-prompt {rollout.n_samples_per_prompt}"
        )
        if options.samples_per_rollout % options.global_batch_size:
            yield (
                f"--global-batch-size {options.global_batch_size} does not divide the {options.samples_per_rollout} "
                f"samples of a rollout ({samples}): change one of them"
            )
        if training.global_batch_size is not None:
            samples = f"--global-batch-size {training.global_batch_size}"
    if training.use_dynamic_batch_size:
        if training.max_tokens_per_gpu is None:
            yield "--use-dynamic-batch-size needs --max-tokens-per-gpu"
        if "micro_batch_size" in options.given:
            yield "--micro-batch-size has no effect with --use-dynamic-batch-size: leave out one of them"
        if options.parallel.qkv_format == "bshd":
            yield "--use-dynamic-batch-size counts packed tokens: leave out --qkv-format bshd"
        return
    if training.max_tokens_per_gpu is not None:
        yield "--max-tokens-per-gpu has no effect without --use-dynamic-batch-size: add it"
    if options.world_size % options.model_parallel_size:
        return
    forward = training.micro_batch_size * options.data_parallel_size
    if options.global_batch_size % forward:
        yield (
            f"--micro-batch-size {training.micro_batch_size} x {options.data_parallel_size} data-parallel ranks does "
            f"not divide the {options.global_batch_size} samples of an optimizer step ({samples}): "
            f"choose a multiple of {forward}"
        )


def layout_faults(options: Options) -> Iterator[str]:
    """What of the layout does not go with the number of ranks or with itself, whatever the model."""
    parallel = options.parallel
    if options.world_size % options.model_parallel_size:
        yield (
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} x --context-parallel-size {parallel.context_parallel_size} does "
            f"not divide the {options.world_size} ranks of --actor-num-nodes {options.cluster.actor_num_nodes} x "
            f"--actor-num-gpus-per-node {options.cluster.actor_num_gpus_per_node}"
        )
    if parallel.num_layers_per_virtual_pipeline_stage is not None and parallel.pipeline_model_parallel_size == 1:
        yield "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1: leave it out"
    if parallel.num_layers_per_virtual_pipeline_stage is not None and parallel.qkv_format == "bshd":
        yield "--num-layers-per-virtual-pipeline-stage needs packed sequences: leave out --qkv-format bshd"
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size above 1: leave it out"
    if parallel.context_parallel_size > 1 and parallel.qkv_format == "bshd":
        yield "--context-parallel-size splits packed sequences: leave out --qkv-format bshd"
    yield from expert_layout_faults(options.parallel, options.world_size)


def _teacher_size(options: Options) -> SizeName:
    """The teacher's flag, with the remark that its value is inherited where it is."""

    def named(name: str, value: int) -> str:
        is_own = getattr(options.opd, f"opd_teacher_{name.replace('-', '_')}") is not None
        return f"--opd-teacher-{name} {value}" + ("" if is_own else " (as of the student)")

    return named


def _model_faults(options: Options) -> Iterator[str]:
    models: list[ModelArchitecture] = []
    if options.checkpoint.hf_checkpoint is not None:
        try:
            student = student_architecture(options)
            models.append(student)
            yield from layout_faults_of_model(options, student)
            yield from expert_option_faults(options, student)
            yield from _virtual_stage_faults(options, student)
            yield from weight_differences(options, student)
        except UserError as error:
            yield str(error)
    if teacher_folder(options) is not None:
        try:
            models.append(teacher_architecture(options))
            yield from _teacher_layout_faults(options, models[-1])
        except UserError as error:
            yield str(error)
    try:
        further = list(named_architectures(options).values())
        models += further
        yield from (fault for model in further for fault in _teacher_layout_faults(options, model))
    except UserError as error:
        yield str(error)
    spread = options.parallel.expert_model_parallel_size > 1 or options.parallel.expert_tensor_parallel_size is not None
    if models and spread and not any(model.mixture for model in models):
        flags = "--expert-model-parallel-size and --expert-tensor-parallel-size"
        yield f"{flags} are for a mixture of experts, which no model of this run is: leave them out"


def _teacher_layout_faults(options: Options, teacher: ModelArchitecture) -> Iterator[str]:
    parallel, named = teacher_parallel(options, teacher), _teacher_size(options)
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if has_own_layout(options):
        if options.world_size % (tensor * pipeline * parallel.context_parallel_size):
            yield (
                f"{named('tensor-model-parallel-size', tensor)} x {named('pipeline-model-parallel-size', pipeline)} x "
                f"--context-parallel-size {parallel.context_parallel_size} does not divide the {options.world_size} "
                "ranks of the trainer, which the teacher shares"
            )
        if teacher.mixture is not None:
            yield from expert_layout_faults(parallel, options.world_size, named)
    if teacher.mixture is None:
        for name in ("opd_teacher_expert_model_parallel_size", "opd_teacher_expert_tensor_parallel_size"):
            if getattr(options.opd, name) is not None:
                flag = flag_of(name)
                yield f"{flag} is for a mixture of experts, which the teacher is not: leave it out"
    own = dataclasses.replace(options, parallel=parallel)
    yield from layout_faults_of_model(own, teacher, "teacher", named)


def _virtual_stage_faults(options: Options, student: ModelArchitecture) -> Iterator[str]:
    layers = options.parallel.num_layers_per_virtual_pipeline_stage
    of_rank = student.num_layers // options.parallel.pipeline_model_parallel_size
    if layers is not None and (of_rank % layers or of_rank == layers):
        yield (
            f"--num-layers-per-virtual-pipeline-stage {layers} must divide the {of_rank} layers of a pipeline rank "
            "into two or more virtual stages"
        )


def layout_faults_of_model(
    options: Options, model: ModelArchitecture, owner: str = "model", named: SizeName = plain_size
) -> list[str]:
    """What of ``model`` cannot be split by the sizes of the layout; ``owner`` and ``named`` are for messages."""
    tensor, pipeline = (
        options.parallel.tensor_model_parallel_size,
        options.parallel.pipeline_model_parallel_size,
    )
    parts = (
        ("attention heads", model.num_attention_heads),
        ("query groups", model.num_query_groups),
        *([("feed-forward channels", model.ffn_hidden_size)] if model.dense_layers else []),
    )
    faults = [
        f"{named('tensor-model-parallel-size', tensor)} does not divide the {owner}'s {count} {what}"
        for what, count in parts
        if count % tensor
    ]
    if model.num_layers % pipeline:
        size = named("pipeline-model-parallel-size", pipeline)
        faults.append(f"{size} does not divide the {owner}'s {model.num_layers} layers")
    return [*faults, *expert_model_faults(options.parallel, model, owner, named)]


def _recompute_faults(options: Options) -> Iterator[str]:
    """The rules of Megatron's TransformerConfig."""
    parallel = options.parallel
    details = {
        "--recompute-method": parallel.recompute_method,
        "--recompute-num-layers": parallel.recompute_num_layers,
    }
    given = [flag for flag, value in details.items() if value is not None]
    if parallel.recompute_granularity == "full":
        for flag in (flag for flag, value in details.items() if value is None):
            yield f"--recompute-granularity full needs {flag}"
    elif given:
        yield f"{' and '.join(given)} need --recompute-granularity full"


def _offload_faults(options: Options) -> Iterator[str]:
    offload = options.offload
    if offload.offload_teacher and not has_megatron_teacher(options) and not loads_reference(options):
        yield "--offload-teacher has no effect: there is neither a Megatron teacher nor a reference: leave it out"
    if offload.offload_dir is not None and not (
        offload.offload_teacher or offload.offload_optimizer or offload.offload_train
    ):
        yield "--offload-dir has nothing to hold: add --offload-teacher, --offload-optimizer or --offload-train"


def _schedule_faults(options: Options) -> Iterator[str]:
    settings = options.optimizer
    if settings.min_lr > settings.lr:
        yield f"--min-lr {settings.min_lr:g} is above --lr {settings.lr:g}"
    if settings.lr_warmup_init > settings.lr:
        yield f"--lr-warmup-init {settings.lr_warmup_init:g} is above --lr {settings.lr:g}"
    if settings.lr_warmup_fraction is not None and settings.lr_warmup_iters:
        yield "--lr-warmup-fraction and --lr-warmup-iters say the same thing: leave out one of them"
    if settings.accumulate_allreduce_grads_in_fp32 and not settings.bf16:
        yield "--accumulate-allreduce-grads-in-fp32 has no effect without --bf16, where gradients are in float32 anyway"
    if settings.overlap_param_gather and not (settings.use_distributed_optimizer and settings.overlap_grad_reduce):
        yield "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce: add them"
    if settings.use_distributed_optimizer and settings.optimizer != "adam":
        yield f"--use-distributed-optimizer does not go with --optimizer {settings.optimizer}: use adam"
    length = options.data.num_rollout
    if options.rollout.rollout_batch_size is not None and length is not None and options.steps_per_rollout:
        try:
            schedule_steps(options, length)
        except UserError as error:
            yield str(error)


def _data_faults(options: Options) -> Iterator[str]:
    data, rollout = options.data, options.rollout
    if data.num_rollout is not None and data.num_epoch is not None:
        yield "--num-rollout and --num-epoch both set the length of the run: leave out one of them"
    if data.num_epoch is not None and data.prompt_data is None and rollout.load_debug_rollout_data is not None:
        yield "--num-epoch counts passes over --prompt-data: with --load-debug-rollout-data use --num-rollout"
    if "apply_chat_template_kwargs" in options.given and not data.apply_chat_template:
        yield "--apply-chat-template-kwargs has no effect without --apply-chat-template: add it"
    pattern = rollout.save_debug_rollout_data
    if pattern is not None and ROLLOUT_ID not in pattern and data.num_rollout != 1:
        yield f"--save-debug-rollout-data {pattern} would keep the last rollout only: put {ROLLOUT_ID} into the name"


def _filter_faults(options: Options) -> Iterator[str]:
    rollout = options.rollout
    flag = "--dynamic-filter-path" if rollout.dynamic_filter_path is not None else "--dynamic-filter"
    if rollout.dynamic_filter_path is not None and rollout.dynamic_filter != "none":
        yield "--dynamic-filter and --dynamic-filter-path both name a filter: leave out one of them"
    elif rollout.dynamic_filter_path is None and rollout.dynamic_filter == "none":
        if "dynamic_filter_max_refills" in options.given:
            yield "--dynamic-filter-max-refills has no effect without a filter: name one with --dynamic-filter"
        return
    if options.objective.loss_type == "sft_loss" or rollout.load_debug_rollout_data is not None:
        yield f"{flag} judges samples of the student, which this run does not make: leave it out"
    if rollout.dynamic_filter == "unequal_rewards" and rollout.n_samples_per_prompt == 1:
        yield "--dynamic-filter unequal_rewards compares samples of a prompt: raise --n-samples-per-prompt"
    if rollout.dynamic_filter == "unequal_rewards" and options.reward.rm_type == "zero":
        yield "--dynamic-filter unequal_rewards would drop everything with --rm-type zero: leave it out"


def _checkpoint_faults(options: Options) -> Iterator[str]:
    paths = options.checkpoint
    if paths.load is None:
        if paths.ckpt_step is not None:
            yield "--ckpt-step is a step of --load: name its folder"
        for name in ("finetune", "no_load_optim", "no_load_rng"):
            if getattr(paths, name):
                yield f"{flag_of(name)} says how --load is read: name its folder"
    if paths.finetune and (paths.no_load_optim or paths.no_load_rng):
        yield "--finetune loads weights alone: leave out --no-load-optim and --no-load-rng"
    if paths.save_retain_interval is not None and (
        paths.save_interval is None or paths.save_retain_interval % paths.save_interval
    ):
        yield f"--save-retain-interval {paths.save_retain_interval} must be a multiple of --save-interval"


def _reward_and_evaluation_faults(options: Options) -> Iterator[str]:
    reward, evaluation = options.reward, options.evaluation
    if reward.rm_type is not None and reward.custom_rm_path is not None:
        yield "--rm-type and --custom-rm-path both name the reward: leave out one of them"
    if "rm_error_value" in options.given and reward.rm_on_error != "value":
        yield "--rm-error-value has no effect without --rm-on-error value: add it"
    if evaluation.eval_interval is not None and not evaluation.eval_prompt_data:
        yield "--eval-interval has nothing to evaluate: give --eval-prompt-data NAME PATH"
    if not evaluation.eval_prompt_data:
        for name in ("eval_input_key", "eval_label_key", "eval_rm_type"):
            if name in options.given:
                yield f"{flag_of(name)} has nothing to evaluate: give --eval-prompt-data NAME PATH"
    if (evaluation.stop_eval_metric is None) != (evaluation.stop_eval_value is None):
        yield "--stop-eval-metric and --stop-eval-value go together: give both or neither"
    names = [name for name, _ in evaluation.eval_prompt_data]
    measured = [f"eval/{name}/{metric}" for name in names for metric in _evaluation_metrics(options)]
    if evaluation.stop_eval_metric is not None and evaluation.stop_eval_metric not in measured:
        known = ", ".join(measured) or "none without --eval-prompt-data"
        yield f"--stop-eval-metric {evaluation.stop_eval_metric} is not measured (there are {known})"
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"--eval-prompt-data {name} is given twice: give each set a name of its own"
    if evaluation.eval_prompt_data and options.rollout.load_debug_rollout_data is not None:
        yield "--eval-prompt-data needs the rollout engine, which --load-debug-rollout-data leaves out"


def _evaluation_metrics(options: Options) -> list[str]:
    """Metrics of an evaluation set that a run can wait for."""
    powers = range(options.evaluation.n_samples_per_eval_prompt.bit_length())
    return [*(f"pass@{2**power}" for power in powers), "reward_mean", "response_length_mean", "truncated_frac"]


def _logging_faults(options: Options) -> Iterator[str]:
    if options.run.use_wandb:
        found = importlib.util.find_spec("wandb")
        # A folder named wandb, which W&B leaves where it ran, is found as a package without an origin.
        if found is None or found.origin is None:
            yield "--use-wandb: the package wandb is not installed: pip install wandb, or leave the flag out"
        elif not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
            yield "--use-wandb: W&B needs its key in WANDB_API_KEY (or WANDB_MODE=offline): set it in the environment"
