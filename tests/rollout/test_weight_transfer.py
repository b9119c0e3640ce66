"""Which way new weights take to the servers, and what is kept of them on it; tests/sglang see them arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config.options.engine import EngineOptions
from opd_megatron.rollout.sglang_build import weights_on_their_way
from opd_megatron.rollout.weight_broadcast import BroadcastWeights, buckets
from opd_megatron.rollout.weight_folders import WeightFolders


@pytest.mark.parametrize(
    ("options", "on_cpu", "expected"),
    [
        ({}, True, WeightFolders),
        ({}, False, BroadcastWeights),
        ({"rollout_weights_dir": "/dev/shm/w"}, False, WeightFolders),
        ({"rollout_weight_transfer": "disk"}, False, WeightFolders),
        ({"rollout_weight_transfer": "distributed"}, True, BroadcastWeights),
    ],
)
def test_the_way_is_chosen_by_what_is_there(options: dict[str, Any], on_cpu: bool, expected: type) -> None:
    found = weights_on_their_way(EngineOptions(**options), Path("run"), lambda tensors, folder: None, on_cpu=on_cpu)
    assert isinstance(found, expected)


def test_parts_hold_every_tensor_once_and_no_more_than_they_may() -> None:
    sizes = [3, 1, 1, 9, 2, 2, 2, 4]
    tensors = [(str(place), torch.zeros(size)) for place, size in enumerate(sizes)]
    parts = list(buckets(tensors, most=5 * 4))
    assert [name for part in parts for name, _ in part] == [name for name, _ in tensors]
    assert [sum(tensor.numel() for _, tensor in part) for part in parts] == [5, 9, 4, 2, 4]
    assert list(buckets([], most=1)) == []


def test_what_is_kept_does_not_change_with_the_trainer() -> None:
    """A server that begins anew after the next train step still gets the weights that speak."""
    parameter = torch.ones(4)
    weights = BroadcastWeights(1.0)
    weights.take([("a", parameter)])
    parameter += 1
    assert weights.tensors[0][1].tolist() == [1.0] * 4
    weights.remove()
    assert weights.tensors == []
