"""What a checkpoint folder holds, found out without torch and without reading any weights.

Two kinds are known. A **Hugging Face folder** has ``config.json`` and ``model.safetensors`` (or shards and an index).
A **torch_dist folder** has one folder per saved step, ``iter_0000010``, or ``release`` for converted weights; beside
them ``latest_checkpointed_iteration.txt`` (a number or ``release``) and ``hf/`` (config and tokenizer). Each step
folder made by this library ends with its manifest ``opd_megatron.json``, ``{"files": {name: bytes}, "crc32": {name:
sum}}``, and is complete if every file is there in full. Names that end in ``.tmp`` are unfinished, but for a step that
a killed process was about to replace: ``iter_0000010.replaced.tmp`` counts where there is no ``iter_0000010``.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from zlib import crc32

from opd_megatron.config.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "opd_megatron.json"
RELEASE: Final = "release"
HF_FOLDER = "hf"
REPLACED = ".replaced.tmp"
"""Ending of the name that a folder has while another one takes its place."""
SUMMED = (".metadata", "metadata.json", "common.pt")
"""Files of a step folder without which none of its tensors can be found; the manifest has their checksums."""

_STEP_NAME = re.compile(r"iter_(\d{7,})")
_LONGEST_HEADER = 100_000_000

Step = int | Literal["release"]


@dataclass(frozen=True)
class CheckpointInfo:
    """What is in a checkpoint folder.

    ``kind`` is None where there is no complete checkpoint, and ``hf_config_only`` for a Hugging Face folder without
    weights. ``steps`` are the complete numbered steps in ascending order and ``latest`` the step that is loaded unless
    another is asked for. ``hf_folder`` has the model's config, if there is one. ``problem`` says what is broken.
    """

    kind: Literal["hf", "torch_dist", "hf_config_only"] | None
    steps: list[int]
    latest: Step | None
    hf_folder: Path | None
    problem: str | None = None

    @property
    def loadable(self) -> bool:
        """Whether weights can be loaded from it."""
        return self.kind == "hf" or (self.kind == "torch_dist" and self.problem is None)


def step_folder_name(step: Step) -> str:
    """``iter_0000010`` or ``release``."""
    return RELEASE if step == RELEASE else f"iter_{step:07d}"


def inspect_checkpoint(path: str | Path) -> CheckpointInfo:
    """Look at a folder of either kind, or at one step folder itself; a path that does not exist has kind None."""
    folder = Path(path)
    if _is_step_folder(folder):
        return _inspect_step_folder(folder)
    steps: list[int] = []
    released, unfinished = False, []
    for step, inner in _step_folders(folder):
        fault = step_fault(inner)
        if fault:
            unfinished.append(f"{inner.name}: {fault}")
        elif isinstance(step, int):
            steps.append(step)
        else:
            released = True
    if steps or released or unfinished:
        return _inspect_tree(folder, sorted(steps), released, unfinished)
    if (folder / "config.json").is_file():
        return _inspect_hf(folder)
    return CheckpointInfo(None, [], None, None)


def resolve_step(path: str | Path, step: Step | None = None) -> Path:
    """The folder to load: a complete step folder of a torch_dist tree, or a Hugging Face folder itself.

    Raises :class:`UserError` if there is no complete checkpoint or if ``step`` is not among those that are there.
    """
    folder, info = Path(path), inspect_checkpoint(path)
    if info.kind == "hf":
        if step is not None:
            raise UserError(f"{folder} is a Hugging Face folder and has no step {step}: leave the step out")
        return folder
    if info.kind != "torch_dist":
        problem = f" ({info.problem})" if info.problem else ""
        beside = alternatives(folder) if _is_step_folder(folder) else ""
        raise UserError(f"{folder} holds no complete checkpoint{problem}{beside}")
    available = [*info.steps, *([RELEASE] if info.latest == RELEASE or _has_release(folder) else [])]
    if step is not None and step not in available:
        raise UserError(f"step {step} is not in {folder} (it has {', '.join(map(str, available))})")
    if step is None and info.problem:
        raise UserError(f"{folder}: {info.problem}")
    if _is_step_folder(folder):
        chosen = folder
    else:
        wanted = info.latest if step is None else step
        assert wanted is not None  # a torch_dist tree without a problem has a latest step
        chosen = dict(_step_folders(folder))[wanted]
    fault = _content_fault(chosen)
    if fault:
        raise UserError(f"{chosen} is damaged: {fault}{alternatives(chosen)}")
    return chosen


def complete_steps(folder: Path) -> list[int]:
    """The numbered steps of a torch_dist tree that are complete, in ascending order."""
    steps = [step for step, inner in _step_folders(folder) if isinstance(step, int) and step_fault(inner) is None]
    return sorted(steps)


def alternatives(damaged: Path) -> str:
    """The end of an error about one step folder: the newest good step beside it and how to load that."""
    step = _step_of(damaged.absolute())
    if step is None:
        return ""
    beside = damaged.absolute().parent
    good = [other for other in complete_steps(beside) if other != step]
    earlier = [other for other in good if step == RELEASE or other < step]
    folders = dict(_step_folders(beside))
    for other in [*reversed(earlier), *(other for other in good if other not in earlier)]:
        if _content_fault(folders[other]) is None:
            return (
                f"; step {other} is complete: load it with --ckpt-step {other} (a teacher: --opd-teacher-ckpt-step "
                f"{other}), or name its folder {folders[other]}"
            )
    return ""


def step_fault(folder: Path) -> str | None:
    """What is missing from one step folder, or None if it is complete.

    A folder without our manifest, as Megatron-LM writes it, passes if the files that every torch_dist checkpoint has
    are there.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        return _manifest_fault(folder, manifest)
    missing = [name for name in (".metadata", "metadata.json", "common.pt") if not (folder / name).is_file()]
    if not any(folder.glob("*.distcp")):
        missing.append("*.distcp")
    return f"{', '.join(missing)} missing" if missing else None


def _content_fault(folder: Path) -> str | None:
    """Which of the small files of a complete step folder is not the one that was written, or None."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    sums: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8")).get("crc32", {})
    changed = [name for name, value in sums.items() if crc32((folder / name).read_bytes()) != value]
    return f"{changed[0]} has other bytes than were written" if changed else None


def _manifest_fault(folder: Path, manifest: Path) -> str | None:
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        sizes = {str(name): int(size) for name, size in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if not sizes:
        return f"{MANIFEST} lists no files"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _step_of(folder: Path) -> Step | None:
    name = folder.name.removesuffix(REPLACED)
    match = _STEP_NAME.fullmatch(name)
    if match:
        return int(match[1])
    return RELEASE if name == RELEASE else None


def _step_folders(folder: Path) -> Iterator[tuple[Step, Path]]:
    """Steps and their folders, each step once: its own folder, or the one that was about to be replaced."""
    for inner in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not inner.is_dir():
            continue
        own = inner.with_name(inner.name.removesuffix(REPLACED))
        step = _step_of(inner)
        if step is not None and (own == inner or not own.exists()):
            yield step, inner


def _is_step_folder(folder: Path) -> bool:
    named = _step_of(folder.absolute()) is not None
    return (folder / ".metadata").is_file() or (
        named and ((folder / MANIFEST).is_file() or any(folder.glob("*.distcp")))
    )


def _has_release(folder: Path) -> bool:
    return any(step == RELEASE and step_fault(inner) is None for step, inner in _step_folders(folder))


def _with_config(folder: Path) -> Path | None:
    return folder if (folder / "config.json").is_file() else None


def _inspect_step_folder(folder: Path) -> CheckpointInfo:
    hf_folder = _with_config(folder.absolute().parent / HF_FOLDER)
    fault = step_fault(folder)
    if fault or folder.name.removesuffix(REPLACED).endswith(".tmp"):
        return CheckpointInfo(None, [], None, hf_folder, fault or "the save was not finished")
    step = _step_of(folder.absolute())
    numbered = [step] if isinstance(step, int) else []
    return CheckpointInfo("torch_dist", numbered, RELEASE if step is None else step, hf_folder)


def _inspect_tree(folder: Path, steps: list[int], released: bool, unfinished: list[str]) -> CheckpointInfo:
    hf_folder = _with_config(folder / HF_FOLDER)
    if not steps and not released:
        return CheckpointInfo(None, [], None, hf_folder, "; ".join(unfinished))
    latest: Step = steps[-1] if steps else RELEASE
    tracker = folder / TRACKER
    if tracker.is_file():
        named = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if named == RELEASE and released:
            latest = RELEASE
        elif named.isdecimal() and int(named) in steps:
            latest = int(named)
        else:
            # Loading an older step in its place would hide that the newest one is lost.
            broken = f" ({'; '.join(unfinished)})" if unfinished else ""
            complete = ", ".join([*map(str, steps), *([RELEASE] if released else [])])
            problem = f"{TRACKER} names {named[:40]!r}, which is not complete{broken}; complete: {complete}"
            if named.isdecimal():
                problem += alternatives(folder / step_folder_name(int(named)))
            return CheckpointInfo("torch_dist", steps, None, hf_folder, problem)
    return CheckpointInfo("torch_dist", steps, latest, hf_folder)


def _inspect_hf(folder: Path) -> CheckpointInfo:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    problem: str | None
    if single.is_file():
        problem = safetensors_fault(single)
    elif index.is_file():
        problem = _index_fault(folder, index)
    else:
        other = next((file.name for file in sorted(folder.glob("*.bin")) if "model" in file.name), None)
        shards = next((file.name for file in sorted(folder.glob("*.safetensors"))), None)
        if other:
            problem = f"{other} is not safetensors: save the model anew with transformers"
        else:
            problem = f"{shards} stands there without {index.name}" if shards else None
        return CheckpointInfo("hf_config_only", [], None, folder, problem)
    return CheckpointInfo("hf_config_only" if problem else "hf", [], None, folder, problem)


def _index_fault(folder: Path, index: Path) -> str | None:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name) for name in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{index.name} is damaged"
    if not shards:
        return f"{index.name} lists no shards"
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        return f"{len(missing)} of {len(shards)} shards missing, e.g. {missing[0]}"
    fault = next((fault for name in sorted(shards) if (fault := safetensors_fault(folder / name))), None)
    if fault:
        return fault
    inside = {name: _safetensors_header(folder / name) or {} for name in shards}
    absent = next((name for name, shard in weight_map.items() if name not in inside[str(shard)]), None)
    return None if absent is None else f"{index.name} names {weight_map[absent]} for weight {absent}, which it lacks"


def safetensors_fault(file: Path) -> str | None:
    """What is wrong with the size of a safetensors file, or None if it is whole.

    The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of the header as a
    little-endian integer, a JSON header with the offsets of each tensor, then the data.
    """
    header = _safetensors_header(file)
    if header is None:
        return f"{file.name} is damaged or cut off"
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"{file.name} has a damaged header"
    size = file.stat().st_size
    with file.open("rb") as stream:
        expected = 8 + struct.unpack("<Q", stream.read(8))[0] + max(ends, default=0)
    return None if size == expected else f"{file.name} has {size} bytes instead of {expected}"


def _safetensors_header(file: Path) -> dict[str, Any] | None:
    """The JSON header of a safetensors file, None if it cannot be read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            return None
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return None
    return header if isinstance(header, dict) else None
