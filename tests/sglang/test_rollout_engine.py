"""The rollout engine over real servers: what it samples, and what it does with weights that did not arrive."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from opd_megatron.config.errors import RunError, UserError
from opd_megatron.rollout.engine import GenerateRequest, Generation, SamplingParams
from opd_megatron.rollout.generate import fill_sample
from opd_megatron.rollout.sglang_engine import SGLangEngine
from opd_megatron.sample import Sample, Status
from tests.sglang.proxy import FaultProxy
from tests.sglang.speakers import POSITIONS, Speaker, write_weights

pytestmark = pytest.mark.sglang
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=40)
LONG = SamplingParams(max_new_tokens=90, ignore_eos=True)


@pytest.fixture
def engine(speaker: Speaker, spoken: str, tmp_path: Path) -> Iterator[SGLangEngine]:
    """An engine over the shared server with the first weights."""
    speaker.reset()
    made = speaker.engine(tmp_path, [spoken])
    made.update_weights(speaker.weights(), "7")
    yield made
    made.close()


def gap(speaker: Speaker, request: GenerateRequest, generation: Generation) -> float:
    """Largest difference to a full forward at the sampling temperature before top-k and top-p."""
    tokens = np.concatenate([request.prompt_tokens, generation.tokens])
    expected = speaker.log_probs(tokens, request.sampling.temperature or 1.0)[len(request.prompt_tokens) - 1 :]
    return float(np.abs(expected - generation.log_probs).max())


def test_every_request_has_a_seed_that_two_runs_share(speaker: Speaker, spoken: str, tmp_path: Path) -> None:
    """As the server gets it: one on GPUs draws by it."""
    speaker.reset()
    runs = []
    for name in ("one", "two"):
        with FaultProxy(spoken) as proxy:
            engine = speaker.engine(tmp_path / name, [proxy.url])
            try:
                engine.update_weights(speaker.weights(), name)
                engine.generate(speaker.requests(6, SamplingParams(max_new_tokens=2)))
            finally:
                engine.close()
        settings = [asked.payload["sampling_params"] for asked in proxy.asked]
        runs.append(sorted(asked["sampling_seed"] for asked in settings if asked["max_new_tokens"]))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6


def test_greedy_generations_are_those_of_the_local_engine(speaker: Speaker, engine: SGLangEngine) -> None:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=40, stop=("1+", "7"))
    requests = [*speaker.requests(12, GREEDY), *speaker.requests(12, sampling, seed=1)]
    filling = np.full(POSITIONS - 1, 5), np.full(POSITIONS, 5), np.full(POSITIONS - 3, 6)
    requests += [GenerateRequest(prompt, GREEDY) for prompt in filling]
    ours, local = engine.generate(requests), speaker.local().generate(requests)
    for one, two in zip(ours, local, strict=True):
        assert one.tokens.tolist() == two.tokens.tolist()
        assert (one.text, one.finish) == (two.text, two.finish)
        assert one.log_probs.dtype == np.float32
        np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-4)
    assert {generation.finish for generation in ours} == set(Status)
    assert {generation.weight_version for generation in ours} == {"7"}


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, -1), (0.6, 1.0, 3), (1.5, 0.5, -1)])
def test_log_probs_are_at_the_sampling_temperature_before_the_filters(
    speaker: Speaker, engine: SGLangEngine, temperature: float, top_p: float, top_k: int
) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=20)
    requests = speaker.requests(8, sampling)
    for request, generation in zip(requests, engine.generate(requests), strict=True):
        assert gap(speaker, request, generation) < 1e-4


def test_bad_prompts_are_refused_before_they_can_end_the_server(speaker: Speaker, engine: SGLangEngine) -> None:
    for prompt in ([], [-1], [speaker.config.vocab_size]):
        with pytest.raises(ValueError, match="request 1: the prompt has"):
            engine.generate([*speaker.requests(1, GREEDY), GenerateRequest(np.array(prompt), GREEDY)])
    assert len(engine.generate(speaker.requests(1, GREEDY))) == 1


def running_requests(url: str) -> int:
    """Requests that the server works on, by what its cache cannot be flushed for."""
    return 0 if requests.post(url + "/flush_cache", timeout=30).status_code == 200 else 1


def wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 30
    while running_requests(url):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stream_gives_each_response_when_it_is_complete_and_aborts_the_rest(
    speaker: Speaker, engine: SGLangEngine, spoken: str
) -> None:
    short = speaker.requests(1, SamplingParams(max_new_tokens=1))
    long = [GenerateRequest(np.array([3]), LONG, (place,)) for place in range(40)]

    async def first() -> tuple[int, bool]:
        stream: Any = engine.stream([*long[:20], *short, *long[20:]])
        place, _ = await anext(stream)
        busy = bool(running_requests(spoken))
        await stream.aclose()
        return place, busy

    place, busy = asyncio.run(first())
    assert place == 20
    assert busy
    began = time.monotonic()
    wait_until_idle(spoken)
    # had they not been aborted, all 40 would still have to be decoded
    assert len(engine.generate(short)) == 1
    assert time.monotonic() - began < 30


def test_cancelling_the_reader_aborts_and_the_engine_goes_on(
    speaker: Speaker, engine: SGLangEngine, spoken: str
) -> None:
    async def cancelled() -> None:
        async def read() -> None:
            async for _ in engine.stream([GenerateRequest(np.array([3]), LONG, (place,)) for place in range(40)]):
                pass

        task = asyncio.create_task(read())
        while not running_requests(spoken):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    wait_until_idle(spoken)
    everything = asyncio.run(collected(engine, speaker.requests(6, GREEDY)))
    assert sorted(everything) == list(range(6))


async def collected(engine: SGLangEngine, asked: list[GenerateRequest]) -> list[int]:
    return [place async for place, _ in engine.stream(asked)]


def test_updates_reach_the_server_and_leave_one_folder(speaker: Speaker, engine: SGLangEngine, tmp_path: Path) -> None:
    before = engine.generate(speaker.requests(4, GREEDY))
    for version in ("8", "9"):
        speaker.step(0.05, seed=int(version))
        engine.update_weights(speaker.weights(), version)
    requests = speaker.requests(4, SamplingParams(max_new_tokens=20))
    for request, generation in zip(requests, engine.generate(requests), strict=True):
        assert gap(speaker, request, generation) < 1e-4
        assert generation.weight_version == engine.weight_version == "9"
    assert [one.tokens.tolist() for one in before] != [
        one.tokens.tolist() for one in engine.generate(speaker.requests(4, GREEDY))
    ]
    assert [folder.name for folder in (tmp_path / "weights").iterdir()] == ["weights_000003"]
    metrics = engine.metrics()
    parts = [metrics[f"perf/weight_{part}_seconds"] for part in ("write", "load", "probe")]
    assert min(parts) > 0
    assert metrics["perf/weight_update_seconds"] == pytest.approx(sum(parts))
    engine.close()
    assert not (tmp_path / "weights").exists()


def test_a_lost_update_of_any_size_stops_the_run(
    speaker: Speaker, engine: SGLangEngine, spoken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server keeps its weights and takes the new label, as after an update that it only reports."""

    async def label_only(self: Any, folder: Path, label: str) -> None:
        requests.post(spoken + "/update_weight_version", json={"new_version": label}, timeout=30).raise_for_status()

    monkeypatch.setattr("opd_megatron.rollout.sglang_server.SGLangServer.load", label_only)
    speaker.step(1e-5)  # moves log-probabilities by less than the tolerance
    with pytest.raises(RunError, match=r"still speaks with weights 7: .* moved by 0\.?\d* in the mean, the trainer's"):
        engine.update_weights(speaker.weights(), "8")
    speaker.step(0.05)
    with pytest.raises(RunError, match=r"differ by [\d.]+ in the mean \(tolerance 0.001\), most at token \d+"):
        engine.update_weights(speaker.weights(), "8")
    with pytest.raises(RuntimeError, match="has no weights"):
        engine.generate(speaker.requests(1, GREEDY))


@pytest.mark.parametrize("fault", ["missing", "altered"])
def test_a_partial_update_stops_the_run(speaker: Speaker, spoken: str, tmp_path: Path, fault: str) -> None:
    """One tensor does not arrive, or arrives altered; the server reports success all the same."""
    broken = False

    def write(named_tensors: Any, folder: Path) -> None:
        tensors = dict(named_tensors)
        if broken:
            tensor = tensors.pop("model.layers.1.post_attention_layernorm.weight")
            if fault == "altered":
                tensors["model.layers.1.post_attention_layernorm.weight"] = 1.1 * tensor
        write_weights(tensors.items(), folder)

    speaker.reset()
    engine = speaker.engine(tmp_path, [spoken], write=write)
    try:
        engine.update_weights(speaker.weights(), "0")
        speaker.step(0.02)
        broken = True
        with pytest.raises(RunError, match="does not speak with the trainer's weights"):
            engine.update_weights(speaker.weights(), "1")
        broken = False
        engine.update_weights(speaker.weights(), "1")
        assert engine.weight_version == "1"
    finally:
        engine.close()


def test_a_checkpoint_of_another_family_stops_the_run(speaker: Speaker, spoken: str, tmp_path: Path) -> None:
    """The server says that it has loaded it."""

    def write(named_tensors: Any, folder: Path) -> None:
        write_weights([("encoder.weight", torch.zeros(2, 2))], folder)

    speaker.reset()
    sound = speaker.engine(tmp_path / "sound", [spoken])
    sound.update_weights(speaker.weights(), "0")
    sound.close()
    speaker.step(0.05)
    engine = speaker.engine(tmp_path / "wrong", [spoken], write=write)
    with pytest.raises(RunError, match="does not speak with the trainer's weights"):
        engine.update_weights(speaker.weights(), "1")
    engine.close()


def test_weights_that_somebody_else_gave_the_server_are_noticed(
    speaker: Speaker, engine: SGLangEngine, spoken: str
) -> None:
    requests.post(spoken + "/update_weight_version", json={"new_version": "other"}, timeout=30).raise_for_status()
    with pytest.raises(RunError, match=r"speaks with weights 'other', this run gave it '7@\w+'"):
        engine.generate(speaker.requests(2, GREEDY))


def test_a_response_under_several_weights_names_all_of_them(
    speaker: Speaker, engine: SGLangEngine, spoken: str
) -> None:
    """As after an update that lets what is being generated go on; one by somebody else ends the run all the same."""
    asked = [GenerateRequest(np.array([3]), LONG, (place,)) for place in range(30)]
    label = requests.get(spoken + "/model_info", timeout=30).json()["weight_version"]

    def name(version: str) -> None:
        change = {"new_version": version, "abort_all_requests": False}
        requests.post(spoken + "/update_weight_version", json=change, timeout=30).raise_for_status()

    def generated_meanwhile(version: str) -> list[Generation]:
        found: list[Any] = []

        def generate() -> None:
            try:
                found.append(engine.generate(asked))
            except RunError as error:
                found.append(error)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        while not running_requests(spoken):
            time.sleep(0.01)
        time.sleep(0.2)
        name(version)
        name(label)
        thread.join(60)
        if isinstance(found[0], RunError):
            raise found[0]
        return list(found[0])

    own = label.partition("@")[2]
    made = generated_meanwhile(f"6@{own}")
    assert {generation.weight_version for generation in made} == {"7"}
    assert ("7", "6", "7") in {generation.weight_versions for generation in made}
    sample = Sample(0, 0, "", prompt_tokens=np.array([3]))
    fill_sample(sample, next(generation for generation in made if generation.weight_versions))
    assert sample.weight_versions == ("7", "6", "7")
    with pytest.raises(RunError, match="it speaks with weights '6@another'"):
        generated_meanwhile("6@another")
    assert engine.generate(speaker.requests(1, GREEDY))[0].weight_versions == ()


def test_a_server_of_another_model_is_refused_before_weights_could_end_it(spoken: str, tmp_path: Path) -> None:
    other = Speaker(tmp_path / "other")
    other.config.hidden_size = 32
    other.config.save_pretrained(other.folder)
    engine = other.engine(tmp_path / "logs", [spoken])
    with pytest.raises(UserError, match="another model than --hf-checkpoint: hidden_size is 64 there and 32 here"):
        engine.update_weights(other.weights(), "0")
    engine.close()
    assert not running_requests(spoken)


def test_memory_can_be_given_back_between_phases(speaker: Speaker, spoken: str, tmp_path: Path) -> None:
    """On the CPU the server frees nothing, but the calls and their order are the same."""
    speaker.reset()
    engine = speaker.engine(tmp_path, [spoken], free_memory=True)
    try:
        engine.update_weights(speaker.weights(), "0")
        requests = speaker.requests(4, GREEDY)
        before = [generation.tokens.tolist() for generation in engine.generate(requests)]
        engine.rest()
        with pytest.raises(RuntimeError, match="has no weights"):
            engine.generate(requests)
        engine.update_weights(speaker.weights(), "0")
        assert [generation.tokens.tolist() for generation in engine.generate(requests)] == before
    finally:
        engine.close()
