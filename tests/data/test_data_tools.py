"""The data tools, through their command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.data.column_arithmetic import Problem, is_held_out, verify
from opd_megatron.data.prompts import check_prompt_file, load_prompt_records
from opd_megatron.data.tokenizer import load_tokenizer, train_bpe_tokenizer

ROOT = Path(__file__).resolve().parents[2]

GSM8K_ROWS = [
    {"question": "Ida has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7 pens.\n#### 7"},
    {"question": "A ship carries 1,200 crates, twice. How many?", "answer": "2*1200=2400\n#### 2,400"},
    {"question": "It is 2 degrees and falls by 5.", "answer": "2-5\n#### -3"},
    {"question": "Half of 5?", "answer": "#### 2.5"},
]


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Column arithmetic


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("task") / "new" / "folder"
    done = run_tool(
        "make_column_arithmetic.py", "--out", out, "--num-train", 300, "--num-dev", 40, "--num-heldout", 60, "--seed", 9
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_task_folder_is_complete(task: Path) -> None:
    assert sorted(item.name for item in task.iterdir()) == [
        "dev.jsonl",
        "heldout.jsonl",
        "prompts.jsonl",
        "sft.jsonl",
        "tokenizer",
    ]
    rows = {name: read(task / f"{name}.jsonl") for name in ("sft", "prompts", "dev", "heldout")}
    assert {name: len(group) for name, group in rows.items()} == {"sft": 300, "prompts": 300, "dev": 40, "heldout": 60}
    assert [{key: row[key] for key in ("prompt", "label")} for row in rows["sft"]] == rows["prompts"]
    for row in rows["sft"]:
        assert verify(row["prompt"], row["response"], True)
    problems = {name: [Problem.from_prompt(row["prompt"]) for row in group] for name, group in rows.items()}
    for name, group in rows.items():
        assert [row["label"] for row in group] == [problem.answer() for problem in problems[name]]
    train = {problem.key() for problem in problems["prompts"]}
    assert train.isdisjoint(problem.key() for problem in problems["dev"])
    assert not any(is_held_out(problem) for problem in problems["prompts"] + problems["dev"])
    assert all(is_held_out(problem) for problem in problems["heldout"])


def test_the_task_loads_as_prompts(task: Path) -> None:
    tokenizer = load_tokenizer(task / "tokenizer")
    records = load_prompt_records(
        str(task / "prompts.jsonl"),
        tokenizer=tokenizer,
        input_key="prompt",
        label_key=None,
        metadata_key="metadata",
        apply_chat_template=False,
        chat_template_kwargs={},
    )
    assert all(len(record.prompt_tokens) == 10 for record in records)
    assert tokenizer.decode(records[5].prompt_tokens) == records[5].prompt


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--num-tran", 5], "unknown flag (did you mean --num-train?)"),
        (["--num-train", 0], "--num-train 0: must be at least 1"),
        (["--num-train", 1_000_000, "--num-dev", 1], "together at most"),
        ([], "--out is missing"),
    ],
)
def test_bad_arguments_of_the_task_tool(arguments: list[object], phrase: str, tmp_path: Path) -> None:
    target = [] if not arguments else ["--out", tmp_path / "task"]
    done = run_tool("make_column_arithmetic.py", *target, *arguments)
    assert_refused(done, phrase)
    assert list(tmp_path.iterdir()) == []


def assert_refused(done: subprocess.CompletedProcess[str], phrase: str) -> None:
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert phrase in done.stderr.splitlines()[-1]


# GSM8K


@pytest.mark.parametrize("by_address", [False, True])
def test_gsm8k_becomes_a_prompt_file(by_address: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "test.jsonl", GSM8K_ROWS)
    address = tmp_path.as_uri() + "/{split}.jsonl"
    chosen = ["--split", "test", "--source", address] if by_address else ["--input", source]
    output = tmp_path / "deep" / "prompts.jsonl"
    done = run_tool("prepare_gsm8k.py", *chosen, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = read(output)
    assert [row["label"] for row in rows] == ["7", "2400", "-3", "2.5"]
    for row, original in zip(rows, GSM8K_ROWS, strict=True):
        (message,) = row["prompt"]
        assert message["role"] == "user"
        assert message["content"].startswith(original["question"] + "\n\n")
    assert check_prompt_file(str(output), "prompt", "label", "metadata") == []
    tokenizer = train_bpe_tokenizer([row["question"] for row in GSM8K_ROWS], 300, tmp_path / "tokenizer")
    records = load_prompt_records(
        str(output),
        tokenizer=tokenizer,
        input_key="prompt",
        label_key="label",
        metadata_key="metadata",
        apply_chat_template=True,
        chat_template_kwargs={},
    )
    assert records[0].prompt_text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_gsm8k_without_an_instruction_is_the_question(tmp_path: Path) -> None:
    source = write(tmp_path / "raw.jsonl", GSM8K_ROWS)
    done = run_tool("prepare_gsm8k.py", "--input", source, "--output", tmp_path / "out.jsonl", "--no-instruction")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out.jsonl")[0]["prompt"][0]["content"] == GSM8K_ROWS[0]["question"]


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ({"question": "a", "answer": "it is 5"}, "line 2: the answer does not end with #### and a number"),
        ({"question": "a"}, "line 2: no texts in the fields question and answer"),
        (["a"], "line 2: not a JSON object"),
    ],
)
def test_a_bad_gsm8k_row_is_named_and_nothing_is_written(row: Any, phrase: str, tmp_path: Path) -> None:
    source = write(tmp_path / "raw.jsonl", [GSM8K_ROWS[0], row])
    done = run_tool("prepare_gsm8k.py", "--input", source, "--output", tmp_path / "out.jsonl")
    assert_refused(done, phrase)
    assert [item.name for item in tmp_path.iterdir()] == ["raw.jsonl"]


def test_a_failed_download_says_what_to_do(tmp_path: Path) -> None:
    done = run_tool(
        "prepare_gsm8k.py", "--source", tmp_path.as_uri() + "/none.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert_refused(done, "give a local copy with --input")
    assert list(tmp_path.iterdir()) == []
