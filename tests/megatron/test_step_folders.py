"""A process that is killed at any moment of a save leaves a complete checkpoint; old steps go by rule."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.checkpoint_paths import (
    MANIFEST,
    TRACKER,
    inspect_checkpoint,
    resolve_step,
    step_fault,
    step_folder_name,
)
from opd_megatron.config.options import CheckpointOptions
from opd_megatron.megatron import step_folders

OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
"""What a save does to the file system, beside writing into files."""


def write(root: Path, step: int, content: str, options: CheckpointOptions) -> None:
    """Save a step as ``checkpoint.save_entries`` and the trainer do, with text in place of tensors."""
    hf_folder = root.parent / "hf"
    hf_folder.mkdir(exist_ok=True)
    (hf_folder / "config.json").write_text("{}")
    final = root / step_folder_name(step)
    temporary = step_folders.empty_folder(step_folders.temporary_name(final))
    for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp"):
        (temporary / name).write_text(content)
    step_folders.publish(temporary, final, hf_folder)
    step_folders.remove_old_steps(root, step, options)


def content_of(folder: Path) -> str:
    """What was written, the same in every file."""
    assert step_fault(folder) is None
    (text,) = {path.read_text() for path in folder.iterdir() if path.name != MANIFEST}
    return text


def killed_at(number: int, action: Callable[[], None]) -> bool:
    """Do ``action`` in a process that dies before its file operation ``number``; whether it came that far."""
    child = os.fork()
    if child == 0:
        left = number

        def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return operation(*args, **kwargs)

            return run

        try:
            for name in OPERATIONS:
                setattr(os, name, counted(getattr(os, name)))
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def kills(tmp_path: Path, before: Callable[[Path], None], action: Callable[[Path], None]) -> Iterator[Path]:
    """The folders that a kill at each operation of ``action`` leaves, each begun with ``before``."""
    number = 0
    while True:
        root = tmp_path / str(number) / "checkpoints"
        root.mkdir(parents=True)
        before(root)
        if not killed_at(number, lambda root=root: action(root)):  # type: ignore[misc]
            return
        yield root
        shutil.rmtree(root.parent)
        number += 1


KEEP_ALL = CheckpointOptions()
KEEP_ONE = CheckpointOptions(save_keep_last=1)


@pytest.mark.parametrize("without_tracker", [False, True])
def test_a_step_that_is_saved_again_is_there_at_every_moment(tmp_path: Path, without_tracker: bool) -> None:
    def before(root: Path) -> None:
        write(root, 5, "old", KEEP_ALL)
        if without_tracker:
            (root / TRACKER).unlink()

    seen = []
    for root in kills(tmp_path, before, lambda root: write(root, 5, "new", KEEP_ALL)):
        info = inspect_checkpoint(root)
        assert (info.steps, info.latest, info.problem) == ([5], 5, None)
        seen.append((content_of(resolve_step(root)), resolve_step(root).name))
        assert content_of(resolve_step(root, 5)) == seen[-1][0]
        write(root, 5, "newest", KEEP_ALL)
        assert content_of(resolve_step(root)) == "newest"
        assert sorted(path.name for path in root.iterdir()) == ["hf", "iter_0000005", TRACKER]
    assert [content for content, _ in seen] == sorted((content for content, _ in seen), reverse=True)
    assert {("old", "iter_0000005"), ("old", "iter_0000005.replaced.tmp"), ("new", "iter_0000005")} == set(seen)


def test_the_window_between_the_names_can_be_entered_twice(tmp_path: Path) -> None:
    """The second process finds no folder of the name and must not clear away the only one there is."""

    def before(root: Path) -> None:
        write(root, 5, "old", KEEP_ALL)
        (root / "iter_0000005").rename(root / "iter_0000005.replaced.tmp")

    for root in kills(tmp_path, before, lambda root: write(root, 5, "new", KEEP_ALL)):
        assert content_of(resolve_step(root)) in ("old", "new")
        assert inspect_checkpoint(root).problem is None


def test_old_steps_go_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    def before(root: Path) -> None:
        for step in (1, 2):
            write(root, step, f"step {step}", KEEP_ALL)

    seen = []
    for root in kills(tmp_path, before, lambda root: write(root, 3, "step 3", KEEP_ONE)):
        info = inspect_checkpoint(root)
        assert info.problem is None
        assert info.latest in (2, 3)
        assert content_of(resolve_step(root)) == f"step {info.latest}"
        assert info.latest == 3 or info.steps[:2] == [1, 2]
        seen.append(tuple(info.steps))
        write(root, 4, "step 4", KEEP_ONE)
        assert sorted(path.name for path in root.iterdir()) == ["hf", "iter_0000004", TRACKER]
    assert {(1, 2), (1, 2, 3), (2, 3), (3,)} == set(seen)


def test_going_back_to_an_earlier_step_keeps_it_and_what_came_later(tmp_path: Path) -> None:
    """The step that --ckpt-step named stays; steps of the run that was given up are not counted as the newest."""
    options = CheckpointOptions(save_keep_last=1, ckpt_step=2)
    for step in (1, 2, 3, 9):
        write(tmp_path / "run", step, "first run", KEEP_ALL)
    for root in kills(
        tmp_path,
        lambda root: shutil.copytree(tmp_path / "run", root, dirs_exist_ok=True) and None,
        lambda root: write(root, 3, "second run", options),
    ):
        info = inspect_checkpoint(root)
        assert info.problem is None
        assert {2, 3, 9} <= set(info.steps)
        assert content_of(resolve_step(root)) == ("first run" if info.latest == 9 else "second run")
    write(tmp_path / "run", 3, "second run", options)
    write(tmp_path / "run", 4, "second run", options)
    info = inspect_checkpoint(tmp_path / "run")
    assert (info.steps, info.latest) == ([2, 4, 9], 4)


@pytest.mark.parametrize(
    ("settings", "saved", "removed"),
    [
        ({}, 60, []),
        ({"save_keep_last": 2}, 60, [10, 20, 30, 40]),
        ({"save_keep_last": 9}, 60, []),
        ({"save_retain_interval": 30}, 50, [10, 20, 40]),
        ({"save_retain_interval": 30}, 60, [10, 20, 40, 50]),
        ({"save_keep_last": 2, "save_retain_interval": 30}, 60, [10, 20, 40]),
        ({"save_keep_last": 1, "ckpt_step": 20}, 30, [10]),
        ({"save_keep_last": 1}, 30, [10, 20]),
    ],
)
def test_which_steps_go(settings: dict[str, int], saved: int, removed: list[int]) -> None:
    steps = range(10, 70, 10)
    assert step_folders.steps_to_remove(steps, saved, CheckpointOptions(**settings)) == removed


def test_nothing_goes_while_the_new_step_is_not_good(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / "run", step, "good", KEEP_ALL)
    (tmp_path / "run" / "iter_0000002" / "common.pt").write_text("")
    step_folders.remove_old_steps(tmp_path / "run", 2, KEEP_ONE)
    assert inspect_checkpoint(tmp_path / "run").steps == [1]
