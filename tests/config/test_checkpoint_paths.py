"""Complete and torn checkpoint folders of both kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opd_megatron.config.checkpoint_paths import inspect_checkpoint, resolve_step, safetensors_fault, step_folder_name
from opd_megatron.config.errors import UserError
from tests.config.inputs import write_hf, write_safetensors, write_step, write_torch_dist

TRACKER = "latest_checkpointed_iteration.txt"


def test_a_tree_of_steps(tmp_path: Path) -> None:
    tree = write_torch_dist(tmp_path / "a", steps=(5, 10, 12345678))
    write_step(tree / "iter_0000020.tmp")
    write_step(tree / "release.tmp")
    (tree / TRACKER).write_text("10")
    info = inspect_checkpoint(tree)
    assert (info.kind, info.steps, info.latest) == ("torch_dist", [5, 10, 12345678], 10)
    assert info.hf_folder == tree / "hf"
    assert info.loadable
    assert resolve_step(tree) == tree / "iter_0000010"
    assert resolve_step(str(tree), 5) == tree / "iter_0000005"
    with pytest.raises(UserError, match=r"step 7 is not in .* \(it has 5, 10, 12345678\)"):
        resolve_step(tree, 7)
    assert [step_folder_name(step) for step in (10, 12345678, "release")] == [
        "iter_0000010",
        "iter_12345678",
        "release",
    ]


def test_without_a_tracker_the_last_step_counts(tmp_path: Path) -> None:
    tree = write_torch_dist(tmp_path / "a", steps=(5, "release", 10))
    (tree / TRACKER).unlink()
    assert inspect_checkpoint(tree).latest == 10
    assert resolve_step(tree, "release") == tree / "release"


def test_converted_weights(tmp_path: Path) -> None:
    tree = write_torch_dist(tmp_path / "a", steps=("release",))
    info = inspect_checkpoint(tree)
    assert (info.kind, info.steps, info.latest) == ("torch_dist", [], "release")
    assert resolve_step(tree) == tree / "release"
    with pytest.raises(UserError, match=r"it has release"):
        resolve_step(tree, 3)


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "empty manifest"])
def test_a_torn_step_is_not_there(damage: str, tmp_path: Path) -> None:
    tree = write_torch_dist(tmp_path / "a", steps=(5, 10))
    step = tree / "iter_0000010"
    if damage == "missing":
        (step / "common.pt").unlink()
    elif damage == "short":
        (step / "__0_0.distcp").write_bytes(bytes(63))
    else:
        (step / "opd_megatron.json").write_text('{"files": {}}' if "empty" in damage else '{"files": {".met')
    info = inspect_checkpoint(tree)
    assert info.steps == [5]
    # The tracker names the torn one: an older step is loaded on demand only.
    assert not info.loadable
    with pytest.raises(UserError, match=r"names '10', which is not complete .*iter_0000010.*complete: 5"):
        resolve_step(tree)
    assert resolve_step(tree, 5) == tree / "iter_0000005"
    (tree / TRACKER).write_text("5\n")
    assert resolve_step(tree) == tree / "iter_0000005"


def test_a_step_that_megatron_wrote_needs_no_manifest(tmp_path: Path) -> None:
    write_step(tmp_path / "iter_0000003", manifest=False)
    assert inspect_checkpoint(tmp_path).steps == [3]
    (tmp_path / "iter_0000003" / "__0_0.distcp").unlink()
    info = inspect_checkpoint(tmp_path)
    assert (info.kind, info.problem) == (None, "iter_0000003: *.distcp missing")


def test_a_step_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_torch_dist(tmp_path / "a", steps=(5, 10))
    info = inspect_checkpoint(tree / "iter_0000005")
    assert (info.kind, info.steps, info.latest, info.hf_folder) == ("torch_dist", [5], 5, tree / "hf")
    assert resolve_step(tree / "iter_0000005") == tree / "iter_0000005"
    assert resolve_step(tree / "iter_0000005", 5) == tree / "iter_0000005"
    with pytest.raises(UserError, match="step 10 is not in"):
        resolve_step(tree / "iter_0000005", 10)
    monkeypatch.chdir(tree / "iter_0000005")
    assert inspect_checkpoint(".").steps == [5]
    (tree / "iter_0000005" / "common.pt").unlink()
    assert inspect_checkpoint(tree / "iter_0000005").kind is None
    (tree / "iter_0000010").rename(tree / "iter_0000010.tmp")
    assert inspect_checkpoint(tree / "iter_0000010.tmp").kind is None


def test_hf_folders(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    assert inspect_checkpoint(folder).kind == "hf"
    assert resolve_step(folder) == folder
    with pytest.raises(UserError, match="has no step 3"):
        resolve_step(folder, 3)
    (folder / "model.safetensors").unlink()
    info = inspect_checkpoint(folder)
    assert (info.kind, info.hf_folder, info.problem) == ("hf_config_only", folder, None)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        resolve_step(folder)


def test_sharded_hf_folders(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", weights=False)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_safetensors(folder / names[0], name="a")
    assert "without model.safetensors.index.json" in (inspect_checkpoint(folder).problem or "")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert inspect_checkpoint(folder).problem == f"1 of 2 shards missing, e.g. {names[1]}"
    assert inspect_checkpoint(folder).kind == "hf_config_only"
    write_safetensors(folder / names[1], name="b")
    assert inspect_checkpoint(folder).kind == "hf"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}))
    assert inspect_checkpoint(folder).problem == f"{index.name} names {names[1]} for weight c, which it lacks"
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes() + b"x")
    assert names[1] in (inspect_checkpoint(folder).problem or "")
    index.write_text("[]")
    assert inspect_checkpoint(folder).problem == "model.safetensors.index.json is damaged"


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert inspect_checkpoint(path) == inspect_checkpoint(tmp_path)
        assert inspect_checkpoint(path).kind is None
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            resolve_step(path)


def test_safetensors_cut_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0)}, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    assert safetensors_fault(file) is None
    for length in (0, 4, 8, 20, len(whole) - 24, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert safetensors_fault(file), length
    file.write_bytes(b"\xff" * 8 + whole[8:])
    assert safetensors_fault(file)
    file.write_bytes(whole[:8] + b"[" + whole[9:])
    assert safetensors_fault(file)
