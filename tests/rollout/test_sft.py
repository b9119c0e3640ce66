"""Samples whose response is the label."""

from __future__ import annotations

from typing import Any

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.rollout.sft import sft_samples
from opd_megatron.sample import Status
from tests.rollout.models import CHARACTERS
from tests.rollout.records import Record


def test_the_response_is_the_label_and_the_end_token(tokenizer: Any) -> None:
    records = [Record("1+1=", label="2", metadata={"a": 1}), Record("2-2=", label="")]
    first, second = sft_samples(records, tokenizer)
    assert first.response_tokens.tolist() == [3 + CHARACTERS.index("2"), 1]
    assert second.response_tokens.tolist() == [1]
    assert first.loss_mask.tolist() == [True, True]
    assert (first.response, first.metadata, first.status) == ("2", {"a": 1}, Status.COMPLETED)
    assert first.prompt_tokens.tolist() == records[0].prompt_tokens.tolist()
    assert first.rollout_log_probs is None
    assert [(sample.index, sample.group_index) for sample in (first, second)] == [(0, 0), (1, 1)]


@pytest.mark.parametrize(("label", "message"), [(None, "no label"), (7, "a label that is a int"), (["x"], "a list")])
def test_a_row_without_a_text_is_named(tokenizer: Any, label: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"row 12 .*{message}.*--label-key"):
        sft_samples([Record("1", label="1"), Record("2", label=label, index=12)], tokenizer)
