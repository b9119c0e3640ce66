"""Rewards that compare the response's text with the label: ``exact``, ``gsm8k`` and ``zero``."""

from __future__ import annotations

import re
from decimal import Decimal

from opd_megatron.reward.base import require_label
from opd_megatron.sample import Sample

ANSWER_MARK = "####"
"""What precedes the final answer in GSM8K's own solutions."""

# A minus counts as a sign only where it cannot be a subtraction; commas only where they group thousands.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def extract_number(text: str) -> Decimal | None:
    """The first number after the last ``####``, or the last number of a text without one; None if there is none.

    ``$`` and commas between thousands are ignored: ``-$1,234.50`` is -1234.5.
    """
    marked = ANSWER_MARK in text
    numbers = _NUMBER.findall((text.rsplit(ANSWER_MARK, 1)[1] if marked else text).replace("\N{MINUS SIGN}", "-"))
    if not numbers:
        return None
    return Decimal(re.sub(r"[$,]", "", numbers[0 if marked else -1]))


def gsm8k(sample: Sample) -> float:
    """1.0 if the response's number (see :func:`extract_number`) equals the label's; a label needs a number."""
    label = require_label(sample, "gsm8k")
    expected = extract_number(label)
    if expected is None:
        raise ValueError(f"the label {label!r} holds no number")
    return float(extract_number(sample.response) == expected)


def exact(sample: Sample) -> float:
    """1.0 if response and label are the same text, white space at both ends aside."""
    return float(sample.response.strip() == require_label(sample, "exact").strip())


def zero(sample: Sample) -> float:
    """No task reward."""
    del sample
    return 0.0
