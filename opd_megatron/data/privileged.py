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
from opd_megatron.config.resolve import is_self_taught
from opd_megatron.data.prompts import PromptRecord, encode_prompts, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def extra_keys(options: Options) -> tuple[str, ...]:
    """Fields of the prompt rows that the options name beside prompt, label and metadata."""
    opd = options.opd
    named = {
        opd.opd_self_context_key: is_self_taught(options),
        opd.opd_data_response_key: opd.use_opd and opd.opd_student_data_fraction < 1.0,
    }
    return tuple(key for key, used in named.items() if key is not None and used)


def with_teacher_prompts(
    options: Options, records: Sequence[PromptRecord], tokenizer: PreTrainedTokenizerBase
) -> list[PromptRecord]:
    """The records with the prompts of ``--opd-teacher self``, unchanged without it.

    ``--opd-self-template`` is filled with the prompt and the row's context, which may hold braces themselves, and the
    result takes the prompt's way to ids: as it stands, or, with the chat template, as the content of the last message
    of the user. The response follows it as it follows the student's prompt, id for id.

    Raises :class:`UserError` for a row without a context, one whose prompt has no text of a user to put it into, and
    one that the tokenizer makes nothing of.
    """
    if not is_self_taught(options):
        return list(records)
    data, source = options.data, f"--prompt-data {options.data.prompt_data}"
    chat_settings = json.loads(data.apply_chat_template_kwargs)
    texts = []
    for record in records:
        where = f"row {record.index} of {source} (counted from 0)"
        prompt = _privileged(record, options.opd.opd_self_context_key, options.opd.opd_self_template, where)
        if data.apply_chat_template:
            prompt = render_chat(where, prompt, tokenizer, chat_settings)
        texts.append(prompt)
    seen = []
    token_ids = encode_prompts(tokenizer, texts, add_special_tokens=not data.apply_chat_template)
    for record, ids in zip(records, token_ids, strict=True):
        if not ids:
            raise UserError(f"row {record.index} of {source}: the tokenizer makes no token of the teacher's prompt")
        tokens = np.asarray(ids, dtype=np.int64)
        tokens.setflags(write=False)
        seen.append(dataclasses.replace(record, teacher_prompt_tokens=tokens))
    return seen


def _privileged(record: PromptRecord, key: str | None, template: str, where: str) -> Any:
    """The prompt of the record, a string or messages, with the context where ``template`` wants it."""
    context = ""
    if key is not None:
        found = record.extras.get(key)
        if not isinstance(found, str) or not found:
            what = "nothing" if found is None or found == "" else f"a {type(found).__name__}"
            raise UserError(
                f"{where} has {what} in the field {key!r} of --opd-self-context-key: every row needs a text that "
                "--opd-teacher self sees; complete or remove the row"
            )
        context = found
    if isinstance(record.prompt, str):
        return _filled(template, record.prompt, context)
    places = [place for place, message in enumerate(record.prompt) if message["role"] == "user"]
    if not places or not isinstance(record.prompt[places[-1]]["content"], str):
        raise UserError(
            f"{where}: --opd-self-template needs a message of the user with a text, which this prompt lacks"
        )
    last = places[-1]
    filled = {**record.prompt[last], "content": _filled(template, record.prompt[last]["content"], context)}
    return [*record.prompt[:last], filled, *record.prompt[last + 1 :]]


def _filled(template: str, prompt: str, context: str) -> str:
    """``template`` with its two places filled at once, so that neither text is searched for the other's place."""
    values = {"{prompt}": prompt, "{context}": context}
    return re.sub(r"\{prompt\}|\{context\}", lambda place: values[place[0]], template)
