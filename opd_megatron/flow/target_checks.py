"""Whether the frozen models of the distillation term mean the same by a token id as the student."""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import needs_teacher_hidden, student_architecture, teacher_architecture
from opd_megatron.config.targets import kept_beside_teacher, named_architectures, named_models
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.teacher.megatron import check_vocabulary
from opd_megatron.teacher.preflight import Finding, Student

logger = logging.getLogger(__name__)


def carried_tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a checkpoint folder brings along, if any."""
    hf_folder = inspect_checkpoint(folder).hf_folder
    if hf_folder is None or not (hf_folder / "tokenizer_config.json").exists():
        return None
    return load_tokenizer(hf_folder)


def compares_distributions(options: Options) -> bool:
    """Whether whole distributions of the student and its Megatron teacher can be compared.

    Raises ``UserError`` where that is needed and impossible.
    """
    student, teacher = student_architecture(options).vocab_size, teacher_architecture(options).vocab_size
    if (options.opd.opd_top_k or 0) > min(student, teacher):
        raise UserError(
            f"--opd-top-k {options.opd.opd_top_k} is more than the {min(student, teacher)} tokens of the vocabulary"
        )
    needed = needs_teacher_hidden(options)
    flag = f"--opd-baseline {options.opd.opd_baseline}"
    if options.opd.opd_loss == "distribution":
        flag = "--opd-loss distribution"
    sizes = {"a teacher": teacher}
    for (name, named, _), model in zip(named_models(options), named_architectures(options).values(), strict=True):
        if name in kept_beside_teacher(options):
            sizes[named] = model.vocab_size
    for owner, size in sizes.items():
        if size != student and needed:
            raise UserError(
                f"{flag} needs {owner} with the student's vocabulary size: it has {size}, the student {student}"
            )
    if teacher != student and options.opd.opd_exact_kl_interval:
        logger.warning("opd/reverse_kl_exact is not measured: teacher and student have vocabularies of other sizes")
    return teacher == student


def check_references(options: Options, student: Student) -> list[Finding]:
    """Whether the frozen models beside the teacher mean the same by a token as the student."""
    sizes = {name: model.vocab_size for name, model in named_architectures(options).items()}
    return [
        finding
        for name, flag, folder in named_models(options)
        for finding in check_vocabulary(f"{flag} {folder}", student, carried_tokenizer(folder), vocab_size=sizes[name])
    ]
