"""Every option of ``train.py``, declared once; flags, help, configuration files and the dump come from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from opd_megatron.config.options.checkpoint import CheckpointOptions
from opd_megatron.config.options.engine import EngineOptions
from opd_megatron.config.options.model import ModelOptions
from opd_megatron.config.options.objective import ObjectiveOptions, TrainingOptions
from opd_megatron.config.options.opd import OpdOptions
from opd_megatron.config.options.optimizer import OptimizerOptions
from opd_megatron.config.options.parallel import OffloadOptions, ParallelOptions
from opd_megatron.config.options.rollout import (
    REWARD_NAMES,
    DataOptions,
    EvaluationOptions,
    RewardOptions,
    RolloutOptions,
)
from opd_megatron.config.options.run import ClusterOptions, RunOptions

__all__ = [
    "REWARD_NAMES",
    "CheckpointOptions",
    "ClusterOptions",
    "DataOptions",
    "EngineOptions",
    "EvaluationOptions",
    "ModelOptions",
    "ObjectiveOptions",
    "OffloadOptions",
    "OpdOptions",
    "OptimizerOptions",
    "Options",
    "ParallelOptions",
    "RewardOptions",
    "RolloutOptions",
    "RunOptions",
    "TrainingOptions",
]


@dataclass(frozen=True)
class Options:
    """All groups.

    ``given`` names the options that a command line or a file set explicitly, ``typed`` those of the command line.
    """

    opd: OpdOptions = field(default_factory=OpdOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    offload: OffloadOptions = field(default_factory=OffloadOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    data: DataOptions = field(default_factory=DataOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    run: RunOptions = field(default_factory=RunOptions)
    given: frozenset[str] = frozenset()
    typed: frozenset[str] = frozenset()

    @property
    def world_size(self) -> int:
        return self.cluster.actor_num_nodes * self.cluster.actor_num_gpus_per_node

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and share its sequences."""
        parallel = self.parallel
        return (
            parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.model_parallel_size

    @property
    def samples_per_rollout(self) -> int:
        """Samples of one rollout; raises ``ValueError`` before ``--rollout-batch-size`` is known."""
        if self.rollout.rollout_batch_size is None:
            raise ValueError("rollout_batch_size is not set")
        return self.rollout.rollout_batch_size * self.rollout.n_samples_per_prompt

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.training.global_batch_size or self.samples_per_rollout

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout: its global batches, in each of the ``--ppo-epochs``."""
        return self.samples_per_rollout // self.global_batch_size * self.objective.ppo_epochs

    @property
    def label_key(self) -> str:
        """Field of the label; rows may lack it unless ``--label-key`` was given."""
        return self.data.label_key or "label"

    @property
    def eval_input_key(self) -> str:
        return self.evaluation.eval_input_key or self.data.input_key

    @property
    def eval_label_key(self) -> str | None:
        """Field of the evaluation labels that was asked for; None where rows may lack a label."""
        return self.evaluation.eval_label_key or self.data.label_key

    @property
    def has_training_reward(self) -> bool:
        return self.reward.rm_type is not None or self.reward.custom_rm_path is not None

    @property
    def eval_max_response_len(self) -> int:
        """Longest response of an evaluation in tokens."""
        return self.evaluation.eval_max_response_len or self.rollout.rollout_max_response_len

    @property
    def training_response_len(self) -> int:
        """Longest response that is sampled to train on, in tokens."""
        longest, prefix = self.rollout.rollout_max_response_len, self.opd.opd_prefix_len
        return min(longest, prefix) if self.opd.use_opd and prefix is not None else longest

    @property
    def run_folder(self) -> Path:
        """``--run-dir``; raises ``ValueError`` before it is known."""
        if self.run.run_dir is None:
            raise ValueError("run_dir is not set")
        return Path(self.run.run_dir)

    @property
    def save_folder(self) -> Path:
        """Where checkpoints go; raises ``ValueError`` before ``--run-dir`` or ``--save`` is known."""
        return Path(self.checkpoint.save) if self.checkpoint.save else self.run_folder / "checkpoints"
