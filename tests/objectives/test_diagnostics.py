"""Diagnostics of tokens against plain float64 arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opd_megatron.objectives import diagnostics
from opd_megatron.objectives.diagnostics import (
    clustered_mean,
    distillation_statistics,
    outcome_statistics,
    position_quarters,
    rank_quarters,
    repetition,
    scored_tokens,
    teacher_statistics,
)

LENGTHS = (7, 0, 12, 1, 9)


def make(seed: int = 0, *, with_teacher: bool = True) -> dict[str, list]:
    """Per-token numbers of a rollout; masked and unscored tokens hold NaN."""
    random = np.random.default_rng(seed)
    masks = [random.random(length) > 0.2 for length in LENGTHS]
    valid = [random.random(length) > 0.2 for length in LENGTHS]
    names = diagnostics.OF_STUDENT + (diagnostics.OF_TEACHER if with_teacher else ())
    measured = [{name: random.exponential(1.0, length) for name in names} for length in LENGTHS]
    teacher = [-random.exponential(1.0, length) for length in LENGTHS]
    for mask, scored, sample, log_probs in zip(masks, valid, measured, teacher, strict=True):
        sample["student_log_prob"] *= -1
        for values in (*sample.values(), log_probs):
            values[~(mask & scored)] = np.nan
    return {"measured": measured, "teacher_log_probs": teacher, "loss_masks": masks, "teacher_valid": valid}


def rows(data: dict[str, list]) -> list[dict[str, float]]:
    """The scored tokens, one by one."""
    found = []
    for sample, (mask, valid) in enumerate(zip(data["loss_masks"], data["teacher_valid"], strict=True)):
        for t in np.flatnonzero(mask & valid):
            row = {name: values[t] for name, values in data["measured"][sample].items()}
            row["k1"] = row["student_log_prob"] - data["teacher_log_probs"][sample][t]
            found.append(row | {"sample": sample, "quarter": math.floor(4 * t / len(mask))})
    return found


@pytest.mark.parametrize("with_teacher", [True, False])
def test_means_and_parts(with_teacher: bool) -> None:
    data = make(with_teacher=with_teacher)
    found = distillation_statistics(scored_tokens(**data))
    tokens = rows(data)
    names = (*diagnostics.OF_STUDENT[1:], *(diagnostics.OF_TEACHER if with_teacher else ()))
    for name in names:
        assert found[diagnostics.MEANS[name]] == pytest.approx(np.mean([row[name] for row in tokens]))
    distance = "reverse_kl" if with_teacher else "k1"
    ordered = sorted(tokens, key=lambda row: row["student_entropy"])
    quarters = [ordered[math.ceil(len(ordered) * q / 4) : math.ceil(len(ordered) * (q + 1) / 4)] for q in range(4)]
    for quarter in range(4):
        by_position = [row[distance] for row in tokens if row["quarter"] == quarter]
        assert found[f"opd/kl_by_position_q{quarter + 1}"] == pytest.approx(np.mean(by_position))
        by_entropy = [row[distance] for row in quarters[quarter]]
        assert found[f"opd/kl_by_entropy_q{quarter + 1}"] == pytest.approx(np.mean(by_entropy))
    weights = np.exp([-row["k1"] for row in tokens])
    assert found["opd/effective_sample_frac"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / len(weights))
    assert len(found) == len(names) + 9


def test_right_and_wrong_samples() -> None:
    data = make()
    passed = [True, True, False, False, True]
    found = outcome_statistics(scored_tokens(**data), passed)
    for outcome, name in ((True, "correct"), (False, "incorrect")):
        chosen = [row for row in rows(data) if passed[row["sample"]] is outcome]
        mean = np.mean([row["k1"] for row in chosen])
        assert found[f"opd/reverse_kl_{name}"] == pytest.approx(mean)
        samples = sorted({row["sample"] for row in chosen})
        residuals = [sum(row["k1"] - mean for row in chosen if row["sample"] == sample) for sample in samples]
        if len(samples) > 1:
            error = math.sqrt(len(samples) / (len(samples) - 1) * np.square(residuals).sum()) / len(chosen)
            assert found[f"opd/reverse_kl_{name}_se"] == pytest.approx(error)
    none = outcome_statistics(scored_tokens(**data), [False] * len(passed))
    assert math.isnan(none["opd/reverse_kl_correct"])


def test_teachers_are_told_apart_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data, names = make(), ["mathematics", "code", "code", "law", "mathematics"]
    tokens = scored_tokens(**data)
    assert teacher_statistics(tokens, ["one"] * 5) == {}
    found = teacher_statistics(tokens, names)
    for name in ("mathematics", "code"):
        of = [row["k1"] for row in rows(data) if names[row["sample"]] == name]
        assert found[f"opd/teacher/{name}/reverse_kl"] == pytest.approx(np.mean(of))
    monkeypatch.setattr(diagnostics, "MOST_TEACHERS", 2)
    crowded = scored_tokens(**make(3))
    found = teacher_statistics(crowded, ["a", "b", "c", "d", "e"])
    assert {name.split("/")[2] for name in found} == {"c", "other"}
    assert sum(value for name, value in found.items() if name.endswith("tokens_frac")) == pytest.approx(1.0)


def test_quarters() -> None:
    assert position_quarters(8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert position_quarters(2).tolist() == [0, 2]
    assert position_quarters(0).tolist() == []
    values = torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0, 0.0, 7.0, 2.0])
    assert rank_quarters(values).tolist() == [2, 0, 1, 2, 3, 0, 3, 1]


def test_repetition() -> None:
    def of(*responses: list[int]) -> float:
        return repetition([np.array(response, dtype=np.int32) for response in responses])

    assert of([1, 2, 3, 4, 5, 6]) == 0.0
    assert of([7] * 13) == pytest.approx(0.9)
    assert of([7] * 13, [1, 2, 3, 4, 5, 6], [1, 2], []) == pytest.approx(0.45)
    assert math.isnan(of([1, 2, 3]))


@pytest.mark.parametrize("radix", [2, 2**16, 2**31])
def test_repetition_counts_grams_however_large_the_vocabulary(radix: int) -> None:
    random = np.random.default_rng(radix)
    words = np.array([*random.integers(0, radix, size=4), radix - 1])
    responses = [random.choice(words, size=length) for length in (5, 40, 200)]
    for size in (1, 2, 4, 6):
        shares = []
        for response in responses:
            grams = [tuple(response[start : start + size]) for start in range(len(response) - size + 1)]
            if len(grams) > 1:
                shares.append(1.0 - len(set(grams)) / len(grams))
        assert repetition(responses, size) == sum(shares) / len(shares)


def test_the_error_of_one_sample_is_unknown() -> None:
    mean, error = clustered_mean(torch.tensor([1.0, 2.0]).double(), torch.tensor([4, 4]))
    assert mean == 1.5
    assert math.isnan(error)
    assert all(math.isnan(value) for value in clustered_mean(torch.zeros(0), torch.zeros(0)))


def test_no_scored_token_at_all() -> None:
    data = make() | {"loss_masks": [np.zeros(length, dtype=bool) for length in LENGTHS]}
    tokens = scored_tokens(**data)
    assert all(math.isnan(value) for value in distillation_statistics(tokens).values())
    assert teacher_statistics(tokens, ["a", "b", "a", "b", "a"]) == {}
