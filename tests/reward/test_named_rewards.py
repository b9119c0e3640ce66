"""The rewards that have a name."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import RewardOptions
from opd_megatron.reward import RewardError, build_reward
from opd_megatron.reward.text import extract_number
from opd_megatron.sample import Sample, Status


def sample(response: str, label: Any, index: int = 0, **changes: Any) -> Sample:
    return Sample(index, 0, "What is it?", np.arange(3), label=label, response=response, **changes)


def rewards(name: str, *pairs: tuple[str, Any]) -> list[float | None]:
    samples = [sample(response, label, index) for index, (response, label) in enumerate(pairs)]
    reward = build_reward(RewardOptions(rm_type=name))
    reward.score(samples)
    reward.close()
    assert all(item.reward_error is None for item in samples)
    return [item.reward for item in samples]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 and 7 make 12.", "12"),
        ("#### 18", "18"),
        ("first #### 3 then\n#### 18 (not 20)", "18"),
        ("it costs $1,234.50 in all", "1234.5"),
        ("a loss of -$1,000", "-1000"),
        ("\N{MINUS SIGN}4", "-4"),
        ("16-3", "3"),
        ("(2)-3", "3"),
        ("x = -3", "-3"),
        ("about .5", "0.5"),
        ("1,2,3", "3"),
        ("10,000,000 people", "10000000"),
        ("12,34", "34"),
        ("**42**", "42"),
        ("\\boxed{72}", "72"),
        ("18.00", "18"),
    ],
)
def test_the_number_of_a_text(text: str, number: str) -> None:
    assert extract_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "7 #### none", "٤"])
def test_a_text_without_a_number(text: str) -> None:
    assert extract_number(text) is None


def test_gsm8k_compares_numbers() -> None:
    assert rewards(
        "gsm8k",
        ("He has 18.00 dollars.", "18"),
        ("#### 1,800", "1800"),
        ("the answer is 19", "18"),
        ("18 #### 19", "18"),
        ("", "18"),
        ("no idea", "18"),
        ("18", 18),
        ("2.5", 2.5),
        ("it is 18", "9 * 2 = 18\n#### 18"),
    ) == [1, 1, 0, 0, 0, 0, 1, 1, 1]


def test_exact_compares_text() -> None:
    assert rewards("exact", (" Paris\n", "Paris"), ("paris", "Paris"), ("", ""), ("7", 7)) == [1, 0, 1, 1]


def test_zero_needs_no_label() -> None:
    assert rewards("zero", ("anything", None), ("", "7")) == [0, 0]


def test_column_arithmetic_asks_the_task() -> None:
    right = "7+6+0=13,2+3+1=06,8+9+0=17,4+1+1=06;6763"
    assert rewards("column_arithmetic", (right, "6763"), (right, "6764"), ("6763", "6763")) == [1, 0, 0]
    cut = sample(right, "6763", status=Status.TRUNCATED)
    build_reward(RewardOptions(rm_type="column_arithmetic")).score([cut])
    assert cut.reward == 0.0


@pytest.mark.parametrize("name", ["math", "gsm8k", "exact"])
def test_a_missing_label_is_the_users_business_under_any_policy(name: str) -> None:
    reward = build_reward(RewardOptions(rm_type=name, rm_on_error="value"))
    with pytest.raises(UserError, match=rf"sample 7 \(prompt 'What is it\?'\) has no label.*{name}.*--label-key"):
        reward.score([sample("1", None, 7)])
    reward.close()


def test_a_label_that_cannot_be_compared_names_the_sample_or_is_counted() -> None:
    bad = sample("18", "eighteen", 3)
    with pytest.raises(RewardError, match=r"sample 3 \(prompt 'What is it\?'\).*'eighteen' holds no number"):
        build_reward(RewardOptions(rm_type="gsm8k")).score([bad])
    good = sample("18", "18", 4)
    build_reward(RewardOptions(rm_type="gsm8k", rm_on_error="value", rm_error_value=-0.5)).score([bad, good])
    assert bad.reward == -0.5
    assert "holds no number" in str(bad.reward_error)
    assert (good.reward, good.reward_error) == (1.0, None)
    bad.label = "18"
    build_reward(RewardOptions(rm_type="gsm8k")).score([bad])
    assert (bad.reward, bad.reward_error) == (1.0, None), "a later success clears the error"


def test_the_options_must_name_one_reward() -> None:
    for options, phrase in (
        (RewardOptions(), "give --rm-type"),
        (RewardOptions(rm_type="zero", custom_rm_path="a:b"), "give one"),
        (RewardOptions(rm_type="mats"), "mats is not known"),
    ):
        with pytest.raises(UserError, match=phrase):
            build_reward(options)
