"""The commands of the servers; that they work is proved in tests/sglang."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.options.engine import EngineOptions
from opd_megatron.rollout.sglang_launch import ServedModel, find_python, server_command, server_launches


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return ServedModel(tmp_path, 4096, "bfloat16", seed=10)


def command(model: ServedModel, number: int = 0, on_cpu: bool = False, **options: Any) -> dict[str, str]:
    """Flags of a command with their values; the last one counts."""
    words = server_command(Path("py"), EngineOptions(**options), model, number, on_cpu=on_cpu)
    return {flag: value for flag, value in zip(words, [*words[1:], ""], strict=True) if flag.startswith("-")}


def test_each_server_has_gpus_and_a_seed_of_its_own(model: ServedModel) -> None:
    options = {"rollout_num_gpus_per_engine": 2, "sglang_base_gpu_id": 4, "rollout_num_engines": 2}
    first, second = command(model, 0, **options), command(model, 1, **options)
    assert (first["--base-gpu-id"], second["--base-gpu-id"], first["--tp-size"]) == ("4", "6", "2")
    assert first["--random-seed"] != second["--random-seed"]
    assert (first["--host"], first["--port"], first["--dtype"]) == ("127.0.0.1", "{port}", "bfloat16")


def test_flags_of_the_user_come_last_and_win(model: ServedModel) -> None:
    more = "--max-total-tokens 99 --schedule-policy 'l p m'"
    flags = command(model, on_cpu=True, sglang_server_args=more, sglang_mem_fraction_static=0.5)
    assert (flags["--max-total-tokens"], flags["--schedule-policy"]) == ("99", "l p m")
    assert flags["--mem-fraction-static"] == "0.5"
    assert "--enable-memory-saver" in command(model, sglang_free_memory=True)


def test_a_config_without_an_architecture_gets_one(model: ServedModel) -> None:
    assert json.loads(command(model)["--json-model-override-args"]) == {"architectures": ["Qwen3ForCausalLM"]}
    (model.folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Mine"]}))
    assert "--json-model-override-args" not in command(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sglang_free_memory": True}, "--sglang-free-memory: SGLang gives"), ({"sglang_base_gpu_id": 1}, "has no GPU")],
)
def test_what_needs_gpus_is_refused_without(model: ServedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        server_launches(EngineOptions(sglang_python=sys.executable, **options), model, model.folder, on_cpu=True)


def test_the_interpreter_is_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--sglang-python .* is no program"):
        find_python(str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opd_megatron.rollout.sglang_launch._REPOSITORY", tmp_path)
    with pytest.raises(UserError, match="finds no SGLang"):
        find_python(None)
    python = tmp_path / ".venv-sglang" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert find_python(None) == python
