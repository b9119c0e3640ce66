"""Trainer ranks in Ray actors: the same numbers as one process, readable errors, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import transformers

from opd_megatron.cluster import ray_group
from opd_megatron.cluster.group import TrainerGroup, start_trainer_group
from opd_megatron.cluster.ray_group import TrainerError
from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ClusterOptions
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import LogProbs, StudentTokens, TopIds
from tests.megatron.support import assert_same_tensors, make_samples, make_spec, save_reference, tiny_config
from tests.parallel import work

pytestmark = [pytest.mark.parallel, pytest.mark.slow]
transformers.utils.logging.disable_progress_bar()

LAYOUTS: dict[str, dict[str, Any]] = {"tp2": {"tensor_model_parallel_size": 2}, "dp2": {}}


def _spec(folder: Path, **flags: Any) -> Any:
    settings = {"actor_num_gpus_per_node": 2, "distributed_timeout_minutes": 1.0}
    return make_spec(folder, **(work.TRAINING | settings | flags))


def _descendants() -> dict[int, str]:
    """Processes that this one started, directly or not, and their command lines."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    found: dict[int, str] = {}
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid() and pid != ancestor:
            with contextlib.suppress(OSError):
                found[pid] = (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ")
    return found


def _ranks() -> list[int]:
    return sorted(pid for pid, command in _descendants().items() if "_TrainerRank" in command)


def _gone(pids: Callable[[], Any], seconds: float = 30.0) -> bool:
    """Whether ``pids`` becomes empty; a killed process needs a moment to go."""
    deadline = time.monotonic() + seconds
    while pids() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not pids()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(tmp_path_factory.mktemp("model") / "qwen3", tiny_config("qwen3"))


def test_bad_input_found_by_a_rank_is_the_users_error(tmp_path: Path, folder: Path) -> None:
    """The group starts a cluster of its own here; all of it is gone when the error arrives."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").unlink()
    before = _descendants().keys()
    with pytest.raises(UserError, match="holds no safetensors weights"):
        start_trainer_group(_spec(broken))
    assert not ray.is_initialized()
    assert _gone(lambda: _descendants().keys() - before)


def test_several_nodes_need_a_cluster_to_join(folder: Path) -> None:
    with pytest.raises(UserError, match="--actor-num-nodes above 1 needs --ray-address"):
        start_trainer_group(_spec(folder, actor_num_nodes=2))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One small cluster for the tests below; groups that find one do not start or stop their own."""
    ray_group._connect(ClusterOptions(actor_num_gpus_per_node=2), 2)
    yield
    ray.shutdown()


@contextlib.contextmanager
def _started(spec: Any) -> Iterator[TrainerGroup]:
    group = start_trainer_group(spec)
    try:
        assert len(_ranks()) == 2
        yield group
    finally:
        group.close()
        assert _gone(_ranks)


def _check_losses(group: TrainerGroup, folder: Path, loss: str) -> None:
    torch.set_num_threads(1)
    expected = work.losses(Rendezvous(), folder, {}, loss)
    for number in range(work.STEPS):
        metrics, log_probs = group.train(make_samples(number))
        assert metrics == pytest.approx(expected[number], rel=1e-4, abs=1e-4), f"step {number}"
        assert [len(array) for array in log_probs] == [sample.response_length for sample in make_samples(number)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_ten_sft_losses_are_those_of_one_process(cluster: None, folder: Path, layout: str) -> None:
    with _started(_spec(folder, **LAYOUTS[layout], **work.LOSSES["sft"])) as group:
        _check_losses(group, folder, "sft")
        os.kill(_ranks()[0], signal.SIGKILL)
        with pytest.raises(TrainerError, match=r"^trainer rank \d failed: Actor") as failure:
            group.train(make_samples(0))
        assert "\n" not in str(failure.value)
        assert _gone(_ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_ten_opd_losses_are_those_of_one_process(
    cluster: None, tmp_path: Path, folder: Path, layout: str
) -> None:
    """On recorded rollouts; then scores, weights and a checkpoint, and at last a sample that one rank fails on."""
    with _started(_spec(folder, **LAYOUTS[layout], **work.LOSSES["opd"])) as group:
        _check_losses(group, folder, "opd")
        alone = MegatronTrainer(make_spec(folder, **work.TRAINING, **work.LOSSES["opd"]), Rendezvous())
        for number in range(work.STEPS):
            alone.train(make_samples(number))
        assert_same_tensors(dict(group.export_weights()), dict(alone.export_weights()), 1e-3)
        scores = alone.ask(LogProbs("student"), make_samples(3))
        for place, array in enumerate(group.ask(LogProbs("student"), make_samples(3))):
            np.testing.assert_allclose(array, scores[place], rtol=0, atol=1e-3)
        top_ids = alone.ask(TopIds(3), make_samples(3))
        agreed = [
            (array == top_ids[place]).mean()
            for place, array in enumerate(group.ask(TopIds(3), make_samples(3)))
            if array.size
        ]
        assert np.mean(agreed) > 0.95  # after ten steps two tokens may have changed places by rounding
        for place, array in enumerate(group.ask(StudentTokens(diagnostics=True), make_samples(3))):
            np.testing.assert_allclose(array["student_log_prob"], scores[place], rtol=0, atol=1e-3)
        gradient = alone.gradient_diagnostics(make_samples(3), 0)
        assert group.gradient_diagnostics(make_samples(3), 0) == pytest.approx(gradient, rel=1e-2, abs=1e-2)
        assert group.resume() is None
        assert group.peak_memory_bytes() > 2**20
        group.save(tmp_path, 10, folder, {"rollouts": 10})
        assert inspect_checkpoint(tmp_path).latest == 10

        samples = make_samples(0)
        samples[0].response_tokens[-1] = 60
        with pytest.raises(
            TrainerError, match=r"^trainer rank \d failed: ValueError: token 60 is not in the"
        ) as failure:
            group.train(samples)
        assert "\n" not in str(failure.value)
        assert _gone(_ranks)


def test_ranks_that_do_not_fit_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, cluster: None, folder: Path
) -> None:
    def wait_for_it(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the cluster for what it does not have")

    monkeypatch.setattr(ray_group, "placement_group", wait_for_it)
    with pytest.raises(
        UserError, match=r"--actor-num-gpus-per-node 3 need 3 times \{'CPU': 1\}, the cluster has \{'CPU': 2"
    ):
        start_trainer_group(_spec(folder, actor_num_gpus_per_node=3))
