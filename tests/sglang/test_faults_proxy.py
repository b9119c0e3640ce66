"""The proxy itself, before the real server: what it passes on, what it remembers, and how it breaks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests

from tests.sglang import faults
from tests.sglang.conftest import Served
from tests.sglang.proxy import FaultProxy, Plan, Recording, always, at_random, in_turn

pytestmark = pytest.mark.sglang
TIMEOUT = 30


def payload(ids: Any, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": 0}
    return {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0, **more}


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture
def rows(qwen: Served) -> list[list[int]]:
    generator = np.random.default_rng(11)
    # Without the last id of the vocabulary, which the server reports as 0.
    return [generator.integers(qwen.vocab_size - 1, size=size).tolist() for size in (6, 9, 12)]


def entries(answer: Any) -> list[Any]:
    parts = answer if isinstance(answer, list) else [answer]
    return [part["meta_info"]["input_token_logprobs"] for part in parts]


def post(session: requests.Session, url: str, body: dict[str, Any], timeout: float = TIMEOUT) -> requests.Response:
    return session.post(url + "/generate", json=body, timeout=timeout)


def test_without_a_fault_the_answers_are_the_servers(
    qwen: Served, session: requests.Session, rows: list[list[int]]
) -> None:
    with FaultProxy(qwen.server.url) as proxy:
        through, direct = (post(session, url, payload(rows)).json() for url in (proxy.url, qwen.server.url))
        info = session.get(proxy.url + "/model_info", timeout=TIMEOUT).json()
    assert info["model_path"] == session.get(qwen.server.url + "/model_info", timeout=TIMEOUT).json()["model_path"]
    for one, two, row in zip(entries(through), entries(direct), rows, strict=True):
        assert [item[1] for item in one] == row
        np.testing.assert_allclose([item[0] for item in one[1:]], [item[0] for item in two[1:]], atol=1e-4)
    assert [asked.is_batch for asked in proxy.asked] == [True]
    assert not proxy.injected


def test_a_recorded_answer_comes_again_however_it_is_asked_for(
    qwen: Served, session: requests.Session, rows: list[list[int]]
) -> None:
    recording = Recording()
    starts = [0, 2, 4]
    with FaultProxy(qwen.server.url, recording=recording) as proxy:
        batch = payload(rows, rid=["a", "b", "c"]) | {"logprob_start_len": starts}
        first = entries(post(session, proxy.url, batch).json())
    assert recording.misses == 3
    with FaultProxy("http://127.0.0.1:9", recording=recording) as proxy:
        for row, start, expected in zip(rows, starts, first, strict=True):
            alone = payload(row, rid="d") | {"logprob_start_len": start}
            assert entries(post(session, proxy.url, alone).json()) == [expected]
        reverse = payload(rows[::-1]) | {"logprob_start_len": starts[::-1]}
        assert entries(post(session, proxy.url, reverse).json()) == first[::-1]
    assert recording.misses == 3


def test_an_altered_batch_differs_in_one_sample(qwen: Served, session: requests.Session, rows: list[list[int]]) -> None:
    with FaultProxy(qwen.server.url, recording=Recording()) as proxy:
        whole = entries(post(session, proxy.url, payload(rows)).json())
        for fault in (faults.NULL, faults.OTHER_ID, faults.SHORTER, faults.LONGER, faults.INFINITE):
            proxy.plan = always(fault)
            found = entries(post(session, proxy.url, payload(rows)).json())
            assert sum(one != two for one, two in zip(found, whole, strict=True)) == 1
        proxy.plan = always(faults.SWAPPED)
        assert entries(post(session, proxy.url, payload(rows)).json()) == whole[::-1]
        proxy.plan = always(faults.CUT)
        answer = post(session, proxy.url, payload(rows))
        assert answer.status_code == 200
        with pytest.raises(json.JSONDecodeError):
            json.loads(answer.content)


@pytest.mark.parametrize("form", [{}, {"return_flat_raw_top_logprobs": True}, {"b64": True}], ids=str)
def test_top_k_lists_are_altered_in_every_form_of_the_answer(
    qwen: Served, session: requests.Session, rows: list[list[int]], form: dict[str, bool]
) -> None:
    flags = {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True} if "b64" in form else form
    with FaultProxy(qwen.server.url, recording=Recording()) as proxy:

        def ask() -> faults.TopK:
            answer = post(session, proxy.url, payload(rows[0], top_logprobs_num=4, **flags)).json()
            return faults.TopK(answer["meta_info"])

        whole = ask()
        assert whole.ids_TK.shape == (len(rows[0]) - 1, 4)
        assert (np.diff(whole.log_probs_TK) <= 0).all()
        proxy.plan = always(faults.TOP_K_FAULTS[0])
        changed = ask()
        assert (changed.ids_TK[:-1] == whole.ids_TK[:-1]).all()
        assert changed.ids_TK[-1].tolist() == whole.ids_TK[-1][[1, 0, 2, 3]].tolist()
        assert changed.log_probs_TK[-1, 0] < changed.log_probs_TK[-1, 1]


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        (faults.RESET, requests.ConnectionError, "reset"),
        (faults.RESET_MIDWAY, requests.RequestException, "reset|IncompleteRead"),
        (faults.CLOSED_MIDWAY, requests.exceptions.ChunkedEncodingError, "IncompleteRead"),
        (faults.SILENT, requests.ReadTimeout, "timed out"),
        (faults.SILENT_MIDWAY, requests.ConnectionError, "timed out"),
        (faults.refused(30.0), requests.ConnectionError, ""),
    ],
    ids=lambda value: value.name if isinstance(value, faults.Fault) else None,
)
def test_a_broken_connection_is_broken_once(
    qwen: Served, session: requests.Session, rows: list[list[int]], fault: faults.Fault, error: Any, match: str
) -> None:
    began = time.monotonic()
    with FaultProxy(qwen.server.url, in_turn(fault)) as proxy:
        with pytest.raises(error, match=match):
            post(session, proxy.url, payload(rows), timeout=1.0)
        if fault.name == "refused":
            with pytest.raises(requests.ConnectionError, match="refused"):
                post(session, proxy.url, payload(rows))
            proxy.listen()
        assert post(session, proxy.url, payload(rows)).status_code == 200
        assert proxy.injected == {fault.name: 1}
    assert proxy.open_requests == 0
    assert time.monotonic() - began < TIMEOUT


def test_random_faults_are_those_of_the_seed(qwen: Served, session: requests.Session, rows: list[list[int]]) -> None:
    def statuses(plan: Plan) -> list[int]:
        with FaultProxy(qwen.server.url, plan, Recording()) as proxy:
            return [post(session, proxy.url, payload(rows[0])).status_code for _ in range(40)]

    first, second = (statuses(at_random([faults.BUSY, faults.UNAVAILABLE], 0.3, seed=4)) for _ in range(2))
    assert first == second
    assert 4 <= 40 - first.count(200) <= 20
    assert set(first) == {200, 429, 503}
