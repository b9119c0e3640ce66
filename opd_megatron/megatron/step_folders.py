"""Folders that appear whole or not at all, and which of them go.

A folder is written under a name that ends in ``.tmp`` and renamed when it is whole. Where a folder has the name
already it is renamed to ``NAME.replaced.tmp`` first; a process that dies between the two renames leaves it there, where
``config.checkpoint_paths`` still finds it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from zlib import crc32

from opd_megatron.config.checkpoint_paths import (
    HF_FOLDER,
    MANIFEST,
    REPLACED,
    SUMMED,
    TRACKER,
    complete_steps,
    step_folder_name,
)
from opd_megatron.config.options import CheckpointOptions
from opd_megatron.system import replacing

logger = logging.getLogger(__name__)

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


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as stream:
        stream.write(text)


def temporary_name(folder: Path) -> Path:
    """The name under which ``folder`` is written."""
    return folder.with_name(folder.name + ".tmp")


def empty_folder(folder: Path) -> Path:
    """Make ``folder`` anew; what a process that died has left in it goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def replace_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; the folder that has it so far goes when the new one is in place."""
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    # Without a folder of that name what stands under the other one may be all there is: it goes last.
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
    temporary = empty_folder(temporary_name(target))
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, temporary / path.name)
    replace_folder(temporary, target)


def publish(temporary: Path, final: Path, hf_folder: Path) -> None:
    """Seal a written step folder with its manifest, give it its name, and let the tracker name it."""
    root = final.parent
    files = {str(path.relative_to(temporary)): path.stat().st_size for path in temporary.rglob("*") if path.is_file()}
    sums = {name: crc32((temporary / name).read_bytes()) for name in SUMMED if name in files}
    _write_text(temporary / MANIFEST, json.dumps({"files": files, "crc32": sums}, indent=1) + "\n")
    _sync_directory(temporary)
    if not (root / HF_FOLDER / "config.json").exists():
        copy_hf_files(hf_folder, root / HF_FOLDER)
    replace_folder(temporary, final)
    _write_text(root / TRACKER, final.name.removeprefix("iter_").lstrip("0") or "0")
    _sync_directory(root)
    _clear_leftovers(root)


def _clear_leftovers(root: Path) -> None:
    """Remove what killed processes left, but not a replaced folder that is all there is of its step."""
    for leftover in root.glob("iter_*.tmp"):
        own = leftover.with_name(leftover.name.removesuffix(REPLACED))
        if own == leftover or own.exists():
            shutil.rmtree(leftover, ignore_errors=True)


def steps_to_remove(steps: Collection[int], saved: int, options: CheckpointOptions) -> list[int]:
    """Which of the complete ``steps`` go after ``saved`` was written.

    Kept are the newest up to ``saved``, every step of ``--save-retain-interval``, and the step of ``--ckpt-step``,
    which the user chose to go back to. Steps after ``saved`` are those of an abandoned continuation: they are not
    judged.
    """
    if options.save_keep_last is None and options.save_retain_interval is None:
        return []
    earlier = sorted(step for step in steps if step <= saved)
    kept = {saved, options.ckpt_step, *earlier[-(options.save_keep_last or 1) :]}
    interval = options.save_retain_interval
    if interval is not None:
        kept |= {step for step in earlier if step % interval == 0}
    return [step for step in earlier if step not in kept]


def remove_old_steps(root: Path, saved: int, options: CheckpointOptions) -> None:
    """Remove what :func:`steps_to_remove` names, provided that ``saved`` itself is complete.

    A folder loses its name before its files go, so what a killed process leaves is no step; the next save clears it
    away. A folder that cannot be removed is a warning: the run goes on.
    """
    steps = complete_steps(root)
    if saved not in steps:
        return
    for step in steps_to_remove(steps, saved, options):
        folder = root / step_folder_name(step)
        nameless = folder.with_name(folder.name + ".removed.tmp")
        try:
            folder.rename(nameless)
            shutil.rmtree(nameless)
        except OSError as error:
            logger.warning("%s was not removed: %s", folder, error)
