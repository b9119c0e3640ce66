"""Where a response ends: end tokens and stop strings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def end_token_ids(tokenizer: Any, config: Any, folder: str | Path | None = None) -> tuple[int, ...]:
    """Every end token that generation_config.json in ``folder``, the model's config or the tokenizer names; sorted.

    Ids outside the config's vocabulary cannot be sampled and are left out.
    """
    found: list[Any] = [config.eos_token_id, tokenizer.eos_token_id]
    path = None if folder is None else Path(folder) / "generation_config.json"
    if path is not None and path.is_file():
        found.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    ids: set[int] = set()
    for value in found:
        ids.update(value if isinstance(value, list) else () if value is None else (value,))
    return tuple(sorted(token for token in ids if 0 <= token < config.vocab_size))


class TokenTexts:
    """The text of every id of a vocabulary, decoded once, when the first stop string asks for it."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._texts: list[str] | None = None

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Text of each list of ids, special tokens included."""
        return list(self._tokenizer.batch_decode(batch, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def containing(self, characters: Iterable[str]) -> np.ndarray:
        """Bool ``[V]``: the token's text holds one of the characters, or a part of a character."""
        if self._texts is None:
            self._texts = self.decode([[token] for token in range(self._vocab_size)])
        # A token of a byte-level vocabulary may end a character; alone it decodes to the replacement character.
        wanted = (*characters, "\ufffd")
        return np.array([any(character in text for character in wanted) for text in self._texts], dtype=np.bool_)


class StopStrings:
    """Finds the sequences whose last token completed a stop string.

    Only tokens that can hold the last character of a stop string are looked at, and of those sequences only the tail
    that can hold the string: every token stands for at least one byte of text.
    """

    def __init__(self, texts: TokenTexts, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._texts = texts
        self._may_complete_V = texts.containing({string[-1] for string in stop})
        # One more token than the string has bytes: some decoders drop a space in front of the first.
        self.window = max(len(string.encode()) for string in stop) + 1

    def completed(self, tails_RW: np.ndarray) -> np.ndarray:
        """Bool ``[R]``: the sequence that ends in these up to ``window`` tokens holds a stop string."""
        completed = np.zeros(len(tails_RW), dtype=np.bool_)
        candidates = np.flatnonzero(self._may_complete_V[tails_RW[:, -1]])
        if len(candidates) == 0:
            return completed
        for row, text in zip(candidates, self._texts.decode(tails_RW[candidates].tolist()), strict=True):
            completed[row] = any(string in text for string in self._stop)
        return completed
