"""The frozen models of the distillation term as a teacher, and what must hold of them and the student."""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import (
    is_self_taught,
    needs_teacher_hidden,
    reference_folder,
    student_architecture,
    teacher_architecture,
)
from opd_megatron.config.targets import (
    OPD_REFERENCE,
    REFERENCE,
    kept_reference,
    loads_reference,
    more_teachers,
    named_architectures,
    named_models,
    teacher_weights,
)
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.objectives.targets import TARGETS
from opd_megatron.questions import LogProbs, Respondent
from opd_megatron.teacher.megatron import MegatronTeacher, check_vocabulary, preflight_megatron
from opd_megatron.teacher.mixture import Combine, MixedMegatronTeachers
from opd_megatron.teacher.preflight import Finding, Student, check_scores, known_tokens, text_samples

logger = logging.getLogger(__name__)


def carried_tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a checkpoint folder brings along, if any."""
    hf_folder = inspect_checkpoint(folder).hf_folder
    if hf_folder is None or not (hf_folder / "tokenizer_config.json").exists():
        return None
    return load_tokenizer(hf_folder)


def megatron_teacher(options: Options, trainer: Respondent) -> MegatronTeacher:
    """``--opd-teacher-load``, with ``--opd-more-teachers`` mixed in."""
    temperature, more = options.rollout.rollout_temperature, more_teachers(options)
    sizes = named_architectures(options)
    members = [
        MegatronTeacher(
            trainer,
            "self" if is_self_taught(options) else str(options.opd.opd_teacher_load),
            temperature=temperature,
            vocab_size=teacher_architecture(options).vocab_size,
        ),
        *(
            MegatronTeacher(trainer, folder, temperature=temperature, vocab_size=sizes[name].vocab_size, model=name)
            for name, folder in more.items()
        ),
    ]
    combine = combination(options, len(members))
    return members[0] if combine is None else MixedMegatronTeachers(trainer, members, combine, temperature=temperature)


def combination(options: Options, count: int) -> Combine | None:
    """How the scores of ``count`` teachers become those of one; None where they are not mixed."""
    if options.opd.opd_teacher_mixture is None:
        return None
    mix, weights = TARGETS[options.opd.opd_teacher_mixture], teacher_weights(options, count)
    return lambda log_probs: mix(log_probs, weights).float().numpy()


def check_megatron(teacher: MegatronTeacher, student: Student) -> list[Finding]:
    """What the preflight finds of each Megatron teacher; raises ``UserError`` where one cannot teach."""
    members = teacher.members if isinstance(teacher, MixedMegatronTeachers) else [teacher]
    return [
        finding for member in members for finding in preflight_megatron(member, student, carried_tokenizer(member.name))
    ]


def compares_distributions(options: Options) -> bool:
    """Whether whole distributions of the student and its Megatron teachers can be compared.

    Embeddings of one tokenizer may have other numbers of rows: then the tokens that all models have are compared, of
    which the preflight makes sure that they are all that the tokenizer uses. Raises ``UserError`` where a comparison is
    needed and impossible.
    """
    student, teacher = student_architecture(options).vocab_size, teacher_architecture(options).vocab_size
    if (options.opd.opd_top_k or 0) > min(student, teacher):
        raise UserError(
            f"--opd-top-k {options.opd.opd_top_k} is more than the {min(student, teacher)} tokens of the vocabulary"
        )
    flag = f"--opd-baseline {options.opd.opd_baseline}"
    if options.opd.opd_loss == "distribution":
        flag = "--opd-loss distribution"
    elif options.opd.opd_baseline == "none":
        flag = f"--opd-token-score {options.opd.opd_token_score}"
    kept = (*more_teachers(options), kept_reference(options))
    folders = {str(options.opd.opd_teacher_load): teacher}
    architectures = named_architectures(options)
    folders |= {folder: architectures[name].vocab_size for name, _, folder in named_models(options) if name in kept}
    for folder, size in folders.items():
        if size == student or carried_tokenizer(folder) is not None:
            continue
        why = f"{folder} has a vocabulary of {size} tokens, the student of {student}, and no tokenizer to compare"
        if needs_teacher_hidden(options):
            raise UserError(f"{flag} needs models of one tokenizer: {why}")
        if options.opd.opd_exact_kl_interval:
            logger.warning("opd/reverse_kl_exact is not measured: %s", why)
        return False
    return True


def check_reference_scores(options: Options, trainer: Respondent, student: Student) -> None:
    """Raise ``UserError`` where a reference does not score a known text as a language model would."""
    folders = {REFERENCE: str(reference_folder(options))} if loads_reference(options) else {}
    folders |= {name: folder for name, _, folder in named_models(options) if name == OPD_REFERENCE}
    tokens = known_tokens(student, student_architecture(options).vocab_size)
    for name, folder in folders.items():
        first, second = (trainer.ask(LogProbs(name), text_samples([tokens]))[0] for _ in range(2))
        check_scores(first, second, f"reference {folder}")


def check_references(options: Options, student: Student) -> list[Finding]:
    """Whether the reference of ``--opd-reward-scale`` means the same by a token as the student."""
    sizes = {name: model.vocab_size for name, model in named_architectures(options).items()}
    return [
        finding
        for name, flag, folder in named_models(options)
        if name == OPD_REFERENCE
        for finding in check_vocabulary(f"{flag} {folder}", student, carried_tokenizer(folder), vocab_size=sizes[name])
    ]
