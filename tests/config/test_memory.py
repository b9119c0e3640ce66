"""Parameter counts against published sizes, what fits on 8 x 80 GB, and the estimator's command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_megatron.config.architecture import ModelArchitecture, architecture_from_hf
from opd_megatron.config.cli import run_cli
from opd_megatron.config.memory import Models, RankMemory, estimate, estimate_stage
from opd_megatron.config.parameters import rank_parameters, total_parameters
from opd_megatron.config.parse import parse_options
from tests.config.inputs import ROOT, run_train, write_hf
from tests.scripts.test_models import ROWS, sourced
from tools import estimate_memory

PUBLISHED_BYTES = {"Qwen/Qwen3-8B": 16_381_470_720, "Qwen/Qwen3-32B": 65_524_246_528}
"""``metadata.total_size`` of ``model.safetensors.index.json`` in the models' repositories at huggingface.co (bf16)."""

EIGHT = """
    --bf16 --accumulate-allreduce-grads-in-fp32 --actor-num-gpus-per-node 8 --tensor-model-parallel-size 8
    --sequence-parallel --use-opd --opd-type megatron --opd-teacher-load teacher --rollout-batch-size 64
""".split()  # noqa: SIM905


def published(checkpoint: str) -> ModelArchitecture:
    return architecture_from_hf(next(row["config"] for row in ROWS if row["checkpoint"] == checkpoint))


@pytest.mark.parametrize("row", ROWS, ids=[row["checkpoint"] for row in ROWS])
def test_parameters_are_those_of_the_model_cards(row: dict[str, Any]) -> None:
    assert total_parameters(published(row["checkpoint"])) == pytest.approx(row["parameters_billion"] * 1e9, rel=0.0125)


@pytest.mark.parametrize("checkpoint", PUBLISHED_BYTES)
def test_parameters_are_exactly_those_of_the_published_files(checkpoint: str) -> None:
    assert 2 * total_parameters(published(checkpoint)) == PUBLISHED_BYTES[checkpoint]


def test_the_parts_of_all_ranks_make_the_whole() -> None:
    """Matrices are split and norms repeated, so eight ranks hold a little more than one."""
    model = published("Qwen/Qwen3-8B")
    flags = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2"]
    parallel = parse_options(flags).parallel
    stages = [rank_parameters(model, parallel, stage, vocab_divisible_by=1).total for stage in range(2)]
    repeated = 3 * (model.num_layers * (2 * 4096 + 2 * 128) + 4096)
    assert 4 * sum(stages) == total_parameters(model) + repeated


def test_a_student_of_8b_and_a_teacher_of_32b_over_eight_ranks() -> None:
    models = Models(published("Qwen/Qwen3-8B"), published("Qwen/Qwen3-32B"))
    plain = estimate(parse_options(EIGHT), models, "cuda")
    assert 8 * plain.weights == pytest.approx(16.4e9, rel=0.01)
    assert 8 * plain.gradients == pytest.approx(4 * 8.19e9, rel=0.01)
    assert 8 * plain.optimizer == pytest.approx(12 * 8.19e9, rel=0.01)
    assert 8 * plain.teacher == pytest.approx(65.5e9, rel=0.01)
    assert plain.weights + plain.gradients + plain.optimizer + plain.teacher + plain.head < 35e9


def test_what_each_option_saves() -> None:
    models = Models(published("Qwen/Qwen3-8B"), published("Qwen/Qwen3-32B"))

    def of(*flags: str, stage: int = 0) -> Any:
        return estimate_stage(parse_options([*EIGHT, *flags]), models, stage, "cuda")

    halved = of("--actor-num-nodes", "2", "--use-distributed-optimizer")
    assert halved.optimizer == pytest.approx(of().optimizer / 2, rel=1e-6)
    recomputed = of("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    assert recomputed.activations + recomputed.recomputed < of().activations / 4
    context = of("--actor-num-nodes", "2", "--context-parallel-size", "2")
    assert context.activations == pytest.approx(of().activations / 2, rel=1e-3)
    assert of("--sequence-parallel=false").activations > 2 * of().activations
    pipeline = [of("--actor-num-nodes", "2", "--pipeline-model-parallel-size", "2", stage=stage) for stage in (0, 1)]
    assert pipeline[0].activations > 1.5 * pipeline[1].activations
    assert (pipeline[0].head, pipeline[1].rollout) == (0, 0)
    assert of("--opd-exact-kl-interval", "0").host == 0 < of().host


def test_what_leaves_the_device_is_not_there_at_once() -> None:
    """Both models and the optimizer are never there together; what has left is on the host."""
    models = Models(published("Qwen/Qwen3-8B"), published("Qwen/Qwen3-32B"), has_reference=True)

    def of(*flags: str) -> RankMemory:
        return estimate(parse_options([*EIGHT, "--opd-exact-kl-interval", "0", *flags]), models, "cuda")

    stays = of()
    assert stays.total == sum(stays.device_parts.values())
    assert stays.host == 0
    work = stays.activations + stays.recomputed + stays.head
    trained = stays.weights + stays.gradients
    teacher = of("--offload-teacher")
    assert teacher.total == stays.rollout + trained + stays.optimizer + max(work, stays.teacher)
    assert teacher.host == stays.teacher + stays.reference
    both = of("--offload-teacher", "--offload-optimizer")
    assert both.total == stays.rollout + trained + max(work, stays.optimizer, stays.teacher)
    everything = of("--offload-teacher", "--offload-train")
    assert everything.total == stays.rollout + max(trained + work + stays.optimizer, stays.teacher)
    assert everything.host == stays.teacher + stays.reference + stays.optimizer + stays.weights


def test_a_teacher_of_its_own_layout_and_precision() -> None:
    models = Models(published("Qwen/Qwen3-8B"), published("Qwen/Qwen3-32B"))
    plain = estimate(parse_options(EIGHT), models, "cuda")
    wide = estimate(parse_options([*EIGHT, "--opd-teacher-dtype", "float32"]), models, "cuda")
    assert (wide.teacher, wide.host) == (2 * plain.teacher, 2 * plain.host)
    short = estimate(
        parse_options([*EIGHT, "--opd-teacher-dtype", "float32", "--opd-teacher-hidden-dtype", "bfloat16"]),
        models,
        "cuda",
    )
    assert short.host == plain.host
    split = estimate(parse_options([*EIGHT, "--opd-teacher-tensor-model-parallel-size", "2"]), models, "cuda")
    assert split.teacher == pytest.approx(4 * plain.teacher, rel=0.01)
    assert split.weights == plain.weights
    head_of_a_rank = 2 * models.student.vocab_size // 8 * 5120
    assert split.host - plain.host == pytest.approx(head_of_a_rank, rel=0.01)
    same = [*EIGHT, "--opd-teacher-tensor-model-parallel-size", "8", "--opd-teacher-pipeline-model-parallel-size", "1"]
    assert estimate(parse_options(same), models, "cuda") == plain
    recorded = parse_options([*EIGHT, "--load-debug-rollout-data", "recorded.jsonl"])
    without = estimate(recorded, Models.of(recorded, models.student, models.teacher), "cuda")
    assert (without.teacher, without.host) == (0, 0)


def test_several_frozen_models() -> None:
    """Each counts in the teacher's precision; with offloading only the largest is there at once."""
    student, teacher = published("Qwen/Qwen3-8B"), published("Qwen/Qwen3-32B")
    alone, both = Models(student, teacher), Models(student, teacher, further={"opd_reference": teacher})

    def of(models: Models, *flags: str) -> RankMemory:
        return estimate(
            parse_options([*EIGHT, "--opd-reward-scale", "2", "--opd-ref-load", "r", *flags]), models, "cuda"
        )

    assert of(both).teacher == 2 * of(alone).teacher
    assert of(both, "--offload-teacher").total == of(alone, "--offload-teacher").total
    whole = ("--opd-loss", "distribution")
    assert of(both).host == of(alone).host
    assert of(both, *whole).host == 2 * of(both).host


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for row in ROWS:
        if row["checkpoint"] in (*PUBLISHED_BYTES, "Qwen/Qwen3-30B-A3B"):
            write_hf(tmp_path / row["checkpoint"].removeprefix("Qwen/"), weights=False, **row["config"])
    return tmp_path


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run_cli(estimate_memory.main, arguments.split())
    return (code, *capsys.readouterr())


def test_a_proposal_is_the_first_that_fits(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"--hf-checkpoint {models}/Qwen3-8B --bf16 --use-distributed-optimizer --use-dynamic-batch-size "
        "--max-tokens-per-gpu 8192 --rollout-batch-size 16 --rollout-engine-batch-size 1 --world-size 8 --json"
    )
    code, out, _ = run(f"{line} --device-memory 80GiB", capsys)
    found = json.loads(out)
    assert code == 0
    assert [layout["fits"] for layout in found["tried"]][-1:] == [True]
    sizes = [layout["layout"] for layout in found["tried"]]
    products = [size["tensor"] * size["context"] * size["pipeline"] for size in sizes]
    assert products == sorted(products)
    assert found["proposal"] == sizes[-1]
    code, out, _ = run(f"{line} --device-memory 60GiB", capsys)
    assert json.loads(out)["proposal"]["tensor"] > found["proposal"]["tensor"]


def test_experts_are_spread_where_that_makes_a_mixture_fit(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"--hf-checkpoint {models}/Qwen3-30B-A3B --bf16 --use-distributed-optimizer --rollout-batch-size 64 "
        "--load-debug-rollout-data recorded --num-rollout 1 --world-size 16 --device-memory 80GB --json"
    )
    code, out, err = run(line, capsys)
    assert code == 0, err
    assert json.loads(out)["proposal"]["expert"] > 1


def test_model_args_do_in_place_of_a_folder(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_args = run(" ".join(sourced("qwen3-30B-A3B.sh")) + " --bf16 --json", capsys)
    from_folder = run(f"--hf-checkpoint {models}/Qwen3-30B-A3B --bf16 --json", capsys)
    assert from_args[:2] == from_folder[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "MODEL_ARGS without --hf-checkpoint lack --ffn-hidden-size, --hidden-size"),
        ("--hf-checkpoint nowhere", "nowhere: no config.json"),
        ("--hf-checkpoint 8B --device-memory 80", "--device-memory 80: must be a size such as 80GiB"),
        ("--hf-checkpoint 8B --world-size 8", "give --device-memory"),
        ("--hf-checkpoint 8B --world-size 12 --device-memory 80GB", "no multiple of --gpus-per-node 8"),
        ("--hf-checkpoint 8B --device-memory 3GiB", "--reserve 4GiB leaves nothing"),
        ("--hf-checkpoint 8B --tensor-model-parallel-size 3", "does not divide"),
        ("--hf-checkpoint 8B --world-size 8 --device-memory 80GB --context-parallel-size 2", "leave out one of them"),
        ("--hf-checkpoint 8B --use-opd --opd-type megatron", "--opd-teacher-load"),
    ],
)
def test_bad_input_is_one_line(models: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    code, out, err = run(arguments.replace("8B", f"{models}/Qwen3-8B"), capsys)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_where_nothing_fits_the_largest_part_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"--hf-checkpoint {models}/Qwen3-8B --bf16 --world-size 8 --device-memory 24GB --rollout-batch-size 64"
    code, out, err = run(line, capsys)
    assert code == 1
    assert "too large" in out
    assert "rollout engine" in err
    assert "--rollout-engine-batch-size" in err


def test_a_dry_run_ends_in_the_estimate(folders: dict[str, Path], tmp_path: Path) -> None:
    done = run_train(
        f"--hf-checkpoint {folders['hf']} --prompt-data {folders['prompts']} --rollout-batch-size 4 --num-rollout 1 "
        "--rm-type exact --run-dir run --dry-run".split(), tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["derived"]["world_size"] == 1
    assert done.out.splitlines()[-1].startswith("# estimated GiB of a rank on a GPU: ")


def test_the_flags_are_those_of_the_training_program() -> None:
    from tests.docs.declared import tool_flags, train_flags

    assert train_flags() <= tool_flags(ROOT / "tools" / "estimate_memory.py").keys()
