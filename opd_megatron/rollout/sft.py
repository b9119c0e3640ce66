"""Samples of which the label is the response, for the SFT loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.rollout.prompt import Prompt, new_sample
from opd_megatron.sample import Sample


def sft_samples(records: Sequence[Prompt], tokenizer: Any) -> list[Sample]:
    """One sample per record: the response is the label's tokens and the end token, all of them trained on.

    Raises :class:`UserError` if a label is missing or not a string (naming its row), or if the tokenizer names no
    end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("--loss-type sft_loss: the tokenizer names no end token (eos_token in tokenizer_config.json)")
    samples = []
    for position, record in enumerate(records):
        if not isinstance(record.label, str):
            found = "no label" if record.label is None else f"a label that is a {type(record.label).__name__}"
            raise UserError(
                f"row {record.index} of the prompt data (counted from 0) has {found}: --loss-type sft_loss needs a "
                "string to learn from (see --label-key)"
            )
        sample = new_sample(record, position, position)
        give_response(sample, record.label, tokenizer)
        samples.append(sample)
    return samples


def give_response(sample: Sample, text: str, tokenizer: Any) -> None:
    """Make ``text`` the response: its tokens and the end token, all of them trained on."""
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    sample.response = text
    sample.response_tokens = np.array(tokens, dtype=np.int64)
    sample.loss_mask = np.ones(len(tokens), dtype=np.bool_)


def check_sft_lengths(records: Sequence[Prompt], tokenizer: Any, positions: int) -> None:
    """Raise :class:`UserError` naming the first row that is longer than the model's ``positions``.

    A row is its prompt, its label and the end token. Labels that are no text are left to :func:`sft_samples`.
    """
    labelled = [record for record in records if isinstance(record.label, str)]
    labels = tokenizer([record.label for record in labelled], add_special_tokens=False)["input_ids"] if labelled else []
    lengths = [len(record.prompt_tokens) + len(ids) + 1 for record, ids in zip(labelled, labels, strict=True)]
    longer = [place for place, length in enumerate(lengths) if length > positions]
    if longer:
        raise UserError(
            f"row {labelled[longer[0]].index} of --prompt-data (counted from 0) has {lengths[longer[0]]} tokens with "
            f"its label, the model {positions} positions ({len(longer)} such rows): shorten or remove them"
        )
