"""Each alarm is raised once by its pattern, by none of a healthy run, and not again after a resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from opd_megatron.observe.alarms import Alarms

STEPS = 80
Line = dict[str, Any]


def healthy(step: int, random: np.random.Generator) -> Line:
    """Distillation into a nearly certain teacher with a task reward: entropy and KL fall together, rewards rise."""
    way = step / STEPS
    kl = 0.4 * 0.03**way + 0.002 * random.normal()
    line = {
        "train/entropy": 0.6 * 0.04**way,
        "opd/k3": kl,
        "opd/reverse_kl_exact": kl,
        "reward/mean": 0.2 + 0.7 * way + 0.03 * random.normal(),
        "rollout/response_length_mean": 40 + 6 * way + random.normal(),
        "train/opd_advantage_abs_mean": 0.5 * (1 - 0.8 * way),
        "train/task_advantage_abs_mean": 0.7,
        "rollout/repetition": 0.15 + 0.01 * random.normal(),
    }
    if step % 7:  # in the others all samples are correct, or none
        line |= {
            "opd/reverse_kl_correct": 0.3 + 0.02 * random.normal(),
            "opd/reverse_kl_correct_se": 0.02,
            "opd/reverse_kl_incorrect": 0.3 + 0.02 * random.normal(),
            "opd/reverse_kl_incorrect_se": 0.02,
        }
    if step % 5 == 0:
        line |= {
            "opd/student_entropy": 0.6 * 0.04**way,
            "opd/teacher_entropy": 0.3 * 0.04**way,
            "train/opd_grad_share": 0.4,
        }
    return line


def collapsed(step: int) -> Line:
    return {"train/entropy": 0.6 * 0.9**step, "opd/k3": 0.4, "reward/mean": 0.2}


def narrower_than_the_teacher(step: int) -> Line:
    return {"opd/student_entropy": 0.02, "opd/teacher_entropy": 0.3} if step > 20 and step % 5 == 0 else {}


def rising(step: int) -> Line:
    kl = 0.1 + max(0, step - 20) * 0.003
    return {"opd/reverse_kl_exact": kl, "opd/k3": kl}


def rising_k3(step: int) -> Line:
    return {"opd/reverse_kl_exact": None, "opd/k3": 0.1 + max(0, step - 20) * 0.003}


def unlearned(step: int) -> Line:
    return {"reward/mean": 0.3 * 0.9**step}


def against_task(step: int) -> Line:
    return {"opd/reverse_kl_correct": 0.36}


def ineffective(step: int) -> Line:
    return {"train/opd_grad_share": 0.002} if step % 5 == 0 else {}


def ineffective_advantage(step: int) -> Line:
    return {"train/opd_grad_share": None, "train/opd_advantage_abs_mean": 0.001}


def longer(step: int) -> Line:
    return {"rollout/response_length_mean": 40 + 2 * step}


def shorter(step: int) -> Line:
    return {"rollout/response_length_mean": 40 * 0.97**step}


def looping(step: int) -> Line:
    return {"rollout/repetition": 0.1 + 0.01 * step}


PATTERNS: dict[str, tuple[Callable[[int], Line], str]] = {
    "collapse": (collapsed, "entropy collapse: the student's entropy fell from"),
    "below the teacher's": (narrower_than_the_teacher, "entropy collapse: the student's entropy is 0.02 nats"),
    "rising": (rising, "the reverse KL has been rising for 50 steps"),
    "rising estimate": (rising_k3, "the reverse KL has been rising for 50 steps"),
    "unlearned": (unlearned, "the reward was lost: "),
    "against the task": (against_task, "the teacher thinks less of correct samples than of incorrect ones"),
    "gradient share": (ineffective, "--opd-kl-coef has next to no effect: the distillation term is 0.20%"),
    "advantage share": (ineffective_advantage, "--opd-kl-coef has next to no effect: the distillation term is 0.14%"),
    "longer": (longer, "the responses drift in length"),
    "shorter": (shorter, "the responses drift in length"),
    "loops": (looping, "the responses repeat themselves"),
}


def run(change: Callable[[int], Line] | None, seed: int = 0) -> list[Line]:
    random = np.random.default_rng(seed)
    return [healthy(step, random) | (change(step) if change else {}) for step in range(STEPS)]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_quiet(seed: int) -> None:
    alarms = Alarms()
    assert [message for line in run(None, seed) for message in alarms.see(line)] == []


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_named_once(name: str) -> None:
    change, expected = PATTERNS[name]
    alarms = Alarms()
    (message,) = [message for line in run(change) for message in alarms.see(line)]
    assert message.startswith(expected)


def test_a_resumed_run_does_not_repeat_itself() -> None:
    lines = run(rising)
    at = [step for step in range(STEPS) if Alarms(lines[:step]).see(lines[step])]
    assert len(at) == 1
    resumed = Alarms(lines[: at[0] + 1])
    assert [message for line in lines[at[0] + 1 :] for message in resumed.see(line)] == []
    early = Alarms(lines[: at[0] - 5])
    assert len([message for line in lines[at[0] - 5 :] for message in early.see(line)]) == 1


def distilled(first: float, last: float, seed: int = 0, steps: int = 130, more: Line | None = None) -> list[str]:
    """What is said of a run whose reverse KL goes from ``first`` to ``last`` nats."""
    random = np.random.default_rng(seed)
    kls = first + (last - first) * np.minimum(np.arange(steps) / 60, 1.0) + 0.05 * first * random.normal(size=steps)
    line = {"train/opd_advantage_abs_mean": 0.5, "train/task_advantage_abs_mean": 0.0, **(more or {})}
    alarms = Alarms()
    return [message for kl in kls for message in alarms.see({**line, "opd/k3": kl})]


@pytest.mark.parametrize("last", [0.4, 0.6])
def test_a_student_that_comes_no_closer_is_told_once(last: float) -> None:
    (message,) = [text for text in distilled(0.4, last) if "closer" in text]
    assert message.startswith("the student does not come closer to the teacher: 0.4")
    assert distilled(0.4, 0.4, steps=99) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_student_that_comes_closer_or_was_close_is_not(seed: int) -> None:
    assert distilled(0.4, 0.3, seed) == []
    assert distilled(0.005, 0.005, seed) == []
    assert distilled(0.4, 0.4, seed, more={"train/opd_advantage_abs_mean": 0.0}) == []
    assert distilled(0.4, 0.4, seed, more={"opd/implicit_reward": 0.1}) == []


def test_a_coefficient_of_zero_is_meant() -> None:
    alarms = Alarms()
    lines = [line | {"train/opd_advantage_abs_mean": 0.0, "train/opd_grad_share": None} for line in run(None)]
    assert [message for line in lines for message in alarms.see(line)] == []
