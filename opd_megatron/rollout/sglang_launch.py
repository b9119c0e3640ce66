"""The command that starts a SGLang server for the student, on GPUs or on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opd_megatron.config.errors import UserError
from opd_megatron.config.options.engine import EngineOptions
from opd_megatron.rollout.sglang_server import Launch
from opd_megatron.servers import start_server

_REPOSITORY = Path(__file__).parents[2]
CPU_LAUNCHER = _REPOSITORY / "tools" / "sglang_cpu" / "launch.py"
_ENVIRONMENT = Path(".venv-sglang", "bin", "python")

_RESERVED_POSITIONS = 8
"""Positions that the server keeps for itself at the end of its context, which the model's are lengthened by."""
_CPU_CACHE_TOKENS = 16384
"""Tokens of the cache on the CPU, if no single sequence needs more."""


@dataclass(frozen=True)
class ServedModel:
    """``folder`` has config and tokenizer; the weights come later. ``dtype`` is written as SGLang does."""

    folder: Path
    positions: int
    dtype: str
    seed: int


def find_python(given: str | None) -> Path:
    """The interpreter of the environment with SGLang.

    ``given``, else ``.venv-sglang`` in the working folder or the repository, else this one. Raises :class:`UserError`
    if there is none.
    """
    if given is not None:
        if not os.access(given, os.X_OK):
            raise UserError(f"--sglang-python {given} is no program: name the interpreter of SGLang's environment")
        return Path(given).absolute()
    for folder in (Path.cwd(), _REPOSITORY):
        if os.access(folder / _ENVIRONMENT, os.X_OK):
            return folder / _ENVIRONMENT
    if importlib.util.find_spec("sglang") is not None:
        return Path(sys.executable)
    raise UserError(
        "--rollout-engine sglang finds no SGLang: name the interpreter of its environment with --sglang-python, or "
        "install one (on a machine without GPU: tools/sglang_cpu/install.sh .venv-sglang)"
    )


def server_launches(options: EngineOptions, model: ServedModel, log_folder: Path, *, on_cpu: bool) -> list[Launch]:
    """One function that starts a server for each of ``--rollout-num-engines``, with its log in ``log_folder``.

    Raises :class:`UserError` where the options ask for what the machine does not have.
    """
    python = find_python(options.sglang_python)
    if on_cpu:
        _refuse_on_cpu(options)
    # Positions beyond the model's are never used; without them the server could not fill those that are.
    environment = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    return [
        partial(
            start_server,
            server_command(python, options, model, number, on_cpu=on_cpu),
            log_path=log_folder / f"engine_{number}.log",
            environment=environment,
        )
        for number in range(options.rollout_num_engines)
    ]


def server_command(python: Path, options: EngineOptions, model: ServedModel, number: int, *, on_cpu: bool) -> list[str]:
    """The arguments of server ``number``; ``{port}`` stands for its port. A flag given twice holds the last time."""
    context = model.positions + _RESERVED_POSITIONS
    settings: dict[str, object] = {
        "--model-path": model.folder,
        "--load-format": "dummy",
        "--dtype": model.dtype,
        "--context-length": context,
        "--port": "{port}",
        "--random-seed": model.seed + number,
    }
    if on_cpu:
        program = [str(python), str(CPU_LAUNCHER)]
        settings["--max-total-tokens"] = max(_CPU_CACHE_TOKENS, context)
    else:
        program = [str(python), "-m", "sglang.launch_server", "--host", "127.0.0.1", "--skip-server-warmup"]
        settings["--tp-size"] = options.rollout_num_gpus_per_engine
        settings["--base-gpu-id"] = options.sglang_base_gpu_id + number * options.rollout_num_gpus_per_engine
    if options.sglang_mem_fraction_static is not None:
        settings["--mem-fraction-static"] = options.sglang_mem_fraction_static
    override = _missing_architecture(model.folder)
    if override:
        settings["--json-model-override-args"] = json.dumps(override)
    memory_saver = ["--enable-memory-saver"] if options.sglang_free_memory else []
    chosen = [str(part) for setting in settings.items() for part in setting]
    return [*program, *chosen, *memory_saver, *shlex.split(options.sglang_server_args or "")]


def _missing_architecture(folder: Path) -> dict[str, list[str]]:
    """The field ``architectures`` where a config lacks it: SGLang chooses its model by nothing else."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))
    return {} if config.get("architectures") or known is None else {"architectures": [known]}


def _refuse_on_cpu(options: EngineOptions) -> None:
    if not CPU_LAUNCHER.is_file():
        raise UserError(
            f"--rollout-engine sglang on a machine without GPU needs {CPU_LAUNCHER}, which an installed package does "
            "not have: run from the repository, or name servers that run already with --rollout-engine-url"
        )
    if options.rollout_num_gpus_per_engine > 1 or options.sglang_base_gpu_id:
        raise UserError(
            "--rollout-num-gpus-per-engine and --sglang-base-gpu-id: this machine has no GPU: leave them out"
        )
    if options.sglang_free_memory:
        raise UserError("--sglang-free-memory: SGLang gives memory of GPUs back only, of which there is none here")
