"""Choosing tokens: pure functions on logits, and one random stream per sample.

Shape legend: ``B`` sequences, ``V`` vocabulary, ``N`` draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opd_megatron.rollout.engine import SamplingParams

_DRAWS_PER_COUNT = 4
"""Doubles that one value of the 256-bit Philox counter yields."""


class UniformStreams:
    """Uniform numbers in [0, 1), one stream per seed.

    A stream is numpy's Philox generator under a key that is a hash of the seed tuple. The n-th number of a stream
    depends on its seed and on n only: not on the other streams, on how many numbers are drawn at a time, nor on what
    was drawn before. So a sample's tokens do not depend on its batch, on the parallel layout, or on a resume.

    Source of the generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """

    def __init__(self, seeds: Sequence[tuple[int, ...]]) -> None:
        digests = [
            hashlib.blake2b(".".join(map(str, map(int, seed))).encode(), digest_size=16).digest() for seed in seeds
        ]
        self._keys = [np.frombuffer(digest, dtype=np.uint64) for digest in digests]
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)

    def __len__(self) -> int:
        return len(self._keys)

    def draw(self, rows: Sequence[int], first: int, count: int) -> np.ndarray:
        """Numbers ``first`` to ``first + count - 1`` of the streams ``rows``: float64 ``[len(rows), count]``."""
        skipped = first % _DRAWS_PER_COUNT
        out = np.empty((len(rows), skipped + count))
        counter = np.array([first // _DRAWS_PER_COUNT, 0, 0, 0], dtype=np.uint64)
        unused = np.zeros(_DRAWS_PER_COUNT, dtype=np.uint64)
        for target, row in zip(out, rows, strict=True):
            # Setting the state of one generator takes a quarter of the time of making one per stream.
            self._bits.state = {
                "bit_generator": "Philox",
                "state": {"counter": counter, "key": self._keys[row]},
                "buffer": unused,
                "buffer_pos": _DRAWS_PER_COUNT,
                "has_uint32": 0,
                "uinteger": 0,
            }
            self._generator.random(out=target)
        return out[:, skipped:]


def sampling_log_probs(logits_BV: Tensor, temperature: float) -> Tensor:
    """``log_softmax(logits / temperature)`` in float32, ``[B, V]``; at temperature 0 that of temperature 1.

    This is the whole distribution, before top-k and top-p, because it is what the trainer computes.
    """
    logits_BV = logits_BV.float()
    if temperature not in (0.0, 1.0):
        logits_BV = logits_BV / temperature
    return torch.log_softmax(logits_BV, dim=-1)


def filter_log_probs(log_probs_BV: Tensor, top_k: int = -1, top_p: float = 1.0) -> Tensor:
    """Set tokens outside the top k, then outside the nucleus of mass ``top_p``, to minus infinity; ``[B, V]``.

    The nucleus is the smallest set of most probable tokens, among those that top-k left and after renormalising over
    them, whose mass reaches ``top_p`` (Holtzman et al. 2020, arXiv 1904.09751); it holds at least one token. Tokens
    that tie with the k-th stay. The result is not renormalised.
    """
    vocabulary = log_probs_BV.shape[-1]
    if 0 < top_k < vocabulary:
        kth_B1 = torch.topk(log_probs_BV, top_k, dim=-1).values[:, -1:]
        log_probs_BV = log_probs_BV.masked_fill(log_probs_BV < kth_B1, -torch.inf)
    if top_p < 1.0:
        sorted_BV, order_BV = torch.sort(log_probs_BV, dim=-1, descending=True)
        probs_BV = torch.softmax(sorted_BV.double(), dim=-1)
        mass_before_BV = probs_BV.cumsum(dim=-1) - probs_BV
        outside_BV = (mass_before_BV >= top_p).scatter(-1, order_BV, mass_before_BV >= top_p)
        outside_BV.scatter_(-1, order_BV[:, :1], False)
        log_probs_BV = log_probs_BV.masked_fill(outside_BV, -torch.inf)
    return log_probs_BV


def choose_by_inverse_cdf(log_probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds ``uniform * total``: int64 ``[B]``.

    ``log_probs_BV`` need not be normalised and ``uniforms_B`` (float64) lies in [0, 1). The sums are float64. A token
    of probability zero is never chosen. A row that holds NaN gives the last token.
    """
    cumulative_BV = log_probs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    # The largest uniform number, 1 - 2**-53, times any total rounds to less than the total: some entry exceeds it.
    target_B1 = uniforms_B.unsqueeze(-1) * cumulative_BV[:, -1:]
    chosen_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
    return chosen_B.clamp(max=log_probs_BV.shape[-1] - 1)


def sample_tokens(logits_BV: Tensor, sampling: SamplingParams, uniforms_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose one token per row; returns ids int64 ``[B]`` and their log-probabilities float32 ``[B]``.

    Temperature 0 takes the most probable token and needs no ``uniforms_B``. The log-probabilities are those of
    :func:`sampling_log_probs`.
    """
    log_probs_BV = sampling_log_probs(logits_BV, sampling.temperature)
    if sampling.temperature == 0.0:
        log_probs_B, tokens_B = log_probs_BV.max(dim=-1)
        return tokens_B, log_probs_B
    if uniforms_B is None:
        raise ValueError("sampling at a temperature above 0 needs uniform numbers")
    tokens_B = choose_by_inverse_cdf(filter_log_probs(log_probs_BV, sampling.top_k, sampling.top_p), uniforms_B)
    return tokens_B, log_probs_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1)
