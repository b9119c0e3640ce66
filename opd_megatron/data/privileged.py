"""What a student that is its own teacher sees before a response: its prompt, and a text that it is not shown."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import hears_feedback, is_self_taught
from opd_megatron.data.prompts import PromptRecord, encode_prompts, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def extra_keys(options: Options) -> tuple[str, ...]:
    """Fields of the prompt rows that the options name beside prompt, label and metadata."""
    opd = options.opd
    named = {
        opd.opd_self_context_key: is_self_taught(options) and not hears_feedback(options),
        opd.opd_data_response_key: opd.use_opd and opd.opd_student_data_fraction < 1.0,
    }
    return tuple(key for key, used in named.items() if key is not None and used)


class PrivilegedPrompts:
    """Makes the prompts of ``--opd-teacher self`` of a prompt and its context.

    ``--opd-self-template`` is filled with both, which may hold braces themselves, and the result takes the prompt's way
    to ids: as it stands, or, with the chat template, as the content of the last message of the user. The response
    follows it as it follows the student's prompt, id for id.
    """

    def __init__(self, options: Options, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = options.opd.opd_self_template
        self._chat = options.data.apply_chat_template
        self._chat_settings = json.loads(options.data.apply_chat_template_kwargs)
        self._tokenizer = tokenizer

    def text(self, prompt: Any, context: str, where: str) -> str:
        """What the teacher sees before the response; ``where`` names prompt and context in errors.

        Raises :class:`UserError` for a prompt that has no text of a user to put the context into.
        """
        filled = self._privileged(prompt, context, where)
        return render_chat(where, filled, self._tokenizer, self._chat_settings) if self._chat else str(filled)

    def ids(self, texts: Sequence[str], places: Sequence[str]) -> list[np.ndarray]:
        """Ids int64 ``[P]`` of each text, read-only; raises :class:`UserError` with the place of one without ids."""
        found = []
        encoded = encode_prompts(self._tokenizer, texts, add_special_tokens=not self._chat)
        for where, ids in zip(places, encoded, strict=True):
            if not ids:
                raise UserError(f"{where}: the tokenizer makes no token of the teacher's prompt")
            tokens = np.asarray(ids, dtype=np.int64)
            tokens.setflags(write=False)
            found.append(tokens)
        return found

    def _privileged(self, prompt: Any, context: str, where: str) -> Any:
        """The prompt, a string or messages, with the context where the template wants it."""
        if isinstance(prompt, str):
            return _filled(self._template, prompt, context)
        places = [place for place, message in enumerate(prompt) if message["role"] == "user"]
        if not places or not isinstance(prompt[places[-1]]["content"], str):
            raise UserError(
                f"{where}: --opd-self-template needs a message of the user with a text, which this prompt lacks"
            )
        last = places[-1]
        filled = {**prompt[last], "content": _filled(self._template, prompt[last]["content"], context)}
        return [*prompt[:last], filled, *prompt[last + 1 :]]


def with_teacher_prompts(
    options: Options, records: Sequence[PromptRecord], tokenizer: PreTrainedTokenizerBase
) -> list[PromptRecord]:
    """The records with the prompts of ``--opd-teacher self``, unchanged without it, or where feedback is still to come.

    Raises :class:`UserError` for a row without a context, one whose prompt has no text of a user to put it into, and
    one that the tokenizer makes nothing of.
    """
    if not is_self_taught(options):
        return list(records)
    prompts = PrivilegedPrompts(options, tokenizer)
    places = [f"row {record.index} of --prompt-data {options.data.prompt_data} (counted from 0)" for record in records]
    key = None if hears_feedback(options) else options.opd.opd_self_context_key
    texts = [
        prompts.text(record.prompt, "" if key is None else _context(record, key, where), where)
        for record, where in zip(records, places, strict=True)
    ]
    if hears_feedback(options):
        return list(records)
    return [
        dataclasses.replace(record, teacher_prompt_tokens=tokens)
        for record, tokens in zip(records, prompts.ids(texts, places), strict=True)
    ]


def _context(record: PromptRecord, key: str, where: str) -> str:
    found = record.extras.get(key)
    if not isinstance(found, str) or not found:
        what = "nothing" if found is None or found == "" else f"a {type(found).__name__}"
        raise UserError(
            f"{where} has {what} in the field {key!r} of --opd-self-context-key: every row needs a text that "
            "--opd-teacher self sees; complete or remove the row"
        )
    return found


def _filled(template: str, prompt: str, context: str) -> str:
    """``template`` with its two places filled at once, so that neither text is searched for the other's place."""
    values = {"{prompt}": prompt, "{context}": context}
    return re.sub(r"\{prompt\}|\{context\}", lambda place: values[place[0]], template)
