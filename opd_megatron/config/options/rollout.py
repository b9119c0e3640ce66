"""Prompts, sampling, rewards and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config import checks
from opd_megatron.config.declare import option

REWARD_NAMES = ("math", "gsm8k", "exact", "zero", "column_arithmetic")
"""Rewards that options can name."""
DYNAMIC_FILTERS = ("none", "unequal_rewards")
"""Filters that options can name."""


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
    dynamic_filter: str = option(
        "none",
        "which prompts' samples are trained on; the others are replaced by those of the next prompts",
        choices=DYNAMIC_FILTERS,
    )
    dynamic_filter_path: str | None = option(
        None,
        "import path of a filter: from the samples of a prompt, with their rewards, to True (keep) or False",
        metavar="MODULE:FUNCTION",
        check=checks.import_path,
    )
    dynamic_filter_max_refills: int = option(
        4, "prompts that a filter may have replaced in one rollout, in multiples of --rollout-batch-size", minimum=1
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
