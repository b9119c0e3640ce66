"""The distillation term and its teachers."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config import checks
from opd_megatron.config.declare import option
from opd_megatron.config.options.diagnostics import DiagnosticsOptions
from opd_megatron.config.options.distribution import DistributionOptions
from opd_megatron.config.options.prefixes import PrefixOptions
from opd_megatron.config.options.self_teacher import SelfTeacherOptions
from opd_megatron.config.options.target import TargetOptions
from opd_megatron.config.options.weights import SampleWeightOptions, TokenSelectionOptions


@dataclass(frozen=True)
class TermOptions:
    """The distillation term"""

    use_opd: bool = option(False, "add the per-token distillation term to the advantage")
    opd_type: str | None = option(None, "where teacher log-probabilities come from", choices=("sglang", "megatron"))
    opd_kl_coef: float = option(1.0, "coefficient of log p_student - log p_teacher", minimum=0.0)
    opd_kl_coef_end: float | None = option(
        None, "coefficient that --opd-kl-coef changes to, linearly over --opd-kl-coef-rollouts", minimum=0.0
    )
    opd_kl_coef_rollouts: int | None = option(
        None, "length of the way to --opd-kl-coef-end", unit="rollouts", minimum=1
    )
    opd_loss: str = option(
        "sampled",
        "form of the term: sampled, the sampled token's log-ratio in the advantage; distribution, a divergence of "
        "whole distributions as a loss; kl_loss, an estimator as a loss",
        choices=("sampled", "distribution", "kl_loss"),
    )
    opd_kl_discount: float = option(
        0.0, "weight of later tokens' log-ratios in a token's term (1: KL of whole responses)", minimum=0.0, maximum=1.0
    )
    opd_log_ratio_clip: float | None = option(None, "clip log p_student - log p_teacher to this size", above=0.0)
    opd_importance: bool = option(
        False,
        "with several optimizer steps per rollout: importance ratio times the current log-ratio as a loss, unclipped",
    )
    opd_kl_loss_type: str = option("k2", "estimator of --opd-loss kl_loss", choices=("k1", "k2", "k3"))
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
class ServerTeacherOptions:
    """A teacher behind an SGLang server"""

    opd_teacher_url: tuple[str, ...] = option(
        (),
        "address of the SGLang server for --opd-type sglang, e.g. http://127.0.0.1:30000; several are replicas that "
        "share the work",
        metavar="URL",
        check=checks.http_url,
        show=checks.mask_url,
    )
    opd_teachers: str | None = option(
        None,
        "YAML, TOML or JSON file of several teachers in place of --opd-teacher-url: NAME: {urls: [URL, ...], "
        "api_key_env: VARIABLE}",
        metavar="FILE",
    )
    opd_teacher_route_key: str = option(
        "teacher", "field of a prompt's metadata that names its teacher of --opd-teachers", metavar="NAME"
    )
    opd_teacher_api_key_env: str | None = option(
        None,
        "environment variable with the API key of --opd-teacher-url, sent as a bearer token and shown nowhere",
        metavar="VARIABLE",
        check=checks.variable_name,
        show=checks.mask_unless_variable,
    )
    opd_teacher_max_in_flight: int | None = option(
        None,
        "samples that each teacher server is asked for at a time (default: as many as it answers faster)",
        unit="samples",
        minimum=1,
        maximum=65536,
    )
    opd_teacher_timeout: float = option(
        120.0, "time limit of one request to the teacher", unit="seconds", above=0.0, maximum=checks.LONGEST_WAIT
    )
    opd_teacher_max_retries: int = option(
        4, "repetitions of a request after a refused connection, time-out, 429 or 5xx", minimum=0
    )
    opd_overlong: str = option(
        "stop",
        "samples longer than the teacher's context: stop before the first step; mask, train on their task reward "
        "alone; drop, replace their prompt's samples by those of the next prompt",
        choices=("stop", "mask", "drop"),
    )
    opd_max_union_ids: int = option(
        1024,
        "different ids for whose log-probabilities a server is asked at every position of a sample",
        minimum=1,
        maximum=65536,
    )


@dataclass(frozen=True)
class TeacherFailureOptions:
    """What a teacher behind a server could not score"""

    opd_on_teacher_failure: str = option(
        "stop",
        "when the teacher cannot score a sample: stop, saved; mask, train on its task reward alone; drop, replace its "
        "prompt's samples by those of the next prompt",
        choices=("stop", "mask", "drop"),
    )
    opd_max_failed_frac: float = option(
        0.1, "part of a rollout's samples that may be masked or dropped before the run stops", minimum=0.0, maximum=1.0
    )
    opd_teacher_step_deadline: float = option(
        1800.0,
        "time that a step waits for the teacher alone; what is not answered by then has failed",
        unit="seconds",
        above=0.0,
        maximum=checks.LONGEST_WAIT,
    )


@dataclass(frozen=True)
class MegatronTeacherOptions:
    """A teacher loaded into Megatron"""

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
    opd_teacher_expert_model_parallel_size: int | None = option(
        None, "ranks over which the Megatron teacher's experts are spread (default: the student's)", minimum=1
    )
    opd_teacher_expert_tensor_parallel_size: int | None = option(
        None, "tensor-parallel ranks of one of the Megatron teacher's experts (default: the student's)", minimum=1
    )
    opd_teacher_hidden_dtype: str = option(
        "same",
        "precision of the teacher's hidden states on the host, kept for the exact KL (same: that of its weights)",
        choices=("same", "float32", "bfloat16"),
    )


@dataclass(frozen=True)
class OpdOptions(
    DiagnosticsOptions,
    PrefixOptions,
    SampleWeightOptions,
    TokenSelectionOptions,
    TargetOptions,
    DistributionOptions,
    SelfTeacherOptions,
    TeacherFailureOptions,
    ServerTeacherOptions,
    MegatronTeacherOptions,
    TermOptions,
):
    """On-policy distillation

    Help and dumps show the fields of the last class first.
    """
