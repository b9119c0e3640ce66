"""Refusals of options that choose the prefixes of the distillation term."""

from __future__ import annotations

from pathlib import Path
from string import Template

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_options
from opd_megatron.config.validate import validate

BASE = "--hf-checkpoint $hf --prompt-data $prompts --rollout-batch-size 4 --num-rollout 2 --run-dir $root/run "
OPD = BASE + "--use-opd --opd-type megatron --opd-teacher-load $teacher "
ZERO = OPD + "--rm-type zero "

CASES: dict[str, tuple[str, str]] = {
    "no distillation": (
        BASE + "--rm-type exact --opd-prefix-len 8",
        "--opd-prefix-len has no effect without --use-opd",
    ),
    "a task": (OPD + "--rm-type exact --opd-prefix-len 8", "--opd-prefix-len leaves responses unfinished"),
    "longer than responses": (
        ZERO + "--opd-prefix-len 8 --rollout-max-response-len 8",
        "--opd-prefix-len 8 has no effect",
    ),
    "no token": (ZERO + "--opd-prefix-len 0", "--opd-prefix-len 0: must be at least 1"),
}

ACCEPTED = {
    "no task": ZERO + "--opd-prefix-len 8",
    "a reward to look at": OPD + "--opd-prefix-len 8 --rm-type exact --advantage-estimator none",
}


@pytest.mark.parametrize("case", CASES)
def test_refusal(folders: dict[str, Path], case: str) -> None:
    arguments, message = CASES[case]
    with pytest.raises(UserError) as refused:
        validate(parse_options(Template(arguments).substitute(folders).split()))
    assert message in str(refused.value)


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(folders: dict[str, Path], case: str) -> None:
    validate(parse_options(Template(ACCEPTED[case]).substitute(folders).split()))
