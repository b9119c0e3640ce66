"""Weights that reach a real server by broadcast: no disk, the same proof."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import torch

from opd_megatron.config.errors import RunError
from opd_megatron.rollout.engine import SamplingParams
from opd_megatron.rollout.sglang_engine import SGLangEngine
from opd_megatron.rollout.weight_broadcast import BroadcastWeights
from tests.sglang.speakers import Speaker

pytestmark = pytest.mark.sglang


class Damaged(BroadcastWeights):
    """Loses, or alters, one tensor on the way."""

    def __init__(self, fault: str) -> None:
        super().__init__(60.0)
        self.fault = fault
        self.broken = False

    def take(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = dict(named_tensors)
        if self.broken:
            tensor = tensors.pop("model.layers.1.post_attention_layernorm.weight")
            if self.fault == "altered":
                tensors["model.layers.1.post_attention_layernorm.weight"] = 1.1 * tensor
        super().take(tensors.items())


@pytest.fixture
def engine(speaker: Speaker, spoken: str, tmp_path: Path) -> Iterator[SGLangEngine]:
    """Over the shared server, in more parts than one."""
    speaker.reset()
    made = speaker.engine(tmp_path, [spoken], weights=BroadcastWeights(60.0, bucket_bytes=50_000))
    yield made
    made.close()


def test_every_update_arrives_in_parts_and_without_a_disk(
    speaker: Speaker, engine: SGLangEngine, tmp_path: Path
) -> None:
    assert sum(tensor.nbytes for _, tensor in speaker.weights()) > 200_000
    threads = threading.active_count()
    for version in ("0", "1", "2"):
        engine.update_weights(speaker.weights(), version)
        asked = speaker.requests(6, SamplingParams(max_new_tokens=20))
        for request, generation in zip(asked, engine.generate(asked), strict=True):
            tokens = np.concatenate([request.prompt_tokens, generation.tokens])
            expected = speaker.log_probs(tokens)[len(request.prompt_tokens) - 1 :]
            np.testing.assert_allclose(generation.log_probs, expected, atol=1e-4)
            assert generation.weight_version == version
        speaker.step(0.05, seed=int(version))
    assert threading.active_count() <= threads + 1
    assert not list(tmp_path.iterdir())
    metrics = engine.metrics()
    assert min(metrics[f"perf/weight_{part}_seconds"] for part in ("write", "load", "probe")) > 0


@pytest.mark.parametrize("fault", ["missing", "altered"])
def test_a_partial_update_stops_the_run(speaker: Speaker, spoken: str, tmp_path: Path, fault: str) -> None:
    speaker.reset()
    weights = Damaged(fault)
    engine = speaker.engine(tmp_path, [spoken], weights=weights)
    try:
        engine.update_weights(speaker.weights(), "0")
        speaker.step(0.02)
        weights.broken = True
        with pytest.raises(RunError, match="does not speak with the trainer's weights"):
            engine.update_weights(speaker.weights(), "1")
        weights.broken = False
        engine.update_weights(speaker.weights(), "1")
    finally:
        engine.close()


def test_an_update_that_somebody_left_open_is_ended(speaker: Speaker, engine: SGLangEngine, spoken: str) -> None:
    """As a run that was killed in the middle of one leaves it."""
    engine.update_weights(speaker.weights(), "0")
    requests.post(spoken + "/begin_weight_update", json={"selector": "all"}, timeout=30).raise_for_status()
    speaker.step(0.05)
    engine.update_weights(speaker.weights(), "1")
    assert engine.weight_version == "1"
