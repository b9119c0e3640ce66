"""What is sent to SGLang's ``/generate`` and what is taken from its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_megatron.config.errors import RunError
from opd_megatron.rollout.engine import BrokenWeightsError, GenerateRequest, SamplingParams
from opd_megatron.rollout.stop import StopStrings
from opd_megatron.sample import Status

_ROUNDING = 1e-3
"""How far above 0 a log-probability may lie."""


class UnusableAnswerError(RuntimeError):
    """An answer that says nothing about the request: it was aborted. Another attempt may succeed."""


def generate_body(
    request: GenerateRequest, prompt: np.ndarray, rid: str, limit: int, end_ids: Sequence[int]
) -> dict[str, Any]:
    """The request for one response of at most ``limit`` tokens."""
    return {
        "rid": rid,
        "input_ids": prompt,
        "return_logprob": True,
        "sampling_params": sampling_params(request.sampling, request.seed, limit, end_ids),
    }


def sampling_params(
    sampling: SamplingParams, seed: tuple[int, ...], limit: int, end_ids: Sequence[int]
) -> dict[str, Any]:
    """How a response of at most ``limit`` tokens is sampled, in SGLang's words.

    The server counts temperature 0 as greedy decoding, and draws by ``sampling_seed`` where it runs with
    ``--enable-deterministic-inference``; elsewhere it ignores the seed.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": limit,
        "stop": list(sampling.stop),
        "stop_token_ids": list(end_ids),
        "ignore_eos": sampling.ignore_eos,
        "sampling_seed": sampling_seed(seed),
    }


def sampling_seed(stream: tuple[int, ...]) -> int:
    """The number of 63 bits that names a random stream."""
    (drawn,) = np.random.SeedSequence(stream).generate_state(1, np.uint64)
    return int(drawn >> np.uint64(1))


def score_body(tokens: np.ndarray, rid: str) -> dict[str, Any]:
    """The request for the log-probabilities of ``tokens[1:]``, at temperature 1 and past the prefix cache."""
    return {
        "rid": rid,
        "input_ids": tokens,
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
    }


def read_response(answer: Any, *, limit: int, vocab_size: int, server: str) -> tuple[np.ndarray, np.ndarray, Status]:
    """Tokens int64 ``[T]``, log-probabilities float32 ``[T]`` and the end of a generated response.

    The log-probabilities are those of ``Generation.log_probs``: SGLang takes them at the sampling temperature before
    top-k and top-p, and at temperature 1 for greedy decoding. Raises :class:`UnusableAnswerError` where the request
    was aborted, :class:`BrokenWeightsError` where the logits were NaN, :class:`RunError` on an answer that is none to
    the request.
    """
    meta = _meta(answer, server)
    finish = meta.get("finish_reason") or {}
    kind = finish.get("type")
    if kind == "abort":
        raise UnusableAnswerError(f"{server} aborted the request: {finish.get('message', '')}")
    tokens, log_probs = _pairs(meta.get("output_token_logprobs"), server)
    if kind not in ("stop", "length"):
        raise RunError(f"{server}: a response ended for a reason that is not known: {finish}")
    if finish.get("matched") == "NaN happened":
        raise BrokenWeightsError(f"{server}: the model's logits are NaN: its weights are damaged")
    if tokens.tolist() != answer.get("output_ids", []):
        raise RunError(f"{server}: the tokens of a response are not those of its log-probabilities")
    if not 1 <= len(tokens) <= limit:
        raise RunError(f"{server}: a response has {len(tokens)} tokens, asked for were 1 to {limit}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise RunError(f"{server}: a response has token ids outside 0..{vocab_size - 1}")
    _check_log_probs(log_probs, server)
    return tokens, log_probs, Status.COMPLETED if kind == "stop" else Status.TRUNCATED


def read_scores(answer: Any, tokens: np.ndarray, *, vocab_size: int, server: str) -> np.ndarray:
    """Log-probabilities float32 of ``tokens[1:]`` from the answer to :func:`score_body`.

    Raises :class:`UnusableAnswerError` and :class:`RunError` like :func:`read_response`.
    """
    meta = _meta(answer, server)
    finish = meta.get("finish_reason") or {}
    if finish.get("type") == "abort":
        raise UnusableAnswerError(f"{server} aborted the request: {finish.get('message', '')}")
    entries = meta.get("input_token_logprobs")
    ids, log_probs = _pairs(entries[1:] if isinstance(entries, list) else entries, server)
    # The server calls the last id of the vocabulary 0, although the log-probability is its own.
    named = np.where(tokens == vocab_size - 1, 0, tokens)[1:]
    if len(ids) != len(named) or not ((ids == tokens[1:]) | (ids == named)).all():
        raise RunError(f"{server}: the scored tokens are not those that were sent")
    _check_log_probs(log_probs, server)
    return log_probs


def cut_at_stop(tokens: np.ndarray, stop: StopStrings) -> int | None:
    """Length of the shortest prefix of ``tokens`` that holds a stop string, or None.

    The server looks at as many last tokens as its own encoding of the string has; a string that was sampled in other
    tokens can escape it.
    """
    for end in range(1, len(tokens) + 1):
        if stop.completed(tokens[None, max(0, end - stop.window) : end])[0]:
            return end
    return None


def _meta(answer: Any, server: str) -> dict[str, Any]:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise RunError(f"{server}: the answer has no meta_info: is this a SGLang server?")
    return meta


def _pairs(entries: Any, server: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of a list of ``[log-probability, id, text]``."""
    try:
        ids = np.array([entry[1] for entry in entries], dtype=np.int64)
        log_probs = np.array([entry[0] for entry in entries], dtype=np.float32)
    except (TypeError, ValueError, IndexError) as error:
        raise RunError(f"{server}: the answer has no log-probabilities of its tokens ({error})") from None
    return ids, log_probs


def _check_log_probs(log_probs: np.ndarray, server: str) -> None:
    if not (np.isfinite(log_probs).all() and (log_probs <= _ROUNDING).all()):
        wrong = log_probs[~(np.isfinite(log_probs) & (log_probs <= _ROUNDING))][0]
        raise RunError(f"{server}: {wrong:g} is not a log-probability")
