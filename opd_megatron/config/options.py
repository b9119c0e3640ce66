"""Every option of ``train.py``, declared once; flags, help, configuration files and the dump come from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from opd_megatron.config import checks
from opd_megatron.config.declare import option
from opd_megatron.config.mixture import MixtureOptions

REWARD_NAMES = ("math", "gsm8k", "exact", "zero", "column_arithmetic")
"""Rewards that options can name."""


@dataclass(frozen=True)
class OpdOptions:
    """On-policy distillation"""

    use_opd: bool = option(False, "add the per-token distillation term to the advantage")
    opd_type: str | None = option(None, "where teacher log-probabilities come from", choices=("sglang", "megatron"))
    opd_kl_coef: float = option(1.0, "coefficient of log p_student - log p_teacher", minimum=0.0)
    opd_teacher_load: str | None = option(
        None, "teacher checkpoint for --opd-type megatron: a torch_dist or Hugging Face folder", metavar="DIR"
    )
    opd_teacher_ckpt_step: int | None = option(None, "step of --opd-teacher-load (default: its latest)", minimum=0)
    opd_teacher_dtype: str = option(
        "same",
        "precision of the Megatron teacher's weights (same: the student's)",
        choices=("same", "float32", "bfloat16"),
    )
    opd_teacher_micro_batch_size: int | None = option(
        None, "samples per forward pass of the Megatron teacher (default: the student's way)", unit="samples", minimum=1
    )
    opd_teacher_max_tokens_per_gpu: int | None = option(
        None,
        "tokens per forward pass of one rank of the Megatron teacher (default: the student's way)",
        unit="tokens",
        minimum=1,
    )
    opd_teacher_tensor_model_parallel_size: int | None = option(
        None, "tensor-parallel ranks of the Megatron teacher (default: the student's)", minimum=1
    )
    opd_teacher_pipeline_model_parallel_size: int | None = option(
        None, "pipeline-parallel ranks of the Megatron teacher (default: the student's)", minimum=1
    )
    opd_teacher_hidden_dtype: str = option(
        "same",
        "precision of the teacher's hidden states on the host, kept for the exact KL (same: that of its weights)",
        choices=("same", "float32", "bfloat16"),
    )
    opd_teacher_url: tuple[str, ...] = option(
        (),
        "address of the SGLang server for --opd-type sglang, e.g. http://127.0.0.1:30000",
        metavar="URL",
        check=checks.http_url,
        show=checks.mask_url,
    )
    opd_teacher_max_in_flight: int = option(8, "requests to the teacher server at a time", minimum=1, maximum=65536)
    opd_teacher_timeout: float = option(
        120.0, "time limit of one request to the teacher", unit="seconds", above=0.0, maximum=checks.LONGEST_WAIT
    )
    opd_teacher_max_retries: int = option(
        4, "repetitions of a request after a refused connection, time-out, 429 or 5xx", minimum=0
    )
    opd_exact_kl_interval: int = option(
        1,
        "measure opd/reverse_kl_exact this often (Megatron teacher; 0: only where --opd-baseline needs it)",
        unit="rollouts",
        minimum=0,
    )
    opd_baseline: str = option(
        "none",
        "subtracted from the term at each position, which leaves its expected gradient: kl, the exact reverse KL; "
        "optimal, the baseline of least variance (Megatron teacher)",
        choices=("none", "kl", "optimal"),
    )
    opd_allow_sampling_mismatch: bool = option(
        False, "accept a sampling law whose expectation is not over the student's distribution at temperature 1"
    )


@dataclass(frozen=True)
class ModelOptions(MixtureOptions):
    """Model architecture (MODEL_ARGS; all may be left out where the checkpoint folder has a config)"""

    num_layers: int | None = option(None, "transformer layers", minimum=1)
    hidden_size: int | None = option(None, "hidden size", minimum=1)
    ffn_hidden_size: int | None = option(None, "feed-forward size", minimum=1)
    num_attention_heads: int | None = option(None, "query heads", minimum=1)
    group_query_attention: bool = option(False, "grouped-query attention (needs --num-query-groups)")
    num_query_groups: int | None = option(None, "key/value heads", minimum=1)
    kv_channels: int | None = option(None, "size of one head (default hidden size / heads)", minimum=1)
    qk_layernorm: bool = option(False, "normalise queries and keys per head (Qwen3)")
    add_qkv_bias: bool = option(False, "bias in the query, key and value projections (Qwen2)")
    disable_bias_linear: bool = option(False, "no bias in the other linear layers")
    swiglu: bool = option(False, "gated SiLU feed-forward")
    normalization: str | None = option(None, "normalisation layer", choices=("RMSNorm",))
    norm_epsilon: float | None = option(None, "epsilon of the normalisation", above=0.0)
    position_embedding_type: str | None = option(None, "position embedding", choices=("rope",))
    use_rotary_position_embeddings: bool = option(False, "same as --position-embedding-type rope")
    rotary_base: float | None = option(None, "base of the rotary embedding", above=0.0)
    use_rope_scaling: bool = option(False, "Llama 3's scaling of the rotary frequencies")
    rope_scaling_factor: float | None = option(None, "factor of --use-rope-scaling", above=0.0)
    untie_embeddings_and_output_weights: bool = option(False, "output weights of their own")
    vocab_size: int | None = option(None, "vocabulary size before padding", minimum=1)
    max_position_embeddings: int | None = option(None, "longest sequence of the model", unit="tokens", minimum=1)
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this times the tensor-parallel size", minimum=1, maximum=65536
    )
    init_method_std: float | None = option(
        None, "standard deviation of random initial weights (default: the config's)", above=0.0
    )
    attention_dropout: float = option(0.0, "only 0: log-probabilities must not be random", minimum=0.0, maximum=0.0)
    hidden_dropout: float = option(0.0, "only 0: log-probabilities must not be random", minimum=0.0, maximum=0.0)


@dataclass(frozen=True)
class ParallelOptions:
    """Parallelism and memory"""

    tensor_model_parallel_size: int = option(1, "tensor-parallel ranks", minimum=1)
    pipeline_model_parallel_size: int = option(1, "pipeline-parallel ranks", minimum=1)
    expert_model_parallel_size: int = option(1, "ranks over which the experts of a layer are spread", minimum=1)
    expert_tensor_parallel_size: int | None = option(
        None, "tensor-parallel ranks of one expert (default: --tensor-model-parallel-size)", minimum=1
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers of a virtual pipeline stage: each rank holds several, for shorter bubbles", minimum=1
    )
    context_parallel_size: int = option(1, "ranks that share each sequence (zigzag)", minimum=1)
    qkv_format: str = option(
        "thd",
        "how sequences lie in a micro-batch: thd, packed end to end; bshd, padded to the longest",
        choices=("thd", "bshd"),
    )
    sequence_parallel: bool = option(False, "split the activations between tensor-parallel regions by sequence")
    recompute_granularity: str | None = option(None, "recompute activations in backward", choices=("full", "selective"))
    recompute_method: str | None = option(
        None, "how --recompute-granularity full chooses layers", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = option(None, "layers per recomputed unit or recomputed layers", minimum=1)
    distributed_timeout_minutes: float = option(
        10.0, "limit of one collective operation", unit="minutes", above=0.0, maximum=checks.LONGEST_WAIT
    )

    def virtual_stages(self, num_layers: int) -> int | None:
        """Virtual pipeline stages of a rank for a model of ``num_layers``; None without them."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        return num_layers // self.pipeline_model_parallel_size // self.num_layers_per_virtual_pipeline_stage

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel ranks of one expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


@dataclass(frozen=True)
class OffloadOptions:
    """What leaves the device while it is not needed"""

    offload_teacher: bool = option(False, "keep teacher and reference on the host but for their scoring")
    offload_optimizer: bool = option(False, "keep the optimizer's state on the host but for its step")
    offload_train: bool = option(
        False, "keep the student's weights, gradients and optimizer on the host while others sample and score"
    )
    offload_dir: str | None = option(
        None, "files for what leaves, mapped into memory, in this folder (default: pinned memory)", metavar="DIR"
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer, schedule and precision"""

    optimizer: str = option("adam", "optimizer", choices=("adam", "sgd"))
    lr: float = option(1e-6, "peak learning rate", minimum=0.0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", minimum=0.0)
    lr_decay_style: str = option(
        "constant", "shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root")
    )
    lr_decay_iters: int | None = option(
        None, "length of the decay (default: all optimizer steps of the run)", unit="optimizer steps", minimum=1
    )
    lr_warmup_iters: int = option(0, "linear warm-up", unit="optimizer steps", minimum=0)
    lr_warmup_fraction: float | None = option(
        None, "warm-up as a fraction of the decay length (in place of --lr-warmup-iters)", minimum=0.0, below=1.0
    )
    lr_warmup_init: float = option(0.0, "learning rate at the start of the warm-up", minimum=0.0)
    weight_decay: float = option(0.01, "decoupled weight decay (not on biases and norms)", minimum=0.0)
    adam_beta1: float = option(0.9, "first moment's decay", minimum=0.0, below=1.0)
    adam_beta2: float = option(0.999, "second moment's decay", minimum=0.0, below=1.0)
    adam_eps: float = option(1e-8, "Adam's epsilon", above=0.0)
    sgd_momentum: float = option(0.9, "momentum of --optimizer sgd", minimum=0.0, below=1.0)
    clip_grad: float = option(1.0, "largest global gradient norm (0: no clipping)", minimum=0.0)
    bf16: bool = option(False, "train in bfloat16 with float32 master weights (default: float32)")
    accumulate_allreduce_grads_in_fp32: bool = option(False, "gradients in float32 with --bf16")
    use_distributed_optimizer: bool = option(False, "shard the optimizer's state over data-parallel ranks")
    overlap_grad_reduce: bool = option(False, "sum gradients over the ranks while the backward pass goes on")
    overlap_param_gather: bool = option(
        False, "gather the distributed optimizer's weights while the next forward pass goes on"
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints"""

    hf_checkpoint: str | None = option(
        None,
        "Hugging Face folder with config and tokenizer, and the weights to start from if nothing else is given",
        metavar="DIR",
    )
    load: str | None = option(None, "resume from this folder if it holds a checkpoint of a run", metavar="DIR")
    ckpt_step: int | None = option(None, "step of --load (default: its latest)", minimum=0)
    finetune: bool = option(
        False, "take the weights of --load alone: step 0, a new optimizer, random state and position in the prompts"
    )
    no_load_optim: bool = option(False, "resume without the optimizer's state: moments and schedule begin anew")
    no_load_rng: bool = option(False, "resume without the random state: it begins from --seed")
    ref_load: str | None = option(
        None, "initial and reference weights: a torch_dist or Hugging Face folder", metavar="DIR"
    )
    save: str | None = option(None, "where checkpoints go (default: checkpoints in --run-dir)", metavar="DIR")
    save_interval: int | None = option(
        None, "save every so many rollouts (default: only at the end)", unit="rollouts", minimum=1
    )
    no_save_optim: bool = option(False, "save without the optimizer's state (resume needs --no-load-optim)")
    save_keep_last: int | None = option(
        None, "keep this many of the newest steps and remove older ones (default: keep all)", minimum=1
    )
    save_retain_interval: int | None = option(
        None,
        "keep every step that is a multiple of this and the newest (or --save-keep-last), remove the others",
        unit="rollouts",
        minimum=1,
    )
    save_hf: str | None = option(
        None, "also write Hugging Face weights here at each save; {rollout_id} is replaced", metavar="DIR"
    )


@dataclass(frozen=True)
class DataOptions:
    """Prompts"""

    prompt_data: str | None = option(
        None, "JSONL or Parquet file of prompts; PATH@[a:b] takes rows a to b-1", metavar="PATH"
    )
    input_key: str = option("prompt", "field of the prompt: a string or a list of messages")
    label_key: str | None = option(None, "field of the label (default: label, if the rows have it)")
    metadata_key: str = option("metadata", "field of a mapping that travels with the sample, if the rows have it")
    apply_chat_template: bool = option(False, "turn prompts into text by the tokenizer's chat template")
    apply_chat_template_kwargs: str = option(
        "{}",
        "JSON mapping passed to the chat template, e.g. '{\"enable_thinking\": false}'",
        metavar="JSON",
        check=checks.json_mapping,
    )
    rollout_shuffle: bool = option(False, "shuffle the prompts anew in each epoch")
    num_rollout: int | None = option(None, "length of the run", unit="rollouts", minimum=1)
    num_epoch: int | None = option(None, "length of the run in passes over the prompts", unit="epochs", minimum=1)


@dataclass(frozen=True)
class RolloutOptions:
    """Rollout: the student speaks"""

    rollout_batch_size: int | None = option(None, "prompts per rollout", minimum=1)
    n_samples_per_prompt: int = option(1, "responses per prompt", minimum=1)
    rollout_max_response_len: int = option(1024, "longest response", unit="tokens", minimum=1)
    rollout_max_prompt_len: int | None = option(
        None, "longer prompts get an empty response and are counted", unit="tokens", minimum=1
    )
    rollout_temperature: float = option(1.0, "sampling temperature", above=0.0)
    rollout_top_p: float = option(1.0, "nucleus sampling (1: off)", above=0.0, maximum=1.0)
    rollout_top_k: int = option(
        -1, "sample among the k most probable tokens (-1: off)", minimum=-1, check=checks.off_or_positive
    )
    rollout_stop: tuple[str, ...] = option((), "strings that end a response", metavar="TEXT")
    rollout_ignore_eos: bool = option(False, "do not stop at the end token (for measurements)")
    rollout_engine_batch_size: int = option(256, "sequences decoded together by the local engine", minimum=1)
    custom_generate_function_path: str | None = option(
        None, "import path of the function that makes one sample", metavar="MODULE:FUNCTION", check=checks.import_path
    )
    save_debug_rollout_data: str | None = option(
        None, "record every rollout in this file; {rollout_id} is replaced", metavar="PATH"
    )
    load_debug_rollout_data: str | None = option(
        None, "train on recorded rollouts instead of sampling and scoring; {rollout_id} is replaced", metavar="PATH"
    )


@dataclass(frozen=True)
class RewardOptions:
    """Reward"""

    rm_type: str | None = option(None, "reward by name", choices=REWARD_NAMES)
    custom_rm_path: str | None = option(
        None,
        "import path of a reward function (sync or async, one sample or a batch)",
        metavar="MODULE:FUNCTION",
        check=checks.import_path,
    )
    rm_timeout: float = option(
        10.0, "time limit of one call of math-verify", unit="seconds", above=0.0, maximum=checks.LONGEST_WAIT
    )
    rm_on_error: str = option(
        "stop", "when a reward function raises: stop, or count it and give --rm-error-value", choices=("stop", "value")
    )
    rm_error_value: float = option(0.0, "reward of a sample whose reward function raised")


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation"""

    eval_prompt_data: tuple[tuple[str, str], ...] = option(
        (), "an evaluation set (repeatable)", metavar=("NAME", "PATH"), check=checks.named_path
    )
    eval_interval: int | None = option(None, "evaluate every so many rollouts", unit="rollouts", minimum=1)
    skip_eval_before_train: bool = option(False, "do not evaluate before the first rollout")
    n_samples_per_eval_prompt: int = option(1, "responses per evaluation prompt", minimum=1)
    eval_temperature: float = option(0.0, "sampling temperature (0: greedy)", minimum=0.0)
    eval_top_p: float = option(1.0, "nucleus sampling (1: off)", above=0.0, maximum=1.0)
    eval_input_key: str | None = option(None, "field of the evaluation prompts (default: --input-key)")
    eval_label_key: str | None = option(None, "field of the evaluation labels (default: --label-key)")
    eval_rm_type: str | None = option(
        None, "reward of the evaluation (default: that of the training)", choices=REWARD_NAMES
    )
    stop_eval_metric: str | None = option(
        None, "end the run, saved, when this evaluation metric reaches --stop-eval-value, e.g. eval/dev/pass@1"
    )
    stop_eval_value: float | None = option(None, "value of --stop-eval-metric that ends the run")
    eval_max_response_len: int | None = option(
        None, "longest response (default: --rollout-max-response-len)", unit="tokens", minimum=1
    )


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
        return self.samples_per_rollout // self.global_batch_size

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
    def run_folder(self) -> Path:
        """``--run-dir``; raises ``ValueError`` before it is known."""
        if self.run.run_dir is None:
            raise ValueError("run_dir is not set")
        return Path(self.run.run_dir)

    @property
    def save_folder(self) -> Path:
        """Where checkpoints go; raises ``ValueError`` before ``--run-dir`` or ``--save`` is known."""
        return Path(self.checkpoint.save) if self.checkpoint.save else self.run_folder / "checkpoints"
