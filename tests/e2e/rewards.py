"""Rewards that the end-to-end tests name by import path."""

from __future__ import annotations

from opd_megatron.sample import Sample


def count_sevens(sample: Sample) -> float:
    """Varies between samples of a random student."""
    return float(sample.response.count("7") + 0.1 * sample.response_length)
