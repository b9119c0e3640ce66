"""The engine that samples."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config import checks
from opd_megatron.config.declare import option


@dataclass(frozen=True)
class EngineOptions:
    """Rollout engine"""

    rollout_engine: str = option(
        "local",
        "what samples: a transformers model in the controller's process, or SGLang servers",
        choices=("local", "sglang"),
    )
    rollout_num_engines: int = option(1, "SGLang servers that are started", minimum=1, maximum=1024)
    rollout_num_gpus_per_engine: int = option(
        1, "GPUs of one SGLang server, over which its tensors are split", minimum=1
    )
    rollout_engine_url: tuple[str, ...] = option(
        (),
        "addresses of SGLang servers that run already, for this run alone, in place of ones that are started",
        metavar="URL",
        check=checks.http_url,
        show=checks.mask_url,
    )
    rollout_engine_api_key_env: str | None = option(
        None,
        "environment variable with the API key of --rollout-engine-url, sent as a bearer token and shown nowhere",
        metavar="VARIABLE",
        check=checks.variable_name,
        show=checks.mask_unless_variable,
    )
    rollout_engine_timeout: float = option(
        1800.0,
        "time limit of one response, also of a teacher's servers, and of one update of the weights",
        unit="seconds",
        above=0.0,
        maximum=checks.LONGEST_WAIT,
    )
    rollout_engine_max_in_flight: int = option(
        256, "responses asked of one SGLang server at a time", minimum=1, maximum=65536
    )
    rollout_weight_transfer: str = option(
        "auto",
        "how new weights reach the SGLang servers: disk, a folder that they read; distributed, a broadcast to each "
        "without a disk between; auto, disk on a machine without GPU and where --rollout-weights-dir names one",
        choices=("auto", "disk", "distributed"),
    )
    rollout_weights_dir: str | None = option(
        None,
        "where new weights are written for the SGLang servers to read (default: engine in --run-dir)",
        metavar="DIR",
    )
    sglang_python: str | None = option(
        None,
        "interpreter of the environment with SGLang (default: that of .venv-sglang, else the one that runs)",
        metavar="PATH",
    )
    sglang_mem_fraction_static: float | None = option(
        None, "part of a GPU's memory for a server's weights and cache (default: SGLang's)", above=0.0, below=1.0
    )
    sglang_base_gpu_id: int = option(0, "first GPU of the SGLang servers", minimum=0)
    sglang_free_memory: bool = option(
        False, "let the SGLang servers give their GPU memory back while the student trains"
    )
    sglang_server_args: str | None = option(
        None,
        "more flags of SGLang's server, in one argument: --sglang-server-args='--max-running-requests 128'",
        metavar="FLAGS",
        check=checks.server_flags,
        show=checks.mask_server_flags,
    )
