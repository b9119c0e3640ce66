"""Which tokens, responses and prompts the distillation term hears, and how much."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class TokenSelectionOptions:
    """Tokens that the distillation term hears"""

    opd_token_select: str = option(
        "all",
        "tokens that the term is made of: all; top, those of the highest scores, which changes the objective; sample, "
        "drawn by their scores and weighted so that it stays the same",
        choices=("all", "top", "sample"),
    )
    opd_token_score: str = option(
        "entropy",
        "score of a token: the student's entropy, or one that also needs the teacher's distribution: its divergence "
        "from the student, both together, or at least one of them",
        choices=("entropy", "divergence", "low_entropy_high_divergence", "soft_or"),
    )
    opd_token_ratio: float = option(
        0.5, "share of the rollout's tokens that --opd-token-select keeps", above=0.0, below=1.0
    )
    opd_token_floor: float = option(
        0.1,
        "smallest probability to keep a token with --opd-token-select sample, as a part of --opd-token-ratio (1: all "
        "tokens alike)",
        above=0.0,
        maximum=1.0,
    )
    opd_token_min_score: float | None = option(
        None, "score below which --opd-token-select top leaves a token out in any case", minimum=0.0, maximum=1.0
    )


@dataclass(frozen=True)
class SampleWeightOptions:
    """Prompts and responses that the distillation term hears"""

    opd_prompt_weight: str = option(
        "none",
        "weights of prompts: none; paced, high where the student's pass rate p is neither 0 nor 1",
        choices=("none", "paced"),
    )
    opd_paced_alpha: float = option(1.0, "power of p in --opd-prompt-weight paced", minimum=0.0)
    opd_paced_beta: float = option(1.0, "power of 1 - p in --opd-prompt-weight paced", minimum=0.0)
    opd_pass_rate: str = option(
        "group",
        "where pass rates come from: group, the prompt's samples of the rollout; running, all its samples so far; "
        "metadata, --opd-pass-rate-key of the prompt's metadata",
        choices=("group", "running", "metadata"),
    )
    opd_pass_rate_key: str = option("pass_rate", "field of a prompt's metadata with its pass rate", metavar="NAME")
    opd_reward_beta: float | None = option(
        None, "weigh the responses to a prompt by the softmax of their rewards over this", above=0.0
    )
    opd_on: str = option(
        "all", "responses that the term is made of, by their reward", choices=("all", "correct", "incorrect")
    )
    opd_pass_above: float = option(
        0.5, "reward above which a response counts as correct, or as a pass, as it does in an evaluation"
    )
    opd_mask_truncated: bool = option(False, "leave responses out of the term that were cut at the length limit")
    opd_mask_longer_than: int | None = option(None, "leave longer responses out of the term", unit="tokens", minimum=1)
    opd_mask_special_tokens: bool = option(
        False, "leave the tokenizer's special tokens, such as that of the end, out of the term"
    )
