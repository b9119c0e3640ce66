"""The preflight of a SGLang teacher; its questions are those of :mod:`opd_megatron.teacher.preflight`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_megatron.config.architecture import read_hf_config
from opd_megatron.config.errors import UserError
from opd_megatron.teacher.agreement import EXACT, ROUNDED, Tolerance
from opd_megatron.teacher.preflight import (
    Finding,
    Student,
    check_scores,
    judged_texts,
    known_tokens,
    plausibility,
    same_model_warnings,
    text_samples,
    unknown_ids,
)
from opd_megatron.teacher.protocol import TeacherError, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
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

_NO_SUCH_QUESTION = (400, 404, 405, 500, 501)
"""Statuses of a server that lacks a tokenizer, a chat template or their endpoint; another may answer next time."""


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
    def tolerance(self) -> Tolerance:
        """How far its answers about one text may differ."""
        return EXACT if self.dtype == "float32" else ROUNDED

    def describe(self) -> str:
        limit = "an unknown number of" if self.max_tokens is None else f"at most {self.max_tokens}"
        return (
            f"{self.model_path} (weight version {self.weight_version or 'not named'}) on sglang "
            f"{self.sglang_version or 'of unknown version'} in {self.dtype}, takes {limit} tokens"
        )


def server_info(teacher: SGLangTeacher, replica: int = 0) -> ServerInfo:
    """Ask ``/model_info`` and ``/server_info``; raises :class:`TeacherError` if the server does not answer."""
    model, server = (teacher.ask(path, replica=replica) for path in ("/model_info", "/server_info"))
    if not isinstance(model, dict) or not isinstance(server, dict) or "model_path" not in model:
        name = teacher.clients[replica].server
        raise TeacherError(f"{name}: /model_info names no model; is this a SGLang server?")
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
    teacher: SGLangTeacher,
    student: Student,
    *,
    rollout_temperature: float = 1.0,
    allow_sampling_mismatch: bool = False,
    longest_sample: int | None = None,
    overlong: str = "stop",
    sizes: RunSizes | None = None,
) -> list[Finding]:
    """Check a teacher before the first step: each of its servers, that they serve one model, and how it scores.

    ``teacher`` is restricted to what its servers take, and held to the weights that they have. ``longest_sample`` is
    the most tokens that prompt and response can have together; ``overlong`` (``--opd-overlong``) says whether it is
    refused that a server takes less. Time is taken where ``sizes`` are given. Raises :class:`UserError` if a server
    cannot be reached or does not fit.
    """
    findings = [_temperature(rollout_temperature, allow_sampling_mismatch)]
    infos = []
    try:
        with teacher.impatient():
            for replica in range(len(teacher.clients)):
                infos.append(_reach(teacher, replica))
                findings += _check_server(teacher, replica, infos[-1], student, longest_sample, overlong)
            findings += _check_scores(teacher, infos, student)
            if sizes is not None:
                findings.append(Finding("throughput", measure(teacher, sizes, _ordinary_ids(student)).describe()))
    except TeacherError as error:
        raise UserError(f"{error}; see the server's log") from error
    return findings


def _reach(teacher: SGLangTeacher, replica: int) -> ServerInfo:
    try:
        return server_info(teacher, replica)
    except TeacherError as error:
        raise UserError(
            f"{error}; start the server (python -m sglang.launch_server --model-path DIR --port PORT) "
            "or correct --opd-teacher-url"
        ) from error


def _check_server(
    teacher: SGLangTeacher,
    replica: int,
    info: ServerInfo,
    student: Student,
    longest_sample: int | None,
    overlong: str,
) -> list[Finding]:
    """What can differ from server to server: who it is, its context, its tokenizer, its vocabulary."""
    client = teacher.clients[replica]
    return [
        *check_length(info, longest_sample, overlong, client.server),
        Finding("server", f"{client.url} has {info.describe()}"),
        *_check_tokenizer(teacher, replica, student),
        *_restrict(teacher, student, info, client.server),
    ]


def _check_scores(teacher: SGLangTeacher, infos: Sequence[ServerInfo], student: Student) -> list[Finding]:
    """A known text scored by every server and once more, and texts of the data."""
    name = f"teacher server {teacher.name}"
    tokens = known_tokens(student, teacher.vocab_size)[: teacher.max_tokens]
    first = teacher.pin(tokens)
    second = teacher.score(text_samples([tokens]))[0].log_probs_T
    check_scores(first, second, name, max((info.tolerance for info in infos), key=lambda it: it.mean))
    gap = float(np.abs(first - second).max(initial=0.0))
    findings = [Finding("known text", f"{len(first)} tokens scored twice, the same to {gap:.1g}")]
    if len(infos) > 1:
        findings.append(Finding("replicas", f"{len(infos)} servers score the known text the same"))
    folders = dict.fromkeys(info.model_path for info in infos)
    findings += same_model_warnings(student, list(folders), tokens, first, name)
    if texts := judged_texts(student, teacher.max_tokens):
        own = None if student.log_probs is None else student.log_probs(texts)
        scores = [scores.log_probs_T for scores in teacher.score(text_samples(texts))]
        findings.append(plausibility(scores, own, teacher.vocab_size, name))
    return findings


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


def check_length(info: ServerInfo, longest_sample: int | None, overlong: str, name: str) -> list[Finding]:
    """A warning where samples can be too long for the server; raises :class:`UserError` if that is to end the run."""
    if info.max_tokens is None or longest_sample is None or longest_sample <= info.max_tokens:
        return []
    fault = f"{name} scores at most {info.max_tokens} tokens, but prompt and response can have {longest_sample}"
    if overlong == "stop":
        raise UserError(
            f"{fault}: start it with a larger --context-length, lower --rollout-max-prompt-len or "
            "--rollout-max-response-len, or choose --opd-overlong mask or drop"
        )
    return [Finding("context", f"{fault}; longer samples: --opd-overlong {overlong}", warning=True)]


def _restrict(teacher: SGLangTeacher, student: Student, info: ServerInfo, name: str) -> list[Finding]:
    """Bound lengths and ids; without a word about the server's vocabulary only the ids of the tokenizer are safe."""
    highest = student.highest_id
    if info.vocab_size is not None and info.vocab_size <= highest:
        raise UserError(
            f"{name} has a vocabulary of {info.vocab_size}, but the student's tokenizer uses ids up to {highest}; "
            "choose a teacher with the student's tokenizer"
        )
    known = highest + 1 if info.vocab_size is None else info.vocab_size
    teacher.restrict(vocab_size=known, server_vocab_size=info.vocab_size, max_tokens=info.max_tokens)
    size = "of unknown size" if info.vocab_size is None else f"of {info.vocab_size} ids"
    return [
        Finding("vocabulary", f"{size}; the student's tokenizer uses ids up to {highest}"),
        *unknown_ids(student, known, name, "a response with one has no score: see --opd-on-teacher-failure"),
    ]


def _check_tokenizer(teacher: SGLangTeacher, replica: int, student: Student) -> list[Finding]:
    """Compare encodings, the texts of single ids and chats; a server that cannot be asked gives a warning."""
    tokenizer, texts = student.tokenizer, probe_texts(student.tokenizer)
    asked = _Tokenizer(teacher, replica)
    try:
        compare_encodings(texts, tokenizer, asked.encode(texts), asked.name, asked.decode)
        compared = _compare_vocabulary(asked, tokenizer)
    except TeacherFailure as error:
        if error.status not in _NO_SUCH_QUESTION:
            raise
        return [Finding("tokenizer", f"{error}; its tokenizer could not be compared with the student's", warning=True)]
    special = len(set(tokenizer.all_special_ids))
    agreed = f"the student's: {len(texts)} texts with {special} special tokens, and {compared} ids one by one"
    return [Finding("tokenizer", agreed), _check_chat_template(asked, student)]


def _check_chat_template(asked: _Tokenizer, student: Student) -> Finding:
    check, settings = "chat template", student.chat_template_kwargs
    if settings is None:
        return Finding(check, "not used: prompts are plain text")
    try:
        theirs = [asked.encode_chat(chat) for chat in chat_questions(settings)]
    except TeacherFailure as error:
        if error.status not in _NO_SUCH_QUESTION:
            raise
        return Finding(check, f"{error}; its chat template could not be compared with the student's", warning=True)
    fault = compare_chat_templates(student.tokenizer, settings, theirs, asked.name, asked.decode)
    return Finding(check, fault or "the student's", warning=fault is not None)


class _Tokenizer:
    """The tokenizer of one server, asked through its endpoints."""

    def __init__(self, teacher: SGLangTeacher, replica: int) -> None:
        self.name = teacher.clients[replica].server
        self._teacher = teacher
        self._replica = replica

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._ask("/tokenize", {"prompt": texts, "add_special_tokens": False}, "tokens", len(texts))

    def encode_chat(self, chat: Mapping[str, Any]) -> list[int]:
        return self._ask("/tokenize", chat, "tokens", None)

    def decode_each(self, ids: Sequence[int]) -> list[str]:
        """The text of every id by itself."""
        question = {"tokens": [[i] for i in ids], "skip_special_tokens": False}
        return [str(text) for text in self._ask("/detokenize", question, "text", len(ids))]

    def decode(self, number: int) -> str:
        return self.decode_each([number])[0]

    def _ask(self, path: str, question: Any, key: str, count: int | None) -> list[Any]:
        """The list ``key`` of the answer, of ``count`` entries unless that is None."""
        answer = self._teacher.ask(path, question, replica=self._replica)
        value = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(value, list) or len(value) != (len(value) if count is None else count):
            raise TeacherError(f"{self.name}: {path} does not answer with {count or 'a list of'} {key}")
        return value


def _compare_vocabulary(asked: _Tokenizer, student: PreTrainedTokenizerBase) -> int:
    """Compare the texts of single ids; how many were compared."""
    numbers = sorted(student.get_vocab().values())
    compared = sorted({*numbers[:: max(1, len(numbers) // COMPARED_IDS)], *numbers[-512:]})
    mine = [str(student.decode([i], skip_special_tokens=False)) for i in compared]
    for number, text, theirs in zip(compared, mine, asked.decode_each(compared), strict=True):
        # Versions of the tokenizers library differ in the spaces around a lone token.
        if text.strip() != theirs.strip():
            raise UserError(
                f"{asked.name} has another tokenizer than the student: id {number} is {text!r} for the student and "
                f"{theirs!r} for the teacher; choose a teacher with the student's tokenizer"
            )
    return len(compared)
