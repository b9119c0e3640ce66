"""The preflight of a SGLang teacher; its questions are those of :mod:`opd_megatron.teacher.preflight`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_megatron.config.architecture import read_hf_config
from opd_megatron.config.errors import UserError
from opd_megatron.sample import Sample
from opd_megatron.teacher.preflight import (
    check_same_folder,
    check_same_model,
    check_scores,
    compare_encodings,
    known_tokens,
    plausible,
    probe_texts,
)
from opd_megatron.teacher.protocol import FailureKind, TeacherError, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPARED_IDS = 16384
"""A larger vocabulary is compared at this many ids, evenly spread, and at its last ids, where special tokens are."""


@dataclass(frozen=True)
class ServerInfo:
    """What a SGLang server says about itself; ``None`` where it does not."""

    model_path: str | None
    weight_version: str
    sglang_version: str | None
    max_tokens: int | None
    """Most tokens of prompt and response that it scores."""
    vocab_size: int | None
    """Read from the model's folder, where that can be read from here."""


def server_info(teacher: SGLangTeacher) -> ServerInfo:
    """Ask ``/model_info`` and ``/server_info``; raises :class:`TeacherError` if the server does not answer."""
    model, server = teacher.ask("/model_info"), teacher.ask("/server_info")
    if not isinstance(model, dict) or not isinstance(server, dict) or "model_path" not in model:
        raise TeacherError(f"teacher server {teacher.name}: /model_info names no model; is this a SGLang server?")
    # The server accepts prompts shorter than this.
    limit = server.get("max_req_input_len")
    return ServerInfo(
        model_path=model["model_path"],
        weight_version=str(model.get("weight_version", "")),
        sglang_version=server.get("version"),
        max_tokens=limit - 1 if isinstance(limit, int) else None,
        vocab_size=_vocab_size(model["model_path"]),
    )


def _vocab_size(model_path: Any) -> int | None:
    try:
        size = read_hf_config(str(model_path)).get("vocab_size")
    except (ValueError, OSError):
        return None
    return size if isinstance(size, int) else None


def preflight_sglang(
    teacher: SGLangTeacher,
    student_tokenizer: PreTrainedTokenizerBase,
    *,
    rollout_temperature: float = 1.0,
    allow_sampling_mismatch: bool = False,
    longest_sample: int | None = None,
    overlong: str = "stop",
    student_folders: Sequence[str | Path] = (),
    known_texts: Sequence[str] = (),
    student_log_probs: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[str]:
    """Check a server before the first step; returns warnings and restricts ``teacher`` to what its server takes.

    ``longest_sample`` is the most tokens that prompt and response can have together; whether more than the server takes
    are refused is said by ``overlong`` (``--opd-overlong``). ``student_folders`` are the
    folders the student starts from. ``known_texts`` are texts of the task, prompt and right answer, that a teacher
    should find likely. ``student_log_probs`` maps token ids ``[L]`` to the student's log-probabilities of tokens
    2..L ``[L - 1]`` at temperature 1. Raises :class:`UserError` if the server cannot be reached or does not fit.
    """
    if rollout_temperature != 1.0 and not allow_sampling_mismatch:
        raise UserError(
            f"--rollout-temperature {rollout_temperature:g} with --opd-type sglang: SGLang scores at "
            "temperature 1 only; sample at 1, use --opd-type megatron, or accept it with --opd-allow-sampling-mismatch"
        )
    name = f"teacher server {teacher.name}"
    try:
        info = server_info(teacher)
    except TeacherError as error:
        raise UserError(
            f"{error}; start the server (python -m sglang.launch_server --model-path DIR --port PORT) "
            "or correct --opd-teacher-url"
        ) from error
    too_short = _check_length(info, longest_sample, overlong, name)
    try:
        warnings = _check_tokenizer(teacher, student_tokenizer, name)
        _restrict(teacher, student_tokenizer, info, name)
        tokens = known_tokens(student_tokenizer, teacher.vocab_size, known_texts)
        first, second = teacher.pin(tokens), _score(teacher, tokens)
    except TeacherError as error:
        raise UserError(f"{error}; see the server's log") from error
    check_scores(first, second, name)
    found = [too_short, check_same_folder(student_folders, info.model_path, name)]
    if known_texts:
        found.append(plausible(first, teacher.vocab_size, name))
    if student_log_probs is not None:
        found.append(check_same_model(student_log_probs(tokens), first, name))
    if rollout_temperature != 1.0:
        found.append(f"{name} scores at temperature 1, the student samples at {rollout_temperature:g}")
    return warnings + [warning for warning in found if warning is not None]


def _score(teacher: SGLangTeacher, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities of ``tokens[1:]``."""
    sample = Sample(index=0, group_index=0, prompt="", prompt_tokens=tokens[:1], response_tokens=tokens[1:])
    return teacher.score([sample])[0].log_probs_T


def _check_length(info: ServerInfo, longest_sample: int | None, overlong: str, name: str) -> str | None:
    """A warning where samples can be too long for the server; raises :class:`UserError` if that is to end the run."""
    if info.max_tokens is None or longest_sample is None or longest_sample <= info.max_tokens:
        return None
    fault = f"{name} scores at most {info.max_tokens} tokens, but prompt and response can have {longest_sample}"
    if overlong == "stop":
        raise UserError(
            f"{fault}: start it with a larger --context-length, lower --rollout-max-prompt-len or "
            "--rollout-max-response-len, or choose --opd-overlong mask or drop"
        )
    return f"{fault}; longer samples: --opd-overlong {overlong}"


def _restrict(teacher: SGLangTeacher, student: PreTrainedTokenizerBase, info: ServerInfo, name: str) -> None:
    """Bound lengths and ids; without a word about the server's vocabulary only the ids of the tokenizer are safe."""
    highest = max(student.get_vocab().values())
    if info.vocab_size is not None and info.vocab_size <= highest:
        raise UserError(
            f"{name} has a vocabulary of {info.vocab_size}, but the student's tokenizer uses ids up to {highest}; "
            "choose a teacher with the student's tokenizer"
        )
    teacher.restrict(vocab_size=highest + 1 if info.vocab_size is None else info.vocab_size, max_tokens=info.max_tokens)


def _check_tokenizer(teacher: SGLangTeacher, student: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Compare encodings of probe texts and the texts of single ids; a server without a tokenizer gives a warning."""
    texts = probe_texts(student)
    try:
        encodings = _ask(teacher, "/tokenize", {"prompt": texts, "add_special_tokens": False}, "tokens", len(texts))
        compare_encodings(texts, student, encodings, name, lambda token: _detokenize(teacher, [token])[0])
        _compare_vocabulary(teacher, student, name)
    except TeacherFailure as error:
        if error.kind is not FailureKind.STATUS:
            raise
        return [f"{error}; its tokenizer could not be compared with the student's"]
    return []


def _detokenize(teacher: SGLangTeacher, ids: Sequence[int]) -> list[str]:
    question = {"tokens": [[i] for i in ids], "skip_special_tokens": False}
    return [str(text) for text in _ask(teacher, "/detokenize", question, "text", len(ids))]


def _ask(teacher: SGLangTeacher, path: str, question: Any, key: str, count: int) -> list[Any]:
    answer = teacher.ask(path, question)
    value = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(value, list) or len(value) != count:
        raise TeacherError(f"teacher server {teacher.name}: {path} does not answer with {count} {key}")
    return value


def _compare_vocabulary(teacher: SGLangTeacher, student: PreTrainedTokenizerBase, name: str) -> None:
    numbers = sorted(student.get_vocab().values())
    compared = sorted({*numbers[:: max(1, len(numbers) // COMPARED_IDS)], *numbers[-512:]})
    mine = [str(student.decode([i], skip_special_tokens=False)) for i in compared]
    for number, text, theirs in zip(compared, mine, _detokenize(teacher, compared), strict=True):
        # Versions of the tokenizers library differ in the spaces around a lone token.
        if text.strip() != theirs.strip():
            raise UserError(
                f"{name} has another tokenizer than the student: id {number} is {text!r} for the student and "
                f"{theirs!r} for the teacher; choose a teacher with the student's tokenizer"
            )
