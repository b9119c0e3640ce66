"""What a SGLang server answers about given tokens, read without loops over tokens and believed only when it is sound.

Facts of the endpoint used here (SGLang 0.5): ``input_token_logprobs`` is a list of ``[log_prob, id, text]`` that begins
at token ``logprob_start_len``, whose first entry has no value; entry i is the log-probability of token i given the
tokens before it. The last id of the vocabulary is reported as 0, beside the right log-probability (the server takes it
for a placeholder of an image). With ``return_flat_raw_top_logprobs_b64`` the most probable tokens are two little-endian
arrays ``[rows, K]`` in base64, without the first entry, which is counted in ``input_top_logprobs_null_prefix``. With
``token_ids_logprob`` every entry of ``input_token_ids_logprobs`` but the first is a list of ``[log_prob, id, text]``.
NaN and infinite values arrive as null.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_megatron.http_client import error_message
from opd_megatron.teacher.protocol import FailureKind

LARGEST_LOG_PROB = 1e-3
"""A log-probability is at most 0, up to rounding in the server's precision."""
MASS_TOLERANCE = 1e-3
"""How far the mass of the most probable tokens may exceed 1, and their order and values differ by rounding."""
SMALLEST_TAIL = 1e-8
"""Least mass outside the most probable tokens: below it the rounding of float32 log-probabilities decides."""

_DTYPES = {"float32": "<f4", "int32": "<i4", "float64": "<f8", "int64": "<i8", "float16": "<f2"}


class AnswerError(ValueError):
    """An answer that is not believed, and why."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class TopK:
    """``K`` tokens of each position ``[N, K]``, int32 and float32, and the log of the mass outside them ``[N]``."""

    ids_NK: np.ndarray
    log_probs_NK: np.ndarray
    tail_log_mass_N: np.ndarray

    @classmethod
    def of(cls, ids_NK: np.ndarray, log_probs_NK: np.ndarray, vocab_size: int) -> TopK:
        """With the tail that distinct ids leave: none where they are the whole vocabulary."""
        mass_N = np.exp(log_probs_NK.astype(np.float64)).sum(axis=1)
        whole = ids_NK.shape[1] == vocab_size
        tail_N = np.full(len(mass_N), -np.inf) if whole else np.log(np.maximum(1.0 - mass_N, SMALLEST_TAIL))
        return cls(ids_NK.astype(np.int32), log_probs_NK.astype(np.float32), tail_N.astype(np.float32))


@dataclass(frozen=True)
class Response:
    """``T`` sampled tokens, int64, the end token included; ``ended`` where they were not cut."""

    tokens_T: np.ndarray
    ended: bool


@dataclass(frozen=True)
class Reading:
    """What an answer says about ``N`` tokens: those after the first one sent, or those of a ``response``."""

    log_probs_N: np.ndarray
    weight_version: str
    top: TopK | None = None
    union_log_probs_NU: np.ndarray | None = None
    """Log-probabilities of the ids asked for, in the order asked."""
    response: Response | None = None


def read_answer(
    answer: Any,
    sent_ids: np.ndarray,
    vocab_size: int,
    *,
    last_id: int | None = None,
    top_k: int = 0,
    union: np.ndarray | None = None,
) -> Reading:
    """Read the answer about ``sent_ids``, those from ``logprob_start_len`` on.

    ``last_id`` is the last id of the server's vocabulary, which can have more ids than ``vocab_size``, those in use.
    ``top_k`` and ``union`` (ids) are what was asked for beside the tokens' own log-probabilities. Raises
    :class:`AnswerError` if the answer is about other tokens or holds anything but log-probabilities.
    """
    meta = _meta(answer)
    entries = _rows(meta, "input_token_logprobs", len(sent_ids))
    ids = entries[:, 1]
    last = vocab_size - 1 if last_id is None else last_id
    with np.errstate(all="ignore"):
        different = np.flatnonzero((ids != sent_ids) & ~((sent_ids == last) & (ids == 0)))
    if different.size:
        place = int(different[0])
        raise AnswerError(
            FailureKind.WRONG_IDS,
            f"the answer is about other tokens: id {ids[place]} where {sent_ids[place]} was sent",
        )
    log_probs = _log_probs(entries[1:, 0], "input_token_logprobs")
    return Reading(
        log_probs_N=log_probs,
        weight_version=str(meta.get("weight_version", "")),
        top=_read_top(meta, sent_ids[1:], log_probs, top_k, vocab_size) if top_k else None,
        union_log_probs_NU=None if union is None else _read_union(meta, sent_ids[1:], log_probs, union),
    )


def read_response(
    answer: Any, prompt_tokens: int, limit: int, vocab_size: int, server_vocab_size: int | None = None
) -> Reading:
    """Read a response of at most ``limit`` tokens to a prompt of ``prompt_tokens``.

    It ends before the first token that is not among the ``vocab_size`` in use, and is then one that was cut; the
    server's model can have more, ``server_vocab_size`` (None: not known how many). Raises :class:`AnswerError` if the
    answer is to another prompt or holds anything but tokens of that model, a known end and their log-probabilities (at
    the sampling temperature).
    """
    meta = _meta(answer)
    finish = meta.get("finish_reason")
    kind, matched = (finish.get("type"), finish.get("matched")) if isinstance(finish, dict) else (None, None)
    if kind not in ("stop", "length"):
        raise AnswerError(FailureKind.MALFORMED, f"a response ended for a reason that is not known ({finish})")
    if matched == "NaN happened":
        raise AnswerError(FailureKind.NOT_FINITE, "a response ended because the model's logits are NaN")
    if meta.get("prompt_tokens") != prompt_tokens:
        said = meta.get("prompt_tokens")
        raise AnswerError(FailureKind.WRONG_LENGTH, f"a response to a prompt of {said} tokens, {prompt_tokens} sent")
    ids = answer.get("output_ids")
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise AnswerError(FailureKind.MALFORMED, "the answer has no list output_ids; is this a SGLang server?")
    if not 1 <= len(ids) <= limit:
        raise AnswerError(FailureKind.WRONG_LENGTH, f"a response of {len(ids)} tokens, asked for were 1 to {limit}")
    outside = [token for token in ids if token < 0 or (server_vocab_size is not None and token >= server_vocab_size)]
    if outside:
        size = vocab_size if server_vocab_size is None else server_vocab_size
        raise AnswerError(FailureKind.WRONG_IDS, f"a response has id {outside[0]}, outside the vocabulary of {size}")
    entries = _rows(meta, "output_token_logprobs", len(ids))
    log_probs = _log_probs(entries[:, 0], "output_token_logprobs")
    if entries[:, 1].tolist() != ids or (type(matched) is int and matched != ids[-1]):
        raise AnswerError(FailureKind.WRONG_IDS, "the tokens of a response are not those of its log-probabilities")
    tokens_T = np.array(ids, dtype=np.int64)
    unknown = np.flatnonzero(tokens_T >= vocab_size)
    end = int(unknown[0]) if unknown.size else len(ids)
    response = Response(tokens_T[:end], ended=kind == "stop" and end == len(ids))
    return Reading(log_probs[:end], str(meta.get("weight_version", "")), response=response)


def _meta(answer: Any) -> dict[str, Any]:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        said = f" ({error_message(_dumped(answer), None)})" if isinstance(answer, dict) and "error" in answer else ""
        raise AnswerError(FailureKind.MALFORMED, f"the answer has no meta_info{said}; is this a SGLang server?")
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        reason = finish.get("message", "no reason given")
        raise AnswerError(FailureKind.ABORTED, f"the server aborted the request ({reason})")
    return meta


def _dumped(answer: Any) -> bytes:
    return json.dumps(answer, default=str).encode()


def _rows(meta: dict[str, Any], key: str, length: int, *depth: int) -> np.ndarray:
    """The field as an object array ``[length, *depth, 3]``; its entries are ``[log_prob, id, text]``."""
    entries = meta.get(key)
    if not isinstance(entries, list):
        raise AnswerError(FailureKind.MALFORMED, f"the answer has no list meta_info.{key}; is this a SGLang server?")
    if len(entries) != length:
        raise AnswerError(FailureKind.WRONG_LENGTH, f"{len(entries)} tokens in the answer, {length} expected ({key})")
    try:
        rows = np.array(entries, dtype=object)
    except ValueError:
        rows = np.empty(0, dtype=object)
    if rows.shape != (length, *depth, 3):
        raise AnswerError(FailureKind.MALFORMED, f"{key} is not a list of [log_prob, id, text] of the size expected")
    return rows


def _log_probs(values: np.ndarray, key: str) -> np.ndarray:
    """``values`` (objects of any shape) as float64; raises :class:`AnswerError` unless they are log-probabilities."""
    try:
        log_probs = values.astype(np.float64)
        if not set(map(type, values.flat)) <= {int, float}:
            raise ValueError("not all are numbers")
    except (TypeError, ValueError, OverflowError) as error:
        if any(value is None for value in values.flat):
            raise AnswerError(FailureKind.NOT_FINITE, f"None is not a log-probability ({key})") from None
        raise AnswerError(FailureKind.MALFORMED, f"{key} is not a list of [log_prob, id, text] ({error})") from None
    bad = ~(log_probs <= LARGEST_LOG_PROB) | (log_probs < np.finfo(np.float32).min)
    if bad.any():
        raise AnswerError(FailureKind.NOT_FINITE, f"{values[bad][0]} is not a log-probability ({key})")
    return log_probs


def _array(meta: dict[str, Any], side: str, shape: list[int]) -> np.ndarray:
    """The flat field ``input_top_logprobs_<side>_flat_b64`` as an array of ``shape``."""
    key = f"input_top_logprobs_{side}_flat_b64"
    text, dtype = meta.get(key), _DTYPES.get(str(meta.get(f"{key}_dtype")))
    if not isinstance(text, str) or dtype is None:
        raise AnswerError(
            FailureKind.MALFORMED,
            f"the answer has no field {key} of a known dtype: --opd-top-k needs SGLang 0.5.23 or later",
        )
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
    except (binascii.Error, ValueError) as error:
        raise AnswerError(FailureKind.MALFORMED, f"{key} is no array in base64 ({error})") from None
    if values.size != shape[0] * shape[1]:
        raise AnswerError(FailureKind.WRONG_LENGTH, f"{values.size} values in {key}, {shape[0]} x {shape[1]} expected")
    return values.reshape(shape)


def _read_top(meta: dict[str, Any], tokens_N: np.ndarray, log_probs_N: np.ndarray, top_k: int, vocab_size: int) -> TopK:
    shape, prefix = meta.get("input_top_logprobs_shape"), meta.get("input_top_logprobs_null_prefix")
    wanted = [len(tokens_N), top_k]
    if shape is not None and (shape != wanted or prefix != 1):
        raise AnswerError(
            FailureKind.WRONG_LENGTH, f"top log-probabilities of shape {shape} after {prefix} tokens, {wanted} expected"
        )
    ids_NK, log_probs_NK = _array(meta, "idx", wanted), _array(meta, "val", wanted).astype(np.float64)
    if (~(log_probs_NK <= LARGEST_LOG_PROB) | np.isneginf(log_probs_NK)).any():
        raise AnswerError(FailureKind.NOT_FINITE, "a value of the top log-probabilities is none")
    if ids_NK.size and (ids_NK.min() < 0 or ids_NK.max() >= vocab_size):
        raise AnswerError(FailureKind.TOP_K, f"a token of the top {top_k} is outside the vocabulary of {vocab_size}")
    if (np.diff(log_probs_NK, axis=1) > 0).any():
        raise AnswerError(FailureKind.TOP_K, f"the top {top_k} log-probabilities are not in descending order")
    if (np.diff(np.sort(ids_NK, axis=1), axis=1) == 0).any():
        raise AnswerError(FailureKind.TOP_K, f"the top {top_k} name a token twice")
    mass_N = np.exp(log_probs_NK).sum(axis=1)
    if (mass_N > 1.0 + MASS_TOLERANCE).any():
        raise AnswerError(FailureKind.TOP_K, f"the top {top_k} have a mass of {mass_N.max():.6g}, more than 1")
    listed_NK = ids_NK == tokens_N[:, None]
    own_N = np.where(listed_NK, log_probs_NK, 0.0).sum(axis=1)
    contradicts = np.where(
        listed_NK.any(axis=1),
        np.abs(own_N - log_probs_N) > MASS_TOLERANCE,
        log_probs_N > log_probs_NK[:, -1] + MASS_TOLERANCE,
    )
    if contradicts.any():
        raise AnswerError(FailureKind.TOP_K, f"the top {top_k} contradict the token's own log-probability")
    return TopK.of(ids_NK, log_probs_NK, vocab_size)


def _read_union(meta: dict[str, Any], tokens_N: np.ndarray, log_probs_N: np.ndarray, union: np.ndarray) -> np.ndarray:
    key, length = "input_token_ids_logprobs", len(tokens_N)
    entries = meta.get(key)
    if isinstance(entries, list) and len(entries) == length + 1:
        # The first entry is a bare null.
        meta = {key: entries[1:]}
    if not length:
        return np.empty((0, len(union)))
    rows = _rows(meta, key, length, len(union))
    if (rows[:, :, 1] != union).any():
        raise AnswerError(FailureKind.WRONG_IDS, "the answer is about other ids than those asked for")
    log_probs_NU = _log_probs(rows[:, :, 0], key)
    mass_N = np.exp(log_probs_NU).sum(axis=1)
    if (mass_N > 1.0 + MASS_TOLERANCE).any():
        raise AnswerError(FailureKind.TOP_K, f"the ids asked for have a mass of {mass_N.max():.6g}, more than 1")
    own_NU = union == tokens_N[:, None]
    if (np.abs(log_probs_NU - log_probs_N[:, None])[own_NU] > MASS_TOLERANCE).any():
        raise AnswerError(FailureKind.TOP_K, "the ids asked for contradict the token's own log-probability")
    return log_probs_NU
