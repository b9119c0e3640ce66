"""A server that dies, comes back, or holds other weights than it did: always a real one."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests

from opd_megatron.config.errors import UserError
from opd_megatron.sample import TeacherScores
from opd_megatron.servers import LocalServer, start_server
from opd_megatron.system import free_port
from opd_megatron.teacher.preflight import Student
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_preflight import preflight_sglang
from tests.e2e.support import make_model, run_training, write_prompts
from tests.sglang.conftest import Served, make_qwen, server_command
from tests.sglang.proxy import Asked, FaultProxy
from tests.sglang.support import assert_same_scores, mixed_samples, score_all, wait_until

pytestmark = pytest.mark.sglang
Connect = Callable[..., SGLangTeacher]
START_LIMIT = 180.0


class Second(Served):
    """A second server, with other weights, that can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        tokenizer = make_qwen(folder, seed=5)
        self._folder, self._port = folder, free_port()
        # A server dies with the thread that started it: this one lives until the end.
        self._starter = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="second server")
        super().__init__(self._starter.submit(self._start).result(), folder, tokenizer)
        self.server.wait_until_healthy(START_LIMIT)

    def _start(self) -> LocalServer:
        return start_server(server_command(self._folder), log_path=self._folder / "server.log", port=self._port)

    def _replace(self) -> None:
        self.server.kill()
        self.server = self._start()

    def restart(self) -> None:
        """Kill every process of the server and start another, without waiting for either."""
        self._starter.submit(self._replace)

    def end(self) -> None:
        self._starter.submit(lambda: self.server.end()).result()
        self._starter.shutdown()

    def load(self, folder: Path, **label: str) -> None:
        answer = requests.post(
            self.server.url + "/update_weights_from_disk", json={"model_path": str(folder), **label}, timeout=60
        )
        assert answer.json()["success"], answer.text


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Second]:
    served = Second(tmp_path_factory.mktemp("second"))
    yield served
    served.end()


def test_a_replica_with_other_weights_is_refused(qwen: Served, second: Second, connect: Connect) -> None:
    teacher = connect(qwen, [qwen.server.url, second.server.url])
    with pytest.raises(UserError, match="weights") as caught:
        preflight_sglang(teacher, Student(qwen.tokenizer))
    assert qwen.server.url in str(caught.value)
    assert second.server.url in str(caught.value)


def test_a_replica_that_dies_is_left_out_and_one_that_returns_is_used(qwen: Served, connect: Connect) -> None:
    samples = mixed_samples(qwen, 48)
    with FaultProxy(qwen.server.url) as stays, FaultProxy(qwen.server.url) as goes:
        teacher = connect(qwen, [stays.url, goes.url], max_in_flight=2, max_retries=4)
        expected = score_all(teacher, samples)
        assert stays.asked
        assert goes.asked
        goes.refuse()
        before = len(goes.asked), len(stays.asked)
        assert_same_scores(score_all(teacher, samples), expected, atol=1e-4)
        assert len(goes.asked) == before[0]
        assert len(stays.asked) > before[1]
        goes.listen()

        def returned() -> bool:
            assert_same_scores(score_all(teacher, samples), expected, atol=1e-4)
            return len(goes.asked) > before[0]

        wait_until(returned, limit=60)


def test_other_weights_in_the_middle_fail_what_comes_after(qwen: Served, second: Second, connect: Connect) -> None:
    samples = mixed_samples(second, 12)
    teacher = connect(second)
    preflight_sglang(teacher, Student(second.tokenizer))
    before = score_all(teacher, samples)
    second.load(qwen.folder, weight_version="2")
    try:
        for sample, outcome in zip(samples, score_all(teacher, samples), strict=True):
            if sample.response_length:
                assert isinstance(outcome, TeacherFailure)
                assert outcome.kind == FailureKind.CHANGED_MODEL
    finally:
        second.load(second.folder, weight_version="default")
    assert_same_scores(score_all(teacher, samples), before, atol=1e-4)


def test_a_run_outlives_a_server_that_is_killed_and_comes_back(second: Second, tmp_path: Path) -> None:
    student, prompts = make_model(tmp_path / "student", seed=1), write_prompts(tmp_path / "prompts.jsonl", 40, seed=3)

    def losses(name: str, url: str) -> list[float]:
        metrics = run_training(
            student, prompts, tmp_path / name, use_opd=True, opd_type="sglang", opd_teacher_url=url,
            opd_teacher_max_retries=12, advantage_estimator="none", num_rollout=3,
        )  # fmt: skip
        return [line["train/loss"] for line in metrics]

    killed = second.server.process.pid
    seen: set[tuple[int, ...]] = set()

    def note(asked: Asked) -> None:
        seen.update(tuple(element["input_ids"]) for element in asked.elements)

    with FaultProxy(second.server.url, note) as proxy:
        expected = losses("undisturbed", proxy.url)
        half = len(seen) // 2
        seen.clear()

        def kill_in_the_middle(asked: Asked) -> None:
            before = len(seen)
            note(asked)
            if before < half <= len(seen):
                second.restart()

        proxy.plan = kill_in_the_middle
        found = losses("disturbed", proxy.url)
    assert second.server.process.pid != killed
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_server_that_is_killed_for_good_fails_what_it_had_not_scored(second: Second, connect: Connect) -> None:
    second.server.wait_until_healthy(START_LIMIT)
    samples = mixed_samples(second, 400)
    teacher = connect(second, max_retries=2)
    expected = score_all(teacher, samples)
    with FaultProxy(second.server.url) as proxy:

        def kill_in_the_middle(asked: Asked) -> None:
            if asked.number == 3:
                second.server.kill()

        proxy.plan = kill_in_the_middle
        found = score_all(connect(second, proxy.url, max_retries=2, max_in_flight=2), samples)
    scored = [index for index, outcome in enumerate(found) if isinstance(outcome, TeacherScores)]
    assert_same_scores([found[index] for index in scored], [expected[index] for index in scored], atol=1e-4)
    failures = [outcome for outcome in found if isinstance(outcome, TeacherFailure)]
    assert failures
    assert {failure.kind for failure in failures} == {FailureKind.CONNECTION}
