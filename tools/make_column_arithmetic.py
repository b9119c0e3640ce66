"""Write the column arithmetic task: its tokenizer, training data and held-out problems.

    python tools/make_column_arithmetic.py --out data/column_arithmetic --num-train 50000 --num-heldout 512 --seed 1

Files in ``--out``: ``tokenizer/`` (a Hugging Face folder), ``sft.jsonl`` (prompt, response, label), ``prompts.jsonl``
(prompt, label; the same problems), ``dev.jsonl`` (prompt, label; other problems of the training side) and
``heldout.jsonl`` (prompt, label; the tenth of all problems that no training set contains, whatever its seed).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_groups
from opd_megatron.data.column_arithmetic import MOST_PROBLEMS, Problem, build_tokenizer, sample_problems
from opd_megatron.data.rows import write_jsonl


@dataclass(frozen=True)
class TaskOptions:
    """Column arithmetic"""

    out: str = option("", "folder to write", metavar="DIR", required=True)
    num_train: int = option(20000, "training problems", minimum=1, maximum=MOST_PROBLEMS)
    num_dev: int = option(160, "development problems", minimum=0, maximum=MOST_PROBLEMS)
    num_heldout: int = option(512, "held-out problems", minimum=0, maximum=MOST_PROBLEMS)
    seed: int = option(1234, "seed of all draws", minimum=0)


def questions(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """Rows with the prompt and the answer alone."""
    return [{"prompt": problem.prompt(), "label": problem.answer()} for problem in problems]


def main(argv: Sequence[str]) -> None:
    parsed = parse_groups(
        argv, {"task": TaskOptions}, prog="make_column_arithmetic.py", description="Write the column arithmetic task."
    )
    options = parsed[TaskOptions]
    if options.num_train + options.num_dev > MOST_PROBLEMS:
        raise UserError(f"--num-train and --num-dev: together at most {MOST_PROBLEMS} problems")
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: not a folder")
    drawn = sample_problems(options.num_train + options.num_dev, options.seed, held_out=False)
    train, dev = drawn[: options.num_train], drawn[options.num_train :]
    build_tokenizer(out / "tokenizer")
    write_jsonl(
        out / "sft.jsonl",
        ({"prompt": item.prompt(), "response": item.response(), "label": item.answer()} for item in train),
    )
    write_jsonl(out / "prompts.jsonl", questions(train))
    write_jsonl(out / "dev.jsonl", questions(dev))
    write_jsonl(out / "heldout.jsonl", questions(sample_problems(options.num_heldout, options.seed, held_out=True)))
    print(f"{out}: {len(train)} training, {len(dev)} development and {options.num_heldout} held-out problems")


if __name__ == "__main__":
    sys.exit(run_cli(main))
