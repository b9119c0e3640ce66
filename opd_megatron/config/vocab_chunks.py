"""How large the chunks and blocks of the vocabulary head are (see ``megatron/vocab_head/shard.py``); no torch."""

from __future__ import annotations

from typing import Literal

DeviceKind = Literal["cpu", "cuda"]

CHUNK_ELEMENTS: dict[str, int] = {"cpu": 15 * 2**19, "cuda": 2**28}
"""Logits of a chunk by kind of device: 30 MiB (from 32 on the C library maps memory anew each time) and 1 GiB."""
LEAST_CHUNK_TOKENS = 128
"""With fewer the multiplications wait for the weight and its gradient to be read."""
BLOCK_ELEMENTS: dict[str, int] = {"cpu": 2**19, "cuda": 2**25}
"""Logits of a block by kind of device: 2 MiB and 128 MiB in float32."""


def tokens_of_chunk(rows: int, elements: int, least: int) -> int:
    """Tokens of a chunk of ``elements`` logits, ``least`` at the least, for a shard of ``rows`` columns."""
    return max(least, elements // max(1, rows))
