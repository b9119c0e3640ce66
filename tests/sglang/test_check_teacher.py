"""tools/check_teacher.py against the real server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from opd_megatron.config.cli import run_cli
from tests.sglang.conftest import Served
from tools import check_teacher

pytestmark = pytest.mark.sglang


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{i} + {i} = ", "label": str(2 * i)} for i in range(10, 30)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_report_of_a_good_teacher(llama: Served, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--opd-teacher-url", llama.server.url, "--hf-checkpoint", str(llama.folder), "--prompt-data", str(prompts),
        "--apply-chat-template", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2",
        "--rollout-max-response-len", "32", "--num-rollout", "10", "--with-student",
    ]  # fmt: skip
    assert run_cli(check_teacher.main, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[9:].split("  ")[0].strip(): line for line in lines[:-1]}
    assert lines[-1] == "10 findings, 2 of them warnings"
    assert [name for name, line in rows.items() if line.startswith("warning")] == ["same model"]
    assert f"{llama.folder} (weight version default) on sglang 0.5.23 in float32, takes at most 249" in rows["server"]
    assert "perplexity" in rows["plausibility"]
    assert "8 samples of" in rows["throughput"]
    rate, step = re.findall(r"\(([\d.e+]+) samples/s.* takes the teacher ([\d.]+) s,", rows["throughput"])[0]
    assert float(rate) * float(step) == pytest.approx(8, rel=0.02)


def test_another_tokenizer_is_one_line_and_exit_code_2(
    qwen: Served, llama: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--opd-teacher-url", qwen.server.url, "--hf-checkpoint", str(llama.folder)]
    assert run_cli(check_teacher.main, [*arguments, "--rollout-max-response-len", "32"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "has another tokenizer than the student: token 0 of" in captured.err


def test_servers_with_other_weights_are_no_replicas(
    qwen: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two servers of the same shape, the second with one layer's weights scaled."""
    from transformers import AutoModelForCausalLM

    from tests.sglang.conftest import sglang_server

    model = AutoModelForCausalLM.from_pretrained(qwen.folder)
    model.model.norm.weight.data *= 1.01
    model.save_pretrained(tmp_path / "other")
    qwen.tokenizer.save_pretrained(tmp_path / "other")
    with sglang_server(tmp_path / "other", tmp_path / "server.log") as server:
        arguments = ["--opd-teacher-url", qwen.server.url, server.url, "--hf-checkpoint", str(qwen.folder)]
        assert run_cli(check_teacher.main, [*arguments, "--rollout-max-response-len", "32"]) == 2
    assert "do not serve the same weights: its log-probabilities of a known text differ by" in capsys.readouterr().err
