"""Files and folders that options name: whether they are there and hold what they are for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from opd_megatron.config.architecture import read_hf_config
from opd_megatron.config.checkpoint_paths import TRACKER, inspect_checkpoint, resolve_step
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import holds_checkpoint, starting_point, teacher_folder
from opd_megatron.config.targets import named_folder_faults, named_models
from opd_megatron.config.teachers_file import read_teachers

ROLLOUT_ID = "{rollout_id}"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_LABELLED_REWARDS = ("math", "gsm8k", "exact")


class PromptCheck(Protocol):
    """Reads a prompt file and returns every fault as a phrase that names the file and the line."""

    def __call__(
        self,
        path: str,
        input_key: str,
        label_key: str | None,
        metadata_key: str,
        *,
        apply_chat_template: bool,
        routes: tuple[str, Sequence[str]] | None,
    ) -> list[str]: ...


def path_faults(options: Options, check_prompts: PromptCheck | None) -> list[str]:
    """Every fault of the paths; prompt files are read by ``check_prompts``, which knows their formats."""
    try:
        return [
            *_hf_checkpoint_faults(options),
            *_weight_faults(options),
            *_teacher_faults(options),
            *named_folder_faults(options),
            *_prompt_faults(options, check_prompts),
            *_recorded_faults(options),
            *_target_faults(options),
            *earlier_run_faults(options),
            *_save_hf_faults(options),
        ]
    except OSError as error:  # no permission, a name too long, a broken disk
        return [f"{error.filename or 'a path'} cannot be read ({error.strerror})"]


def _fault(action: Callable[[], object]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def _missing(flag: str, folder: str) -> str | None:
    if not Path(folder).exists():
        return f"{flag} {folder} does not exist"
    return None if Path(folder).is_dir() else f"{flag} {folder} is a file: name the folder"


def _hf_checkpoint_faults(options: Options) -> Iterator[str]:
    folder = options.checkpoint.hf_checkpoint
    if folder is None:
        return
    fault = _missing("--hf-checkpoint", folder)
    if fault:
        yield fault
        return
    fault = _fault(lambda: read_hf_config(folder))
    if fault:
        yield f"--hf-checkpoint {fault}"
    if not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        yield f"--hf-checkpoint {folder} holds no tokenizer (tokenizer.json or tokenizer_config.json): put it there"


def _weight_faults(options: Options) -> Iterator[str]:
    """Faults of ``--load`` and ``--ref-load``; a ``--load`` without a checkpoint is a run that begins."""
    load, ref_load, step = options.checkpoint.load, options.checkpoint.ref_load, options.checkpoint.ckpt_step
    resumes = load is not None and Path(load).is_dir() and holds_checkpoint(load)
    if load is not None and Path(load).is_file():
        yield f"--load {load} is a file: name the folder"
    elif load is not None and resumes:
        fault = _fault(lambda: resolve_step(load, step))
        if fault:
            yield f"{'--load' if step is None else '--ckpt-step:'} {fault}"
    elif load is not None and step is not None:
        yield f"--ckpt-step: step {step} is not in --load {load}, which holds no complete checkpoint"
    elif load is not None and options.checkpoint.finetune:
        yield f"--finetune has no weights to begin from: --load {load} holds no complete checkpoint"
    hf_checkpoint = options.checkpoint.hf_checkpoint
    if ref_load is not None:
        fault = _missing("--ref-load", ref_load)
        if not fault:
            fault = _fault(lambda: resolve_step(ref_load))
            fault = fault and f"--ref-load {fault}"
        if fault:
            yield fault
    elif not resumes and hf_checkpoint is not None and Path(hf_checkpoint).is_dir():
        # Only where these weights will be read: a folder with no more than config and tokenizer is of use, too.
        fault = _fault(lambda: starting_point(options))
        if fault:
            yield f"--hf-checkpoint {fault}: complete it, or remove what is left of the weights"


def _teacher_faults(options: Options) -> Iterator[str]:
    folder, step = teacher_folder(options), options.opd.opd_teacher_ckpt_step
    if folder is None:
        return
    fault = _missing("--opd-teacher-load", folder)
    if fault is None and inspect_checkpoint(folder).kind == "hf_config_only":
        problem = inspect_checkpoint(folder).problem or "a config without weights"
        fault = f"--opd-teacher-load {folder} holds no complete checkpoint ({problem})"
    elif fault is None:
        fault = _fault(lambda: resolve_step(folder, step))
        whole = step is None or inspect_checkpoint(folder).kind is None
        named = "--opd-teacher-load" if whole else "--opd-teacher-ckpt-step:"
        fault = fault and f"{named} {fault}"
    if fault:
        yield fault


def _prompt_faults(options: Options, check_prompts: PromptCheck | None) -> Iterator[str]:
    if check_prompts is None:
        return
    data, rewards = options.data, options.reward
    sets: list[tuple[str, str, str, str | None]] = []
    if data.prompt_data is not None:
        labelled = options.objective.loss_type == "sft_loss" or rewards.rm_type in _LABELLED_REWARDS
        sets.append(
            ("--prompt-data", data.prompt_data, data.input_key, options.label_key if labelled else data.label_key)
        )
    for name, path in options.evaluation.eval_prompt_data:
        labelled = (options.evaluation.eval_rm_type or rewards.rm_type) in _LABELLED_REWARDS
        key = options.eval_label_key or ("label" if labelled else None)
        sets.append((f"--eval-prompt-data {name}", path, options.eval_input_key, key))
    for flag, path, input_key, label_key in sets:
        found = check_prompts(
            path,
            input_key,
            label_key,
            data.metadata_key,
            apply_chat_template=data.apply_chat_template,
            routes=prompt_routes(options) if flag == "--prompt-data" else None,
        )
        yield from (f"{flag}: {fault}" for fault in found)


def prompt_routes(options: Options) -> tuple[str, list[str]] | None:
    """The metadata field by which prompts choose a teacher, and the teachers; None where they choose none."""
    opd = options.opd
    if not opd.use_opd or opd.opd_teachers is None or opd.opd_teacher_mixture is not None:
        return None
    return opd.opd_teacher_route_key, [entry.name for entry in read_teachers(opd.opd_teachers)[0]]


def _recorded_faults(options: Options) -> Iterator[str]:
    pattern = options.rollout.load_debug_rollout_data
    if pattern is None:
        return
    path = Path(pattern)
    if ROLLOUT_ID not in pattern:
        if not path.is_file():
            yield f"--load-debug-rollout-data {pattern} does not exist"
        return
    before, _, after = path.name.partition(ROLLOUT_ID)
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    if not any(name.startswith(before) and name.endswith(after) for name in names) and ROLLOUT_ID in path.name:
        yield f"--load-debug-rollout-data {pattern}: there is no such file for any rollout"


def _target_faults(options: Options) -> Iterator[str]:
    """Folders that will be written: nothing may stand in their way."""
    folders = (
        ("--run-dir", options.run.run_dir),
        ("--save", options.checkpoint.save),
        ("--save-hf", options.checkpoint.save_hf),
        ("--offload-dir", options.offload.offload_dir),
    )
    for flag, folder in folders:
        if folder is None:
            continue
        existing = Path(folder).resolve()
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            yield f"{flag} {folder}: {existing} is a file: choose another folder"
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield f"{flag} {folder}: {existing} is not writable: choose another folder"
        yield from (
            f"{flag} {folder} is also {source}, which would be overwritten: choose another folder"
            for source, read in _folders_read(options)
            if Path(read).resolve() == Path(folder).resolve()
        )


def _save_hf_faults(options: Options) -> Iterator[str]:
    """``--save-hf`` replaces its folder: it may hold an earlier export and nothing else."""
    named = options.checkpoint.save_hf
    if named is None or options.run.run_dir is None:
        return
    folder = Path(named)
    kept = [options.run_folder, options.save_folder, *(Path(read) for _, read in _folders_read(options))]
    if any(folder.resolve() in (path.resolve(), *path.resolve().parents) for path in kept):
        yield f"--save-hf {named} holds other folders of this run, which it would replace: choose a folder of its own"
    elif ROLLOUT_ID not in named and folder.is_dir() and any(folder.iterdir()) and not holds_only_a_model(folder):
        yield f"--save-hf {named} holds other files, which it would replace: choose a folder of its own"


def holds_only_a_model(folder: Path) -> bool:
    """Whether ``folder`` is a plain Hugging Face model folder, without folders in it."""
    return (folder / "config.json").is_file() and all(entry.is_file() for entry in folder.iterdir())


def earlier_run_faults(options: Options) -> Iterator[str]:
    """A run never writes over another: where one has been, it is resumed or another folder is named.

    With ``--finetune`` a run begins, wherever its weights come from.
    """
    if options.run.run_dir is None:
        return
    resumed = None if options.checkpoint.finetune else options.checkpoint.load
    if resumed is not None and Path(resumed).resolve() == options.save_folder.resolve():
        return
    for flag, folder, traces in (
        ("--run-dir", options.run_folder, ("metrics.jsonl", "checkpoints")),
        ("--save", options.save_folder, (TRACKER,)),
    ):
        if any((folder / trace).exists() for trace in traces):
            without = " and without --finetune" if options.checkpoint.finetune else ""
            yield (
                f"{flag} {folder} holds a run already: resume it with --load {options.save_folder}{without}, "
                "or choose another folder"
            )
            return


def _folders_read(options: Options) -> list[tuple[str, str]]:
    """The folders of models that a run reads and must leave as they are (``--load`` may be where it saves)."""
    folders = (
        ("--hf-checkpoint", options.checkpoint.hf_checkpoint),
        ("--ref-load", options.checkpoint.ref_load),
        ("--opd-teacher-load", teacher_folder(options)),
        *((flag, folder) for _, flag, folder in named_models(options)),
        ("--critic-load", options.objective.critic_load),
    )
    return [(flag, folder) for flag, folder in folders if folder is not None]
