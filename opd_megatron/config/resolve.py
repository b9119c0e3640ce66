"""What follows from the options and the folders they name: models, starting weights, lengths of the schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opd_megatron.config.architecture import (
    ModelArchitecture,
    architecture_from_hf,
    differences,
    disagreements,
    read_hf_config,
)
from opd_megatron.config.checkpoint_paths import inspect_checkpoint, resolve_step
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import OpdOptions, Options, ParallelOptions


@dataclass(frozen=True)
class StartingPoint:
    """Where the student's first weights come from.

    ``folder`` is the Hugging Face or step folder to read; with ``random`` there are no weights and it has the config.
    ``load`` is a resume if the folder holds a trainer's state.
    """

    source: Literal["load", "ref_load", "hf_checkpoint", "random"]
    folder: Path


def starting_point(options: Options) -> StartingPoint:
    """``--load`` if it holds a checkpoint; else ``--ref-load``; else the weights in ``--hf-checkpoint``; else random.

    Raises :class:`UserError` if the folder that is chosen is damaged.
    """
    paths = options.checkpoint
    if paths.load is not None and holds_checkpoint(paths.load):
        return StartingPoint("load", resolve_step(paths.load, paths.ckpt_step))
    if paths.ref_load is not None:
        return StartingPoint("ref_load", resolve_step(paths.ref_load))
    folder = _hf_checkpoint(options)
    info = inspect_checkpoint(folder)
    if info.problem:
        raise UserError(f"{folder}: {info.problem}")
    return StartingPoint("hf_checkpoint" if info.kind == "hf" else "random", folder)


def holds_checkpoint(folder: str | Path) -> bool:
    """Whether ``--load`` means a resume: it has a checkpoint, be it a damaged one, which must not be passed over."""
    info = inspect_checkpoint(folder)
    return info.kind in ("hf", "torch_dist") or info.problem is not None


def needs_old_log_probs(options: Options) -> bool:
    """Whether the student's log-probabilities are computed before the first optimizer step of a rollout.

    With one step they are those of the step's own forward pass, unless something is made of them before it.
    """
    discounted = options.opd.use_opd and options.opd.opd_kl_discount > 0
    return options.steps_per_rollout > 1 or options.objective.kl_coef > 0 or discounted or selects_tokens(options.opd)


def selects_tokens(opd: OpdOptions) -> bool:
    """Whether the student says before the step how much there is to learn at each token."""
    return opd.use_opd and opd.opd_token_select != "all"


def selects_by_divergence(opd: OpdOptions) -> bool:
    """Whether the choice of tokens compares the student's distributions with the teacher's."""
    return selects_tokens(opd) and opd.opd_token_score != "entropy"


def learns_from_chosen_tokens(options: Options) -> bool:
    """Whether nothing but the distillation term of the chosen tokens is in the loss: the others need no gradient.

    Not where the ratio of a whole response, which all its tokens make, decides about the chosen ones.
    """
    objective = options.objective
    task = estimates_advantages(options)
    other = objective.use_kl_loss or objective.entropy_coef > 0 or objective.custom_loss_path is not None
    of_responses = (objective.policy_loss == "gspo" or objective.use_opsm) and options.steps_per_rollout > 1
    return selects_tokens(options.opd) and not (task or other or of_responses)


def measures_exact_kl(opd: OpdOptions, rollout_id: int) -> bool:
    """Whether ``--opd-exact-kl-interval`` names rollout ``rollout_id`` (from 0)."""
    return opd.opd_exact_kl_interval > 0 and rollout_id % opd.opd_exact_kl_interval == 0


def measures_diagnostics(opd: OpdOptions, rollout_id: int) -> bool:
    """Whether ``--opd-diagnostics-interval`` names rollout ``rollout_id`` (from 0)."""
    return opd.opd_diagnostics_interval > 0 and rollout_id % opd.opd_diagnostics_interval == 0


def measures_gradients(opd: OpdOptions, rollout_id: int) -> bool:
    """Whether ``--opd-gradient-diagnostics-interval`` names rollout ``rollout_id`` (from 0)."""
    interval = opd.opd_gradient_diagnostics_interval
    return interval > 0 and rollout_id % interval == 0


def needs_teacher_hidden(options: Options) -> bool:
    """Whether every rollout is trained with the hidden states of a Megatron teacher."""
    opd = options.opd
    compared = opd.opd_baseline != "none" or opd.opd_loss == "distribution" or selects_by_divergence(opd)
    return has_megatron_teacher(options) and compared


def has_advantages(options: Options) -> bool:
    """Whether the policy loss has something to weigh: a task advantage, or a distillation term that is one."""
    objective, opd = options.objective, options.opd
    own = objective.custom_loss_path is not None or objective.loss_type != "policy_loss"
    tasked = own or estimates_advantages(options)
    return tasked or not opd.use_opd or (opd.opd_loss == "sampled" and not opd.opd_importance)


def learns_from_samples(options: Options) -> bool:
    """Whether policy loss or distillation is a mean over sampled tokens, which importance weights can correct."""
    return has_advantages(options) or options.opd.opd_loss == "kl_loss" or options.opd.opd_importance


def sampled_tokens_learn(options: Options) -> bool:
    """Whether the loss has a gradient through the log-probabilities of the sampled tokens, or through the entropy.

    Pure distillation by whole distributions has none: its task advantages are 0.
    """
    objective = options.objective
    regularised = objective.use_kl_loss or objective.entropy_coef > 0
    return learns_from_samples(options) or regularised or learns_given_tokens(options)


def learns_given_tokens(options: Options) -> bool:
    """Whether responses that the student did not make teach by their tokens, not by distributions at their prefixes."""
    opd = options.opd
    compared = (opd.opd_data_loss or opd.opd_loss) == "distribution"
    return opd.use_opd and not compared


def needs_student_ids(options: Options) -> bool:
    """Whether a teacher behind servers is asked about the tokens that the student finds likeliest.

    The trainer names those when the whole rollout is there.
    """
    opd = options.opd
    recorded = options.rollout.load_debug_rollout_data is not None
    of_student = opd.opd_loss == "distribution" and opd.opd_support == "student_topk"
    return opd.use_opd and opd.opd_type == "sglang" and of_student and not recorded


def reference_folder(options: Options) -> Path | None:
    """Weights of the reference model for ``--kl-coef`` and ``--use-kl-loss``; None if there are none.

    They stay those of ``--ref-load``, or else of ``--hf-checkpoint``, when the student resumes from ``--load``.
    """
    if options.checkpoint.ref_load is not None:
        return resolve_step(options.checkpoint.ref_load)
    folder = _hf_checkpoint(options)
    return folder if inspect_checkpoint(folder).kind == "hf" else None


def needs_reference(options: Options) -> bool:
    """Whether the objective contains a KL to the reference."""
    return options.objective.use_kl_loss or options.objective.kl_coef > 0


def student_architecture(options: Options) -> ModelArchitecture:
    """The model of ``--hf-checkpoint``; raises :class:`UserError` naming every MODEL_ARGS option that disagrees."""
    folder = _hf_checkpoint(options)
    architecture = architecture_from_hf(read_hf_config(folder), source=f"--hf-checkpoint {folder}")
    found = disagreements(options.given, options.model, architecture)
    if found:
        raise UserError(f"MODEL_ARGS disagree with --hf-checkpoint {folder}: {', '.join(found)}")
    if options.model.init_method_std is not None:
        architecture = dataclasses.replace(architecture, init_method_std=options.model.init_method_std)
    return architecture


def has_megatron_teacher(options: Options) -> bool:
    """Whether the trainer loads a teacher: recorded rollouts come with its scores."""
    recorded = options.rollout.load_debug_rollout_data is not None
    return options.opd.use_opd and options.opd.opd_type == "megatron" and not recorded


def has_reward(options: Options) -> bool:
    """Whether samples have a task reward: ``--rm-type zero`` is none, but a recording has its own."""
    return options.reward.rm_type != "zero" or options.rollout.load_debug_rollout_data is not None


def has_task(options: Options) -> bool:
    """Whether a task reward takes part in what is learned.

    An estimator of the user's own may make advantages of anything.
    """
    objective = options.objective
    if objective.custom_advantage_path is not None:
        return True
    return objective.advantage_estimator != "none" and has_reward(options)


def estimates_advantages(options: Options) -> bool:
    """Whether anything but distillation makes advantages: a task, or the KL to a reference as a reward."""
    return has_task(options) or options.objective.kl_coef > 0


def teacher_answers(options: Options) -> bool:
    """Whether the teacher samples responses in the place of some of the student's."""
    opd, recorded = options.opd, options.rollout.load_debug_rollout_data is not None
    return opd.use_opd and opd.opd_student_data_fraction < 1.0 and opd.opd_data_source == "teacher" and not recorded


def is_self_taught(options: Options) -> bool:
    """Whether the student is its own teacher."""
    return options.opd.use_opd and options.opd.opd_teacher == "self"


def hears_feedback(options: Options) -> bool:
    """Whether what the student sees as its own teacher is known only when a sample has its reward."""
    return is_self_taught(options) and options.opd.opd_self_feedback


def teacher_folder(options: Options) -> str | None:
    """``--opd-teacher-load`` where it has an effect; None for a student that is its own teacher."""
    return options.opd.opd_teacher_load if has_megatron_teacher(options) else None


def knows_teacher(options: Options) -> bool:
    """Whether the trainer has a teacher whose architecture is known: in a folder, or the student's."""
    return teacher_folder(options) is not None or (has_megatron_teacher(options) and is_self_taught(options))


def teaches_itself_now(options: Options) -> bool:
    """Whether the trainer's teacher is the student with its current weights, of which there is no copy."""
    return has_megatron_teacher(options) and is_self_taught(options) and options.opd.opd_self_weights == "current"


def teaches_itself_by_average(options: Options) -> bool:
    """Whether the trainer's teacher is a moving average of the student."""
    return has_megatron_teacher(options) and is_self_taught(options) and options.opd.opd_self_weights == "ema"


def teacher_architecture(options: Options) -> ModelArchitecture:
    """The model of ``--opd-teacher-load``, which has nothing to do with MODEL_ARGS, or the student's own."""
    if is_self_taught(options):
        return student_architecture(options)
    if options.opd.opd_teacher_load is None:
        raise UserError("--opd-teacher-load is missing")
    return checkpoint_architecture(options.opd.opd_teacher_load, "--opd-teacher-load")


def has_own_layout(options: Options) -> bool:
    """Whether the teacher is spread over the ranks otherwise than the student: the sizes decide, named or not."""
    return _sizes(_teacher_sizes(options)) != _sizes(options.parallel)


def teacher_parallel(options: Options, teacher: ModelArchitecture) -> ParallelOptions:
    """The layout of a Megatron teacher on the ranks of the run; it is never recomputed."""
    parallel, is_mixture = _teacher_sizes(options), teacher.mixture is not None
    return dataclasses.replace(
        parallel,
        sequence_parallel=parallel.tensor_model_parallel_size > 1 and (parallel.sequence_parallel or is_mixture),
        expert_model_parallel_size=parallel.expert_model_parallel_size if is_mixture else 1,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size if is_mixture else None,
        num_layers_per_virtual_pipeline_stage=None,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
    )


def _teacher_sizes(options: Options) -> ParallelOptions:
    """The student's layout with the sizes that ``--opd-teacher-*`` name; the experts' are for a mixture alone."""
    own, student = options.opd, options.parallel
    experts = own.opd_teacher_expert_model_parallel_size or student.expert_model_parallel_size
    # Experts that are not spread are split as the rest of the model is.
    inherited = student.expert_tensor_parallel_size if experts > 1 else None
    return dataclasses.replace(
        student,
        tensor_model_parallel_size=own.opd_teacher_tensor_model_parallel_size or student.tensor_model_parallel_size,
        pipeline_model_parallel_size=(
            own.opd_teacher_pipeline_model_parallel_size or student.pipeline_model_parallel_size
        ),
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=own.opd_teacher_expert_tensor_parallel_size or inherited,
    )


def _sizes(parallel: ParallelOptions) -> tuple[int, ...]:
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_size,
    )


def checkpoint_architecture(folder: str | Path, flag: str) -> ModelArchitecture:
    """The model in a checkpoint folder of either kind, from the config that it carries."""
    info = inspect_checkpoint(folder)
    if info.hf_folder is None:
        raise UserError(
            f"{flag} {folder} carries no config (hf/config.json): put the model's there or convert it anew with "
            "tools/convert_hf_to_torch_dist.py"
        )
    return architecture_from_hf(read_hf_config(info.hf_folder), source=f"{flag} {info.hf_folder}")


def weight_differences(options: Options, student: ModelArchitecture) -> list[str]:
    """Faults of ``--load`` and ``--ref-load`` folders that hold another model than the student's."""
    faults = []
    for flag, folder in (("--load", options.checkpoint.load), ("--ref-load", options.checkpoint.ref_load)):
        if folder is None or inspect_checkpoint(folder).hf_folder is None:
            continue
        found = differences(checkpoint_architecture(folder, flag), student)
        if found:
            faults.append(f"{flag} {folder} is another model than --hf-checkpoint: {', '.join(found)}")
    return faults


def optimizer_kind(options: Options) -> dict[str, str | int | bool]:
    """The options that decide what an optimizer keeps for each parameter; a resumed run must have the same."""
    return {"--optimizer": options.optimizer.optimizer, "--bf16": options.optimizer.bf16}


def check_optimizer_kind(options: Options, saved: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` if a checkpoint's optimizer kept other things than that of this run does."""
    wanted = optimizer_kind(options)
    changed = [
        f"{name} {saved[name]} (now {wanted[name]})" for name in wanted if name in saved and saved[name] != wanted[name]
    ]
    if changed:
        raise UserError(
            f"--load {options.checkpoint.load}: its optimizer was saved with {', '.join(changed)}: resume with the "
            "same, or with a new optimizer by --no-load-optim"
        )


def schedule_steps(options: Options, num_rollouts: int) -> tuple[int, int]:
    """(decay, warm-up) of the learning rate in optimizer steps for a run of ``num_rollouts``.

    The rollouts of ``--num-critic-only-steps`` have none of these steps. Raises :class:`UserError` if the
    warm-up does not end before the decay does.
    """
    settings = options.optimizer
    rollouts = max(1, num_rollouts - options.objective.num_critic_only_steps)
    decay = settings.lr_decay_iters or rollouts * options.steps_per_rollout
    warmup = settings.lr_warmup_iters
    if settings.lr_warmup_fraction is not None:
        warmup = int(settings.lr_warmup_fraction * decay)
    if warmup >= decay:
        raise UserError(
            f"--lr-warmup-iters {warmup} must be shorter than the decay of {decay} optimizer steps "
            "(--lr-decay-iters, or else the whole run)"
        )
    return decay, warmup


def _hf_checkpoint(options: Options) -> Path:
    if options.checkpoint.hf_checkpoint is None:
        raise UserError("--hf-checkpoint is missing: name the folder of the student's config and tokenizer")
    return Path(options.checkpoint.hf_checkpoint)
