"""math-verify behind its time limit, with the real package and inputs that really hang it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from opd_megatron.config.options import RewardOptions
from opd_megatron.reward import RewardError, RewardFunction, build_reward
from opd_megatron.sample import Sample

HANGS = "$9^{9^{9^{9}}}$"


def sample(response: str, label: str, index: int = 0) -> Sample:
    return Sample(index, 0, "What is it?", np.arange(3), label=label, response=response)


@pytest.fixture(scope="module")
def reward() -> Iterator[RewardFunction]:
    built = build_reward(RewardOptions(rm_type="math", rm_timeout=4))
    yield built
    built.close()


def worker_pids() -> set[int]:
    """Children of this process that run the worker program."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[1]
            program = (process / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == os.getpid() and b"math_worker.py" in program:
            found.add(int(process.name))
    return found


def test_equal_answers_in_other_words_are_right(reward: RewardFunction) -> None:
    cases = [
        ("so the answer is \\boxed{18}", "18", 1),
        ("the answer is 18.", "18", 1),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1),
        ("\\boxed{0.5}", "$\\frac{1}{2}$", 1),
        ("$1+x^2$", "x^2+1", 1),
        ("\\boxed{(1,2)}", "(1,2)", 1),
        ("\\boxed{1000}", "1,000", 1),
        ("\\boxed{19}", "18", 0),
        ("", "18", 0),
        ("I do not know", "18", 0),
        ("\\boxed{\\frac{}{", "18", 0),
        ("line\u2028break\r\n\x00 \\boxed{18}", "18", 1),
    ]
    samples = [sample(response, label, index) for index, (response, label, _) in enumerate(cases)]
    reward.score(samples)
    assert [(item.reward, item.reward_error) for item in samples] == [(right, None) for _, _, right in cases]


def test_a_response_that_hangs_gets_nothing_and_costs_nobody_else(reward: RewardFunction) -> None:
    samples = [sample(HANGS, "1", 0), *(sample("\\boxed{18}", "18", index) for index in range(1, 6))]
    reward.score(samples)
    assert samples[0].reward == 0.0
    assert "did not finish in 4 s" in str(samples[0].reward_error)
    assert [(item.reward, item.reward_error) for item in samples[1:]] == [(1.0, None)] * 5


def test_the_limit_holds_in_a_thread(reward: RewardFunction) -> None:
    hanging, right = sample(HANGS, "1", 0), sample("\\boxed{18}", "18", 1)
    thread = threading.Thread(target=reward.score, args=([hanging, right],))
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert "did not finish" in str(hanging.reward_error)
    assert right.reward == 1.0


def test_workers_are_kept_and_end_with_the_reward() -> None:
    before = worker_pids()
    own = build_reward(RewardOptions(rm_type="math"))
    own.score([sample("1", "1")])
    started = worker_pids() - before
    own.score([sample("1", "1")])
    assert len(started) == 1, "one question needs one process"
    assert worker_pids() - before == started
    own.close()
    own.close()
    assert worker_pids() == before


def test_a_worker_that_was_killed_is_replaced(reward: RewardFunction) -> None:
    reward.score([sample("1", "1")])
    for pid in worker_pids():
        os.kill(pid, signal.SIGKILL)
    samples = [sample("\\boxed{18}", "18", index) for index in range(8)]
    reward.score(samples)
    lost = [item for item in samples if item.reward_error]
    assert len(lost) <= 4, "at most the question that each killed process was asked"
    assert all("ended with status -9" in str(item.reward_error) for item in lost)
    assert {item.reward for item in samples if item not in lost} == {1.0}


def test_a_worker_does_not_outlive_a_killed_run(tmp_path: Path) -> None:
    """The limit is kept by the worker itself, so one that is stuck ends although nobody is left to end it."""
    program = tmp_path / "run.py"
    program.write_text(
        "import numpy as np\n"
        "from opd_megatron.config.options import RewardOptions\n"
        "from opd_megatron.reward import build_reward\n"
        "from opd_megatron.sample import Sample\n"
        "reward = build_reward(RewardOptions(rm_type='math', rm_timeout=3.0))\n"
        "reward.score([Sample(0, 0, 'p', np.arange(1), label='1', response='1')])\n"
        "print(reward._rater._workers[0]._process.pid, flush=True)\n"
        f"reward.score([Sample(0, 0, 'p', np.arange(1), label='1', response={HANGS!r})])\n",
        encoding="utf-8",
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    time.sleep(0.5)  # long enough to be inside the power, short of the limit
    run.kill()
    run.wait()
    run.stdout.close()
    for _ in range(300):
        if not alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker is still running")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_label_that_is_not_mathematics_is_an_error(reward: RewardFunction) -> None:
    with pytest.raises(RewardError, match=r"sample 9 .*cannot read the label"):
        reward.score([sample("\\boxed{1}", "", 9)])
