"""Weights of the distillation term: options without an effect, and what they need of the run."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import has_reward

LEAST_GROUP = 4
"""Samples of a prompt from which its pass rate is estimated: with fewer, most estimates are 0 or 1."""

_OF_SELECTION = ("opd_token_score", "opd_token_ratio", "opd_token_floor", "opd_token_min_score")
_OF_PACED = ("opd_paced_alpha", "opd_paced_beta", "opd_pass_rate", "opd_pass_rate_key")


def weight_faults(options: Options) -> list[str]:
    """Every fault of the weights' options; the options have ``--use-opd``."""
    return [*_selection_faults(options), *_paced_faults(options), *_sample_faults(options)]


def _selection_faults(options: Options) -> Iterator[str]:
    opd, given = options.opd, options.given
    if opd.opd_token_select == "all":
        for name in (name for name in _OF_SELECTION if name in given):
            yield f"{flag_of(name)} has no effect with --opd-token-select all: choose top or sample"
        return
    if opd.opd_token_select == "top" and "opd_token_floor" in given:
        yield "--opd-token-floor goes with --opd-token-select sample only"
    if opd.opd_token_select == "sample" and opd.opd_token_min_score is not None:
        yield (
            "--opd-token-min-score is a hard cut-off, which --opd-token-select sample cannot make up for: no weight "
            "brings back a token that is never kept. Leave it out, or choose top"
        )
    if opd.opd_token_select == "top" and opd.opd_token_score != "entropy" and opd.opd_reward_scale != 1.0:
        yield (
            f"--opd-token-score {opd.opd_token_score} is a distance from the teacher, beyond which --opd-reward-scale "
            "goes: it would leave out what is left to learn. Use --opd-token-score entropy, or choose by sample"
        )
    if opd.opd_token_score != "entropy" and not _has_distributions(options):
        yield (
            f"--opd-token-score {opd.opd_token_score} compares whole distributions, of which nothing is known here: "
            "use --opd-token-score entropy, a Megatron teacher, or a server with --opd-loss distribution"
        )


def _has_distributions(options: Options) -> bool:
    """Whether the teacher's distributions are at hand: a Megatron teacher's own, or a server's most probable tokens."""
    if options.opd.opd_type == "megatron":
        return options.rollout.load_debug_rollout_data is None
    return options.opd.opd_loss == "distribution"


def _paced_faults(options: Options) -> Iterator[str]:
    opd, given, copies = options.opd, options.given, options.rollout.n_samples_per_prompt
    if opd.opd_prompt_weight == "none":
        for name in (name for name in _OF_PACED if name in given):
            yield f"{flag_of(name)} has no effect without --opd-prompt-weight paced: add it"
        return
    if opd.opd_paced_alpha == opd.opd_paced_beta == 0:
        yield "--opd-paced-alpha 0 and --opd-paced-beta 0 give every prompt the same weight: leave one at its default"
    if "opd_pass_rate_key" in given and opd.opd_pass_rate != "metadata":
        yield "--opd-pass-rate-key goes with --opd-pass-rate metadata only"
    if opd.opd_pass_rate == "group" and copies < LEAST_GROUP:
        yield (
            f"--opd-pass-rate group needs --n-samples-per-prompt of at least {LEAST_GROUP}: it is {copies}; raise it, "
            "or take running or metadata"
        )
    if opd.opd_pass_rate != "metadata" and not has_reward(options):
        yield f"--opd-pass-rate {opd.opd_pass_rate} needs a task reward, which --rm-type zero does not give"


def _sample_faults(options: Options) -> Iterator[str]:
    opd, given, rollout = options.opd, options.given, options.rollout
    if opd.opd_on != "all" and not has_reward(options):
        yield f"--opd-on {opd.opd_on} needs a task reward, which --rm-type zero does not give"
    if opd.opd_reward_beta is not None and not has_reward(options):
        yield "--opd-reward-beta needs a task reward, which --rm-type zero does not give"
    if opd.opd_reward_beta is not None and rollout.n_samples_per_prompt == 1:
        yield "--opd-reward-beta has no effect with --n-samples-per-prompt 1: a response alone has weight 1"
    by_rate = opd.opd_prompt_weight == "paced" and opd.opd_pass_rate != "metadata"
    if "opd_pass_above" in given and opd.opd_on == "all" and not by_rate:
        yield "--opd-pass-above has no effect without --opd-on, or pass rates of the student's own samples"
    longest = opd.opd_mask_longer_than
    if longest is not None and longest >= options.training_response_len:
        limit = "--rollout-max-response-len" if opd.opd_prefix_len is None else "--opd-prefix-len"
        yield (
            f"--opd-mask-longer-than {longest} has no effect with {limit} {options.training_response_len}: no response "
            "is longer"
        )
