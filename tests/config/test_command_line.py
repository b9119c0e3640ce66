"""``train.py`` as a user meets it where nothing is wrong: dry runs, help, configuration files."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
import yaml

from opd_megatron.config.dump import dump_yaml
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import OpdOptions, Options
from opd_megatron.config.parse import parse_options
from opd_megatron.config.resolve import starting_point
from opd_megatron.config.validate import validate
from opd_megatron.data.prompts import check_prompt_file
from tests.config.inputs import ROOT, run_train

BASE = (
    "--hf-checkpoint $hf --prompt-data $prompts --rollout-batch-size 4 --num-rollout 2 --run-dir $run --rm-type exact "
)


def words(line: str, folders: dict[str, Path], tmp_path: Path) -> list[str]:
    return [Template(word).substitute(folders | {"run": tmp_path / "run"}) for word in line.split()]


def accept(line: str, folders: dict[str, Path], tmp_path: Path) -> Options:
    options = parse_options(words(line, folders, tmp_path))
    validate(options, check_prompt_file)
    return options


LEGAL = {
    "plain": "",
    "megatron teacher": "--use-opd --opd-type megatron --opd-teacher-load $teacher --rollout-temperature 0.7",
    "teacher step": "--use-opd --opd-type megatron --opd-teacher-load $teacher --opd-teacher-ckpt-step 5",
    "teacher step folder": "--use-opd --opd-type megatron --opd-teacher-load $teacher/iter_0000005",
    "hf teacher": "--use-opd --opd-type megatron --opd-teacher-load $teacher_hf --advantage-estimator none",
    "released teacher": "--use-opd --opd-type megatron --opd-teacher-load $release",
    "sglang teacher": "--use-opd --opd-type sglang --opd-teacher-url https://user:pw@host/?key=1 --rollout-top-k -1",
    "sglang replicas": "--use-opd --opd-type sglang --opd-teacher-url http://h:1 http://h:2 --opd-overlong drop",
    "recorded scores": "--use-opd --opd-type sglang --load-debug-rollout-data $root/rollout_{rollout_id}.jsonl",
    "override": (
        "--use-opd --opd-type sglang --opd-teacher-url http://h:1 --rollout-temperature 0.7 --rollout-top-p 0.9 "
        "--rollout-top-k 20 --opd-allow-sampling-mismatch"
    ),
    "coefficient of zero": "--use-opd --opd-type sglang --opd-teacher-url http://h:1 --opd-kl-coef 0",
    "sampling law without opd": "--rollout-temperature 0.7 --rollout-top-p 0.9 --rollout-top-k 20",
    "resume": "--load $checkpoint --ckpt-step 5 --save $checkpoint",
    "first start of a resumable run": "--load $run/checkpoints",
    "reference": "--ref-load $checkpoint --use-kl-loss --kl-loss-coef 0.1",
    "torn weights that are not read": "--hf-checkpoint $torn_hf --ref-load $checkpoint",
    "random start": "--hf-checkpoint $config_only",
    "layout": (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--actor-num-gpus-per-node 8 --global-batch-size 2"
    ),
    "model arguments": (
        "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention "
        "--num-query-groups 2 --kv-channels 16 --qk-layernorm --rotary-base 1000000 --norm-epsilon 1e-6 --swiglu "
        "--vocab-size 100 --normalization RMSNorm --disable-bias-linear --use-rotary-position-embeddings"
    ),
    "one switch twice": "--rollout-shuffle --rollout-shuffle",
    "routes to teachers": (
        "--use-opd --opd-type sglang --opd-teachers $teachers --prompt-data $routed@[0:1] --opd-kl-coef 0.5"
    ),
    "a mixture, which prompts do not choose from": (
        "--use-opd --opd-type sglang --opd-teachers $teachers --prompt-data $routed --opd-teacher-mixture geometric"
    ),
    "slice of the prompts": "--prompt-data $prompts@[1:3]",
    "rows without labels": "--prompt-data $unlabelled --rm-type zero",
    "sft": "--loss-type sft_loss",
    "evaluation": "--eval-prompt-data dev $prompts --eval-prompt-data test $prompts@[0:2] --eval-interval 1",
    "sglang engine": (
        "--rollout-engine sglang --rollout-num-engines 2 --sglang-mem-fraction-static 0.7 --sglang-free-memory "
        "--sglang-server-args=--enable-deterministic-inference --rollout-weights-dir $root/weights"
    ),
    "engines after the trainer's GPUs": "--rollout-engine sglang --sglang-base-gpu-id 1",
    "given engines": "--rollout-engine sglang --rollout-engine-url http://h:1 --rollout-engine-url http://h:2",
    "recompute": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_passes_and_its_dump_reads_back(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options = accept(BASE + LEGAL[name], folders, tmp_path)
    assert list(tmp_path.iterdir()) == []
    text = dump_yaml(options)
    assert "user" not in text
    assert "pw" not in text
    assert "key=1" not in text
    (tmp_path / "config.yaml").write_text(text)
    if "***" in text:
        with pytest.raises(UserError, match="masked by a dump"):
            parse_options(["--config", str(tmp_path / "config.yaml")])
        return
    again = parse_options(["--config", str(tmp_path / "config.yaml")])
    validate(again, check_prompt_file)
    assert dump_yaml(again) == text
    assert again.given <= options.given


def test_dry_run_prints_the_configuration_and_creates_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    line = BASE + "--dry-run --use-opd --opd-type megatron --opd-teacher-load $teacher --opd-kl-coef=0.5"
    result = run_train(words(line, folders, tmp_path), tmp_path)
    assert (result.code, result.err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    printed = yaml.safe_load(result.out)
    assert printed["opd"]["opd_kl_coef"] == 0.5
    assert printed["optimizer"]["lr"] == 1e-6
    assert printed["derived"]["save"] == str(tmp_path / "run" / "checkpoints")
    assert printed["derived"]["global_batch_size"] == 4
    assert printed["derived"]["student"]["num_layers"] == 4
    assert printed["derived"]["teacher"]["num_layers"] == 6
    assert printed["derived"]["start"] == {"source": "hf_checkpoint", "folder": str(folders["hf"])}
    assert "dry_run" not in printed["run"]


def test_bad_options_are_refused_before_torch_is_imported(folders: dict[str, Path], tmp_path: Path) -> None:
    """And good ones, up to the point where the loop is imported."""
    program = (
        "import runpy, sys\ndel sys.argv[0]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))\n"
    )
    arguments = words(BASE + "--dry-run --eval-prompt-data dev $prompts", folders, tmp_path)
    for line, expected in ((["--use-opd"], "2 []"), (arguments, "0 []")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(ROOT / "train.py"), *line],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == expected


def test_a_group_begins_with_what_it_is_about() -> None:
    names = [item.name for item in dataclasses.fields(OpdOptions)]
    assert names[:3] == ["use_opd", "opd_type", "opd_kl_coef"]
    assert names.index("opd_loss") < names.index("opd_teacher_load") < names.index("opd_divergence")


def test_help_shows_groups_defaults_and_units(tmp_path: Path) -> None:
    result = run_train(["--help"], tmp_path)
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "On-policy distillation:" in text
    assert "coefficient of log p_student - log p_teacher [default: 1.0]" in text
    assert "--opd-type {sglang,megatron}" in text
    assert "--eval-prompt-data NAME PATH" in text
    assert "time limit of one request to the teacher, in seconds [default: 120.0]" in text
    assert "--config FILE" in text


def test_the_command_line_wins_over_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("use-opd: true\nopd_type: megatron\noptimizer:\n  lr: 1e-4\n  min-lr: 1e-5\n")
    line = f"{BASE} --config {tmp_path}/run.yaml --use-opd=false --opd-type sglang --lr 1e-3"
    options = parse_options(words(line, folders, tmp_path))
    assert (options.opd.use_opd, options.opd.opd_type) == (False, "sglang")
    assert (options.optimizer.lr, options.optimizer.min_lr) == (1e-3, 1e-5)
    assert {"use_opd", "opd_type", "lr", "min_lr", "rollout_batch_size"} <= options.given
    assert "opd_kl_coef" not in options.given


def test_the_command_line_switches_the_distillation_of_a_file_off(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("use_opd: true\nopd_type: megatron\nopd_teacher_load: nowhere\nopd_kl_coef: 2\n")
    line = f"{BASE} --config {tmp_path}/run.yaml --dry-run"
    assert run_train(words(line, folders, tmp_path), tmp_path).code == 2
    off = run_train(words(f"{line} --use-opd=false", folders, tmp_path), tmp_path)
    assert (off.code, off.err) == (0, "")
    assert yaml.safe_load(off.out)["opd"]["use_opd"] is False
    (tmp_path / "dump.yaml").write_text(off.out)
    again = run_train(["--config", str(tmp_path / "dump.yaml"), "--dry-run"], tmp_path)
    assert (again.code, again.out) == (0, off.out)
    typed = run_train(words(f"{line} --use-opd=false --opd-kl-coef 3", folders, tmp_path), tmp_path)
    assert typed.code == 2
    assert typed.last_line == "error: --opd-kl-coef has no effect without --use-opd: add it"


def test_wandb_without_package_or_key_is_refused_before_anything_is_created(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = words(f"{BASE} --dry-run --use-wandb", folders, tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if importlib.util.find_spec("wandb") is None:
        refused = run_train(line, tmp_path)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "--use-wandb: the package wandb is not installed" in refused.last_line
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    refused = run_train(line, tmp_path)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--use-wandb: W&B needs its key in WANDB_API_KEY" in refused.last_line
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run_train(line, tmp_path).code == 0
    assert not (tmp_path / "run").exists()


def test_where_the_student_starts(folders: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        "--load $checkpoint --ref-load $release": ("load", "checkpoint/iter_0000010"),
        "--load $checkpoint --ckpt-step 5": ("load", "checkpoint/iter_0000005"),
        "--load $empty --ref-load $release": ("ref_load", "release/release"),
        "--load $run": ("hf_checkpoint", "student"),
        "--hf-checkpoint $config_only": ("random", "config_only"),
    }
    for line, (source, folder) in cases.items():
        start = starting_point(accept(BASE + line, folders, tmp_path))
        assert (start.source, start.folder) == (source, folders["root"] / folder)


def test_a_file_with_bad_values_ends_like_a_bad_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('lr = "fast"\n[opd]\nopd-kl-coef = -1.0\nuse_odp = true\n')
    line = f"{BASE} --config {tmp_path}/run.toml --sed 1"
    result = run_train(words(line, folders, tmp_path), tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    for text in ("--sed: unknown flag", "lr fast: must be a number", "opd.opd_kl_coef -1.0: must be at least 0"):
        assert text in result.last_line
    assert "opd.use_odp: unknown key (did you mean use_opd?)" in result.last_line
