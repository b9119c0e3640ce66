"""Ranks lie together on their nodes, however Ray has spread the actors."""

from __future__ import annotations

import random

from opd_megatron.cluster.ray_group import Place, local_ranks, rank_order


def test_tensor_parallel_groups_lie_within_a_node() -> None:
    places = [Place(node, (device,)) for node in ("10.0.0.2", "10.0.0.10", "10.0.0.1") for device in range(8)]
    for seed in range(20):
        shuffled = random.Random(seed).sample(places, len(places))
        ordered = [shuffled[position] for position in rank_order(shuffled)]
        assert sorted(ordered) == sorted(places)
        assert ordered[0].node == shuffled[0].node
        for start in range(0, len(ordered), 8):
            assert {place.node for place in ordered[start : start + 8]} == {ordered[start].node}
            assert [place.devices for place in ordered[start : start + 8]] == [(device,) for device in range(8)]
        assert local_ranks([place.node for place in ordered]) == [*range(8)] * 3


def test_without_devices_actors_of_a_node_keep_their_order() -> None:
    places = [Place("a", ()), Place("b", ()), Place("a", ()), Place("b", ())]
    assert rank_order(places) == [0, 2, 1, 3]
    assert local_ranks(["a", "a", "b", "b"]) == [0, 1, 0, 1]
