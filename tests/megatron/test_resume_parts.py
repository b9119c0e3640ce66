"""Resuming without parts of a checkpoint, and checkpoints that lack parts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as strategies

from opd_megatron.config.errors import UserError
from opd_megatron.config.resolve import StartingPoint
from opd_megatron.megatron.checkpoint import load_weights
from opd_megatron.megatron.trainer import MegatronTrainer
from tests.megatron.support import (
    assert_equal_tensors,
    exported,
    make_samples,
    make_trainer,
    optimizer_state,
    save_reference,
    stored_tensors,
    tiny_config,
)

SETTINGS: dict[str, Any] = {"use_opd": True, "lr": 1e-2, "lr_warmup_iters": 2, "lr_decay_style": "cosine"}


@pytest.fixture
def trained(folders: dict[str, Path]) -> MegatronTrainer:
    trainer = make_trainer(folders["qwen2"], **SETTINGS)
    for number in range(3):
        trainer.train(make_samples(number))
    return trainer


@pytest.fixture
def saved(trained: MegatronTrainer, folders: dict[str, Path], tmp_path: Path) -> Path:
    trained.save(tmp_path, 3, folders["qwen2"], {"rollouts": 3})
    return tmp_path / "iter_0000003"


def from_checkpoint(saved: Path, folders: dict[str, Path], **flags: Any) -> MegatronTrainer:
    return make_trainer(folders["qwen2"], start=StartingPoint("load", saved), **(SETTINGS | flags))


def test_without_the_optimizer_moments_and_schedule_begin_anew(
    saved: Path, trained: MegatronTrainer, folders: dict[str, Path]
) -> None:
    weights = exported(trained)
    resumed = from_checkpoint(saved, folders, no_load_optim=True, optimizer="sgd")
    state = resumed.resume()
    assert state is not None
    assert state["rollouts"] == 3
    assert_equal_tensors(exported(resumed), weights)
    fresh = from_checkpoint(saved, folders, finetune=True, optimizer="sgd")
    assert fresh.resume() is None
    first, second = (trainer.train(make_samples(3)).metrics for trainer in (resumed, fresh))
    assert first == second
    assert_equal_tensors(exported(resumed), exported(fresh))


def test_finetuning_takes_the_weights_alone(saved: Path, trained: MegatronTrainer, folders: dict[str, Path]) -> None:
    weights = exported(trained)
    torch.manual_seed(77)
    trainer = from_checkpoint(saved, folders, finetune=True)
    before = torch.get_rng_state()
    assert trainer.resume() is None
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal_tensors(exported(trainer), weights)
    new = from_checkpoint(saved, folders)
    assert trainer.optimizer.param_groups[0]["lr"] == new.optimizer.param_groups[0]["lr"]
    for name, tensor in optimizer_state(trainer).items():
        assert name.endswith("weight") or not tensor.any(), name


def test_the_random_state_is_left_alone_when_told(saved: Path, folders: dict[str, Path]) -> None:
    states = {}
    for flag in (False, True):
        trainer = from_checkpoint(saved, folders, no_load_rng=flag)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        assert trainer.resume() is not None
        states[flag] = torch.equal(torch.get_rng_state(), before)
    assert states == {False: False, True: True}


def test_a_checkpoint_without_optimizer(trained: MegatronTrainer, folders: dict[str, Path], tmp_path: Path) -> None:
    trained.save(tmp_path / "whole", 3, folders["qwen2"], {"rollouts": 3})
    weights = exported(trained)
    lean = make_trainer(folders["qwen2"], no_save_optim=True, **SETTINGS)
    load_weights(lean.student, tmp_path / "whole")
    lean.save(tmp_path / "lean", 3, folders["qwen2"], {"rollouts": 3})
    whole, part = (tmp_path / name / "iter_0000003" for name in ("whole", "lean"))
    assert all(name.startswith("optimizer") for name in stored_tensors(whole).keys() - stored_tensors(part).keys())
    assert not any(name.startswith("optimizer") for name in stored_tensors(part))
    with pytest.raises(UserError, match="was saved without the optimizer's state: resume with --no-load-optim"):
        from_checkpoint(part, folders).resume()
    resumed = from_checkpoint(part, folders, no_load_optim=True)
    state = resumed.resume()
    assert state is not None
    assert state["rollouts"] == 3
    assert_equal_tensors(exported(resumed), weights)


def test_an_optimizer_that_keeps_other_things_is_refused(saved: Path, folders: dict[str, Path]) -> None:
    for flags, message in (
        ({"optimizer": "sgd"}, r"--optimizer adam \(now sgd\)"),
        ({"bf16": True}, r"--bf16 False \(now True\)"),
    ):
        with pytest.raises(UserError, match=f"its optimizer was saved with {message}: .*--no-load-optim"):
            from_checkpoint(saved, folders, **flags).resume()


def test_options_of_the_resumed_run_hold(saved: Path, folders: dict[str, Path]) -> None:
    trainer = from_checkpoint(saved, folders, adam_beta2=0.9, adam_eps=1e-3)
    trainer.resume()
    assert all(group["betas"][1] == 0.9 and group["eps"] == 1e-3 for group in trainer.optimizer.param_groups)


class MegatronFormat(strategies.TorchDistSaveShardedStrategy):
    """Megatron's own translation of its sharded tensors, written in this process.

    Its writers are forked, which hangs in a process with threads.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        flat, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        planner = strategies.MCoreSavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
        )
        writer = dcp.FileSystemWriter(checkpoint_dir)
        dcp.save(strategies.mcore_to_pyt_state_dict(flat, False), storage_writer=writer, planner=planner)


def test_megatron_reads_our_files_and_we_read_those_of_megatron(
    saved: Path, trained: MegatronTrainer, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = stored_tensors(saved)
    assert any("exp_avg" in name for name in expected)
    found = dist_checkpointing.load_plain_tensors(str(saved))
    assert_equal_tensors({name: found[name] for name in expected}, expected)
    theirs = tmp_path / "theirs" / "iter_0000003"
    os.makedirs(theirs)
    weights = exported(trained)
    state = trained.student.sharded_state_dict()
    dist_checkpointing.save({"model": state}, str(theirs), MegatronFormat("torch_dist", 1))
    assert_equal_tensors({name: expected[name] for name in stored_tensors(theirs)}, stored_tensors(theirs))
    other = make_trainer(save_reference(tmp_path / "other", tiny_config("qwen2"), seed=8))
    load_weights(other.student, theirs)
    assert_equal_tensors(exported(other), weights)
