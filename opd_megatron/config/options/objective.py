"""Task advantage, policy loss and the batches of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config import checks
from opd_megatron.config.declare import option
from opd_megatron.config.options.critic import CriticOptions


@dataclass(frozen=True)
class AdvantageOptions:
    """Task advantages"""

    advantage_estimator: str = option(
        "grpo",
        "task advantage (none: distillation alone)",
        choices=(
            "grpo",
            "rloo",
            "opo",
            "remax",
            "gpg",
            "reinforce_plus_plus",
            "reinforce_plus_plus_baseline",
            "ppo",
            "none",
        ),
    )
    custom_advantage_path: str | None = option(
        None,
        "import path of an advantage estimator of your own, in place of --advantage-estimator",
        metavar="MODULE:FUNCTION",
        check=checks.import_path,
    )
    normalize_advantages: bool = option(False, "whiten the task advantages over the rollout's trained tokens")
    disable_grpo_std_normalization: bool = option(
        False, "do not divide a group's rewards by their standard deviation (Dr. GRPO)"
    )
    kl_coef: float = option(0.0, "coefficient of the KL to the reference inside the reward", minimum=0.0)
    gamma: float = option(1.0, "discount of the returns of REINFORCE++ and PPO", minimum=0.0, maximum=1.0)


@dataclass(frozen=True)
class PolicyLossOptions:
    """Policy loss"""

    policy_loss: str = option(
        "ppo_clip",
        "surrogate: ppo_clip; gspo, with one ratio for a response; cispo, which clips the weight and not the gradient",
        choices=("ppo_clip", "gspo", "cispo"),
    )
    custom_loss_path: str | None = option(
        None,
        "import path of a policy loss of your own, in place of --policy-loss",
        metavar="MODULE:FUNCTION",
        check=checks.import_path,
    )
    eps_clip: float = option(0.2, "lower (and default upper) clip range of the importance ratio", minimum=0.0)
    eps_clip_high: float | None = option(None, "upper clip range (clip-higher)", minimum=0.0)
    eps_clip_c: float | None = option(None, "dual-clip bound for negative advantages", above=1.0)
    ppo_epochs: int = option(1, "passes of the optimizer over each rollout", minimum=1)
    calculate_per_token_loss: bool = option(
        False, "average the loss over the step's tokens (default: over its sequences of their token means)"
    )
    loss_length_divisor: int | None = option(
        None,
        "divide each sequence's sum over its tokens by this constant instead of their number (Dr. GRPO)",
        unit="tokens",
        minimum=1,
    )
    entropy_coef: float = option(0.0, "coefficient of the entropy bonus", minimum=0.0)


@dataclass(frozen=True)
class KlLossOptions:
    """KL to the reference as a loss"""

    use_kl_loss: bool = option(False, "add a KL to the reference as a loss")
    kl_loss_coef: float = option(0.0, "coefficient of --use-kl-loss", minimum=0.0)
    kl_loss_type: str = option(
        "k1",
        "estimator of --use-kl-loss; k1+ and k3+ report that value and have the gradient of k2",
        choices=("k1", "k2", "k3", "k1+", "k3+"),
    )


@dataclass(frozen=True)
class MismatchOptions:
    """Corrections of samples from another policy"""

    use_tis: bool = option(
        False,
        "weigh the policy loss, and a distillation loss of sampled tokens, by the importance ratio of the trainer's to "
        "the engine's probability",
    )
    tis_level: str = option(
        "token", "ratio of --use-tis: of each token, or of the response", choices=("token", "sequence")
    )
    tis_mode: str = option(
        "truncate",
        "ratios of --use-tis outside --tis-clip-low to --tis-clip: limited, or dropped (IcePop)",
        choices=("truncate", "mask"),
    )
    tis_clip: float = option(2.0, "largest ratio of --use-tis", above=0.0)
    tis_clip_low: float = option(0.0, "smallest ratio of --use-tis", minimum=0.0)
    use_opsm: bool = option(
        False, "leave out tokens of negative advantage in responses that the policy has moved away from"
    )
    opsm_delta: float = option(
        1e-4, "mean log-ratio of the old to the current policy above which --use-opsm acts", unit="nats", minimum=0.0
    )


@dataclass(frozen=True)
class ObjectiveOptions(AdvantageOptions, PolicyLossOptions, KlLossOptions, MismatchOptions, CriticOptions):
    """Objective"""

    loss_type: str = option("policy_loss", "what is minimised", choices=("policy_loss", "sft_loss"))


@dataclass(frozen=True)
class TrainingOptions:
    """Training"""

    global_batch_size: int | None = option(
        None, "samples per optimizer step (default: all samples of a rollout)", unit="samples", minimum=1
    )
    micro_batch_size: int = option(1, "samples per forward pass of one rank", unit="samples", minimum=1)
    use_dynamic_batch_size: bool = option(
        False, "micro-batches by --max-tokens-per-gpu, and data-parallel ranks balanced by their work"
    )
    max_tokens_per_gpu: int | None = option(
        None, "tokens per forward pass of one rank with --use-dynamic-batch-size", unit="tokens", minimum=1
    )
    seed: int = option(1234, "seed of initial weights, shuffles and sampling", minimum=0)
