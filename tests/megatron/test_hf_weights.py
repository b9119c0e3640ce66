"""The weight table and what reads and writes Hugging Face folders through it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_megatron.config.errors import UserError
from opd_megatron.config.resolve import StartingPoint
from opd_megatron.megatron.hf_weights import HFWeights, write_hf_weights
from opd_megatron.megatron.weight_map import parameter_maps
from tests.megatron.support import (
    FAMILIES,
    architecture_of,
    assert_equal_tensors,
    exported,
    load_reference,
    make_trainer,
    save_reference,
    tiny_config,
)


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_table_moves_are_inverse_to_each_other(tmp_path: Path, family: str, tied: bool) -> None:
    folder = save_reference(tmp_path / "model", tiny_config(family, tie_word_embeddings=tied))
    architecture, state = architecture_of(folder), _state(folder)
    seen: dict[str, torch.Tensor] = {}
    for size in (1, 2):
        for row in parameter_maps(architecture, padded_vocab_size=64):
            full = row.layout.merge([state[name] for name in row.hf_names])
            shards = [row.layout.shard(full, rank, size) for rank in range(size)]
            assert len({tuple(shard.shape) for shard in shards}) == 1
            assert torch.equal(row.layout.unshard(shards), full)
            parts = row.layout.split(full)
            assert tuple(tuple(part.shape) for part in parts) == row.hf_shapes
            seen |= dict(zip(row.hf_names, parts, strict=True))
    assert_equal_tensors(seen, state)


def test_a_shard_of_qkv_holds_whole_groups(folders: dict[str, Path]) -> None:
    """Rank r of two computes exactly the query heads of its key/value heads."""
    architecture = architecture_of(folders["qwen3"])
    (row,) = [
        row
        for row in parameter_maps(architecture, 64)
        if row.megatron_name.endswith("0.self_attention.linear_qkv.weight")
    ]
    size = architecture.kv_channels
    q, k, v = (torch.arange(shape[0] * shape[1]).reshape(shape) + 10_000 * i for i, shape in enumerate(row.hf_shapes))
    shard = row.layout.shard(row.layout.merge([q, k, v]), 1, 2)
    assert torch.equal(shard, torch.cat([q[2 * size :], k[size:], v[size:]]))


def test_a_shard_of_the_feed_forward_holds_both_halves(folders: dict[str, Path]) -> None:
    (row,) = [
        row
        for row in parameter_maps(architecture_of(folders["llama"]), 64)
        if "layers.0.mlp.linear_fc1.weight" in row.megatron_name
    ]
    gate, up = (torch.randn(shape) for shape in row.hf_shapes)
    half = len(gate) // 2
    assert torch.equal(row.layout.shard(row.layout.merge([gate, up]), 0, 2), torch.cat([gate[:half], up[:half]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_and_exporting_returns_the_same_bits(folders: dict[str, Path], family: str) -> None:
    assert_equal_tensors(exported(make_trainer(folders[family])), _state(folders[family]))


def test_sharded_files_are_written_and_read(tmp_path: Path, folders: dict[str, Path]) -> None:
    trainer = make_trainer(folders["qwen2"])
    target = tmp_path / "shards"
    write_hf_weights(trainer.export_weights(), target, shard_bytes=10_000)
    (target / "config.json").write_text((folders["qwen2"] / "config.json").read_text())
    assert len(list(target.glob("*.safetensors"))) > 2
    assert_equal_tensors(exported(make_trainer(target)), _state(folders["qwen2"]))
    assert_equal_tensors(load_reference(target).state_dict(), load_reference(folders["qwen2"]).state_dict())


def _changed(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_missing_weight_is_the_users_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    state = _state(folders["qwen2"])
    del state["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        make_trainer(_changed(folders["qwen2"], tmp_path / "missing", state))


def test_a_misshapen_weight_is_the_users_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    state = _state(folders["llama"])
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"][:-1].contiguous()
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \(47, 32\), the config says \(48, 32\)"):
        make_trainer(_changed(folders["llama"], tmp_path / "misshapen", state))


def test_a_folder_without_weights_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no safetensors weights"):
        HFWeights(tmp_path)


def test_an_index_is_followed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(HFWeights(tmp_path).tensor("b"), torch.zeros(3))


def test_random_weights_follow_seed_and_name_alone(folders: dict[str, Path]) -> None:
    """Tensors do not depend on the padding, on other tensors or on torch's generator, so not on the layout."""
    architecture = architecture_of(folders["qwen2"])

    def drawn(padded: int, seed: int, layers: int = 2) -> dict[str, torch.Tensor]:
        model = dataclasses.replace(architecture, num_layers=layers)
        return {
            name: tensor
            for row in parameter_maps(model, padded)
            for name, tensor in zip(row.hf_names, row.random(model, seed, torch.float32), strict=True)
        }

    first = drawn(64, seed=1)
    torch.rand(1)
    assert_equal_tensors(drawn(128, seed=1), first)
    longer = drawn(64, seed=1, layers=3)
    assert_equal_tensors({name: longer[name] for name in first}, first)
    other = drawn(64, seed=2)
    matrices = [name for name in first if first[name].ndim == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert len({float(first[name].flatten()[0]) for name in matrices}) == len(matrices)
    spread = torch.cat([first[name].flatten() for name in matrices]).std()
    assert spread == pytest.approx(architecture.init_method_std, rel=0.05)


def test_a_random_start_fills_every_weight(folders: dict[str, Path]) -> None:
    start = StartingPoint("random", folders["qwen3"])
    first, again = (exported(make_trainer(folders["qwen3"], start=start, seed=5)) for _ in range(2))
    assert_equal_tensors(first, again)
    assert first.keys() == _state(folders["qwen3"]).keys()
    assert not torch.equal(
        first["model.embed_tokens.weight"],
        exported(make_trainer(folders["qwen3"], start=start, seed=6))["model.embed_tokens.weight"],
    )
