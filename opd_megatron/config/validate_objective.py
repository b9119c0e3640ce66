"""Combinations of objective options that contradict one another or have no effect."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import has_advantages, learns_from_samples, reference_folder
from opd_megatron.config.targets import REFERENCE, loads_reference, opd_reference_name

_SWITCHES: dict[str, tuple[str, ...]] = {
    "use_kl_loss": ("kl_loss_coef", "kl_loss_type"),
    "use_tis": ("tis_level", "tis_mode", "tis_clip", "tis_clip_low"),
    "use_opsm": ("opsm_delta",),
}
"""Options that have an effect only with the switch before them."""

_POLICY_ONLY = (
    "use_kl_loss",
    "kl_coef",
    "entropy_coef",
    "advantage_estimator",
    "custom_advantage_path",
    "normalize_advantages",
    "disable_grpo_std_normalization",
    "gamma",
    "policy_loss",
    "custom_loss_path",
    "eps_clip",
    "eps_clip_high",
    "eps_clip_c",
    "ppo_epochs",
    "use_tis",
    "use_opsm",
)
"""Options of the policy loss that change what is trained when they are not at their default."""

_OF_ADVANTAGES = (
    "normalize_advantages",
    "policy_loss",
    "eps_clip",
    "eps_clip_high",
    "eps_clip_c",
    "use_opsm",
)
"""Options that change nothing where every advantage is 0."""


def objective_faults(options: Options) -> Iterator[str]:
    """Every fault of the objective's options among themselves; those of distillation are in ``validate_opd``."""
    objective, given = options.objective, options.given
    for switch, names in _SWITCHES.items():
        if not getattr(objective, switch):
            for name in (name for name in names if name in given):
                yield f"{flag_of(name)} has no effect without {flag_of(switch)}: add it"
    if objective.calculate_per_token_loss and objective.loss_length_divisor is not None:
        yield "--calculate-per-token-loss and --loss-length-divisor are two averages over tokens: leave out one of them"
    if objective.loss_type == "sft_loss":
        unused = [name for name in _POLICY_ONLY if name in given and getattr(objective, name)]
        unused += ["n_samples_per_prompt"] if options.rollout.n_samples_per_prompt > 1 else []
        for name in unused:
            yield f"{flag_of(name)} has no effect with --loss-type sft_loss: leave it out"
        return
    yield from _advantage_faults(options)
    yield from _policy_loss_faults(options)
    if loads_reference(options) and options.checkpoint.hf_checkpoint and reference_folder(options) is None:
        flag = "--use-kl-loss" if objective.use_kl_loss else "--kl-coef"
        if opd_reference_name(options) == REFERENCE:
            flag = "--opd-reward-scale"
        yield f"{flag} needs a reference: give --ref-load, or weights in --hf-checkpoint"


def _advantage_faults(options: Options) -> Iterator[str]:
    objective, given = options.objective, options.given
    if objective.custom_advantage_path is not None:
        if "advantage_estimator" in given:
            yield "--advantage-estimator and --custom-advantage-path both name an estimator: leave out one of them"
        if objective.disable_grpo_std_normalization:
            yield "--disable-grpo-std-normalization belongs to --advantage-estimator grpo: leave it out"
        return
    if "gamma" in given and objective.advantage_estimator not in ("reinforce_plus_plus", "ppo"):
        yield "--gamma belongs to --advantage-estimator reinforce_plus_plus or ppo: leave it out"
    if objective.disable_grpo_std_normalization and objective.advantage_estimator != "grpo":
        yield "--disable-grpo-std-normalization belongs to --advantage-estimator grpo: leave it out"
    if objective.advantage_estimator == "none" and objective.kl_coef > 0:
        yield "--kl-coef is part of the task reward, which --advantage-estimator none ignores: use --use-kl-loss"


def _policy_loss_faults(options: Options) -> Iterator[str]:
    objective, given = options.objective, options.given
    if not has_advantages(options):
        form = "importance" if options.opd.opd_loss == "sampled" else f"loss {options.opd.opd_loss}"
        for name in (name for name in _OF_ADVANTAGES if name in given and getattr(objective, name)):
            yield (f"{flag_of(name)} has no effect: with --opd-{form} and no task reward every advantage is 0")
        if objective.use_tis and not learns_from_samples(options):
            yield (
                f"--use-tis has no effect: with --opd-{form} and no task reward no mean over sampled tokens is in the "
                "loss"
            )
    if objective.use_kl_loss and objective.kl_loss_coef == 0:
        yield "--use-kl-loss has no effect with --kl-loss-coef 0, its default: give a coefficient"
    if objective.custom_loss_path is not None and "policy_loss" in given:
        yield "--policy-loss and --custom-loss-path both name a policy loss: leave out one of them"
    if objective.eps_clip_c is not None and objective.policy_loss == "cispo" and objective.custom_loss_path is None:
        yield "--eps-clip-c bounds a clipped surrogate, which --policy-loss cispo is not: leave it out"
    if objective.tis_clip_low > objective.tis_clip:
        yield f"--tis-clip-low {objective.tis_clip_low:g} is above --tis-clip {objective.tis_clip:g}"
    one_step = options.rollout.rollout_batch_size is not None and options.steps_per_rollout == 1
    if objective.use_opsm and one_step:
        yield (
            "--use-opsm has no effect with one optimizer step per rollout, which leaves no response behind: lower "
            "--global-batch-size, raise --ppo-epochs, or leave it out"
        )
