"""Values, configuration files, and option groups of other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_megatron.config.checks import http_url, mask_url
from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError, refuse
from opd_megatron.config.options import Options, ParallelOptions
from opd_megatron.config.parse import parse_groups, parse_options


def faults(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_options(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_file(tmp_path: Path, text: str, name: str = "run.yaml") -> Options:
    (tmp_path / name).write_text(text)
    return parse_options(["--config", str(tmp_path / name)])


def file_fault(tmp_path: Path, text: str, name: str = "run.yaml") -> str:
    with pytest.raises(UserError) as caught:
        read_file(tmp_path, text, name)
    return str(caught.value)


def test_nothing_given_is_all_defaults() -> None:
    assert parse_options([]) == Options()


@dataclass(frozen=True)
class Foreign:
    """Flags of another program"""

    sglang_server_args: str | None = option(None, "flags")


@pytest.mark.parametrize("words", [["--sglang-server-args=--tp 2 --x"], ["--sglang-server-args", "--tp 2 --x"]])
def test_flags_of_another_program_are_one_value(words: list[str]) -> None:
    assert parse_groups(words, {"own": Foreign}, prog="p", description="")[Foreign].sglang_server_args == "--tp 2 --x"


def test_values_take_their_declared_types() -> None:
    options = parse_options(
        [
            "--lr",
            "1e-3",
            "--rollout-top-k",
            "-1",
            "--rollout-stop",
            "- end",
            "</s>",
            "--rollout-stop=--",
            "--use-opd",
            "--use-opd",
            "--eval-prompt-data",
            "a",
            "p",
            "b",
            "q",
            "--eval-prompt-data",
            "c",
            "r",
            "--seed=7",
            "--bf16=false",
            "--rm-error-value",
            "-.5",
            "--lr",
            "2e-3",
        ]
    )
    assert options.optimizer.lr == 2e-3
    assert options.rollout.rollout_top_k == -1
    assert options.rollout.rollout_stop == ("- end", "</s>", "--")
    assert options.opd.use_opd
    assert options.evaluation.eval_prompt_data == (("a", "p"), ("b", "q"), ("c", "r"))
    assert options.training.seed == 7
    assert options.optimizer.bf16 is False
    assert options.reward.rm_error_value == -0.5
    assert options.given == {
        "lr",
        "rollout_top_k",
        "rollout_stop",
        "use_opd",
        "eval_prompt_data",
        "seed",
        "bf16",
        "rm_error_value",
    }


def test_options_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        parse_options([]).opd.use_opd = True  # type: ignore[misc]


def test_bounds() -> None:
    text = faults(
        "--opd-teacher-timeout",
        "0",
        "--rollout-top-p",
        "1.01",
        "--adam-beta1",
        "1",
        "--micro-batch-size",
        "0",
        "--attention-dropout",
        "0.1",
        "--rm-error-value",
        "-inf",
        "--num-layers",
        "1e3",
    )
    assert text.split("; ") == [
        "--opd-teacher-timeout 0: must be above 0",
        "--rollout-top-p 1.01: must be at most 1",
        "--adam-beta1 1: must be below 1",
        "--micro-batch-size 0: must be at least 1",
        "--attention-dropout 0.1: must be at most 0",
        "--rm-error-value -inf: must be finite",
        "--num-layers 1e3: must be a whole number",
    ]
    parse_options(["--rollout-top-p", "1", "--gamma", "0", "--adam-beta1", "0", "--seed", str(2**31 - 1)])
    assert faults("--seed", "9" * 400).endswith("9: must be at most 2147483647")


def test_values_after_a_misspelt_flag_are_no_faults_of_their_own() -> None:
    assert faults("--rollout-stp", "a", "b") == "--rollout-stp: unknown flag (did you mean --rollout-stop?)"
    assert faults("--tensor-model", "2") == (
        "--tensor-model: unknown flag (did you mean --tensor-model-parallel-size?)"
    )
    assert faults("--zzz=1") == "--zzz: unknown flag (see --help)"


def test_left_over_arguments() -> None:
    assert "--use-opd is a switch" in faults("--use-opd", "false")
    assert faults("--lr", "1", "2") == "'2': unexpected argument (values with spaces need quotes)"
    assert faults("--use-opd=maybe") == "--use-opd maybe: must be true or false"


def test_files_flat_and_grouped_in_both_formats(tmp_path: Path) -> None:
    yaml_text = (
        "optimizer: sgd\nlr: 1e-4\nopd:\n  opd-teacher-url: http://h:1\nrollout:\n  rollout_stop: [a, b]\n"
        "evaluation:\n  eval_prompt_data: [[dev, p.jsonl]]\nload: null\nrun:\n  wandb-group:\n"
        "derived: {save: elsewhere}\n"
    )
    toml_text = (
        'optimizer = "sgd"\nlr = 1e-4\n[opd]\nopd-teacher-url = ["http://h:1"]\n[rollout]\nrollout_stop = ["a", "b"]\n'
        '[evaluation]\neval_prompt_data = [["dev", "p.jsonl"]]\n'
    )
    options = read_file(tmp_path, yaml_text)
    assert options == read_file(tmp_path, toml_text, "run.toml")
    assert (options.optimizer.optimizer, options.optimizer.lr) == ("sgd", 1e-4)
    assert options.opd.opd_teacher_url == ("http://h:1",)
    assert options.rollout.rollout_stop == ("a", "b")
    assert options.evaluation.eval_prompt_data == (("dev", "p.jsonl"),)
    assert options.given == {"optimizer", "lr", "opd_teacher_url", "rollout_stop", "eval_prompt_data"}


def test_a_default_in_a_file_does_not_count_as_given(tmp_path: Path) -> None:
    assert read_file(tmp_path, "opd_kl_coef: 1\nuse_opd: false\nopd_type: null\n").given == set()
    assert parse_options(["--opd-kl-coef", "1"]).given == {"opd_kl_coef"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use_odp: true", "use_odp: unknown key (did you mean use_opd?)"),
        ("optimizr:\n  lr: 1", "optimizr: is no group of options (did you mean optimizer?)"),
        ("opd:\n  lr: 1", "opd.lr: unknown key (it belongs to optimizer)"),
        ("opd:\n  opd_typ: sglang", "opd.opd_typ: unknown key (did you mean opd_type?)"),
        ("lr: 1\noptimizer:\n  lr: 2", "optimizer.lr: given twice"),
        ("lr: 1\nlr: 2", "lr is given twice"),
        ("lr: 1\nseed: true", "seed true: must be a whole number"),
        ("seed: 1.0", "seed 1.0: must be a whole number"),
        ("lr: .nan", "lr nan: must be finite"),
        ("lr: [1]", "lr 1: takes one value"),
        ("lr: null", "needs a value"),
        ("wandb_group: no", "wandb_group false: must be text: put it in quotes"),
        ("use_opd: 1", "use_opd 1: must be true or false"),
        ("eval_prompt_data: [a, b]", "must be a list of lists of 2 values"),
        ("eval_prompt_data: [[a b, c]]", "name 'a b' may hold letters"),
        ("- lr", "must be a mapping"),
        ("lr: [", "is not YAML"),
    ],
)
def test_faults_of_a_file(text: str, expected: str, tmp_path: Path) -> None:
    fault = file_fault(tmp_path, text)
    assert fault.startswith(f"--config {tmp_path / 'run.yaml'}: ")
    assert expected in fault
    assert "\n" not in fault


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in faults("--config", str(tmp_path / "none.yaml"))
    assert "must end in .yaml, .yml or .toml" in file_fault(tmp_path, "lr: 1", "run.txt")
    assert "is not TOML" in file_fault(tmp_path, "lr: 1", "run.toml")
    assert faults("--config") == "--config: needs a file"
    assert faults("--config", "a.yaml", "--config=b.yaml").startswith("--config: given twice")


@dataclass(frozen=True)
class ToolOptions:
    """A tool's own options"""

    load: str | None = option(None, "checkpoint folder", metavar="DIR", required=True)
    output: str | None = option(None, "file to write", metavar="FILE", required=True)
    share: float = option(0.5, "100 % is all", maximum=1.0)


GROUPS = {"tool": ToolOptions, "parallel": ParallelOptions}


def test_groups_of_a_tool(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--load", "a", "--output=b", "--tensor-model-parallel-size", "2"]
    parsed = parse_groups(line, GROUPS, prog="tool.py", description="Does it.")
    assert parsed[ToolOptions] == ToolOptions("a", "b", 0.5)
    assert parsed[ParallelOptions].tensor_model_parallel_size == 2
    assert parsed.given == {"load", "output", "tensor_model_parallel_size"}
    with pytest.raises(SystemExit) as end:
        parse_groups(["--help"], GROUPS, prog="tool.py", description="Does 100 % of it.")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "checkpoint folder [required]" in shown
    assert "Does 100 % of it." in shown


def test_a_tool_ends_with_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> None:
        parse_groups(list(argv), GROUPS, prog="tool.py", description="")  # type: ignore[call-overload]

    assert run_cli(main, ["--lod", "a"]) == 2
    assert capsys.readouterr().err == "error: --lod: unknown flag (did you mean --load?)\n"
    assert run_cli(main, []) == 2
    expected = "error: --load is missing: checkpoint folder; --output is missing: file to write\n"
    assert capsys.readouterr().err == expected
    assert run_cli(main, ["--load=a", "--output=b"]) == 0


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> None:
        print("before")
        raise UserError("first\n  second")

    assert run_cli(main, []) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("before\n", "error: first second\n")


def test_other_exceptions_keep_their_traceback() -> None:
    def main(argv: object) -> None:
        raise ValueError("a fault of the program")

    with pytest.raises(ValueError, match="of the program"):
        run_cli(main, [])


def test_refuse_says_each_fault_once() -> None:
    refuse([])
    with pytest.raises(UserError, match=r"^a; b$"):
        refuse(["a", "b", "a"])


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("http://h:30000", "http://h:30000"),
        ("https://user:pw@h:1/v1?key=s#x", "https://***@h:1/v1?***#***"),
        ("http://key@h", "http://***@h"),
        ("user:pw@h:30000", "user:***"),
        ("http://u:p/w@h", "***"),
        ("http://[::1]:30000/a", "http://[::1]:30000/a"),
    ],
)
def test_addresses_are_shown_without_their_secrets(url: str, masked: str) -> None:
    assert mask_url(url) == masked


def test_addresses() -> None:
    for good in ("http://127.0.0.1:30000", "https://u:p@teacher.example/v1?x=1", "http://[::1]:8000"):
        assert http_url(good) is None
    for bad in ("127.0.0.1:30000", "ftp://h", "http://", "http://:1", "http://h:port", "http://h :1", "http://***@h"):
        assert http_url(bad)
