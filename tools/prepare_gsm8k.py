"""Turn GSM8K into a prompt file: one user message and the number that answers it.

    python tools/prepare_gsm8k.py --output data/gsm8k_train.jsonl                      # downloads the train split
    python tools/prepare_gsm8k.py --input test.jsonl --output data/gsm8k_test.jsonl    # converts a file

GSM8K (Cobbe et al., 2021, arXiv 2110.14168; MIT licence) has rows ``{"question", "answer"}`` whose answer ends with
``#### 18``. The rows written are ``{"prompt": [{"role": "user", "content": ...}], "label": "18"}``, for
``--apply-chat-template`` and ``--rm-type gsm8k`` or ``math``.
"""

from __future__ import annotations

import re
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError, refuse
from opd_megatron.config.parse import parse_groups
from opd_megatron.data.rows import Row, read_rows, summarize, write_jsonl

SOURCE = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"
INSTRUCTION = "Reason step by step, then end with a line that holds #### and the answer as a number."
DOWNLOAD_TIMEOUT = 60.0

_LABEL = re.compile(r"####\s*(-?[\d,]*\.?\d+)\s*$")


@dataclass(frozen=True)
class ConversionOptions:
    """GSM8K"""

    input: str | None = option(None, "file of GSM8K rows (default: download --split)", metavar="FILE")
    output: str = option("", "prompt file to write", metavar="FILE", required=True)
    split: str = option("train", "what to download", choices=("train", "test"))
    source: str = option(SOURCE, "address to download from; {split} is replaced", metavar="URL")
    instruction: str = option(INSTRUCTION, "sentence added below each question")
    no_instruction: bool = option(False, "add no sentence")


def convert(row: Row, instruction: str | None) -> dict[str, object]:
    """One prompt row; raises ``ValueError`` if ``row`` is not of GSM8K's form."""
    question, answer = row.fields.get("question"), row.fields.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(f"{row.where}: no texts in the fields question and answer")
    label = _LABEL.search(answer)
    if label is None:
        raise ValueError(f"{row.where}: the answer does not end with #### and a number")
    content = f"{question}\n\n{instruction}" if instruction else question
    return {"prompt": [{"role": "user", "content": content}], "label": label[1].replace(",", "")}


def convert_file(source: str, output: Path, instruction: str | None) -> int:
    """Convert all rows or none; returns how many. Raises :class:`UserError` that names the first bad rows."""
    rows, faults = read_rows(source)
    converted = []
    for row in rows:
        try:
            converted.append(convert(row, instruction))
        except ValueError as error:
            faults.append(str(error))
    refuse(summarize(faults))
    write_jsonl(output, converted)
    return len(converted)


def download(url: str, target: Path) -> None:
    """Fetch ``url`` into ``target``; raises :class:`UserError` if that fails."""
    print(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as answer:
            target.write_bytes(answer.read())
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise UserError(f"{url}: cannot be downloaded ({error}); give a local copy with --input") from error


def main(argv: Sequence[str]) -> None:
    parsed = parse_groups(
        argv, {"gsm8k": ConversionOptions}, prog="prepare_gsm8k.py", description="Turn GSM8K into a prompt file."
    )
    options = parsed[ConversionOptions]
    instruction = None if options.no_instruction else options.instruction
    output = Path(options.output)
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name the file to write")
    if options.input is not None:
        count = convert_file(options.input, output, instruction)
    else:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"{options.split}.jsonl"
            download(options.source.replace("{split}", options.split), copy)
            count = convert_file(str(copy), output, instruction)
    print(f"{output}: {count} prompts")


if __name__ == "__main__":
    sys.exit(run_cli(main))
