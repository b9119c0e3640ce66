"""Whole runs whose teacher misbehaves: the same training where a retry helps, the policy's result where none does."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.cli import run_cli
from opd_megatron.observe.run_folder import read_metrics
from opd_megatron.sample import Sample, read_samples
from tests.e2e.support import base_arguments, make_model, run_training, write_prompts
from tests.sglang import faults
from tests.sglang.conftest import Served
from tests.sglang.proxy import Fault, FaultProxy, Plan, Recording, at_random, no_fault, whenever

pytestmark = pytest.mark.sglang
ROLLOUTS = 3
SAMPLES = 16
"""Of one rollout."""
RANDOM_FAULTS = [
    *(faults.refused(0.1), faults.RESET, faults.RESET_MIDWAY, faults.CLOSED_MIDWAY, faults.CUT, faults.BUSY),
    *faults.ERROR_FORMS,
    *(faults.UNAVAILABLE, faults.BUSY_FOR_A_WHILE, faults.LONGER, faults.POSITIVE, faults.TEXT, faults.ABORTED),
    *(faults.OTHER_ID, faults.SHORTER, faults.NAN, faults.INFINITE, faults.NULL, faults.SWAPPED, faults.LOST),
]
SPOILT = faults.status(500, {"error": {"message": "this one cannot be scored"}})


class Training:
    """Runs of the same student behind proxies; teacher answers are recorded, so that all of them hear the same."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.served, self.folder = served, folder
        self.student = make_model(folder / "student", seed=1)
        self.prompts = write_prompts(folder / "prompts.jsonl", 60, seed=3)
        self.recording = Recording()
        rows = [json.loads(line) for line in self.prompts.read_text(encoding="utf-8").splitlines()]
        self._prompts = {tuple(served.tokenizer(row["prompt"]).input_ids) for row in rows}

    def is_of_a_rollout(self, element: dict[str, Any]) -> bool:
        """Whether a sample of this payload begins with a prompt; the preflight's do not."""
        return tuple(element["input_ids"][: element["logprob_start_len"] + 1]) in self._prompts

    def is_spoilt(self, element: dict[str, Any]) -> bool:
        """True for one sample of the rollouts in about six, always the same ones."""
        return self.is_of_a_rollout(element) and sum(element["input_ids"]) % 6 == 1

    def spoilt(self, samples: list[Sample]) -> list[Sample]:
        payloads = [
            {"input_ids": sample.tokens.tolist(), "logprob_start_len": len(sample.prompt_tokens) - 1}
            for sample in samples
        ]
        return [sample for sample, payload in zip(samples, payloads, strict=True) if self.is_spoilt(payload)]

    def options(self, url: str, **more: Any) -> dict[str, Any]:
        return {
            "use_opd": True,
            "opd_type": "sglang",
            "opd_teacher_url": url,
            "opd_teacher_max_retries": 12,
            "opd_teacher_timeout": 5.0,
            "advantage_estimator": "grpo",
            "rm_type": None,
            "custom_rm_path": "tests.e2e.rewards:count_sevens",
            "num_rollout": ROLLOUTS,
            "rollout_batch_size": SAMPLES // 2,
            **more,
        }

    def run(self, name: str, plan: Plan = no_fault, recorded: bool = True, **more: Any) -> list[dict[str, Any]]:
        """The metrics of a run that ends well and leaves neither a request nor a process behind."""
        before = children()
        with FaultProxy(self.served.server.url, plan, self.recording if recorded else None) as proxy:
            more["save_debug_rollout_data"] = self.folder / (name + "_{rollout_id}.jsonl")
            metrics = run_training(self.student, self.prompts, self.folder / name, **self.options(proxy.url, **more))
            assert proxy.open_requests == 0
        assert plan is no_fault or proxy.injected
        assert children() <= before
        return metrics

    def at_random(self, probability: float, seed: int) -> Plan:
        """Random faults of the rollouts' requests; the preflight, which the user sees, has none."""
        plan = at_random(RANDOM_FAULTS, probability, seed)
        return lambda asked: plan(asked) if self.is_of_a_rollout(asked.elements[0]) else None

    def first(self, *once: Fault) -> Plan:
        """The first requests of the rollouts meet one fault each, others none."""
        left = list(once)
        return lambda asked: left.pop(0) if left and self.is_of_a_rollout(asked.elements[0]) else None

    def samples(self, name: str) -> list[list[Sample]]:
        return [list(read_samples(self.folder / f"{name}_{number}.jsonl")) for number in range(ROLLOUTS)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults in a row are the plan's, not a server's that needs a rest: pauses that grow would be all of a run."""
    monkeypatch.setattr("opd_megatron.http_client.MAX_PAUSE", 0.5)


@pytest.fixture(scope="module")
def training(qwen: Served, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(qwen, tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def undisturbed(training: Training) -> list[dict[str, Any]]:
    return training.run("undisturbed")


def learned(metrics: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What a run learned, without how long it took."""
    names = ("train/", "reward/", "opd/", "rollout/")
    return [{name: value for name, value in line.items() if name.startswith(names)} for line in metrics]


@pytest.mark.parametrize("seed", [1, 2])
def test_faults_that_pass_leave_the_training_as_it_is_bit_for_bit(
    training: Training, undisturbed: list[dict[str, Any]], seed: int
) -> None:
    found = training.run(f"disturbed {seed}", training.at_random(0.4, seed))
    assert learned(found) == learned(undisturbed)
    assert all(line["opd/teacher_failed_frac"] == 0 for line in found)


def test_answers_that_come_too_late_leave_the_training_as_it_is(
    training: Training, undisturbed: list[dict[str, Any]]
) -> None:
    found = training.run("late", training.first(faults.SILENT, faults.SILENT_MIDWAY), opd_teacher_timeout=2.0)
    assert learned(found) == learned(undisturbed)


def test_with_new_answers_the_loss_is_the_same_within_rounding(
    training: Training, undisturbed: list[dict[str, Any]]
) -> None:
    found = training.run("asked anew", training.at_random(0.3, seed=3), recorded=False)
    for name in ("train/loss", "opd/reverse_kl"):
        np.testing.assert_allclose(
            [line[name] for line in found], [line[name] for line in undisturbed], rtol=0, atol=1e-4
        )


def test_masked_samples_keep_their_reward_and_leave_the_distillation(training: Training) -> None:
    metrics = training.run(
        "masked",
        whenever(training.is_spoilt, SPOILT),
        opd_on_teacher_failure="mask",
        opd_max_failed_frac=0.6,
        opd_teacher_max_retries=0,
    )
    failed = 0
    for line, samples in zip(metrics, training.samples("masked"), strict=True):
        masked = training.spoilt(samples)
        failed += len(masked)
        for sample in samples:
            assert sample.reward is not None
            assert sample.teacher_scores is not None
            assert (sample.teacher_failure == "status") == any(sample is other for other in masked)
            assert sample.teacher_scores.valid_T.all() != (sample.teacher_failure is not None)
        assert len(samples) == SAMPLES
        assert line["opd/teacher_failed_frac"] == pytest.approx(len(masked) / SAMPLES)
        assert np.isfinite(line["train/loss"])
    assert 0 < failed < ROLLOUTS * SAMPLES / 2


def test_dropped_samples_are_replaced(training: Training) -> None:
    metrics = training.run(
        "dropped",
        whenever(training.is_spoilt, SPOILT),
        opd_on_teacher_failure="drop",
        opd_max_failed_frac=1.0,
        opd_teacher_max_retries=0,
    )
    for samples in training.samples("dropped"):
        assert len(samples) == SAMPLES
        assert not training.spoilt(samples)
        assert all(sample.teacher_scores is not None and sample.teacher_scores.valid_T.all() for sample in samples)
    assert sum(line["opd/teacher_failed_frac"] for line in metrics) > 0


@pytest.mark.parametrize(
    ("fault", "policy", "message"),
    [
        (SPOILT, {"opd_on_teacher_failure": "stop"}, "HTTP 500: this one cannot be scored"),
        (SPOILT, {"opd_on_teacher_failure": "mask", "opd_max_failed_frac": 0.01}, "--opd-max-failed-frac 0.01 allows"),
        (faults.OTHER_VERSION, {}, "its weight version is 'another', not 'default'"),
    ],
    ids=["stop", "above the budget", "other weights"],
)
def test_what_cannot_go_on_is_saved_and_ends_with_one_line(
    training: Training, fault: Fault, policy: dict[str, Any], message: str, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The teacher fails in the second rollout; what the first one learned is in the checkpoint."""
    folder = training.folder / request.node.callspec.id
    first = {tuple(sample.tokens) for sample in training.samples("undisturbed")[0]}
    plan = whenever(lambda element: training.is_spoilt(element) and tuple(element["input_ids"]) not in first, fault)
    with FaultProxy(training.served.server.url, plan, training.recording) as proxy:
        options = training.options(proxy.url, **policy, opd_teacher_max_retries=0)
        assert run_cli(train.main, base_arguments(training.student, training.prompts, folder, **options)) == 1
        assert proxy.open_requests == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "sample " in last
    saved = inspect_checkpoint(folder / "checkpoints").steps
    assert saved == [line["step"] for line in read_metrics(folder / "metrics.jsonl")][-1:]


def children() -> set[int]:
    """Processes that this one started and that still are."""
    found: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found.update(map(int, (task / "children").read_text().split()))
    return found
