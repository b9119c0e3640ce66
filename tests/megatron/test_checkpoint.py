"""Checkpoints: resuming bit for bit, saves that are cut off, and files that must not be trusted."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config.checkpoint_paths import MANIFEST, TRACKER, inspect_checkpoint, resolve_step
from opd_megatron.config.errors import UserError
from opd_megatron.config.resolve import StartingPoint
from opd_megatron.megatron.checkpoint import has_training_state, load_weights, save_checkpoint
from opd_megatron.megatron.safe_checkpoint import UnsafeCheckpointError
from opd_megatron.megatron.trainer import MegatronTrainer
from tests.megatron.support import (
    FAMILIES,
    assert_equal_tensors,
    exported,
    make_samples,
    make_trainer,
    optimizer_state,
    save_reference,
    tiny_config,
)

SCHEDULE: dict[str, Any] = {"lr": 1e-2, "lr_warmup_iters": 2, "lr_decay_style": "cosine", "num_rollouts": 8}
OPTIMIZERS = {
    "adam": {},
    "adam-distributed": {"use_distributed_optimizer": True},
    "sgd": {"optimizer": "sgd"},
    "adam-bf16": {"bf16": True},
    "adam-bf16-fp32-grads": {"bf16": True, "accumulate_allreduce_grads_in_fp32": True},
    "adam-distributed-bf16": {"use_distributed_optimizer": True, "bf16": True},
    "sgd-bf16": {"optimizer": "sgd", "bf16": True},
}


def _trainer(folder: Path, **flags: Any) -> MegatronTrainer:
    return make_trainer(folder, use_opd=True, **(SCHEDULE | flags))


def _resumed(folder: Path, saved: Path, **flags: Any) -> tuple[MegatronTrainer, dict[str, Any]]:
    trainer = _trainer(folder, start=StartingPoint("load", resolve_step(saved)), **flags)
    state = trainer.resume()
    assert state is not None
    return trainer, state


def _learn(trainer: MegatronTrainer, rollouts: range) -> list[dict[str, float]]:
    """Metrics of each rollout; every step uses up a random number, which a resume must not repeat."""
    found = []
    for number in rollouts:
        metrics = trainer.train(make_samples(number)).metrics
        assert metrics is not None
        found.append(metrics | {"random": torch.rand(()).item()})
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    folder, flags = folders["qwen2"], OPTIMIZERS[name]
    straight = _trainer(folder, **flags)
    expected = _learn(straight, range(6))
    first = _trainer(folder, **flags)
    assert _learn(first, range(3)) == expected[:3]
    run_state = {"rollouts": 3, "prompts": {"epoch": 1, "position": 5}}
    first.save(tmp_path, 3, folder, run_state)
    second, found_state = _resumed(folder, tmp_path, **flags)
    assert found_state.items() >= run_state.items()
    assert_equal_tensors(optimizer_state(second), optimizer_state(first))
    assert _learn(second, range(3, 6)) == expected[3:]
    assert_equal_tensors(exported(second), exported(straight))
    assert_equal_tensors(optimizer_state(second), optimizer_state(straight))


def test_saving_changes_nothing_in_the_run_that_goes_on(tmp_path: Path, folders: dict[str, Path]) -> None:
    saving, silent = (_trainer(folders["qwen3"]) for _ in range(2))
    torch.manual_seed(0)
    expected = _learn(silent, range(3))
    torch.manual_seed(0)
    found = _learn(saving, range(1))
    saving.save(tmp_path, 1, folders["qwen3"], {})
    assert found + _learn(saving, range(1, 3)) == expected


@pytest.mark.parametrize("name", ["adam", "adam-distributed", "sgd", "adam-bf16"])
def test_a_run_can_be_saved_before_its_first_step(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    folder, flags = folders["qwen3"], OPTIMIZERS[name]
    straight = _trainer(folder, **flags)
    expected = _learn(straight, range(2))
    _trainer(folder, **flags).save(tmp_path, 0, folder, {"rollouts": 0})
    resumed, _ = _resumed(folder, tmp_path, **flags)
    assert _learn(resumed, range(2)) == expected
    assert_equal_tensors(exported(resumed), exported(straight))


def test_the_folder_is_complete_and_the_tracker_names_the_newest(tmp_path: Path, folders: dict[str, Path]) -> None:
    trainer = _trainer(folders["qwen2"])
    for step in (2, 10):
        trainer.save(tmp_path, step, folders["qwen2"], {"rollouts": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "iter_0000002", "iter_0000010", TRACKER]
    assert (tmp_path / TRACKER).read_text().strip() == "10"
    info = inspect_checkpoint(tmp_path)
    assert (info.steps, info.latest, info.hf_folder, info.problem) == ([2, 10], 10, tmp_path / "hf", None)
    assert (tmp_path / "hf" / "config.json").exists()
    assert not list((tmp_path / "hf").glob("*.safetensors"))
    assert has_training_state(tmp_path / "iter_0000010")


def test_a_step_can_be_saved_again(tmp_path: Path, folders: dict[str, Path]) -> None:
    trainer = _trainer(folders["qwen2"])
    trainer.save(tmp_path, 1, folders["qwen2"], {"rollouts": 1})
    _learn(trainer, range(1))
    trainer.save(tmp_path, 1, folders["qwen2"], {"rollouts": 1, "again": True})
    resumed, state = _resumed(folders["qwen2"], tmp_path)
    assert state["again"]
    assert_equal_tensors(exported(resumed), exported(trainer))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_alone_serve_as_a_start_and_as_a_teacher(tmp_path: Path, folders: dict[str, Path], family: str) -> None:
    trainer = make_trainer(folders[family])
    save_checkpoint(tmp_path, "release", trainer.student, hf_folder=folders[family])
    assert (tmp_path / TRACKER).read_text().strip() == "release"
    assert not has_training_state(tmp_path / "release")
    other = make_trainer(save_reference(tmp_path / "other", tiny_config(family), seed=8))
    load_weights(other.student, tmp_path)
    assert_equal_tensors(exported(other), exported(trainer))


def test_weights_of_a_run_are_loaded_without_its_optimizer(tmp_path: Path, folders: dict[str, Path]) -> None:
    trainer = _trainer(folders["qwen3"])
    _learn(trainer, range(1))
    trainer.save(tmp_path, 1, folders["qwen3"], {})
    start = StartingPoint("ref_load", resolve_step(tmp_path))
    other = _trainer(folders["qwen3"], start=start)
    assert other.resume() is None
    assert_equal_tensors(exported(other), exported(trainer))


_CUT_OFF = """
import os, signal, sys
from pathlib import Path
from opd_megatron.megatron import checkpoint, step_folders
from tests.megatron.support import make_samples, make_trainer

folder, root = Path(sys.argv[1]), Path(sys.argv[2])

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_name(ending):
    replace = Path.replace
    Path.replace = lambda self, target: die() if str(target).endswith(ending) else replace(self, target)
    rename = Path.rename
    Path.rename = lambda self, target: die() if str(target).endswith(ending) else rename(self, target)

def during_write():
    write = checkpoint.write_step
    def half(where, entries, common):
        write(where, entries, common)
        for path in where.glob("*.distcp"):
            os.truncate(path, path.stat().st_size // 2)
        die()
    checkpoint.write_step = half

MOMENTS = {
    "nothing": lambda: None,
    "before-the-first-byte": lambda: setattr(checkpoint, "write_step", die),
    "during-the-write": during_write,
    "before-the-manifest": lambda: die_at_name(step_folders.MANIFEST),
    "before-the-rename": lambda: die_at_name("iter_0000002"),
    "before-the-tracker": lambda: die_at_name(step_folders.TRACKER),
}
for moment, prepare in MOMENTS.items():
    child = os.fork()
    if child == 0:
        # groups and threads are made after the fork
        trainer = make_trainer(folder, use_opd=True)
        trainer.train(make_samples(0))
        trainer.save(root / moment, 1, folder, {"rollouts": 1})
        trainer.train(make_samples(1))
        prepare()
        trainer.save(root / moment, 2, folder, {"rollouts": 2})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(moment, status if status == 0 else -os.WTERMSIG(status), flush=True)
"""


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> tuple[Path, dict[str, int]]:
    """Checkpoint folders of processes that were killed in the middle of their second save, and how each ended."""
    root = tmp_path_factory.mktemp("cut-off")
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _CUT_OFF, str(folders["qwen2"]), str(root)],
        cwd=repository,
        env={
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": ":".join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root, {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    "moment",
    ["before-the-first-byte", "during-the-write", "before-the-manifest", "before-the-rename", "before-the-tracker"],
)
def test_a_killed_save_leaves_the_previous_checkpoint_good(
    folders: dict[str, Path], cut_off: tuple[Path, dict[str, int]], moment: str
) -> None:
    root, ends = cut_off
    assert ends[moment] == -9
    info = inspect_checkpoint(root / moment)
    assert (info.latest, info.problem) == (1, None)
    resumed, state = _resumed(folders["qwen2"], root / moment)
    assert state["rollouts"] == 1
    expected, _ = _resumed(folders["qwen2"], root / "nothing" / "iter_0000001")
    assert_equal_tensors(exported(resumed), exported(expected))
    # what the dead process left behind is in nobody's way
    resumed.train(make_samples(1))
    resumed.save(root / moment, 2, folders["qwen2"], {"rollouts": 2})
    assert inspect_checkpoint(root / moment).latest == 2
    assert not list((root / moment).glob("*.tmp"))


def test_an_undisturbed_save_in_that_process_is_the_newest(cut_off: tuple[Path, dict[str, int]]) -> None:
    root, ends = cut_off
    assert ends["nothing"] == 0
    assert inspect_checkpoint(root / "nothing").latest == 2


class _Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.fixture
def saved(tmp_path: Path, folders: dict[str, Path]) -> Path:
    _trainer(folders["qwen2"]).save(tmp_path / "saved", 1, folders["qwen2"], {"rollouts": 1})
    return tmp_path / "saved" / "iter_0000001"


def test_metadata_cannot_reach_through_an_allowed_module(folders: dict[str, Path], saved: Path) -> None:
    module, name = b"torch.distributed.checkpoint.filesystem", b"os.getcwd"
    call = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93)R."
    (saved / MANIFEST).unlink()
    (saved / ".metadata").write_bytes(call)
    with pytest.raises(UnsafeCheckpointError, match="refusing to load"):
        load_weights(make_trainer(folders["qwen2"]).student, saved)


def test_metadata_that_asks_for_other_objects_is_refused(tmp_path: Path, folders: dict[str, Path], saved: Path) -> None:
    trap = tmp_path / "executed"
    (saved / MANIFEST).unlink()
    (saved / ".metadata").write_bytes(pickle.dumps(_Trap(trap)))
    trainer = make_trainer(folders["qwen2"])
    with pytest.raises(UnsafeCheckpointError, match="refusing to load"):
        load_weights(trainer.student, saved)
    assert not trap.exists()


def test_a_shared_state_that_asks_for_other_objects_is_refused(
    tmp_path: Path, folders: dict[str, Path], saved: Path
) -> None:
    trap = tmp_path / "executed"
    (saved / "common.pt").unlink()
    torch.save({"run": _Trap(trap)}, saved / "common.pt")
    (saved / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"common\.pt is damaged .*[Ww]eights.only"):
        has_training_state(saved)
    load_weights(make_trainer(folders["qwen2"]).student, saved)  # weights do without it
    assert not trap.exists()


def test_a_checkpoint_that_lost_bytes_is_not_loaded(folders: dict[str, Path], saved: Path) -> None:
    copy = saved.parent.parent / "copy"
    shutil.copytree(saved.parent, copy)
    shard = next((copy / saved.name).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=shard.name):
        resolve_step(copy)
