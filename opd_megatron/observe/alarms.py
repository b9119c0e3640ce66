"""Warnings that a run gives by itself when its metrics show a known failure.

Each alarm is a function of the history of metrics that returns a message while the pattern shows at its end. Means over
windows stand against the noise of single steps. All limits are here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, variance
from typing import Any, TypeAlias

History: TypeAlias = Mapping[str, Sequence[float]]
"""The values of each metric of :data:`WATCHED`, oldest first; those of one tuple are of the same steps."""
Alarm: TypeAlias = Callable[[History], str | None]

OUTCOMES = (
    "opd/reverse_kl_correct",
    "opd/reverse_kl_correct_se",
    "opd/reverse_kl_incorrect",
    "opd/reverse_kl_incorrect_se",
)
PARTS = ("train/opd_advantage_abs_mean", "train/task_advantage_abs_mean")

WATCHED = (
    ("train/entropy",),
    ("opd/student_entropy", "opd/teacher_entropy"),
    ("opd/k3",),
    ("opd/implicit_reward",),
    ("opd/reverse_kl_exact",),
    ("reward/mean",),
    OUTCOMES,
    ("train/opd_grad_share",),
    PARTS,
    ("rollout/response_length_mean",),
    ("rollout/repetition",),
)
WINDOW = 10
"""Steps that a mean is taken over."""
FEW = 3
"""The same of what is measured at an interval."""
RISING_STEPS = 50
PATIENCE = 100
"""Steps in which a student should have come closer to its teacher."""


def entropy_collapse(history: History) -> str | None:
    """The student is nearly certain of everything, which its teacher is not, or to no avail.

    Its entropy is below a quarter of the teacher's at the same prefixes in each of the last 3 measurements; or it fell
    below a tenth of that of its first 10 steps while the reverse KL was not halved and the reward did not rise. A
    student that comes close to a certain teacher is certain itself, and healthy.
    """
    both = [history[name][-FEW:] for name in ("opd/student_entropy", "opd/teacher_entropy")]
    pairs = list(zip(*both, strict=True))
    if len(pairs) == FEW and all(teacher > 0.01 and student < 0.25 * teacher for student, teacher in pairs):
        student, teacher = pairs[-1]
        return f"entropy collapse: the student's entropy is {student:.2g} nats where its teacher's is {teacher:.2g}"
    before, now = _ends(history["train/entropy"])
    if not now < 0.1 * before or _halved(history["opd/k3"]) or _rose(history["reward/mean"]):
        return None
    return (
        f"entropy collapse: the student's entropy fell from {before:.2g} to {now:.2g} nats while neither the reward "
        "nor the reverse KL got better"
    )


def rising_kl(history: History) -> str | None:
    """The reverse KL grew through all of the last 50 measured steps: from ten to ten, and by a quarter in all."""
    if history["opd/implicit_reward"]:  # whose target is not the teacher
        return None
    values = history["opd/reverse_kl_exact"]
    if len(values) < RISING_STEPS:
        values = history["opd/k3"]
    if len(values) < RISING_STEPS:
        return None
    recent = values[-RISING_STEPS:]
    means = [fmean(recent[start : start + WINDOW]) for start in range(0, RISING_STEPS, WINDOW)]
    grew = all(later > earlier for earlier, later in itertools.pairwise(means))
    if not grew or means[-1] < 1.25 * means[0] or means[-1] - means[0] < 0.005:
        return None
    return f"the reverse KL has been rising for {RISING_STEPS} steps, from {means[0]:.3g} to {means[-1]:.3g} nats"


def no_closer(history: History) -> str | None:
    """After 100 steps the reverse KL is not below that of the first 10 by two standard errors.

    Silent where the student began close to its teacher (below 0.01 nats), where the target is not the teacher, and
    where the distillation term is 0 because its coefficient is.
    """
    values, sizes = history["opd/k3"], history[PARTS[0]]
    if len(values) < PATIENCE or history["opd/implicit_reward"] or (sizes and not any(sizes[-WINDOW:])):
        return None
    before, now = _ends(values)
    if before < 0.01 or _rose([-value for value in values]):
        return None
    return (
        f"the student does not come closer to the teacher: {before:.3g} nats in the first {WINDOW} steps, {now:.3g} in "
        "the last"
    )


def lost_reward(history: History) -> str | None:
    """Samples earn less than a quarter of what they earned in the first 10 steps, by more than chance."""
    values = history["reward/mean"]
    before, now = _ends(values)
    if not 0 <= now < 0.25 * before or not _rose([-value for value in values]):
        return None
    return f"the reward was lost: {before:.3g} on average in the first {WINDOW} steps, {now:.3g} in the last"


def teacher_against_task(history: History) -> str | None:
    """The teacher thinks less of correct samples than of incorrect ones, by more than four standard errors.

    Over the last 10 steps with samples of both kinds: ``opd/reverse_kl_correct`` is the larger one, by at least 0.01
    nats per token. Every step is a test: with two standard errors some would fail by chance in a long run.
    """
    correct, correct_se, incorrect, incorrect_se = (history[name][-WINDOW:] for name in OUTCOMES)
    if len(correct) < WINDOW:
        return None
    error = math.sqrt(sum(value**2 for value in (*correct_se, *incorrect_se))) / WINDOW
    if fmean(correct) - fmean(incorrect) <= max(4 * error, 0.01):
        return None
    return (
        "the teacher thinks less of correct samples than of incorrect ones: log p_student - log p_teacher is "
        f"{fmean(correct):.3g} and {fmean(incorrect):.3g} nats per token"
    )


def coefficient_without_effect(history: History) -> str | None:
    """The distillation term is there and makes less than 1 % of the gradient or, unmeasured, of the advantage."""
    shares = list(history["train/opd_grad_share"][-FEW:])
    if len(shares) < FEW:
        sizes = [history[name][-2 * WINDOW :] for name in PARTS]
        shares = [opd / (opd + task) if opd + task > 0 else 0.0 for opd, task in zip(*sizes, strict=True)]
        if len(shares) < 2 * WINDOW:
            return None
    share = fmean(shares)
    if not 0.0 < share < 0.01:
        return None
    return f"--opd-kl-coef has next to no effect: the distillation term is {share:.2%} of what the student learns from"


def length_drift(history: History) -> str | None:
    """Responses became more than twice, or less than half, as long as in the first 10 steps."""
    before, now = _ends(history["rollout/response_length_mean"])
    if math.isnan(now) or before / 2 <= now <= 2 * before:
        return None
    return f"the responses drift in length: {before:.4g} tokens in the first {WINDOW} steps, {now:.4g} in the last"


def repetitive(history: History) -> str | None:
    """Responses repeat themselves: a fifth of their 4-grams, and more than twice as many as in the first 10 steps."""
    before, now = _ends(history["rollout/repetition"])
    if math.isnan(now) or now < 0.2 or now < 2 * before + 0.05:
        return None
    return f"the responses repeat themselves: {now:.0%} of their 4-grams occurred before, {before:.0%} in the beginning"


ALARMS: tuple[Alarm, ...] = (
    entropy_collapse,
    rising_kl,
    no_closer,
    lost_reward,
    teacher_against_task,
    coefficient_without_effect,
    length_drift,
    repetitive,
)


class Alarms:
    """The alarms of one run, each of which is raised once.

    ``earlier`` are the lines of ``metrics.jsonl`` of a run that is resumed: what showed in them was said then.
    """

    def __init__(self, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        self._history: dict[str, list[float]] = {name: [] for names in WATCHED for name in names}
        self._raised: set[Alarm] = set()
        for line in earlier:
            self.see(line)

    def see(self, line: Mapping[str, Any]) -> list[str]:
        """Take in the metrics of a step; messages of the alarms that they raise for the first time."""
        for names in WATCHED:
            values = [math.nan if line.get(name) is None else float(line[name]) for name in names]
            if all(map(math.isfinite, values)):
                for name, value in zip(names, values, strict=True):
                    self._history[name].append(value)
        found = {alarm: alarm(self._history) for alarm in ALARMS if alarm not in self._raised}
        messages = {alarm: message for alarm, message in found.items() if message is not None}
        self._raised |= messages.keys()
        return list(messages.values())


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last 10 values; NaN before there are 30."""
    if len(values) < 3 * WINDOW:
        return math.nan, math.nan
    return fmean(values[:WINDOW]), fmean(values[-WINDOW:])


def _halved(values: Sequence[float]) -> bool:
    before, now = _ends(values)
    return now < 0.5 * before


def _rose(values: Sequence[float]) -> bool:
    """Whether the last values lie above the first by more than two standard errors of the difference."""
    before, now = _ends(values)
    if math.isnan(now):
        return False
    return now - before > 2 * math.sqrt((variance(values[:WINDOW]) + variance(values[-WINDOW:])) / WINDOW)
