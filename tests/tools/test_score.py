"""tools/score.py against transformers, on one and two ranks; its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opd_megatron.config.errors import UserError
from tests.tools.conftest import LAYOUTS, ROOT, Models, torchrun
from tests.tools.models import (
    CASES,
    largest_difference,
    read_log_probs,
    reference_log_probs,
    token_lines,
    write_lines,
    write_model,
)
from tools import score

KINDS = ("hf", "torch_dist")


def scored(folder: Path, input_file: Path, output: Path, *flags: str) -> list[list[float]]:
    score.main(["--load", str(folder), "--input", str(input_file), "--output", str(output), *flags])
    return read_log_probs(output)


@pytest.fixture(scope="module")
def references(models: Models) -> dict[str, list]:
    return {case: reference_log_probs(models.hf[case], models.lines[case]) for case in CASES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_one_rank_agrees_with_transformers(
    case: str, kind: str, models: Models, references: dict[str, list], tmp_path: Path
) -> None:
    folder = {"hf": models.hf, "torch_dist": models.torch_dist}[kind][case]
    found = scored(folder, models.input[case], tmp_path / "out.jsonl", "--micro-batch-size", "3")
    assert largest_difference(found, references[case]) < 1e-5
    assert found[1] == []


@pytest.mark.parallel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_agree_with_transformers(
    layout: str, case: str, kind: str, two_ranks: Path, references: dict[str, list]
) -> None:
    found = read_log_probs(two_ranks / layout / f"{case}_{kind}.jsonl")
    assert largest_difference(found, references[case]) < 1e-5


def test_scaled_rotary_frequencies_matter(models: Models, tmp_path: Path) -> None:
    """The reference would not notice a dropped scaling if the lines were too short for it."""
    config = json.loads((models.hf["llama_tied"] / "config.json").read_text())
    unscaled = tmp_path / "unscaled"
    unscaled.mkdir()
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (unscaled / "config.json").write_text(json.dumps(config))
    (unscaled / "model.safetensors").symlink_to(models.hf["llama_tied"] / "model.safetensors")
    lines = models.lines["llama_tied"]
    expected = reference_log_probs(models.hf["llama_tied"], lines)
    found = scored(unscaled, models.input["llama_tied"], tmp_path / "out.jsonl")
    assert largest_difference(found, expected) > 1e-2
    assert largest_difference(found, reference_log_probs(unscaled, lines)) < 1e-5


def test_many_lines_keep_their_order_at_a_temperature(models: Models, tmp_path: Path) -> None:
    """More lines than are scored at a time, in both orders of length."""
    lengths = [2 + place % 23 for place in range(150)]
    lines = token_lines(CASES["qwen2_untied"][2], lengths, seed=3)
    file = write_lines(tmp_path / "in.jsonl", lines)
    found = scored(
        models.torch_dist["qwen2_untied"],
        file,
        tmp_path / "out.jsonl",
        "--temperature",
        "0.7",
        "--micro-batch-size",
        "4",
    )
    assert largest_difference(found, reference_log_probs(models.hf["qwen2_untied"], lines, 0.7)) < 1e-5


def test_bf16_is_close_and_no_more(models: Models, references: dict[str, list], tmp_path: Path) -> None:
    found = scored(models.torch_dist["qwen3_tied"], models.input["qwen3_tied"], tmp_path / "out.jsonl", "--bf16")
    assert 1e-4 < largest_difference(found, references["qwen3_tied"]) < 1.0


def test_a_chosen_step(models: Models, tmp_path: Path) -> None:
    folder = models.torch_dist["qwen2_tied"]
    with pytest.raises(UserError, match=r"--ckpt-step: step 7 is not in .* \(it has release\)"):
        scored(folder, models.input["qwen2_tied"], tmp_path / "out.jsonl", "--ckpt-step", "7")
    step = tmp_path / "run"
    step.mkdir()
    (step / "iter_0000007").symlink_to(folder / "release")
    (step / "hf").symlink_to(folder / "hf")
    seven = scored(step, models.input["qwen2_tied"], tmp_path / "out.jsonl", "--ckpt-step", "7")
    assert seven == scored(folder, models.input["qwen2_tied"], tmp_path / "out.jsonl")


def test_long_lines_are_scored_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "short", "qwen2", max_position_embeddings=16)
    lines = token_lines(45, [18, 17])
    found = scored(folder, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    assert "warning: 1 lines are longer than the 16 positions" in capsys.readouterr().out
    assert largest_difference(found, reference_log_probs(folder, lines)) < 1e-5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"ids": [1]}', 'needs "tokens"'),
        ('{"tokens": []}', "at least one id"),
        ('{"tokens": 5}', 'needs "tokens"'),
        ('{"tokens": [1, 2.0]}', r"entry 1 of tokens is no whole number \(2.0\)"),
        ('{"tokens": [true]}', "entry 0 of tokens is no whole number"),
        ('{"tokens": [3, -1]}', "id -1 is not in the model's vocabulary of 301"),
        ('{"tokens": [301]}', "id 301 is not in the model's vocabulary of 301"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, models: Models, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"tokens": [1, 300]}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"in\.jsonl, line 2: .*{message}"):
        scored(models.hf["qwen2_untied"], file, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_folders_and_files_that_do_not_fit(models: Models, tmp_path: Path) -> None:
    model, lines = models.hf["qwen2_tied"], models.input["qwen2_tied"]
    for folder, file, output, message in (
        (tmp_path / "none", lines, "out", "--load .*none does not exist"),
        (lines, lines, "out", "--load .* is a file"),
        (tmp_path, lines, "out", "--load .* holds no complete checkpoint"),
        (models.torch_dist["qwen2_tied"] / "hf", lines, "out", "--load .* holds a config and no weights"),
        (model, tmp_path / "none.jsonl", "out", "none.jsonl: no such file"),
        (model, lines, ".", "--output .* is a folder"),
        (model, lines, str(lines), "--output .* is the input"),
    ):
        with pytest.raises(UserError, match=message):
            scored(folder, file, tmp_path / output)


def test_damaged_weights_are_no_scores(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "model", "qwen2")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = write_lines(tmp_path / "in.jsonl", [[1, 2, 3]])
    with pytest.raises(UserError, match=r"in.jsonl, line 1: log-probabilities that are not finite"):
        scored(folder, file, tmp_path / "out.jsonl")


def test_a_layout_that_does_not_fit_is_refused(models: Models, tmp_path: Path) -> None:
    arguments = (models.hf["qwen2_tied"], models.input["qwen2_tied"], tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"number of ranks, 1: start them with torchrun --nproc-per-node 6") as caught:
        scored(*arguments, "--tensor-model-parallel-size", "3", "--pipeline-model-parallel-size", "2")
    assert "--tensor-model-parallel-size 3 does not divide the model's 4 attention heads" in str(caught.value)
    with pytest.raises(UserError, match="--sequence-parallel needs"):
        scored(*arguments, "--sequence-parallel")


@pytest.mark.parallel
def test_the_ranks_of_torchrun_report_an_error_once(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"tokens": [1, 9999]}\n')
    out = tmp_path / "out.jsonl"
    done = torchrun(ROOT / "tools" / "score.py", "--load", models.hf["qwen2_tied"], "--input", file, "--output", out)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "line 1: id 9999 is not in the model's vocabulary" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not out.exists()
