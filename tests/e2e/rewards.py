"""Rewards that the end-to-end tests name by import path."""

from __future__ import annotations

from opd_megatron.sample import Sample


def count_sevens(sample: Sample) -> float:
    """Varies between samples of a random student."""
    return float(sample.response.count("7") + 0.1 * sample.response_length)


def has_a_seven(sample: Sample) -> float:
    """Often equal within a group."""
    return float("7" in sample.response)


def keep_none(samples: list[Sample]) -> bool:
    """A filter that nothing passes."""
    return False


def keep_all_for_two_rollouts(samples: list[Sample]) -> bool:
    """A filter that lets two rollouts of the base arguments through, and of the third less than it needs."""
    return samples[0].weight_version in ("0", "1")
