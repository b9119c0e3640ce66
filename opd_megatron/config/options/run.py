"""Processes and the run folder."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class ClusterOptions:
    """Processes"""

    actor_num_nodes: int = option(1, "nodes of the trainer", minimum=1)
    actor_num_gpus_per_node: int = option(1, "trainer ranks per node (processes on a machine without GPUs)", minimum=1)
    ray_address: str | None = option(None, "Ray cluster to join (default: one started on this machine)")


@dataclass(frozen=True)
class RunOptions:
    """Run folder and logging"""

    run_dir: str | None = option(None, "folder of everything the run writes", metavar="DIR")
    dry_run: bool = option(False, "print the resolved configuration and stop")
    no_tensorboard: bool = option(False, "write no TensorBoard events")
    use_wandb: bool = option(False, "log to Weights & Biases (its key comes from the environment)")
    wandb_project: str = option("opd_megatron", "W&B project")
    wandb_group: str | None = option(None, "W&B group")
    wandb_run_name: str | None = option(None, "W&B run name")
    num_logged_samples: int = option(4, "samples written to samples/ per rollout", minimum=0)
