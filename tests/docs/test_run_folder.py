"""docs/run_folder.md against what a real run writes: its files, its metrics, its summary."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_megatron.observe.run_folder import read_metrics
from tests.docs.declared import PAGES, ROOT
from tests.e2e.support import make_model

PAGE = ROOT / "docs" / "run_folder.md"
METRIC = re.compile(r"`((?:rollout|reward|opd|train|eval|perf)/[\w/@]+)`")

OF_SGLANG_ENGINE = {
    "perf/weight_write_seconds",
    "perf/weight_load_seconds",
    "perf/weight_probe_seconds",
    "rollout/engine_restarts",
}
"""Metrics of runs that sample through servers; tests/sglang look at those."""

OF_CRITIC = {
    "train/value_loss",
    "train/value_clipfrac",
    "train/explained_variance",
    "train/value_mean",
    "train/return_mean",
    "train/critic_grad_norm",
    "train/critic_lr",
}
"""Metrics of PPO's critic; tests/e2e/test_ppo.py looks at those."""

OF_SGLANG_TEACHER = {
    "perf/teacher_requests",
    "perf/teacher_retries",
    "perf/teacher_answer_seconds",
    "perf/teacher_in_flight_limit",
}
"""Metrics of runs whose teacher is behind servers; tests/sglang look at those."""

OF_OTHER_TERMS = {
    "train/opd_clipfrac",
    "train/opd_loss",
    "train/opd_divergence",
    "train/opd_prompt_divergence",
    "train/opd_supervised_loss",
    "opd/implicit_reward",
    "opd/jsd_beta",
    "opd/student_data_frac",
    "opd/given_length_mean",
    "opd/given_truncated_frac",
    "opd/feedback_frac",
}
"""Metrics of other forms of the distillation term; tests/e2e/test_distillation_forms.py looks at those,
test_teacher_responses.py beside it at responses that the student did not make, test_self_distillation.py at
feedback."""
OF_WEIGHTS = {"opd/token_kept_frac", "opd/weight_mean", "opd/weight_max", "opd/weight_ess", "opd/pass_rate"}
"""Metrics of weights of the distillation term; tests/e2e/test_opd_weights.py looks at those."""
OF_OTHER_TERMS |= OF_WEIGHTS

ELSEWHERE = OF_SGLANG_ENGINE | OF_SGLANG_TEACHER | OF_OTHER_TERMS | OF_CRITIC


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a mixture of experts with a reward, a Megatron teacher, a KL to the reference, an evaluation."""
    root = tmp_path_factory.mktemp("documented")
    make_model(root / "student", seed=0, hidden=16, layers=1, experts=4)
    make_model(root / "teacher", seed=1, hidden=16, layers=1)
    (root / "prompts.jsonl").write_text('{"prompt": "1234+1234=", "label": "2468"}\n' * 4)
    arguments = (
        "--hf-checkpoint student --prompt-data prompts.jsonl --rm-type column_arithmetic --run-dir run "
        "--rollout-batch-size 2 --n-samples-per-prompt 2 --num-rollout 2 --rollout-max-response-len 8 "
        "--save-interval 1 --use-opd --opd-type megatron --opd-teacher-load teacher --use-kl-loss --kl-loss-coef 0.1 "
        "--eval-prompt-data NAME prompts.jsonl --n-samples-per-eval-prompt 2 --moe-aux-loss-coeff 0.01 "
        "--advantage-estimator remax --policy-loss gspo --use-tis --use-opsm --ppo-epochs 2 "
        "--opd-diagnostics-interval 1 --opd-gradient-diagnostics-interval 1"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments.split()],
        cwd=root, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.fixture(scope="module")
def metrics(run_folder: Path) -> list[dict]:
    return read_metrics(run_folder / "metrics.jsonl")


def test_the_metrics_of_a_run_are_those_of_the_page(metrics: list[dict]) -> None:
    documented = set(METRIC.findall(PAGE.read_text(encoding="utf-8")))
    emitted = {name for record in metrics for name in record} - {"step", "non_finite"}
    assert documented == emitted | ELSEWHERE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_named_elsewhere_exist(page: Path, metrics: list[dict]) -> None:
    emitted = {name for record in metrics for name in record} | ELSEWHERE
    assert set(METRIC.findall(page.read_text(encoding="utf-8"))) <= emitted


def test_steps_are_numbered_as_the_page_says(run_folder: Path, metrics: list[dict]) -> None:
    assert [record["step"] for record in metrics] == [0, 1, 2]
    assert all(name in ("step", "perf/weight_update_seconds") or name.startswith("eval/NAME/") for name in metrics[0])
    assert {"rollout/tokens", "train/loss", "eval/NAME/pass@1"} <= metrics[2].keys()
    samples = sorted(path.name for path in (run_folder / "samples").iterdir())
    assert samples == ["rollout_000000.jsonl", "rollout_000001.jsonl"]
    assert (run_folder / "checkpoints" / "iter_0000001").is_dir()


def test_the_files_of_a_run_are_those_of_the_page(run_folder: Path) -> None:
    table = re.search(r"^\| path \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert table is not None
    rows = re.findall(r"^\| (.*?) \|", table[1], re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row)} - {"wandb_run_id"}
    assert [name for name in documented if not (run_folder / name).exists()] == []
    assert {entry.name for entry in run_folder.iterdir()} == {name.split("/")[0] for name in documented}


def test_the_summary_has_the_fields_of_the_page(run_folder: Path) -> None:
    row = re.search(r"^\| `summary\.json` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    summary = json.loads((run_folder / "summary.json").read_text())
    assert set(re.findall(r"`(\w+)`", row[1])) == summary.keys()
    assert summary["rollouts"] == 2
    assert summary["finished"] is True


def test_a_checkpoint_looks_as_drawn(run_folder: Path) -> None:
    drawn = re.search(r"```text\ncheckpoints/\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert drawn is not None
    names = {line.split()[0].strip("/") for line in drawn[1].splitlines()}
    there = {re.sub(r"iter_\d+", "iter_0000050", entry.name) for entry in (run_folder / "checkpoints").iterdir()}
    assert names == there
