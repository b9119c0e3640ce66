"""Checkpoints on disk: torch_dist step folders that appear whole or not at all, and weights from either kind of folder.

Layout of a checkpoint folder (read without torch by ``config.checkpoint_paths``)::

    latest_checkpointed_iteration.txt     a step number, or "release" for converted weights
    hf/                                   config and tokenizer of the model
    iter_0000010/ or release/             torch_dist files and the manifest opd_megatron.json

What is in a step folder does not depend on the layout that wrote it (see ``chunks`` and ``optimizer_state``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opd_megatron.config.checkpoint_paths import RELEASE, Step, resolve_step, step_folder_name
from opd_megatron.config.errors import UserError
from opd_megatron.megatron import step_folders
from opd_megatron.megatron.chunks import ChunkedTensor, Entries, model_entries
from opd_megatron.megatron.hf_weights import hf_weights_dtype, load_hf_weights, write_hf_weights
from opd_megatron.megatron.model import Models, chunks_of
from opd_megatron.megatron.optimizer_state import (
    PREFIX,
    optimizer_entries,
    set_steps_taken,
    steps_taken,
)
from opd_megatron.megatron.safe_checkpoint import COMMON, StepReader, read_common, write_step


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def _together(action: Callable[[], None]) -> None:
    """Do ``action``; a ``UserError`` of one rank, which alone may have met a damaged file, is raised on all."""
    fault: UserError | None = None
    try:
        action()
    except UserError as error:
        fault = error
    faults: list[UserError | None] = [fault] * dist.get_world_size()
    if len(faults) > 1:
        dist.all_gather_object(faults, fault)
    for found in faults:
        if found is not None:
            raise found


def write_hf_folder(tensors: Iterable[tuple[str, Tensor]], target: Path, hf_folder: Path) -> None:
    """Write a Hugging Face folder: ``tensors``, and config and tokenizer of ``hf_folder``.

    It is written under a name that ends in ``.tmp`` and takes the place of ``target`` when it is whole. The config
    comes to name the data type of the weights, by which transformers chooses the one it loads.
    """
    target = target.resolve()
    temporary = step_folders.temporary_name(target)
    step_folders.copy_hf_files(hf_folder, temporary)
    _name_dtype(temporary / "config.json", write_hf_weights(tensors, temporary))
    step_folders.replace_folder(temporary, target)


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """Set ``dtype``, or ``torch_dtype`` where transformers 4 wrote the config; one that is right stays as it is."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != name for key in keys):
        config.update(dict.fromkeys(keys, name))
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_checkpoint(
    folder: str | Path,
    step: Step,
    models: Models,
    *,
    hf_folder: Path,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    run_state: dict[str, Any] | None = None,
    beside: tuple[Entries, dict[str, Any]] = ({}, {}),
) -> Path:
    """Write one step folder; all ranks call it.

    ``run_state`` is a JSON-like mapping; without it only the weights are written. Without an optimizer and its
    scheduler a run can resume with new ones only. ``beside`` is what else the step folder is to hold, a critic for one:
    this rank's pieces and what is not sharded.

    The folder is written under a name that ends in ``.tmp`` and renamed when it is whole, then the tracker is replaced;
    a process that dies on the way leaves the earlier checkpoint as it was.
    """
    entries, common = entries_of(models, optimizer, scheduler)
    if run_state is not None:
        common |= {"run": run_state, "rng": torch.get_rng_state()}
    return save_entries(Path(folder), step, entries | beside[0], common | beside[1], hf_folder)


def entries_of(
    models: Models, optimizer: MegatronOptimizer | None, scheduler: OptimizerParamScheduler | None
) -> tuple[Entries, dict[str, Any]]:
    """What this rank writes of a model and of its optimizer, where there is one, and what is not sharded of them."""
    entries = model_entries(chunks_of(models), to_write=True)
    if optimizer is None or scheduler is None:
        return entries, {}
    entries |= optimizer_entries(optimizer, chunks_of(models), to_write=True)
    return entries, {"scheduler": scheduler.state_dict(), "optimizer_steps": steps_taken(optimizer)}


def renamed(entries: Entries, prefix: str) -> Entries:
    """The same pieces of tensors whose names begin with ``prefix``."""
    return {prefix + name: entry for name, entry in entries.items()}


def stores(folder: Path, name: str) -> bool:
    """Whether a step folder has the tensor ``name``; raises ``UserError`` if its metadata is damaged."""
    return name in StepReader(folder).tensors()


def save_entries(root: Path, step: Step, entries: Entries, common: dict[str, Any], hf_folder: Path) -> Path:
    """Write one step folder from this rank's pieces; all ranks call it."""
    final = root / step_folder_name(step)
    temporary = step_folders.temporary_name(final)
    is_first = dist.get_rank() == 0
    if is_first:
        step_folders.empty_folder(temporary)
    _barrier()
    write_step(temporary, entries, common)
    _barrier()
    if is_first:
        step_folders.publish(temporary, final, hf_folder)
    _barrier()
    return final


def save_release(target: Path, entries: Entries, hf_folder: Path) -> None:
    """Write weights, config and tokenizer as a checkpoint folder of their own; all ranks call it.

    The whole folder takes the place of ``target`` when it is written, so that weights never stand beside the config of
    other ones.
    """
    target = target.resolve()
    temporary = step_folders.temporary_name(target)
    if dist.get_rank() == 0:
        step_folders.empty_folder(temporary)
    save_entries(temporary, RELEASE, entries, {}, hf_folder)
    if dist.get_rank() == 0:
        step_folders.replace_folder(temporary, target)
    _barrier()


def stored_dtype(source: Path) -> torch.dtype:
    """Data type of the weights in a Hugging Face folder or in one torch_dist step folder.

    Where they have several it is the smallest that holds them all.
    """
    if (source / "config.json").exists():
        return hf_weights_dtype(source)
    stored = StepReader(source).tensors()
    beside = ("optimizer", "critic.", "moving_average.")
    dtypes = [entry.properties.dtype for name, entry in stored.items() if not name.startswith(beside)]
    if not dtypes:
        raise UserError(f"{source} holds no weights of a model")
    return reduce(torch.promote_types, dtypes)


def load_weights(models: Models, path: str | Path, step: Step | None = None) -> None:
    """Load weights from a torch_dist or Hugging Face folder; the layout that wrote them does not matter."""
    load_model_folder(models, resolve_step(path, step))


def load_model_folder(models: Models, source: Path, prefix: str = "") -> None:
    """Load weights from a Hugging Face folder or from one torch_dist step folder, piece by piece into their place.

    ``prefix`` stands before their names in the step folder of another model. Raises ``UserError`` if they are those of
    another model, or damaged.
    """
    chunks = chunks_of(models)
    if (source / "config.json").exists():
        load_hf_weights(chunks, source)
        return
    wanted = renamed(model_entries(chunks, to_write=False), prefix)
    vocab_size = chunks[0].architecture.vocab_size

    def read() -> None:
        reader = StepReader(source)
        check_weights(reader, wanted, vocab_size)
        read_entries(reader, wanted)

    _together(read)


def check_weights(reader: StepReader, wanted: Entries, vocab_size: int) -> None:
    """Raise ``UserError`` unless a step folder has all of ``wanted`` in its shape (padding of the vocabulary aside)."""
    stored = reader.tensors()
    for name, entry in wanted.items():
        if name not in stored:
            raise UserError(f"{reader.folder}: weight {name} is missing, which the model of the config has")
        fault = _shape_fault(entry, stored[name], vocab_size)
        if fault:
            raise UserError(f"{reader.folder}: weight {name} has {fault}")


def _shape_fault(entry: ChunkedTensor, stored: TensorStorageMetadata, vocab_size: int) -> str | None:
    found, expected = tuple(stored.size), entry.shape
    if entry.padded and found[0] >= vocab_size:
        expected = (found[0], *expected[1:])
    return None if found == expected else f"shape {found}, the config says {entry.shape}"


@torch.no_grad()
def read_entries(reader: StepReader, wanted: Entries) -> None:
    """Read pieces into their place; rows of a padded vocabulary that the folder lacks become zero."""
    stored = reader.tensors()
    for name, entry in wanted.items():
        if entry.shape != tuple(stored[name].size):
            for _, tensor in entry.pieces.values():
                tensor().zero_()
    reader.read(wanted)


def has_training_state(source: Path) -> bool:
    """Whether a folder holds more than weights: the state of a run that can go on."""
    return (source / COMMON).exists() and "run" in read_common(source)


def load_training_state(
    source: Path,
    models: Models,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    check: Callable[[dict[str, Any]], None],
    with_optimizer: bool = True,
    with_rng: bool = True,
) -> dict[str, Any]:
    """Resume from a step folder of any layout, whose weights are loaded already; returns its ``run_state``.

    ``check`` may refuse the run state before the optimizer's tensors are read. Raises ``UserError`` if the optimizer's
    state is not there or not that of these models.
    """
    common = read_common(source)
    run_state: dict[str, Any] = common["run"]
    if with_optimizer:
        check(run_state)
        load_optimizer(source, common, models, optimizer, scheduler)
    if with_rng:
        torch.set_rng_state(common["rng"])
    return run_state


def load_optimizer(
    source: Path,
    saved: dict[str, Any],
    models: Models,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    prefix: str = "",
) -> None:
    """Read optimizer and schedule from a step folder; ``saved`` is what it holds of them that is not sharded.

    ``prefix`` is that of :func:`load_model_folder`. Raises ``UserError`` if they are not there or of another model.
    """
    if "optimizer_steps" not in saved:
        raise UserError(f"{source} was saved without the optimizer's state: resume with --no-load-optim")
    wanted = renamed(optimizer_entries(optimizer, chunks_of(models), to_write=False), prefix)
    vocab_size = chunks_of(models)[0].architecture.vocab_size
    _together(lambda: _read_optimizer(StepReader(source), wanted, vocab_size))
    set_steps_taken(optimizer, saved["optimizer_steps"])
    scheduler.load_state_dict(saved["scheduler"])


def _read_optimizer(reader: StepReader, wanted: Entries, vocab_size: int) -> None:
    stored = reader.tensors()
    for name, entry in wanted.items():
        if name not in stored or _shape_fault(entry, stored[name], vocab_size):
            raise UserError(
                f"{reader.folder} has no optimizer state {name.removeprefix(PREFIX)} that fits: resume with "
                "--no-load-optim, or take the weights alone with --finetune"
            )
    read_entries(reader, wanted)
