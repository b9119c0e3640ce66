"""Rewards that the end-to-end tests name by import path."""

from __future__ import annotations

from opd_megatron.sample import Sample


def count_sevens(sample: Sample) -> float:
    """Varies between samples of a random student."""
    return float(sample.response.count("7") + 0.1 * sample.response_length)


def has_a_seven(sample: Sample) -> float:
    """Often equal within a group."""
    return float("7" in sample.response)


def tell_the_answer(sample: Sample) -> float:
    """Those without a seven, about half of them, hear what the answer is."""
    passed = "7" in sample.response
    sample.metadata["told"] = "" if passed else f"={sample.label}"
    return float(passed)


def keep_none(samples: list[Sample]) -> bool:
    """A filter that nothing passes."""
    return False


def keep_all_for_two_rollouts(samples: list[Sample]) -> bool:
    """A filter that lets two rollouts of the base arguments through, and of the third less than it needs."""
    return samples[0].weight_version in ("0", "1")
