"""Servers of the engine's own: started, started again, ended; and runs of train.py that sample through them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.rollout.engine import GenerateRequest, Generation, SamplingParams
from opd_megatron.sample import read_samples
from tests.docs.test_run_folder import OF_SGLANG_ENGINE
from tests.e2e.processes import interrupt_twice, start_run, wait_for, wait_for_step
from tests.e2e.support import base_arguments, run_training, write_prompts
from tests.sglang.faults import SILENT
from tests.sglang.proxy import FaultProxy
from tests.sglang.speakers import REPOSITORY, Speaker, sglang_python
from tests.sglang.support import wait_until

pytestmark = pytest.mark.sglang


def processes(*words: str) -> list[int]:
    """Processes whose command line has all the words."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if all(word in line for word in words):
                found.append(int(folder.name))
    return found


def group(leader: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                state, _, pgrp = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(pgrp) == leader and state != "Z":
                found.append(int(folder.name))
    return found


def wait_until_gone(leader: int) -> None:
    deadline = time.monotonic() + 30
    while group(leader):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_is_killed_comes_back_and_no_response_is_lost(speaker: Speaker, tmp_path: Path) -> None:
    speaker.reset()
    others = processes("launch.py", str(speaker.folder))  # a server that other tests share

    def own_server() -> int:
        (leader,) = set(processes("launch.py", str(speaker.folder))) - set(others)
        return leader

    engine = speaker.engine(tmp_path)
    try:
        engine.update_weights(speaker.weights(), "0")
        speaker.step(0.05)
        engine.update_weights(speaker.weights(), "1")
        greedy = speaker.requests(8, SamplingParams(temperature=0.0, max_new_tokens=40))
        before = engine.generate(greedy)
        leader, addresses = own_server(), engine.addresses()
        long = [
            GenerateRequest(np.array([3]), SamplingParams(max_new_tokens=90, ignore_eos=True), (i,)) for i in range(60)
        ]
        answers: list[list[Generation]] = []
        thread = threading.Thread(target=lambda: answers.append(engine.generate([*long, *greedy])), daemon=True)
        thread.start()
        time.sleep(0.3)
        assert not answers
        os.killpg(leader, signal.SIGKILL)
        thread.join(240)
        (after,) = answers
        assert len(after) == 68
        assert [one.tokens.tolist() for one in after[60:]] == [one.tokens.tolist() for one in before]
        for request, generation in zip(long, after[:60], strict=True):
            tokens = np.concatenate([request.prompt_tokens, generation.tokens])
            np.testing.assert_allclose(generation.log_probs, speaker.log_probs(tokens), atol=1e-4)
        assert engine.metrics()["rollout/engine_restarts"] == 1
        again = own_server()
        assert again != leader
        assert engine.addresses() == addresses, "who asked it to score finds it where it was"
    finally:
        engine.close()
    wait_until_gone(again)
    assert (tmp_path / "engine_0.log").read_text().count("server_args=") == 2


def arguments(speaker: Speaker, tmp_path: Path, **more: Any) -> dict[str, Any]:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 20, seed=3)
    return {
        "student": speaker.folder,
        "prompts": prompts,
        "run_dir": tmp_path / "run",
        "rollout_engine": "sglang",
        **more,
    }


def test_a_run_samples_through_the_server_with_the_weights_of_each_step(
    speaker: Speaker, spoken: str, tmp_path: Path
) -> None:
    metrics = run_training(
        **arguments(speaker, tmp_path),
        rollout_engine_url=spoken,
        rollout_temperature=0.8,
        advantage_estimator="grpo",
        rm_type=None,
        custom_rm_path="tests.e2e.rewards:count_sevens",
        lr=1e-2,
        eval_prompt_data=["held", tmp_path / "prompts.jsonl"],
        eval_rm_type="column_arithmetic",
        save_debug_rollout_data=tmp_path / "rollout_{rollout_id}.jsonl",
    )
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert set(metrics[0]) >= OF_SGLANG_ENGINE
    for rollout, line in enumerate(metrics[1:]):
        assert line["rollout/train_logprob_gap_max"] < 1e-3
        assert line["rollout/engine_restarts"] == 0
        assert {sample.weight_version for sample in read_samples(tmp_path / f"rollout_{rollout}.jsonl")} == {
            str(rollout)
        }
    assert max(line["train/grad_norm"] for line in metrics[1:3]) > 0  # so that weights did change on the way
    assert not list((tmp_path / "run").rglob("weights_*"))


def test_servers_that_are_not_there_are_one_line(speaker: Speaker, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("opd_megatron.rollout.sglang_server.ALIVE_TIMEOUT", 1.0)
    with pytest.raises(UserError, match=r"--rollout-engine-url: rollout engine http://127\.0\.0\.1:9"):
        run_training(**arguments(speaker, tmp_path), rollout_engine_url="http://127.0.0.1:9")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_while_its_servers_start_leaves_none(
    speaker: Speaker, tmp_path: Path, number: signal.Signals
) -> None:
    run = arguments(speaker, tmp_path, sglang_python=sglang_python())
    command = [
        sys.executable,
        "train.py",
        *base_arguments(run.pop("student"), run.pop("prompts"), run.pop("run_dir"), **run),
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (leaders := processes("launch.py", str(speaker.folder), f"--random-seed\0{5}")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    wait_until_gone(leaders[0])


def test_ctrl_c_while_a_teacher_is_silent_leaves_no_request_and_no_server(
    speaker: Speaker, spoken: str, tmp_path: Path
) -> None:
    """The first signal waits for the step, which does not end, the second does not wait."""
    silent = threading.Event()
    run = arguments(speaker, tmp_path, sglang_python=sglang_python(), num_rollout=1000)
    folder, log = run["run_dir"], tmp_path / "log"
    with FaultProxy(spoken, lambda asked: SILENT if silent.is_set() else None) as proxy:
        run |= {"use_opd": True, "opd_type": "sglang", "opd_teacher_url": proxy.url}
        command = base_arguments(run.pop("student"), run.pop("prompts"), run.pop("run_dir"), **run)
        process = start_run(command, log)
        try:
            wait_for_step(process, folder, 1, seconds=240.0)
            (leader,) = processes("launch.py", str(speaker.folder), "--random-seed\0005\0")
            silent.set()
            wait_for(lambda: proxy.open_requests > 0, process, seconds=240.0)
            assert interrupt_twice(process, log) == 128 + signal.SIGINT
        finally:
            process.kill()
            process.wait()
        wait_until_gone(leader)
        wait_until(lambda: proxy.open_requests == 0, 30.0)
    assert "Traceback" not in log.read_text()
