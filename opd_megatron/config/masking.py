"""Secrets that a server may repeat, taken out of what it says."""

from __future__ import annotations

import json
from typing import Any

from opd_megatron.config.checks import MASK

_ENCODED = "_b64"
"""Ends the names of fields that hold numbers in base64, where a short secret may occur by chance."""


class Secrets:
    """Keys and passwords; empty ones count for nothing."""

    def __init__(self) -> None:
        self._forms: list[str] = []

    def add(self, *secrets: str) -> None:
        """Know ``secrets`` from now on, as they are and as JSON writes them."""
        for secret in filter(None, secrets):
            escaped = json.dumps(secret)[1:-1]
            self._forms += dict.fromkeys((secret, escaped, escaped.replace("/", "\\/")))
        self._forms.sort(key=len, reverse=True)

    def masked(self, text: str) -> str:
        """``text`` without them."""
        for form in self._forms:
            text = text.replace(form, MASK)
        return text

    def occur_in(self, content: bytes) -> bool:
        """Whether one of them stands in ``content``, a text in UTF-8."""
        return any(form.encode() in content for form in self._forms)

    def masked_values(self, value: Any) -> Any:
        """``value``, made of what JSON knows, with every string in it masked but the names of fields."""
        if isinstance(value, str):
            return self.masked(value)
        if isinstance(value, list):
            return [self.masked_values(item) for item in value]
        if isinstance(value, dict):
            return {
                key: item if str(key).endswith(_ENCODED) else self.masked_values(item) for key, item in value.items()
            }
        return value
