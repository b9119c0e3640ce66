"""A checkpoint of one layout goes on in another, with its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.support import (
    VOCAB_SIZE,
    assert_equal_tensors,
    assert_same_tensors,
    save_reference,
    stored_tensors,
    tiny_config,
)
from tests.parallel import work
from tests.parallel.pool import WorkerPool
from tests.parallel.test_products import FOUR

pytestmark = pytest.mark.parallel

DISTRIBUTED = {"use_distributed_optimizer": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "alone-distributed": DISTRIBUTED,
    "tp2-sp-pp2": FOUR
    | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    "tp2-dp2-distributed": FOUR | DISTRIBUTED | {"tensor_model_parallel_size": 2},
    "pp2-dp2": FOUR | {"pipeline_model_parallel_size": 2},
    "dp4-distributed": FOUR | DISTRIBUTED,
    "cp2-dp2-distributed": FOUR | DISTRIBUTED | {"context_parallel_size": 2},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "ep2-dp2-distributed": FOUR | DISTRIBUTED | {"expert_model_parallel_size": 2},
    "pp2-ep2-distributed": FOUR | DISTRIBUTED | {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2-ep2": FOUR | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
}
VIRTUAL: dict[str, Any] = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
INTERLEAVED: dict[str, dict[str, Any]] = {
    "virtual-dp2": FOUR | VIRTUAL,
    "virtual-dp2-distributed": FOUR | DISTRIBUTED | VIRTUAL,
    "virtual-tp2": FOUR | VIRTUAL | {"tensor_model_parallel_size": 2},
}
KINDS: dict[str, dict[str, Any]] = {"adam": {}, "adam-bf16": {"bf16": True}, "sgd": {"optimizer": "sgd"}}
Run = Callable[..., None]


@pytest.fixture(scope="module")
def run(four: WorkerPool) -> Run:
    """Call ``work.train_and_save`` in a layout."""

    def in_layout(layout: str, kind: str, *arguments: Any, family: Path) -> None:
        flags = (LAYOUTS | EXPERTS | INTERLEAVED)[layout] | KINDS[kind]
        if layout.startswith("alone"):
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            work.train_and_save(work.Rendezvous(), family, flags, *arguments)
            torch.set_num_threads(threads)
        else:
            four.run(work.train_and_save, family, flags, *arguments)

    return in_layout


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(tmp_path_factory.mktemp("mixture"), tiny_config("qwen3_moe"))


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(tmp_path_factory.mktemp("four-layers"), tiny_config("qwen3", num_hidden_layers=4))


def without_padding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows that are tokens: a vocabulary is padded for its layout, and the padding is zero."""
    found = {}
    for name, tensor in tensors.items():
        padded = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        assert not padded or not tensor[VOCAB_SIZE:].any(), name
        found[name] = tensor[:VOCAB_SIZE] if padded else tensor
    return found


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("qwen2", "alone", "tp2-dp2-distributed"),
        ("qwen3", "tp2-dp2-distributed", "pp2-dp2"),
        ("qwen2", "pp2-dp2", "dp4-distributed"),
        ("qwen3", "dp4-distributed", "tp2-sp-pp2"),
        ("qwen2", "tp2-sp-pp2", "cp2-dp2-distributed"),
        ("qwen3", "cp2-dp2-distributed", "alone-distributed"),
        ("qwen2", "alone-distributed", "alone"),
    ],
)
def test_three_steps_here_and_three_there_are_six_in_one_process(
    run: Run, tmp_path: Path, folders: dict[str, Path], family: str, first: str, second: str
) -> None:
    folder = folders[family]
    run("alone", "adam", range(6), tmp_path / "straight", None, family=folder)
    run(first, "adam", range(3), tmp_path / "half", None, family=folder)
    run(second, "adam", range(3, 6), tmp_path / "whole", tmp_path / "half", family=folder)
    found, expected = (
        without_padding(stored_tensors(tmp_path / name / "iter_0000006")) for name in ("whole", "straight")
    )
    assert_same_tensors(found, expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_and_saved_again_is_the_same_to_the_bit(
    run: Run, tmp_path: Path, folders: dict[str, Path], kind: str
) -> None:
    """Through every layout that the kind of optimizer has."""
    folder = folders["qwen2-tied"]
    run("alone", kind, range(2), tmp_path / "alone", None, family=folder)
    expected = without_padding(stored_tensors(tmp_path / "alone" / "iter_0000002"))
    assert any(name.startswith("optimizer.state.fp32_param.") for name in expected) == (kind == "adam-bf16")
    source = tmp_path / "alone"
    names = [name for name in LAYOUTS if kind != "sgd" or "distributed" not in name]
    for name in [*names[1:], "alone"]:
        target = tmp_path / f"by-{name}"
        run(name, kind, range(2, 2), target, source, family=folder)
        assert_equal_tensors(without_padding(stored_tensors(target / "iter_0000002")), expected)
        source = target


@pytest.mark.parametrize(
    ("first", "second"), [("ep2-dp2-distributed", "tp2-ep2"), ("tp2-ep2", "alone"), ("alone", "pp2-ep2-distributed")]
)
def test_experts_move_with_their_moments(run: Run, tmp_path: Path, mixture: Path, first: str, second: str) -> None:
    """They have an optimizer of their own where they are spread over ranks."""
    run("alone", "adam", range(4), tmp_path / "straight", None, family=mixture)
    run(first, "adam", range(2), tmp_path / "half", None, family=mixture)
    run(second, "adam", range(2, 4), tmp_path / "whole", tmp_path / "half", family=mixture)
    found, expected = (
        without_padding(stored_tensors(tmp_path / name / "iter_0000004")) for name in ("whole", "straight")
    )
    assert any("experts" in name and "exp_avg_sq" in name for name in expected)
    assert_same_tensors(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("virtual-dp2", "dp4-distributed"),
        ("virtual-dp2-distributed", "tp2-sp-pp2"),
        ("tp2-dp2-distributed", "virtual-tp2"),
        ("virtual-tp2", "virtual-dp2-distributed"),
        ("alone-distributed", "virtual-dp2"),
    ],
)
def test_layers_of_virtual_stages_move_with_their_moments(
    run: Run, tmp_path: Path, four_layers: Path, first: str, second: str
) -> None:
    """A rank's layers are not neighbours there, and each chunk of them counts its own from 0."""
    run("alone", "adam", range(4), tmp_path / "straight", None, family=four_layers)
    run(first, "adam", range(2), tmp_path / "half", None, family=four_layers)
    run(second, "adam", range(2, 4), tmp_path / "whole", tmp_path / "half", family=four_layers)
    found, expected = (
        without_padding(stored_tensors(tmp_path / name / "iter_0000004")) for name in ("whole", "straight")
    )
    assert any("exp_avg_sq" in name for name in expected)
    assert_same_tensors(found, expected, 1e-5)


@pytest.mark.parametrize("kind", ["adam", "adam-bf16"])
def test_virtual_stages_lose_no_bit(run: Run, tmp_path: Path, four_layers: Path, kind: str) -> None:
    run("alone", kind, range(2), tmp_path / "alone", None, family=four_layers)
    expected = without_padding(stored_tensors(tmp_path / "alone" / "iter_0000002"))
    source = tmp_path / "alone"
    for name in [*INTERLEAVED, "pp2-dp2", "alone"]:
        target = tmp_path / f"by-{name}"
        run(name, kind, range(2, 2), target, source, family=four_layers)
        assert_equal_tensors(without_padding(stored_tensors(target / "iter_0000002")), expected)
        source = target


def test_a_model_to_score_with_loads_in_every_layout(
    run: Run, four: WorkerPool, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """From the checkpoint of a run in another layout: a teacher, or initial weights."""
    run("tp2-sp-pp2", "adam", range(1), tmp_path / "run", None, family=folders["teacher"])
    expected = work.load_and_export(work.Rendezvous(), folders["teacher"], {}, tmp_path / "run")
    for layout in ("pp2-dp2", "tp2-dp2-distributed", "tp2-sp-pp2"):
        found = four.run(work.load_and_export, folders["teacher"], LAYOUTS[layout], tmp_path / "run")[0]
        assert_equal_tensors(found, expected)


def test_damage_that_one_rank_meets_is_told_by_all(
    run: Run, four: WorkerPool, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """The file of the last rank has layers of the last stage only; the other ranks must not wait for it in vain."""
    run("pp2-dp2", "adam", range(1), tmp_path, None, family=folders["qwen2"])
    sizes = {path: path.stat().st_size for path in (tmp_path / "iter_0000001").glob("__2_*.distcp")}
    for path, size in sizes.items():
        path.write_bytes(bytes(size))
    assert sizes
    messages = four.run(work.refusal, folders["qwen2"], LAYOUTS["pp2-dp2"], tmp_path)
    assert len(set(messages)) == 1
    assert "iter_0000001" in messages[0]
    assert "is damaged" in messages[0]
