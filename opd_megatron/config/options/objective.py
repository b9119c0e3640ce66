"""Task advantage, policy loss and the batches of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class ObjectiveOptions:
    """Objective"""

    loss_type: str = option("policy_loss", "what is minimised", choices=("policy_loss", "sft_loss"))
    advantage_estimator: str = option(
        "grpo",
        "task advantage (none: distillation alone)",
        choices=("grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "none"),
    )
    normalize_advantages: bool = option(False, "whiten the task advantages over the rollout's trained tokens")
    disable_grpo_std_normalization: bool = option(
        False, "do not divide a group's rewards by their standard deviation (Dr. GRPO)"
    )
    kl_coef: float = option(0.0, "coefficient of the KL to the reference inside the reward", minimum=0.0)
    gamma: float = option(1.0, "discount of REINFORCE++ returns", minimum=0.0, maximum=1.0)
    eps_clip: float = option(0.2, "lower (and default upper) clip range of the importance ratio", minimum=0.0)
    eps_clip_high: float | None = option(None, "upper clip range (clip-higher)", minimum=0.0)
    eps_clip_c: float | None = option(None, "dual-clip bound for negative advantages", above=1.0)
    entropy_coef: float = option(0.0, "coefficient of the entropy bonus", minimum=0.0)
    use_kl_loss: bool = option(False, "add a KL to the reference as a loss")
    kl_loss_coef: float = option(0.0, "coefficient of --use-kl-loss", minimum=0.0)
    kl_loss_type: str = option("k1", "estimator of --use-kl-loss", choices=("k1", "k2", "k3"))
    calculate_per_token_loss: bool = option(
        False, "average the loss over the step's tokens (default: over its sequences of their token means)"
    )


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
