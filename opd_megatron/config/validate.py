"""The order in which options are judged, so that a user meets the plainest fault first."""

from __future__ import annotations

from opd_megatron.config.errors import refuse
from opd_megatron.config.options import Options
from opd_megatron.config.validate_functions import function_faults
from opd_megatron.config.validate_opd import opd_faults
from opd_megatron.config.validate_paths import PromptCheck, path_faults
from opd_megatron.config.validate_run import run_faults


def validate(options: Options, check_prompts: PromptCheck | None = None) -> None:
    """Raise :class:`UserError` with all faults of the first stage that has any.

    The stages after parsing: distillation options, paths, everything else, options that are missing, and functions of
    the user's own. Nothing is created. ``check_prompts`` reads prompt files; without it they are not looked at.
    """
    refuse(opd_faults(options))
    refuse(path_faults(options, check_prompts))
    refuse(run_faults(options))
    refuse(missing_faults(options))
    refuse(list(function_faults(options)))


def missing_faults(options: Options) -> list[str]:
    """Every required option that was not given."""
    recorded = options.rollout.load_debug_rollout_data is not None
    rewarded = not recorded and options.objective.loss_type != "sft_loss"
    faults = []
    if options.checkpoint.hf_checkpoint is None:
        faults.append("--hf-checkpoint is missing: name the folder of the student's config and tokenizer")
    if options.data.prompt_data is None and not recorded:
        faults.append("--prompt-data is missing: name a JSONL or Parquet file")
    if options.rollout.rollout_batch_size is None:
        faults.append("--rollout-batch-size is missing: give the number of prompts per rollout")
    if options.data.num_rollout is None and options.data.num_epoch is None:
        faults.append("--num-rollout or --num-epoch is missing: give the length of the run")
    if options.run.run_dir is None:
        faults.append("--run-dir is missing: name the folder for everything the run writes")
    if rewarded and not options.has_training_reward:
        faults.append("--rm-type or --custom-rm-path is missing: name the reward (zero: no task reward)")
    evaluated = options.has_training_reward or options.evaluation.eval_rm_type is not None
    if options.evaluation.eval_prompt_data and not evaluated and not rewarded:
        faults.append("--eval-rm-type is missing: the evaluation needs a reward")
    return faults
