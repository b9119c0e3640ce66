"""What the tools share: one model outside of a run, in one process or on the ranks of ``torchrun``."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.checkpoint_paths import Step, inspect_checkpoint, resolve_step
from opd_megatron.config.cli import run_cli
from opd_megatron.config.errors import UserError, refuse
from opd_megatron.config.options import Options, ParallelOptions
from opd_megatron.config.validate_moe import expert_layout_faults
from opd_megatron.config.validate_run import layout_faults_of_model
from opd_megatron.megatron import checkpoint, distributed
from opd_megatron.megatron.model import HiddenStateModel, build_model

_ERROR_SHOWN = "opd_megatron/error_shown"
_ERROR_WAIT = datetime.timedelta(seconds=20)


def run_tool(main: Callable[[Sequence[str]], None]) -> int:
    """``run_cli`` for a program that ``torchrun`` may start: one rank prints a user's error, all exit with code 2.

    The error is one that all ranks find. The first prints it and the others wait for that, because ``torchrun`` stops
    every rank once one has ended.
    """
    rendezvous = distributed.Rendezvous.from_torchrun()
    if rendezvous.world_size == 1:
        return run_cli(main)

    def quiet(argv: Sequence[str]) -> int:
        try:
            main(argv)
        except UserError:
            if rendezvous.rank > 0 and _first_rank_has_spoken(rendezvous):
                return 2
            raise
        distributed.shutdown()
        return 0

    code = run_cli(quiet)
    if code == 2 and rendezvous.rank == 0:
        _torchrun_store(rendezvous).set(_ERROR_SHOWN, "yes")
    return code


def _first_rank_has_spoken(rendezvous: distributed.Rendezvous) -> bool:
    try:
        _torchrun_store(rendezvous).wait([_ERROR_SHOWN], _ERROR_WAIT)
    except RuntimeError:  # it found no error within the time, or is gone
        return False
    return True


def _torchrun_store(rendezvous: distributed.Rendezvous) -> dist.Store:
    """The store through which the ranks of ``torchrun`` meet, whether they have joined already or not."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rendezvous.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=_ERROR_WAIT,
        wait_for_workers=False,
        multi_tenant=True,
    )


def weights_folder(flag: str, folder: str, step: Step | None = None) -> Path:
    """The Hugging Face or step folder to read; raises :class:`UserError` that names ``flag``."""
    if not Path(folder).is_dir():
        raise UserError(
            f"{flag} {folder} {'is a file: name the folder' if Path(folder).exists() else 'does not exist'}"
        )
    info = inspect_checkpoint(folder)
    if info.kind == "hf_config_only" and info.problem is None:
        raise UserError(f"{flag} {folder} holds a config and no weights")
    try:
        return resolve_step(folder, step)
    except UserError as error:
        raise UserError(f"{flag} {error}" if step is None else f"--ckpt-step: {error}") from None


def refuse_target(folder: Path, *, replaceable: bool, overwrite: bool, what: str) -> None:
    """Raise :class:`UserError` if writing ``what`` to ``--save`` would lose something that the user did not give up.

    ``replaceable`` says that the folder holds ``what`` and nothing else; only then ``overwrite`` means anything.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save {folder} is a file: name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not replaceable:
        raise UserError(f"--save {folder} holds more than {what}, which would be lost: choose another folder")
    if not overwrite:
        raise UserError(f"--save {folder} holds {what} already: choose another folder, or add --overwrite")


def join(parallel: ParallelOptions, architecture: ModelArchitecture) -> bool:
    """Check that the layout fits the model and the number of ranks, join them; returns whether this is the first rank.

    Raises :class:`UserError` naming every fault of the layout.
    """
    rendezvous = distributed.Rendezvous.from_torchrun()
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    faults = []
    if rendezvous.world_size % (tensor * pipeline):
        faults.append(
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} does not divide the "
            f"number of ranks, {rendezvous.world_size}: start them with torchrun --nproc-per-node {tensor * pipeline}"
        )
    if parallel.sequence_parallel and tensor == 1:
        faults.append("--sequence-parallel needs --tensor-model-parallel-size above 1: leave it out")
    faults += expert_layout_faults(parallel, rendezvous.world_size)
    refuse([*faults, *layout_faults_of_model(Options(parallel=parallel), architecture)])
    distributed.initialize(rendezvous, parallel, seed=0)
    return rendezvous.rank == 0


def without_recompute(parallel: ParallelOptions) -> ParallelOptions:
    """The layout of a model that is not trained."""
    return dataclasses.replace(parallel, recompute_granularity=None, recompute_method=None, recompute_num_layers=None)


def load_model(
    source: Path,
    architecture: ModelArchitecture,
    parallel: ParallelOptions,
    dtype: torch.dtype,
    make_vocab_size_divisible_by: int = 128,
) -> HiddenStateModel:
    """This rank's part of a model that is not trained, with the weights of ``source``; all ranks call it.

    Raises :class:`UserError` if ``source`` holds another model.
    """
    model = build_model(
        architecture,
        without_recompute(parallel),
        dtype=dtype,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )
    checkpoint.load_model_folder(model, source)
    return model.requires_grad_(False).eval()
