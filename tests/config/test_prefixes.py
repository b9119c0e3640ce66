"""Refusals of options that choose the prefixes of the distillation term."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.judging import accept, refuse

BASE = "--hf-checkpoint $hf --prompt-data $prompts --rollout-batch-size 4 --num-rollout 2 --run-dir $root/run "
OPD = BASE + "--use-opd --opd-type megatron --opd-teacher-load $teacher "
SERVED = BASE + "--use-opd --opd-type sglang --opd-teacher-url http://127.0.0.1:1 --rm-type zero "
ZERO = OPD + "--rm-type zero "
WHOLE = ZERO + "--opd-loss distribution "
GIVEN = "--opd-student-data-fraction 0.5 --opd-data-response-key label "
TAUGHT = "--opd-student-data-fraction 0.5 --opd-data-source teacher "

CASES: dict[str, tuple[str, str]] = {
    "the time of a response that nobody asks for": (
        SERVED + "--rollout-engine-timeout 60",
        "--rollout-engine-timeout goes with --rollout-engine sglang only",
    ),
    "no distillation": (
        BASE + "--rm-type exact --opd-prefix-len 8",
        "--opd-prefix-len has no effect without --use-opd",
    ),
    "a task": (OPD + "--rm-type exact --opd-prefix-len 8", "--opd-prefix-len leaves responses unfinished"),
    "longer than responses": (
        ZERO + "--opd-prefix-len 8 --rollout-max-response-len 8",
        "--opd-prefix-len 8 has no effect",
    ),
    "no field of responses": (
        WHOLE + "--opd-student-data-fraction 0.5",
        "--opd-student-data-fraction below 1 needs --opd-data-response-key",
    ),
    "responses that nobody asks for": (WHOLE + "--opd-data-response-key label", "has no effect: give"),
    "a source that nobody asks for": (WHOLE + "--opd-data-source teacher", "--opd-data-source has no effect: give"),
    "two sources": (WHOLE + TAUGHT + "--opd-data-response-key label", "--opd-data-response-key has no effect with"),
    "samples of the student's own": (
        BASE + "--use-opd --opd-type megatron --rm-type zero --opd-loss distribution --opd-teacher self "
        "--opd-self-context-key label " + TAUGHT,
        "--opd-data-source teacher does not go with --opd-teacher self",
    ),
    "samples of a mixture": (
        WHOLE + TAUGHT + "--opd-more-teachers $teacher --opd-teacher-mixture arithmetic",
        "--opd-data-source teacher does not go with --opd-teacher-mixture",
    ),
    "servers that wait for the rollout": (
        BASE
        + "--use-opd --opd-type sglang --opd-teacher-url http://127.0.0.1:9 --rm-type zero --opd-loss distribution "
        "--opd-support student_topk --opd-top-k 4 " + TAUGHT,
        "--opd-data-source teacher does not go with --opd-support student_topk",
    ),
    "turns": (
        WHOLE + TAUGHT + "--custom-generate-function-path tests.rollout.records:two_turns",
        "--opd-data-source teacher does not go with --custom-generate-function-path",
    ),
    "distributions that nobody compares": (
        ZERO + GIVEN + "--opd-data-loss distribution",
        "--opd-data-loss distribution needs --opd-loss distribution, not sampled",
    ),
    "a form that nobody asks for": (WHOLE + "--opd-data-loss supervised", "--opd-data-loss has no effect: give"),
    "critic": (
        OPD + GIVEN + "--opd-loss distribution --rm-type exact --advantage-estimator ppo",
        "does not go with --advantage-estimator ppo",
    ),
    "KL to a reference": (WHOLE + GIVEN + "--use-kl-loss", "does not go with --use-kl-loss"),
    "importance sampling": (WHOLE + GIVEN + "--use-tis", "does not go with --use-tis"),
    "weights by reward": (WHOLE + GIVEN + "--opd-reward-beta 1", "does not go with --opd-reward-beta"),
    "outcomes": (WHOLE + GIVEN + "--opd-on correct", "does not go with --opd-on correct"),
    "a filter by rewards": (
        OPD
        + "--opd-loss distribution --rm-type exact --n-samples-per-prompt 4 --dynamic-filter unequal_rewards "
        + GIVEN,
        "does not go with --dynamic-filter unequal_rewards",
    ),
    "SFT": (WHOLE + GIVEN + "--loss-type sft_loss", "--use-opd does not go with --loss-type sft_loss"),
    "recorded": (
        "--hf-checkpoint $hf --load-debug-rollout-data $root/r_{rollout_id}.jsonl --rollout-batch-size 4 "
        "--num-rollout 2 --run-dir $root/run --use-opd --opd-type megatron --opd-loss distribution --rm-type zero "
        + GIVEN,
        "--opd-student-data-fraction has no effect with --load-debug-rollout-data",
    ),
    "no token": (ZERO + "--opd-prefix-len 0", "--opd-prefix-len 0: must be at least 1"),
}

ACCEPTED = {
    "no task": ZERO + "--opd-prefix-len 8",
    "responses of the data": WHOLE + GIVEN,
    "responses of the teacher": WHOLE + TAUGHT,
    "tokens of the teacher": ZERO + TAUGHT,
    "the time of a response of a server": SERVED + TAUGHT + "--rollout-engine-timeout 60",
    "tokens beside an estimator": ZERO + GIVEN + "--opd-loss kl_loss",
    "tokens beside distributions": WHOLE + GIVEN + "--opd-data-loss supervised",
    "a reward to look at": OPD + "--opd-prefix-len 8 --rm-type exact --advantage-estimator none",
}


@pytest.mark.parametrize("case", CASES)
def test_refusal(folders: dict[str, Path], case: str) -> None:
    arguments, message = CASES[case]
    assert message in refuse(arguments, folders)


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(folders: dict[str, Path], case: str) -> None:
    accept(ACCEPTED[case], folders)
