"""Which frozen models stand behind the target of the distillation term, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.checkpoint_paths import inspect_checkpoint, resolve_step
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import checkpoint_architecture, has_megatron_teacher, needs_reference

REFERENCE = "reference"
"""The reference of the objective's own KL, which the target shares where it is the same folder."""
OPD_REFERENCE = "opd_reference"
"""The reference of ``--opd-reward-scale`` where it is another."""


def extrapolates(options: Options) -> bool:
    """Whether ``--opd-reward-scale`` makes the target another one than the teacher."""
    return options.opd.use_opd and options.opd.opd_reward_scale != 1.0


def opd_reference_name(options: Options) -> str | None:
    """The frozen model that is the reference of ``--opd-reward-scale``; None where the target needs none."""
    if not extrapolates(options):
        return None
    named, default = options.opd.opd_ref_load, options.checkpoint.ref_load or options.checkpoint.hf_checkpoint
    shared = named is None or (default is not None and Path(named).resolve() == Path(default).resolve())
    return REFERENCE if shared else OPD_REFERENCE


def more_teachers(options: Options) -> dict[str, str]:
    """Folder of each Megatron teacher beside ``--opd-teacher-load``, by its name in the trainer."""
    folders = options.opd.opd_more_teachers if has_megatron_teacher(options) else ()
    return {f"teacher_{number}": folder for number, folder in enumerate(folders, start=2)}


def teacher_weights(options: Options, count: int) -> list[float]:
    """``--opd-teacher-weights`` of ``count`` teachers, or equal ones, divided by their sum."""
    weights = options.opd.opd_teacher_weights or (1.0,) * count
    return [weight / sum(weights) for weight in weights]


def loads_reference(options: Options) -> bool:
    """Whether the model of ``--ref-load`` (or ``--hf-checkpoint``) is loaded as :data:`REFERENCE`."""
    return needs_reference(options) or opd_reference_name(options) == REFERENCE


def named_models(options: Options) -> list[tuple[str, str, str]]:
    """``(name, flag, folder)`` of each frozen model beside ``--opd-teacher-load`` and the shared reference.

    Their precision, layout and batches are those of ``--opd-teacher-*``.
    """
    models = [(name, "--opd-more-teachers", folder) for name, folder in more_teachers(options).items()]
    if opd_reference_name(options) == OPD_REFERENCE:
        models.append((OPD_REFERENCE, "--opd-ref-load", str(options.opd.opd_ref_load)))
    return models


def named_architectures(options: Options) -> dict[str, ModelArchitecture]:
    """Architecture of each of :func:`named_models` by its name; raises :class:`UserError` for a folder without one."""
    return {name: checkpoint_architecture(folder, flag) for name, flag, folder in named_models(options)}


def kept_reference(options: Options) -> str | None:
    """The reference whose hidden rows the term needs in training as it needs the teachers', if any."""
    return opd_reference_name(options) if options.opd.opd_loss == "distribution" else None


def named_folder_faults(options: Options) -> Iterator[str]:
    """What is wrong with the folders of :func:`named_models`."""
    for _, flag, folder in named_models(options):
        if not Path(folder).is_dir():
            kind = "is a file: name the folder" if Path(folder).exists() else "does not exist"
            yield f"{flag} {folder} {kind}"
        elif inspect_checkpoint(folder).kind == "hf_config_only":
            problem = inspect_checkpoint(folder).problem or "a config without weights"
            yield f"{flag} {folder} holds no complete checkpoint ({problem})"
        else:
            try:
                resolve_step(folder)
            except UserError as error:
                yield f"{flag} {error}"
