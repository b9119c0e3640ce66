"""The two converters: bit-equal round trips in every layout, what they refuse, and what a crash leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_megatron.config.architecture import architecture_from_hf, read_hf_config
from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ParallelOptions
from opd_megatron.megatron import checkpoint, tooling
from opd_megatron.megatron.hf_weights import write_hf_weights
from tests.tools.conftest import LAYOUTS, Models
from tests.tools.models import CASES, ODD_VOCABULARY, write_model
from tools import convert_hf_to_torch_dist, convert_torch_dist_to_hf


def to_torch_dist(source: Path, target: Path, *flags: str) -> Path:
    convert_hf_to_torch_dist.main(["--hf-checkpoint", str(source), "--save", str(target), *flags])
    return target


def to_hf(source: Path, target: Path, *flags: str) -> Path:
    convert_torch_dist_to_hf.main(["--load", str(source), "--save", str(target), *flags])
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_files(folder: Path) -> dict[str, bytes]:
    return {name: text for name, text in files(folder).items() if not name.endswith(".safetensors")}


# Round trips


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_changes_nothing(case: str, models: Models, tmp_path: Path) -> None:
    back = to_hf(models.torch_dist[case], tmp_path / "back")
    assert_same_weights(back, models.hf[case])
    assert small_files(back) == small_files(models.hf[case])
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < set(files(back))
    loaded = AutoModelForCausalLM.from_pretrained(back)
    assert loaded.dtype == CASES[case][3]
    assert AutoTokenizer.from_pretrained(back).eos_token == "<eos>"


@pytest.mark.parallel
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_matter(layout: str, case: str, models: Models, two_ranks: Path, tmp_path: Path) -> None:
    """What two ranks write one process reads."""
    assert_same_weights(to_hf(two_ranks / layout / f"{case}_torch_dist", tmp_path / "back"), models.hf[case])


def test_the_torch_dist_folder_is_a_complete_release(models: Models) -> None:
    folder = models.torch_dist["llama_untied"]
    info = inspect_checkpoint(folder)
    assert (info.kind, info.latest, info.problem) == ("torch_dist", "release", None)
    assert small_files(folder / "hf") == small_files(models.hf["llama_untied"])
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "latest_checkpointed_iteration.txt", "release"]


def test_shards_are_read_and_written(models: Models, tmp_path: Path) -> None:
    case = CASES["qwen2_untied"]
    sharded = write_model(tmp_path / "sharded", *case, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert_same_weights(to_hf(to_torch_dist(sharded, tmp_path / "td"), tmp_path / "back"), models.hf["qwen2_untied"])
    write_hf_weights(weights(sharded).items(), tmp_path / "written", shard_bytes=40_000)
    shutil.copyfile(sharded / "config.json", tmp_path / "written" / "config.json")
    index = json.loads((tmp_path / "written" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "written").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(sharded).items())


def test_the_tensors_decide_the_data_type(tmp_path: Path) -> None:
    """A config often names another type than the one the weights have."""
    source = write_model(tmp_path / "source", "qwen3", True, ODD_VOCABULARY, torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    back = to_hf(to_torch_dist(source, tmp_path / "td"), tmp_path / "back")
    assert_same_weights(back, source)
    assert json.loads((back / "config.json").read_text()) == config


@pytest.mark.parametrize(("key", "written"), [("torch_dtype", "torch_dtype"), (None, "dtype")])
def test_a_trained_model_names_its_own_type(key: str | None, written: str, tmp_path: Path) -> None:
    """A run with --bf16 stores bfloat16 weights, whatever the model's config says."""
    source = write_model(tmp_path / "source", "qwen2", False)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | ({key: "float32"} if key else {})))
    architecture, parallel = architecture_from_hf(read_hf_config(source)), ParallelOptions()
    tooling.join(parallel, architecture)
    model = tooling.load_model(source, architecture, parallel, torch.bfloat16)
    checkpoint.save_checkpoint(tmp_path / "run", 12, model, hf_folder=source)
    back = to_hf(tmp_path / "run", tmp_path / "back", "--ckpt-step", "12")
    expected = {name: tensor.bfloat16() for name, tensor in weights(source).items()}
    found = weights(back)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert json.loads((back / "config.json").read_text()) == config | {written: "bfloat16"}


def test_mixed_types_become_the_one_that_holds_all(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "qwen2", False, dtype=torch.bfloat16)
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in weights(source).items()}
    mixed["model.norm.weight"] += 1e-7
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    found = weights(to_hf(to_torch_dist(source, tmp_path / "td"), tmp_path / "back"))
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in mixed.items())


def test_a_tied_head_that_is_stored_twice_is_read(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "llama", True)
    stored = weights(source)
    extra = {"lm_head.weight": stored["model.embed_tokens.weight"].clone(), "model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(stored | extra, source / "model.safetensors", metadata={"format": "pt"})
    found = weights(to_hf(to_torch_dist(source, tmp_path / "td"), tmp_path / "back"))
    assert found.keys() == stored.keys()
    extra["lm_head.weight"][0, 0] += 1
    save_file(stored | extra, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight has no place in the model of the config"):
        to_torch_dist(source, tmp_path / "td2")


def test_towards_hugging_face_one_process_is_enough(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"one process converts .*: start .* without torchrun"):
        to_hf(models.torch_dist["qwen2_tied"], tmp_path / "out")


# MODEL_ARGS


def test_model_args_must_agree(models: Models, tmp_path: Path) -> None:
    source = models.hf["qwen3_tied"]
    right = ["--num-layers", "2", "--hidden-size", "32", "--kv-channels", "12", "--qk-layernorm"]
    to_torch_dist(source, tmp_path / "td", *right, "--vocab-size", str(ODD_VOCABULARY))
    with pytest.raises(UserError) as caught:
        to_torch_dist(source, tmp_path / "other", "--num-layers", "4", "--hidden-size", "32", "--add-qkv-bias")
    message = str(caught.value)
    assert "--num-layers 4 (config: 2)" in message
    assert "--add-qkv-bias (config: False)" in message
    assert "--hidden-size" not in message
    assert not (tmp_path / "other").exists()


# Refusals


def broken(folder: Path, fault: str) -> Path:
    """A model with one fault."""
    stored = {} if fault == "shard" else weights(folder)
    if fault == "no weights":
        (folder / "model.safetensors").unlink()
    elif fault == "cut off":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-7])
    elif fault == "shard":
        sorted(folder.glob("*.safetensors"))[1].unlink()
    elif fault == "missing":
        del stored["model.layers.1.mlp.up_proj.weight"]
    elif fault == "misshapen":
        stored["model.norm.weight"] = torch.ones(31)
    elif fault == "foreign":
        stored["model.layers.2.mlp.up_proj.weight"] = torch.ones(3)
    elif fault == "int8":
        stored["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    if fault in ("missing", "misshapen", "foreign", "int8"):
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no weights", "holds a config and no weights"),
        ("cut off", "model.safetensors has .* bytes instead of"),
        ("shard", "1 of .* shards missing"),
        ("missing", r"weight model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        ("misshapen", r"weight model\.norm\.weight has shape \(31,\), the config says \(32,\)"),
        ("foreign", r"weight model\.layers\.2\.mlp\.up_proj\.weight has no place in the model"),
        ("int8", "weights of the type I8 are not supported"),
    ],
)
def test_a_broken_model_is_refused(fault: str, message: str, tmp_path: Path) -> None:
    size = "20KB" if fault == "shard" else "5GB"
    source = broken(write_model(tmp_path / "source", "qwen2", False, max_shard_size=size), fault)
    with pytest.raises(UserError, match=message):
        to_torch_dist(source, tmp_path / "td")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_folders_of_the_wrong_kind_are_refused(models: Models, tmp_path: Path) -> None:
    hf, torch_dist = models.hf["qwen2_tied"], models.torch_dist["qwen2_tied"]
    with pytest.raises(UserError, match=r"--hf-checkpoint .* is a torch_dist checkpoint already"):
        to_torch_dist(torch_dist, tmp_path / "out")
    with pytest.raises(UserError, match=r"--load .* is a Hugging Face folder already"):
        to_hf(hf, tmp_path / "out")
    with pytest.raises(UserError, match=r"--load .*none does not exist"):
        to_hf(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match=r"--ckpt-step: step 3 is not in .* \(it has release\)"):
        to_hf(torch_dist, tmp_path / "out", "--ckpt-step", "3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 48}, r"has shape .*, the config says"),
        ({"num_hidden_layers": 3}, r"has shape .*, the config says"),
        ({"tie_word_embeddings": False}, r"weight output_layer\.weight is missing"),
        ({"vocab_size": 129}, r"embedding\.word_embeddings\.weight has shape \(128, 32\), the config says \(129, 32\)"),
    ],
)
def test_a_config_of_another_model_is_noticed(
    settings: dict[str, int], message: str, models: Models, tmp_path: Path
) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(models.torch_dist["qwen2_tied"], folder)
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=message):
        to_hf(folder, tmp_path / "out")


# Targets


def test_a_target_is_replaced_only_when_told(models: Models, tmp_path: Path) -> None:
    td = to_torch_dist(models.hf["qwen2_tied"], tmp_path / "td")
    hf = to_hf(td, tmp_path / "hf")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"--save .*td holds a converted checkpoint already: .* --overwrite"):
        to_torch_dist(models.hf["llama_tied"], td)
    with pytest.raises(UserError, match=r"--save .*hf holds a model already: .* --overwrite"):
        to_hf(models.torch_dist["llama_tied"], hf)
    assert files(tmp_path) == before
    to_torch_dist(models.hf["llama_tied"], td, "--overwrite")
    to_hf(models.torch_dist["llama_tied"], hf, "--overwrite")
    assert_same_weights(hf, models.hf["llama_tied"])
    # the config beside the new weights is the new one, too
    assert_same_weights(to_hf(td, tmp_path / "back"), models.hf["llama_tied"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "td"]


def test_what_is_no_conversion_is_never_replaced(models: Models, tmp_path: Path) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    shutil.copytree(models.torch_dist["qwen2_tied"], run)
    (run / "release").rename(run / "iter_0000003")
    notes.mkdir()
    (notes / "thesis.txt").write_text("the only copy")
    before = files(tmp_path)
    for target in (run, notes):
        with pytest.raises(UserError, match="which would be lost: choose another folder"):
            to_torch_dist(models.hf["qwen2_tied"], target, "--overwrite")
        with pytest.raises(UserError, match="which would be lost: choose another folder"):
            to_hf(models.torch_dist["qwen2_tied"], target, "--overwrite")
    with pytest.raises(UserError, match="which would be lost"):
        to_torch_dist(models.hf["qwen2_tied"], models.hf["qwen2_tied"], "--overwrite")
    with pytest.raises(UserError, match="is a file: name a folder"):
        to_torch_dist(models.hf["qwen2_tied"], notes / "thesis.txt", "--overwrite")
    assert files(tmp_path) == before


def test_a_crash_leaves_the_earlier_folder_and_nothing_half(models: Models, tmp_path: Path) -> None:
    target = to_hf(models.torch_dist["qwen2_tied"], tmp_path / "hf")
    before = files(target)

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights(models.hf["llama_tied"]).items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_hf_folder(breaks_off(), target, models.hf["llama_tied"])
    assert files(target) == before
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_hf_folder(breaks_off(), tmp_path / "new", models.hf["llama_tied"])
    assert not (tmp_path / "new").exists()


def test_leftovers_of_a_crash_are_replaced(models: Models, tmp_path: Path) -> None:
    """The folders that a killed conversion leaves have names of their own and are in nobody's way."""
    for name in ("td.tmp", "hf.tmp", "td.replaced.tmp", "hf.replaced.tmp"):
        (tmp_path / name / "release.tmp").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{")
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    td = to_torch_dist(models.hf["qwen3_tied"], tmp_path / "td")
    assert sorted(path.name for path in td.iterdir()) == ["hf", "latest_checkpointed_iteration.txt", "release"]
    back = to_hf(td, tmp_path / "hf")
    assert_same_weights(back, models.hf["qwen3_tied"])
    assert small_files(back) == small_files(models.hf["qwen3_tied"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "td"]
