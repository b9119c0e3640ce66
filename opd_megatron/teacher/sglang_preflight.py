"""The preflight of a SGLang teacher; its questions are those of :mod:`opd_megatron.teacher.preflight`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_megatron.config.architecture import read_hf_config
from opd_megatron.config.errors import UserError
from opd_megatron.teacher.preflight import (
    EXACT,
    ROUNDED,
    Finding,
    Precision,
    Student,
    check_replicas,
    check_scores,
    judged_texts,
    known_tokens,
    plausibility,
    same_model_warnings,
    text_samples,
)
from opd_megatron.teacher.protocol import TeacherError
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_client import HttpStatusError
from opd_megatron.teacher.throughput import RunSizes, measure
from opd_megatron.teacher.tokenizer_checks import (
    chat_questions,
    compare_chat_templates,
    compare_encodings,
    probe_texts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPARED_IDS = 16384
"""A larger vocabulary is compared at this many ids, evenly spread, and at its last ids, where special tokens are."""


@dataclass(frozen=True)
class ServerInfo:
    """What a SGLang server says about itself; ``None`` where it does not.

    Nothing else of ``/server_info`` is kept: it holds the keys that the server was started with.
    """

    model_path: str | None
    weight_version: str
    sglang_version: str | None
    max_tokens: int | None
    """Most tokens of prompt and response that it scores."""
    vocab_size: int | None
    """Read from the model's folder, where that can be read from here."""
    dtype: str
    """What it computes in; ``auto`` where it follows a model that cannot be read from here."""

    @property
    def precision(self) -> Precision:
        return EXACT if self.dtype == "float32" else ROUNDED

    def describe(self) -> str:
        limit = "an unknown number of" if self.max_tokens is None else f"at most {self.max_tokens}"
        return (
            f"{self.model_path} (weight version {self.weight_version or 'not named'}) on sglang "
            f"{self.sglang_version or 'of unknown version'} in {self.dtype}, takes {limit} tokens"
        )


def server_info(teacher: SGLangTeacher) -> ServerInfo:
    """Ask ``/model_info`` and ``/server_info``; raises :class:`TeacherError` if the server does not answer."""
    model, server = teacher.client.get("/model_info"), teacher.client.get("/server_info")
    if not isinstance(model, dict) or not isinstance(server, dict) or "model_path" not in model:
        raise TeacherError(f"teacher server {teacher.name}: /model_info names no model; is this a SGLang server?")
    config = _readable_config(model["model_path"])
    # The server accepts prompts shorter than this.
    limit, size = server.get("max_req_input_len"), config.get("vocab_size")
    dtype = str(server.get("dtype", "auto"))
    if dtype == "auto":
        dtype = str(config.get("dtype") or config.get("torch_dtype") or dtype)
    return ServerInfo(
        model_path=model["model_path"],
        weight_version=str(model.get("weight_version", "")),
        sglang_version=server.get("version"),
        max_tokens=limit - 1 if isinstance(limit, int) else None,
        vocab_size=size if isinstance(size, int) else None,
        dtype=str(server.get("quantization") or dtype),
    )


def _readable_config(model_path: Any) -> dict[str, Any]:
    try:
        return dict(read_hf_config(str(model_path)))
    except (ValueError, OSError):
        return {}


def preflight_sglang(
    servers: Sequence[SGLangTeacher],
    student: Student,
    *,
    rollout_temperature: float = 1.0,
    allow_sampling_mismatch: bool = False,
    longest_sample: int | None = None,
    sizes: RunSizes | None = None,
) -> list[Finding]:
    """Check a teacher before the first step: each of its ``servers``, and that they serve one model.

    Each of them is restricted to what its server takes. ``longest_sample`` is the most tokens that prompt and response
    can have together. Time is taken where ``sizes`` are given. Raises :class:`UserError` if a server cannot be reached
    or does not fit.
    """
    findings = [_temperature(rollout_temperature, allow_sampling_mismatch)]
    known: dict[str, np.ndarray] = {}
    precision = EXACT
    for server in servers:
        info = _reach(server)
        name = f"teacher server {server.name}"
        findings.append(Finding("server", f"{server.name} has {info.describe()}"))
        _check_length(info, longest_sample, name)
        precision = max(precision, info.precision, key=lambda item: item.largest)
        try:
            findings += _check_tokenizer(server, student, name)
            findings.append(_restrict(server, student, info, name))
            tokens = known_tokens(student, server.vocab_size)[: info.max_tokens]
            first, second = (_score(server, [tokens])[0] for _ in range(2))
            check_scores(first, second, name, info.precision)
            gap = float(np.abs(first - second).max(initial=0.0))
            findings.append(Finding("known text", f"{len(first)} tokens scored twice, the same to {gap:.1g}"))
            known[server.name] = first
            findings += same_model_warnings(student, info.model_path, tokens, first, name)
            if texts := judged_texts(student, info.max_tokens):
                own = None if student.log_probs is None else student.log_probs(texts)
                findings.append(plausibility(_score(server, texts), own, server.vocab_size, name))
            if sizes is not None:
                findings.append(Finding("throughput", measure(server, sizes, _ordinary_ids(student)).describe()))
        except TeacherError as error:
            raise UserError(f"{error}; see the server's log") from error
    if len(known) > 1:
        findings.append(check_replicas(known, precision))
    return findings


def _reach(server: SGLangTeacher) -> ServerInfo:
    try:
        return server_info(server)
    except TeacherError as error:
        raise UserError(
            f"{error}; start the server (python -m sglang.launch_server --model-path DIR --port PORT) "
            "or correct --opd-teacher-url"
        ) from error


def _ordinary_ids(student: Student) -> list[int]:
    tokenizer = student.tokenizer
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def _temperature(rollout_temperature: float, allow_sampling_mismatch: bool) -> Finding:
    if rollout_temperature == 1.0:
        return Finding("temperature", "1, as the student samples")
    if not allow_sampling_mismatch:
        raise UserError(
            f"--rollout-temperature {rollout_temperature:g} with --opd-type sglang: SGLang scores at "
            "temperature 1 only; sample at 1, use --opd-type megatron, or accept it with --opd-allow-sampling-mismatch"
        )
    text = f"the teacher's server scores at temperature 1, the student samples at {rollout_temperature:g}"
    return Finding("temperature", text, warning=True)


def _score(teacher: SGLangTeacher, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-probabilities of tokens 2..L of each text."""
    return [scores.log_probs_T for scores in teacher.score(text_samples(texts))]


def _check_length(info: ServerInfo, longest_sample: int | None, name: str) -> None:
    if info.max_tokens is not None and longest_sample is not None and longest_sample > info.max_tokens:
        raise UserError(
            f"{name} scores at most {info.max_tokens} tokens, but prompt and response can have {longest_sample}: "
            "start it with a larger --context-length, or lower --rollout-max-prompt-len or --rollout-max-response-len"
        )


def _restrict(teacher: SGLangTeacher, student: Student, info: ServerInfo, name: str) -> Finding:
    """Bound lengths and ids; without a word about the server's vocabulary only the ids of the tokenizer are safe."""
    highest = student.highest_id
    if info.vocab_size is not None and info.vocab_size <= highest:
        raise UserError(
            f"{name} has a vocabulary of {info.vocab_size}, but the student's tokenizer uses ids up to {highest}; "
            "choose a teacher with the student's tokenizer"
        )
    teacher.restrict(vocab_size=highest + 1 if info.vocab_size is None else info.vocab_size, max_tokens=info.max_tokens)
    size = "of unknown size" if info.vocab_size is None else f"of {info.vocab_size} ids"
    return Finding("vocabulary", f"{size}; the student's tokenizer uses ids up to {highest}")


def _check_tokenizer(teacher: SGLangTeacher, student: Student, name: str) -> list[Finding]:
    """Compare encodings, the texts of single ids and chats; a server that cannot be asked gives a warning."""
    tokenizer, texts = student.tokenizer, probe_texts(student.tokenizer)
    try:
        encodings = _ask(teacher, "/tokenize", {"prompt": texts, "add_special_tokens": False}, "tokens", len(texts))
        compare_encodings(texts, tokenizer, encodings, name, lambda token: _detokenize(teacher, [token])[0])
        compared = _compare_vocabulary(teacher, tokenizer, name)
    except HttpStatusError as error:
        return [Finding("tokenizer", f"{error}; its tokenizer could not be compared with the student's", warning=True)]
    special = len(set(tokenizer.all_special_ids))
    agreed = f"the student's: {len(texts)} texts with {special} special tokens, and {compared} ids one by one"
    return [Finding("tokenizer", agreed), _check_chat_template(teacher, student, name)]


def _check_chat_template(teacher: SGLangTeacher, student: Student, name: str) -> Finding:
    check, settings = "chat template", student.chat_template_kwargs
    if settings is None:
        return Finding(check, "not used: prompts are plain text")
    try:
        theirs = [_ask(teacher, "/tokenize", chat, "tokens", None) for chat in chat_questions(settings)]
    except HttpStatusError as error:
        return Finding(check, f"{error}; its chat template could not be compared with the student's", warning=True)
    fault = compare_chat_templates(
        student.tokenizer, settings, theirs, name, lambda token: _detokenize(teacher, [token])[0]
    )
    return Finding(check, fault or "the student's", warning=fault is not None)


def _detokenize(teacher: SGLangTeacher, ids: Sequence[int]) -> list[str]:
    question = {"tokens": [[i] for i in ids], "skip_special_tokens": False}
    return [str(text) for text in _ask(teacher, "/detokenize", question, "text", len(ids))]


def _ask(teacher: SGLangTeacher, path: str, question: Any, key: str, count: int | None) -> list[Any]:
    """The list ``key`` of the answer, of ``count`` entries unless that is None."""
    answer = teacher.client.post(path, question)
    value = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(value, list) or len(value) != (len(value) if count is None else count):
        raise TeacherError(f"teacher server {teacher.name}: {path} does not answer with {count or 'a list of'} {key}")
    return value


def _compare_vocabulary(teacher: SGLangTeacher, student: PreTrainedTokenizerBase, name: str) -> int:
    """Compare the texts of single ids; how many were compared."""
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
    return len(compared)
