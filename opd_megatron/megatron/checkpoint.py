"""Checkpoints on disk: torch_dist step folders that appear whole or not at all, and weights from either kind of folder.

Layout of a checkpoint folder (read without torch by ``config.checkpoint_paths``)::

    latest_checkpointed_iteration.txt     a step number, or "release" for converted weights
    hf/                                   config and tokenizer of the model
    iter_0000010/ or release/             torch_dist files and the manifest opd_megatron.json
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opd_megatron.config.checkpoint_paths import (
    HF_FOLDER,
    MANIFEST,
    RELEASE,
    TRACKER,
    Step,
    resolve_step,
    step_folder_name,
)
from opd_megatron.config.errors import UserError
from opd_megatron.megatron import cpu
from opd_megatron.megatron.hf_weights import hf_weights_dtype, load_hf_weights, write_hf_weights
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.safe_checkpoint import SafeLoad, SynchronousSave, read_metadata
from opd_megatron.system import replacing

_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
_WEIGHT_FILES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""How the keys of a model's weights begin in torch_dist; those of the optimizer's state begin otherwise."""


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as stream:
        stream.write(text)


def _temporary_name(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def _empty_folder(folder: Path) -> Path:
    """Make ``folder`` anew; what a process that died has left in it goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _replace_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; the folder that has it so far goes when the new one is in place."""
    replaced = final.with_name(final.name + ".replaced.tmp")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy config and tokenizer of a Hugging Face folder (every file but weights) through a temporary name."""
    temporary = _empty_folder(_temporary_name(target))
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, temporary / path.name)
    _replace_folder(temporary, target)


def write_hf_folder(tensors: Iterable[tuple[str, Tensor]], target: Path, hf_folder: Path) -> None:
    """Write a Hugging Face folder: ``tensors``, and config and tokenizer of ``hf_folder``.

    It is written under a name that ends in ``.tmp`` and takes the place of ``target`` when it is whole. The config
    comes to name the data type of the weights, by which transformers chooses the one it loads.
    """
    target = target.resolve()
    temporary = _temporary_name(target)
    copy_hf_files(hf_folder, temporary)
    _name_dtype(temporary / "config.json", write_hf_weights(tensors, temporary))
    _replace_folder(temporary, target)


_EXTRA_STATE = "_extra_state"
"""Ending of what Transformer Engine's layers store beside parameters; without fp8 there is nothing in it."""


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """Set ``dtype``, or ``torch_dtype`` where transformers 4 wrote the config; one that is right stays as it is."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != name for key in keys):
        config.update(dict.fromkeys(keys, name))
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_state(model: HiddenStateModel) -> dict[str, Any]:
    # Megatron puts the process groups of the moment into the mapping, so it gets one of its own each time.
    state: dict[str, Any] = model.sharded_state_dict(metadata=dict(_OPTIMIZER_FORMAT))
    return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}


def _training_state(
    model: HiddenStateModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, *, is_loading: bool
) -> dict[str, Any]:
    _allocate_moments(optimizer)
    state = _model_state(model)
    with cpu.cuda_type_names():
        moments = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(_OPTIMIZER_FORMAT))
    return {"model": state, "optimizer": moments, "scheduler": scheduler.state_dict()}


def _nothing_to_do(inner: torch.optim.Optimizer, config: Any) -> None:
    """The state was allocated by :func:`_allocate_moments`."""


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has not stepped yet its zero moments, so that there is something to save or load."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if part.init_state_fn is None:
            # Megatron has no such function for SGD but calls it when it loads.
            part.init_state_fn = _nothing_to_do
        if inner is None or inner.state:
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if isinstance(inner, torch.optim.SGD):
                    inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                elif isinstance(inner, torch.optim.AdamW):
                    inner.state[parameter]["step"] = torch.tensor(0.0)
                    inner.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    inner.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        if not inner.state:
            part.init_state_fn(inner, part.config)


def save_checkpoint(
    folder: str | Path,
    step: Step,
    model: HiddenStateModel,
    *,
    hf_folder: Path,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    run_state: dict[str, Any] | None = None,
) -> Path:
    """Write one step folder; all ranks call it. Without an optimizer only the weights are written.

    The folder is written under a name that ends in ``.tmp`` and renamed when it is whole, then the tracker is replaced;
    a process that dies on the way leaves the earlier checkpoint as it was. ``run_state`` is a JSON-like mapping.
    """
    root = Path(folder)
    final = root / step_folder_name(step)
    temporary = _temporary_name(final)
    is_first = dist.get_rank() == 0
    if is_first:
        _empty_folder(temporary)
    _barrier()
    if optimizer is None or scheduler is None:
        state: dict[str, Any] = {"model": _model_state(model)}
    else:
        state = _training_state(model, optimizer, scheduler, is_loading=False)
        state["run"] = run_state or {}
        state["rng"] = torch.get_rng_state()
    dist_checkpointing.save(state, str(temporary), SynchronousSave())
    _barrier()
    if is_first:
        _publish(temporary, final, root, hf_folder)
    _barrier()
    return final


def _publish(temporary: Path, final: Path, root: Path, hf_folder: Path) -> None:
    files = {str(path.relative_to(temporary)): path.stat().st_size for path in temporary.rglob("*") if path.is_file()}
    _write_text(temporary / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
    if not (root / HF_FOLDER / "config.json").exists():
        copy_hf_files(hf_folder, root / HF_FOLDER)
    _replace_folder(temporary, final)
    _write_text(root / TRACKER, final.name.removeprefix("iter_").lstrip("0") or "0")


def save_release(target: Path, model: HiddenStateModel, hf_folder: Path) -> None:
    """Write weights, config and tokenizer as a checkpoint folder of their own; all ranks call it.

    The whole folder takes the place of ``target`` when it is written, so that weights never stand beside the config of
    other ones.
    """
    target = target.resolve()
    temporary = _temporary_name(target)
    if dist.get_rank() == 0:
        _empty_folder(temporary)
    save_checkpoint(temporary, RELEASE, model, hf_folder=hf_folder)
    if dist.get_rank() == 0:
        _replace_folder(temporary, target)
    _barrier()


def stored_dtype(source: Path) -> torch.dtype:
    """Data type of the weights in a Hugging Face folder or in one torch_dist step folder.

    Where they have several it is the smallest that holds them all.
    """
    if (source / "config.json").exists():
        return hf_weights_dtype(source)
    tensors = read_metadata(source).state_dict_metadata
    dtypes = [
        entry.properties.dtype
        for name, entry in tensors.items()
        if name.startswith(_MODEL_KEYS) and isinstance(entry, TensorStorageMetadata)
    ]
    if not dtypes:
        raise UserError(f"{source} holds no weights of a model")
    return reduce(torch.promote_types, dtypes)


def load_weights(model: HiddenStateModel, path: str | Path, step: Step | None = None) -> None:
    """Load weights from a torch_dist or Hugging Face folder; the layout that wrote them does not matter."""
    load_model_folder(model, resolve_step(path, step))


def load_model_folder(model: HiddenStateModel, source: Path) -> None:
    """Load weights from a Hugging Face folder or from one torch_dist step folder.

    Raises ``UserError`` if they are those of another model.
    """
    if (source / "config.json").exists():
        load_hf_weights(model, source)
        return
    wanted = _model_state(model)
    _check_stored(wanted, source, model.architecture.vocab_size)
    state = dist_checkpointing.load({"model": wanted}, str(source), SafeLoad())
    _load_parameters(model, state["model"])


def _check_stored(wanted: dict[str, Any], source: Path, vocab_size: int) -> None:
    """Raise ``UserError`` unless the step folder has every weight in its shape (padding of the vocabulary aside)."""
    stored = read_metadata(source).state_dict_metadata
    for tensor in wanted.values():
        if not isinstance(tensor, ShardedTensor):
            continue
        entry = stored.get(tensor.key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{source}: weight {tensor.key} is missing, which the model of the config has")
        found, expected = tuple(entry.size), tuple(tensor.global_shape)
        if tensor.allow_shape_mismatch and found[0] >= vocab_size:
            expected = (found[0], *expected[1:])
        if found != expected:
            raise UserError(f"{source}: weight {tensor.key} has shape {found}, the config says {expected}")


def _load_parameters(model: HiddenStateModel, state: dict[str, Any]) -> None:
    """Load the parameters of a model state; raises ``ValueError`` if one is missing or foreign."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    faults = model.load_state_dict(tensors, strict=False)
    missing = [name for name in faults.missing_keys if not name.endswith(_EXTRA_STATE)]
    if missing or faults.unexpected_keys:
        raise ValueError(f"the checkpoint lacks {missing} and has {faults.unexpected_keys} too many")


def has_training_state(source: Path) -> bool:
    """Whether a folder holds more than weights: the state of a run that can go on."""
    return (source / "common.pt").exists() and "run" in dist_checkpointing.load_common_state_dict(str(source))


def saved_layout(source: Path) -> dict[str, Any]:
    """The options that shaped the optimizer state in a step folder with a training state."""
    layout: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(source))["run"].get("layout", {})
    return layout


def load_training_state(
    source: Path,
    model: HiddenStateModel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> dict[str, Any]:
    """Resume from a step folder that :func:`save_checkpoint` wrote in the same layout; returns its ``run_state``."""
    state = _training_state(model, optimizer, scheduler, is_loading=True)
    loaded = dist_checkpointing.load(state, str(source), SafeLoad())
    _load_parameters(model, loaded["model"])
    _restore_first_step(loaded["optimizer"])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    torch.set_rng_state(loaded["rng"])
    run_state: dict[str, Any] = loaded["run"]
    return run_state


def _restore_first_step(state: dict[str, Any]) -> None:
    """Put a step count of 0, which Megatron leaves out when it saves, back where torch's Adam wants one.

    Where experts are spread over ranks their weights have an optimizer of their own, and the states are numbered.
    """
    for part in [part for key, part in state.items() if isinstance(key, int)] or [state]:
        moments: dict[Any, Any] = part.get("optimizer", part).get("state", {})
        if "common_step" not in moments and any("exp_avg" in entry for entry in moments.values()):
            moments["common_step"] = torch.tensor(0.0)
