"""Whether two servers have the same weights, by what they say of one text."""

from __future__ import annotations

import numpy as np
import pytest

from opd_megatron.teacher.agreement import EXACT, ROUNDED, Identity


@pytest.mark.parametrize(("shift", "spike", "same"), [(0.02, 0.3, True), (0.2, 0.0, False), (0.0, 0.9, False)])
def test_rounded_replicas_are_judged_by_the_mean_and_the_largest_difference(
    shift: float, spike: float, same: bool
) -> None:
    scores = -np.random.default_rng(0).exponential(2.0, size=64)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=64)
    other = scores + shift * signs
    other[5] -= spike
    found = Identity("m", "v", scores).difference(Identity("m", "v", other), ROUNDED)
    assert (found is None) == same
    assert Identity("m", "v", scores).difference(Identity("m", "v", scores + 0.01), EXACT) is not None
