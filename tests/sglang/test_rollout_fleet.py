"""Several servers of one engine: some die, some come back, and those that are left speak with the right weights."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

import train
from opd_megatron import servers
from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.cli import run_cli
from opd_megatron.config.errors import RunError, UserError
from opd_megatron.config.options.engine import EngineOptions
from opd_megatron.observe.run_folder import read_metrics
from opd_megatron.rollout import sglang_server
from opd_megatron.rollout.engine import GenerateRequest, Generation, SamplingParams
from opd_megatron.rollout.sglang_engine import SGLangEngine
from opd_megatron.rollout.sglang_launch import server_launches
from opd_megatron.rollout.sglang_server import SGLangServer
from opd_megatron.sample import Sample, read_samples
from opd_megatron.servers import LocalServer
from tests.e2e.support import base_arguments, write_prompts
from tests.sglang import faults
from tests.sglang.proxy import FaultProxy, always, in_turn, no_fault
from tests.sglang.speakers import Speaker, sglang_python
from tests.sglang.support import wait_until
from tests.sglang.test_rollout_servers import group, processes, wait_until_gone

pytestmark = pytest.mark.sglang
KEY = "sk-of-the-fleet"
LONG = SamplingParams(max_new_tokens=90, ignore_eos=True)
_victims: list[int] = []
"""Leaders of servers that :func:`kill_one` has ended, and of those that it may choose from."""


def kill_one(samples: Sequence[Sample]) -> list[float]:
    """A reward that ends one of the run's servers in the middle of its second rollout."""
    if _victims and {sample.weight_version for sample in samples} == {"1"}:
        os.killpg(_victims.pop(), signal.SIGKILL)
        _victims.clear()
    elif not _victims and {sample.weight_version for sample in samples} == {"0"}:
        _victims.extend(processes("launch.py", "--random-seed\x0077\x00"))
    return [float("7" in sample.response) for sample in samples]


def stop_at(path: str, version: str, monkeypatch: pytest.MonkeyPatch, at: Second | None = None) -> list[int]:
    """Stop a server when it is told ``path`` about weights ``version``; its process, once there is one, in a list.

    It keeps its connections and answers nothing, as one that hangs. Little is waited for afterwards. Without
    ``at``, the first server that is told so.
    """
    tell, stopped = SGLangServer.tell, []

    async def stop_and_tell(server: SGLangServer, told: str, payload: Any, *more: Any) -> None:
        meant = at is None or server.client.url == at.proxy.url
        if meant and told == path and f"'{version}@" in str(payload) and not stopped:
            stopped.append(scheduler_of(server.client.url if at is None else at.server.url))
            os.kill(stopped[0], signal.SIGSTOP)
        await tell(server, told, payload, *more)

    monkeypatch.setattr(SGLangServer, "tell", stop_and_tell)
    monkeypatch.setattr(sglang_server, "FAREWELL_TIMEOUT", 1.0)
    monkeypatch.setattr(servers, "END_TIMEOUT", 2.0)
    return stopped


def scheduler_of(url: str) -> int:
    """The process of a server that holds its weights."""
    (leader,) = processes("launch.py", f"--port\0{urlsplit(url).port}\0")
    (found,) = [member for member in group(leader) if b"scheduler" in Path(f"/proc/{member}/cmdline").read_bytes()]
    return found


def test_a_run_over_two_servers_survives_the_death_of_one_and_ends_where_one_hangs(
    speaker: Speaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is killed in the second rollout; after the third one joins the group for new weights and takes none."""
    _victims.clear()
    stopped = stop_at("/update_weights_from_distributed", "3", monkeypatch)
    arguments = base_arguments(
        speaker.folder,
        write_prompts(tmp_path / "prompts.jsonl", 20, seed=3),
        tmp_path / "run",
        num_rollout=4,
        rollout_engine_timeout=10,
        rollout_engine="sglang",
        rollout_num_engines=2,
        rollout_weight_transfer="distributed",
        sglang_python=sglang_python(),
        # more than one server may have in flight, so that the dead one owes some when it is missed
        rollout_engine_max_in_flight=2,
        rollout_batch_size=8,
        n_samples_per_prompt=4,
        advantage_estimator="grpo",
        rm_type=None,
        custom_rm_path="tests.sglang.test_rollout_fleet:kill_one",
        lr=1e-2,
        seed=76,  # the second server gets one more
        save_debug_rollout_data=tmp_path / "rollout_{rollout_id}.jsonl",
    )
    assert run_cli(train.main, arguments) == 1
    assert stopped
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: rollout engine http://\S+ (POST /update_weights_from_distributed|weights): .*", last)
    assert inspect_checkpoint(tmp_path / "run" / "checkpoints").latest == 3
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert [line["rollout/engine_restarts"] for line in metrics][-1] == 1
    for rollout, line in enumerate(metrics):
        assert line["rollout/train_logprob_gap_max"] < 1e-3
        samples = list(read_samples(tmp_path / f"rollout_{rollout}.jsonl"))
        assert len(samples) == 32
        assert {sample.weight_version for sample in samples} == {str(rollout)}
    assert not processes("launch.py", "--random-seed\x0076\x00")
    assert not processes("launch.py", "--random-seed\x0077\x00")


class Second:
    """A server with an API key behind a proxy, which can lose it and find another one."""

    def __init__(self, speaker: Speaker, folder: Path) -> None:
        options = EngineOptions(sglang_python=sglang_python(), sglang_server_args=f"--api-key {KEY}")
        (self._launch,) = server_launches(options, speaker.served, folder, on_cpu=True)
        self.server: LocalServer = self._launch()
        self.proxy = FaultProxy(self.server.url)
        self.server.wait_until_healthy(600)

    def begin_anew(self) -> None:
        self.server.kill()
        self.server = self._launch()
        self.server.wait_until_healthy(600)
        self.proxy.upstream = self.server.url

    def label(self) -> str:
        headers = {"Authorization": f"Bearer {KEY}"}
        return str(requests.get(self.server.url + "/model_info", headers=headers, timeout=30).json()["weight_version"])

    def name_weights(self, version: str) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        change = {"new_version": version}
        address = self.server.url + "/update_weight_version"
        requests.post(address, json=change, headers=headers, timeout=30).raise_for_status()


@pytest.fixture(scope="module")
def second(speaker: Speaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Second]:
    made = Second(speaker, tmp_path_factory.mktemp("second"))
    with made.proxy:
        yield made
    made.server.end()
    wait_until_gone(made.server.process.pid)


@pytest.fixture
def engine(
    speaker: Speaker, spoken: str, second: Second, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SGLangEngine]:
    """Over the shared server and the second one, with weights 0."""
    monkeypatch.setenv("OPD_TEST_FLEET_KEY", KEY)
    monkeypatch.setattr("opd_megatron.rollout.sglang_server.ALIVE_TIMEOUT", 4.0)
    speaker.reset()
    made = speaker.engine(tmp_path, [spoken, second.proxy.url], api_key_env="OPD_TEST_FLEET_KEY", timeout=25.0)
    made.update_weights(speaker.weights(), "0")
    yield made
    made.close()


def check_speech(speaker: Speaker, engine: SGLangEngine, count: int = 12) -> None:
    """``count`` responses come from the trainer's weights."""
    asked = speaker.requests(count, SamplingParams(max_new_tokens=20))
    for request, generation in zip(asked, engine.generate(asked), strict=True):
        tokens = np.concatenate([request.prompt_tokens, generation.tokens])
        expected = speaker.log_probs(tokens)[len(request.prompt_tokens) - 1 :]
        np.testing.assert_allclose(generation.log_probs, expected, atol=1e-4)
        assert generation.weight_version == engine.weight_version


def in_the_middle(engine: SGLangEngine, second: Second, fault: Any) -> list[Generation]:
    """30 long responses, during which ``fault()`` happens while the second server owes some."""
    answers: list[list[Generation]] = []
    asked = [GenerateRequest(np.array([3]), LONG, (place,)) for place in range(30)]
    thread = threading.Thread(target=lambda: answers.append(engine.generate(asked)), daemon=True)
    thread.start()
    wait_until(lambda: second.proxy.open_requests > 5)
    fault()
    thread.join(120)
    assert len(answers[0]) == 30
    assert all(len(generation.tokens) == 90 for generation in answers[0])
    return answers[0]


def test_a_server_that_is_lost_while_it_speaks_comes_back_with_the_next_weights(
    speaker: Speaker, engine: SGLangEngine, second: Second
) -> None:
    check_speech(speaker, engine)
    assert second.proxy.asked
    in_the_middle(engine, second, second.server.kill)
    speaker.step(0.05)
    engine.update_weights(speaker.weights(), "1")  # it is still gone
    check_speech(speaker, engine)
    second.begin_anew()
    speaker.step(0.05)
    engine.update_weights(speaker.weights(), "2")
    assert second.label().startswith("2@")
    second.proxy.asked.clear()
    check_speech(speaker, engine)
    assert second.proxy.asked
    assert engine.metrics()["rollout/engine_restarts"] == 0


def test_a_server_with_other_weights_gets_them_again_or_is_left_out(
    speaker: Speaker, engine: SGLangEngine, second: Second
) -> None:
    """As one does that began anew by itself. ``reset``: it goes away again over the proof."""
    for plan, stays in ((in_turn(faults.RESET), True), (always(faults.RESET), False)):
        engine.update_weights(speaker.weights(), "1")
        second.name_weights("default")
        second.proxy.asked.clear()
        second.proxy.plan = plan
        check_speech(speaker, engine)
        assert second.label().startswith("1@")
        second.proxy.plan = no_fault
        second.proxy.asked.clear()
        check_speech(speaker, engine)
        assert bool(second.proxy.asked) == stays


def test_a_server_that_hangs_over_an_update_is_left_out_until_it_begins_anew(
    speaker: Speaker, engine: SGLangEngine, second: Second, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang does not always recover by itself from an update that was given up on half way."""
    speaker.step(0.05)
    with monkeypatch.context() as patch:
        patch.setattr(engine._fleet.servers[1], "_timeout", 3.0)
        stopped = stop_at("/update_weights_from_disk", "1", patch, at=second)
        try:
            engine.update_weights(speaker.weights(), "1")
            second.proxy.asked.clear()
            check_speech(speaker, engine)
            assert stopped
            assert not second.proxy.asked
        finally:
            second.begin_anew()
    speaker.step(0.05)
    engine.update_weights(speaker.weights(), "2")
    assert second.label().startswith("2@")
    check_speech(speaker, engine)
    assert second.proxy.asked


@pytest.mark.parametrize("moment", ["load", "proof"])
def test_a_server_that_is_lost_at_an_update_is_left_out(
    speaker: Speaker, engine: SGLangEngine, second: Second, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker.step(0.05)
    if moment == "load":
        second.proxy.refuse()
    else:

        def reference(tokens: np.ndarray) -> np.ndarray:
            second.proxy.refuse()
            return speaker.log_probs(tokens)

        monkeypatch.setattr(engine, "_reference", reference)
    try:
        engine.update_weights(speaker.weights(), "1")
        monkeypatch.setattr(engine, "_reference", speaker.log_probs)
        assert second.label().startswith("0@" if moment == "load" else "1@")
        check_speech(speaker, engine)
        engine.rest()
    finally:
        second.proxy.listen()
    engine.update_weights(speaker.weights(), "2")
    assert second.label().startswith("2@")


def test_a_server_that_answers_and_does_not_generate_is_left_out(
    speaker: Speaker, spoken: str, second: Second, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_TEST_FLEET_KEY", KEY)
    speaker.reset()
    urls = [spoken, second.proxy.url]
    engine = speaker.engine(tmp_path, urls, api_key_env="OPD_TEST_FLEET_KEY", timeout=8.0)
    engine.update_weights(speaker.weights(), "0")
    monkeypatch.setattr("opd_megatron.rollout.sglang_server.ALIVE_TIMEOUT", 4.0)
    stopped = scheduler_of(second.server.url)
    try:
        in_the_middle(engine, second, lambda: os.kill(stopped, signal.SIGSTOP))
        second.proxy.asked.clear()
        check_speech(speaker, engine)
        assert not second.proxy.asked
    finally:
        os.kill(stopped, signal.SIGCONT)
        engine.close()


def test_weights_that_a_server_cannot_read_end_the_run(speaker: Speaker, second: Second, tmp_path: Path) -> None:
    """It is not taken for one that has gone: the next update would fail there, too."""

    def write(named_tensors: Any, folder: Path) -> None:
        folder.mkdir(parents=True)

    os.environ["OPD_TEST_FLEET_KEY"] = KEY
    engine = speaker.engine(tmp_path, [second.proxy.url], api_key_env="OPD_TEST_FLEET_KEY", write=write)
    try:
        with pytest.raises(RunError, match=r"HTTP 400: .*weights"):
            engine.update_weights(speaker.weights(), "0")
    finally:
        engine.close()
        del os.environ["OPD_TEST_FLEET_KEY"]


def test_a_server_that_wants_a_key_and_gets_none_is_one_line(speaker: Speaker, second: Second, tmp_path: Path) -> None:
    engine = speaker.engine(tmp_path, [second.proxy.url])
    try:
        with pytest.raises(UserError, match=r"--rollout-engine-url: .* HTTP 401"):
            engine.update_weights(speaker.weights(), "0")
    finally:
        engine.close()
