"""A damaged step is named with its file, and the good one beside it with the option that loads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_megatron.config.checkpoint_paths import MANIFEST, RELEASE, resolve_step
from opd_megatron.config.errors import UserError
from opd_megatron.config.resolve import StartingPoint
from opd_megatron.megatron.checkpoint import load_weights, save_checkpoint
from tests.megatron.support import make_samples, make_trainer

STEPS = (1, 2, 3)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 9])


def scrambled(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x5A for byte in path.read_bytes()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Path:
    """Three steps of a run, and converted weights."""
    root = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folders["qwen2"], use_opd=True)
    trainer.train(make_samples(0))
    for step in STEPS:
        trainer.save(root, step, folders["qwen2"], {"rollouts": step})
    save_checkpoint(root, RELEASE, trainer.student, hf_folder=folders["qwen2"])
    (root / "latest_checkpointed_iteration.txt").write_text("2")
    return root


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def advice(root: Path) -> str:
    return (
        "; step 1 is complete: load it with --ckpt-step 1 (a teacher: --opd-teacher-ckpt-step 1), or name its folder "
        f"{root / 'iter_0000001'}"
    )


@pytest.mark.parametrize("damage", [zeroed, truncated, scrambled, Path.unlink])
@pytest.mark.parametrize("file", [".metadata", "common.pt", "metadata.json", "__0_0.distcp"])
def test_what_can_be_seen_without_reading_the_weights_is_refused_at_start(
    copy: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / "iter_0000002" / file)
    if file.endswith("distcp") and damage in (zeroed, scrambled):
        assert resolve_step(copy) == copy / "iter_0000002"  # only reading it will tell
        return
    for path in (copy, copy / "iter_0000002"):
        with pytest.raises(UserError) as caught:
            resolve_step(path)
        message = str(caught.value)
        assert "iter_0000002" in message
        assert file in message
        assert message.endswith(advice(copy))
    assert resolve_step(copy, 1) == copy / "iter_0000001"


def test_a_good_step_is_offered_even_if_its_neighbour_is_bad_too(copy: Path) -> None:
    zeroed(copy / "iter_0000002" / ".metadata")
    zeroed(copy / "iter_0000001" / "common.pt")
    with pytest.raises(UserError, match="step 3 is complete: load it with --ckpt-step 3"):
        resolve_step(copy)
    truncated(copy / "iter_0000003" / "__0_0.distcp")
    with pytest.raises(UserError, match=r"other bytes than were written$"):
        resolve_step(copy)


@pytest.mark.parametrize("damage", [zeroed, truncated, scrambled, Path.unlink])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_damage_met_while_reading_weights_is_one_line(
    copy: Path, folders: dict[str, Path], file: str, damage: Callable[[Path], None]
) -> None:
    """Megatron-LM writes no manifest, and ours does not have the sums of the large files."""
    source = copy / "iter_0000002"
    (source / MANIFEST).unlink()
    trainer = make_trainer(folders["qwen2"])
    damage(source / file)
    with pytest.raises(UserError) as caught:
        load_weights(trainer.student, source) if (source / file).exists() else resolve_step(source)
    message = str(caught.value)
    assert str(source) in message
    assert "\n" not in message
    assert message.endswith(advice(copy))


@pytest.mark.parametrize("damage", [zeroed, truncated, scrambled])
def test_damage_met_while_resuming_is_one_line(
    copy: Path, folders: dict[str, Path], damage: Callable[[Path], None]
) -> None:
    source = copy / "iter_0000002"
    trainer = make_trainer(folders["qwen2"], use_opd=True, start=StartingPoint("load", source))
    (source / MANIFEST).unlink()
    damage(source / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt is damaged") as caught:
        trainer.resume()
    assert str(caught.value).endswith(advice(copy))
    shutil.copyfile(copy / "iter_0000001" / "common.pt", source / "common.pt")
    damage(source / "__0_0.distcp")
    with pytest.raises(UserError, match=r"\.distcp is damaged") as caught:
        trainer.resume()
    assert str(caught.value).endswith(advice(copy))
