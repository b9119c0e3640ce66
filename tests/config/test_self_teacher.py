"""Refusals of a student that is its own teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.judging import accept, refuse

BASE = (
    "--hf-checkpoint $hf --prompt-data $prompts --rollout-batch-size 4 --num-rollout 2 --run-dir $root/run "
    "--rm-type zero --use-opd --opd-type megatron "
)
OWN = BASE + "--opd-teacher self --opd-self-context-key label "

TOLD = (
    BASE.replace("--rm-type zero", "--custom-rm-path tests.e2e.rewards:tell_the_answer")
    + "--opd-teacher self --opd-self-feedback "
)

CASES: dict[str, tuple[str, str]] = {
    "another's context": (
        BASE + "--opd-teacher-load $teacher --opd-self-context-key label",
        "--opd-self-context-key goes with --opd-teacher self only",
    ),
    "weights of another": (
        OWN + "--opd-teacher-load $teacher",
        "--opd-teacher-load does not go with --opd-teacher self",
    ),
    "the prompt of another": (
        OWN + "--opd-loss distribution --opd-include-prompt",
        "--opd-include-prompt does not go with --opd-teacher self",
    ),
    "a layout of another": (
        OWN + "--opd-teacher-tensor-model-parallel-size 2",
        "--opd-teacher-tensor-model-parallel-size does not go with --opd-teacher self",
    ),
    "nothing privileged": (BASE + "--opd-teacher self", "--opd-teacher self would see what the student sees"),
    "a template without a field": (
        BASE + "--opd-teacher self --opd-self-template={context}-{prompt}",
        "--opd-self-template holds {context}: name its field",
    ),
    "a field without a place": (
        OWN + "--opd-self-template=!{prompt}",
        "--opd-self-context-key has no effect: put {context} into --opd-self-template",
    ),
    "a template without a prompt": (OWN + "--opd-self-template={context}", "must hold {prompt}"),
    "drop": (OWN + "--opd-overlong drop", "--opd-overlong drop replaces samples during the rollout"),
    "a budget for nothing": (OWN + "--opd-max-failed-frac 0.5", "--opd-max-failed-frac has no effect with"),
    "no weights to keep": (OWN + "--hf-checkpoint $config_only", "--opd-self-weights frozen needs weights to keep"),
    "nothing to move": (
        OWN + "--opd-self-weights current --offload-teacher",
        "--offload-teacher has no effect with --opd-self-weights current",
    ),
    "a decay of nothing": (
        OWN + "--opd-self-ema-decay 0.9",
        "--opd-self-ema-decay goes with --opd-self-weights ema only",
    ),
    "feedback of nobody": (OWN + "--opd-self-feedback", "--opd-self-feedback needs a function that gives"),
    "feedback nowhere": (
        TOLD + "--opd-self-template !{prompt}",
        "--opd-self-feedback needs --opd-self-context-key",
    ),
    "feedback for another": (
        BASE + "--opd-teacher-load $teacher --opd-self-feedback",
        "--opd-self-feedback goes with --opd-teacher self only",
    ),
    "feedback on what is unfinished": (
        TOLD + "--opd-self-context-key said --opd-prefix-len 4",
        "--opd-prefix-len leaves responses unfinished, of which no feedback can speak",
    ),
    "feedback on the data's": (
        TOLD + "--opd-self-context-key said --opd-loss distribution --opd-student-data-fraction 0.5 "
        "--opd-data-response-key label",
        "--opd-student-data-fraction below 1 does not go with --opd-self-feedback",
    ),
    "a server's options": (OWN + "--opd-teacher-timeout 3", "--opd-teacher-timeout goes with --opd-type sglang only"),
}

SERVED = OWN.replace("--opd-type megatron", "--opd-type sglang")
CASES |= {
    "a server of nothing": (SERVED, "--opd-type sglang needs --opd-teacher-url"),
    "an average behind a server": (
        SERVED + "--opd-teacher-url http://127.0.0.1:1 --opd-self-weights ema",
        "--opd-self-weights ema needs --opd-type megatron",
    ),
    "current weights of nobody": (
        SERVED + "--opd-self-weights current",
        "--opd-self-weights current with --opd-type sglang needs --rollout-engine sglang",
    ),
    "two servers of the current weights": (
        SERVED + "--opd-self-weights current --rollout-engine sglang --opd-teacher-url http://127.0.0.1:1",
        "--opd-teacher-url has no effect with --opd-self-weights current",
    ),
}

ACCEPTED: dict[str, str] = {
    "frozen": OWN,
    "current": OWN + "--opd-self-weights current",
    "average": OWN + "--opd-self-weights ema --opd-self-ema-decay 0.9 --offload-teacher",
    "another template": BASE + "--opd-teacher self --opd-self-template {prompt}!",
    "frozen behind a server": SERVED + "--opd-teacher-url http://127.0.0.1:1 --opd-overlong drop",
    "the engine": SERVED + "--opd-self-weights current --rollout-engine sglang",
    "feedback": TOLD + "--opd-self-context-key said",
    "feedback behind a server": TOLD.replace("--opd-type megatron", "--opd-type sglang")
    + "--opd-self-context-key said --opd-teacher-url http://127.0.0.1:1",
    "masked": OWN + "--opd-overlong mask --opd-max-failed-frac 0.5",
}


@pytest.mark.parametrize("case", CASES)
def test_refusal(folders: dict[str, Path], case: str) -> None:
    arguments, message = CASES[case]
    assert message in refuse(arguments, folders)


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(folders: dict[str, Path], case: str) -> None:
    accept(ACCEPTED[case], folders)
