"""The decoding loop of one batch: prefill, then a token for every running sequence until all have ended.

Shape legend: ``B`` sequences of the batch, ``R`` sequences still running, ``T`` new tokens, ``W`` tail of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd_megatron.rollout.cache import KeyValueCache, join_caches
from opd_megatron.rollout.decoder import Decoder
from opd_megatron.rollout.engine import BrokenWeightsError, SamplingParams
from opd_megatron.rollout.sampling import UniformStreams, sample_tokens
from opd_megatron.rollout.stop import StopStrings

_PREFILL_TOKENS = 32768
"""Prompt tokens of one forward pass: bounds the activations of long prompts in a large batch."""
_ROOM_AHEAD = 256
"""New tokens that the cache has room for at the start; it grows when responses are longer."""
_DRAW_AHEAD = 64
"""Uniform numbers drawn per sequence at a time."""
_DROP_BELOW = 0.8
"""Ended sequences are dropped when fewer than this fraction still runs: dropping copies the cache."""


@dataclass(frozen=True)
class Batch:
    """Sequences decoded together. ``limits`` are the longest responses in tokens, each at least 1."""

    prompts: Sequence[np.ndarray]
    sampling: SamplingParams
    limits: Sequence[int]
    seeds: Sequence[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Response:
    """A finished response of ``T`` tokens: ``row`` is its place in the batch, ``tokens`` int64, ``log_probs`` float32.

    ``ended``: an end token or stop string was sampled (else the limit was reached).
    """

    row: int
    tokens: np.ndarray
    log_probs: np.ndarray
    ended: bool


def _prefill(
    decoder: Decoder, prompts: Sequence[np.ndarray], room: int, device: torch.device
) -> tuple[Tensor, KeyValueCache]:
    """Logits after every prompt and the cache that holds them; prompts that occur several times are run once."""
    places: dict[bytes, int] = {}
    which = [places.setdefault(prompt.tobytes(), len(places)) for prompt in prompts]
    distinct = [np.frombuffer(key, dtype=np.int64) for key in places]
    longest = max(map(len, distinct))
    tokens_BS = np.zeros((len(distinct), longest), dtype=np.int64)
    for row, prompt in zip(tokens_BS, distinct, strict=True):
        row[longest - len(prompt) :] = prompt
    pad_B = np.array([longest - len(prompt) for prompt in distinct])
    padded = bool(pad_B.any())
    rows = max(1, _PREFILL_TOKENS // longest)
    caches, logits = [], []
    for start in range(0, len(distinct), rows):
        part = slice(start, start + rows)
        caches.append(decoder.new_cache(torch.from_numpy(pad_B[part]).to(device), padded, longest + room))
        logits.append(decoder.forward(torch.from_numpy(tokens_BS[part]).to(device), caches[-1]))
    cache, logits_BV = join_caches(caches), torch.cat(logits)
    if len(distinct) < len(prompts):
        rows_B = torch.tensor(which, device=device)
        cache.take(rows_B)
        logits_BV = logits_BV.index_select(0, rows_B)
    return logits_BV, cache


class _Running:
    """Book-keeping of the sequences that still run: ``rows_R`` are their places in the batch."""

    def __init__(self, limits: Sequence[int], device: torch.device) -> None:
        self.limits_R = torch.tensor(limits, device=device)
        self.rows_R = torch.arange(len(limits), device=device)
        self.alive_R = torch.ones(len(limits), dtype=torch.bool, device=device)
        self.left = len(limits)

    def finish(self, ended_R: Tensor, length: int) -> Tensor | None:
        """Note who ended, or reached its limit, with the token that makes responses ``length`` long.

        Returns their places among those that run, or None where there are none. ``left`` counts who goes on.
        """
        stay_R = self.alive_R & ~ended_R & (self.limits_R > length)
        left = int(stay_R.sum())
        if left == self.left:
            return None
        just_U = (self.alive_R & ~stay_R).nonzero().squeeze(1)
        self.alive_R, self.left = stay_R, left
        return just_U

    def drop_ended(self) -> Tensor:
        """Forget the sequences that have ended; returns the places, among those that ran, of those that stay."""
        stay_R = self.alive_R.nonzero().squeeze(1)
        self.limits_R, self.rows_R = self.limits_R[stay_R], self.rows_R[stay_R]
        self.alive_R = self.alive_R[stay_R]
        return stay_R


def _responses(tokens_TU: Tensor, log_probs_TU: Tensor, rows_U: Tensor, ended_U: Tensor) -> list[Response]:
    tokens_UT = tokens_TU.t().contiguous().cpu().numpy()
    log_probs_UT = log_probs_TU.t().contiguous().cpu().numpy()
    if np.isnan(log_probs_UT).any():
        raise BrokenWeightsError("the model's log-probabilities are NaN: its weights are too large, or damaged")
    return [
        Response(*fields) for fields in zip(rows_U.tolist(), tokens_UT, log_probs_UT, ended_U.tolist(), strict=True)
    ]


def decode_batch(
    decoder: Decoder, batch: Batch, end_ids: Sequence[int], stop: StopStrings | None, device: torch.device
) -> Iterator[list[Response]]:
    """Sample a response for every prompt of the batch (each of at least one token, as int64 arrays).

    Yields the responses that end with it after every token, usually none; who stops reading ends the decoding.
    """
    total, steps = len(batch.prompts), max(batch.limits)
    streams = UniformStreams(batch.seeds) if batch.sampling.temperature > 0 else None
    end_ids_E = torch.tensor(end_ids, device=device)
    tokens_TB = torch.zeros((steps, total), dtype=torch.int64, device=device)
    log_probs_TB = torch.zeros((steps, total), dtype=torch.float32, device=device)
    running = _Running(batch.limits, device)
    logits_RV, cache = _prefill(decoder, batch.prompts, min(steps, _ROOM_AHEAD), device)
    uniforms_TB = torch.empty(0)
    for step in range(steps):
        if streams is not None and step % _DRAW_AHEAD == 0:
            drawn = streams.draw(running.rows_R.tolist(), step, min(_DRAW_AHEAD, steps - step))
            uniforms_TB = torch.zeros((drawn.shape[1], total), dtype=torch.float64, device=device)
            uniforms_TB[:, running.rows_R] = torch.from_numpy(drawn).to(device).t()
        uniforms_R = None if streams is None else uniforms_TB[step % _DRAW_AHEAD, running.rows_R]
        tokens_R, log_probs_R = sample_tokens(logits_RV, batch.sampling, uniforms_R)
        tokens_TB[step, running.rows_R] = tokens_R
        log_probs_TB[step, running.rows_R] = log_probs_R
        ended_R = (tokens_R.unsqueeze(1) == end_ids_E).any(dim=1)
        if stop is not None:
            tails_RW = tokens_TB[max(0, step + 1 - stop.window) : step + 1, running.rows_R].t().cpu().numpy()
            ended_R |= torch.from_numpy(stop.completed(tails_RW)).to(device)
        just_U = running.finish(ended_R, step + 1)
        if just_U is None:
            yield []
        else:
            rows_U, so_far = running.rows_R[just_U], slice(0, step + 1)
            yield _responses(tokens_TB[so_far, rows_U], log_probs_TB[so_far, rows_U], rows_U, ended_R[just_U])
        if running.left == 0:
            return
        if running.left < _DROP_BELOW * len(tokens_R):
            stay_R = running.drop_ended()
            cache.take(stay_R)
            tokens_R = tokens_R[stay_R]
        logits_RV = decoder.forward(tokens_R.unsqueeze(1), cache)
