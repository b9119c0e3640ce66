"""Responses in place of some of the student's: whose those are, and those of the prompt rows (arXiv 2306.13649)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.rollout.prompt import Prompt
from opd_megatron.rollout.sft import give_response
from opd_megatron.sample import Sample, Status

_CHOICE_STREAM = 0x67697665
"""Keeps the choice of prompts apart from whatever else draws from the run's seed."""


class GivenResponses:
    """Decides which prompts the student does not answer (``--opd-student-data-fraction``).

    ``by_teacher`` says that the teacher does; else responses stand in the rows and :meth:`fill` puts them into samples.
    """

    def __init__(self, options: Options, tokenizer: Any) -> None:
        opd = options.opd
        self._fraction = opd.opd_student_data_fraction if opd.use_opd else 1.0
        self.by_teacher = opd.opd_data_source == "teacher"
        self._key = opd.opd_data_response_key or ""
        self._seed = options.training.seed
        self._tokenizer = tokenizer
        self._longest = options.rollout.rollout_max_response_len
        self._longest_prompt = options.rollout.rollout_max_prompt_len

    def chosen(self, record: Prompt, rollout_id: int) -> bool:
        """Whether this prompt's response is not the student's: a function of seed, rollout and prompt alone.

        A prompt that is too long for ``--rollout-max-prompt-len`` has no response at all.
        """
        if self._fraction == 1.0 or len(record.prompt_tokens) > (self._longest_prompt or math.inf):
            return False
        drawn = np.random.default_rng([_CHOICE_STREAM, self._seed, rollout_id, record.index]).random()
        return bool(drawn >= self._fraction)

    def fill(self, sample: Sample, record: Prompt) -> None:
        """Give the sample its row's response and the end token."""
        give_response(sample, record.extras[self._key], self._tokenizer)
        sample.from_data = True

    def check(self, records: Sequence[Prompt], positions: int) -> None:
        """Raise :class:`UserError` naming the first row without a response, or with one that is too long.

        Rows that the teacher answers need none. A response has at most ``--rollout-max-response-len`` tokens, the end
        token included, and fits the model's ``positions`` behind its prompt.
        """
        if self._fraction == 1.0 or self.by_teacher:
            return
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                "--opd-data-response-key: the tokenizer names no end token (eos_token in tokenizer_config.json)"
            )
        for record in records:
            text, where = record.extras.get(self._key), f"row {record.index} of --prompt-data (counted from 0)"
            if not isinstance(text, str) or not text:
                what = "nothing" if text is None or text == "" else f"a {type(text).__name__}"
                raise UserError(
                    f"{where} has {what} in the field {self._key!r} of --opd-data-response-key: every row needs the "
                    "text of a response; complete or remove the row"
                )
            length = len(self._tokenizer.encode(text, add_special_tokens=False)) + 1
            if length > self._longest:
                raise UserError(
                    f"{where} has a response of {length} tokens in {self._key!r}, the end token included, more than "
                    f"--rollout-max-response-len {self._longest}: raise it, or shorten or remove the row"
                )
            if len(record.prompt_tokens) + length > positions:
                raise UserError(
                    f"{where} has {len(record.prompt_tokens) + length} tokens with its response in {self._key!r}, the "
                    f"model {positions} positions: shorten or remove the row"
                )


def origin_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """``opd/student_data_frac``, and of the responses that the student did not make length and truncation."""
    given = [sample for sample in samples if sample.from_data]
    found = {"opd/student_data_frac": 1.0 - len(given) / len(samples)}
    if not given:
        return found
    return found | {
        "opd/given_length_mean": float(np.mean([sample.response_length for sample in given])),
        "opd/given_truncated_frac": sum(sample.status is Status.TRUNCATED for sample in given) / len(given),
    }
