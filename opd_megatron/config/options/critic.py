"""The critic of PPO: what it learns, its optimizer and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class CriticOptions:
    """Critic of --advantage-estimator ppo"""

    lambd: float = option(
        1.0, "lambda of generalised advantages (ppo): 1, the return minus the value; 0, the one-step error",
        minimum=0.0, maximum=1.0,
    )  # fmt: skip
    value_clip: float = option(
        0.2, "how far a value may move from that of the rollout before the critic's loss is clipped (0: never)",
        minimum=0.0,
    )  # fmt: skip
    num_critic_only_steps: int = option(
        0, "first rollouts on which the critic is trained alone", unit="rollouts", minimum=0
    )
    critic_load: str | None = option(
        None,
        "first weights of the critic: a torch_dist folder, with or without a critic in it, or a Hugging Face folder "
        "(default: the student's)",
        metavar="DIR",
    )
    critic_lr: float | None = option(None, "peak learning rate of the critic (default: --lr)", minimum=0.0)
    critic_min_lr: float | None = option(
        None, "learning rate of the critic at the end of its decay (default: --min-lr)", minimum=0.0
    )
    critic_lr_decay_style: str | None = option(
        None,
        "shape of the critic's decay (default: --lr-decay-style)",
        choices=("constant", "linear", "cosine", "inverse-square-root"),
    )
    critic_lr_decay_iters: int | None = option(
        None,
        "length of the critic's decay (default: all its optimizer steps of the run)",
        unit="optimizer steps",
        minimum=1,
    )
    critic_lr_warmup_iters: int = option(0, "linear warm-up of the critic", unit="optimizer steps", minimum=0)
    critic_clip_grad: float | None = option(
        None, "largest global gradient norm of the critic (0: no clipping; default: --clip-grad)", minimum=0.0
    )
