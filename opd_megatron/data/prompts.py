"""Prompt sets: rows checked against the keys, turned into token ids, and handed out in seeded epochs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.config.flags import spoken
from opd_megatron.data.rows import Row, read_rows, summarize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LABEL_KEY = "label"
LABEL_WORDS = 4
"""A label of more words than these is a text; one of fewer is an answer, which a response leads up to."""


@dataclass(frozen=True, eq=False)
class PromptRecord:
    """One prompt, ready to be sampled from.

    ``index`` counts the rows of the (sliced) file from 0. ``prompt`` is what the row holds (a string or messages),
    ``prompt_text`` the text that was tokenised and ``prompt_tokens`` its ids, int64 ``[tokens]``. ``extras`` are fields
    of the row, or of its metadata, that were asked for; None where there is no such field. ``teacher_prompt_tokens``
    are the ids of the prompt that the teacher sees, None where that is the same.
    """

    index: int
    prompt: str | list[dict[str, Any]]
    prompt_text: str
    prompt_tokens: np.ndarray
    label: Any
    metadata: dict[str, Any]
    extras: dict[str, Any] = field(default_factory=dict)
    teacher_prompt_tokens: np.ndarray | None = None


def check_prompt_file(
    path: str,
    input_key: str,
    label_key: str | None,
    metadata_key: str,
    *,
    apply_chat_template: bool = True,
    routes: tuple[str, Sequence[str]] | None = None,
) -> list[str]:
    """What is wrong with a prompt file, as phrases; an empty list if nothing is.

    ``path`` may carry a slice (``PATH@[a:b]``). The first row with a fault is named by line (Parquet: row), the others
    are counted. Without ``apply_chat_template``, a prompt that is a list of messages is a fault. ``routes`` are a field
    of the metadata and the teachers of which it has to name one.
    """
    rows, faults = _read_checked(path, input_key, label_key, metadata_key, apply_chat_template)
    return faults or summarize([fault for row in rows if (fault := _route_fault(row, metadata_key, routes))])


def _read_checked(
    path: str, input_key: str, label_key: str | None, metadata_key: str, apply_chat_template: bool
) -> tuple[list[Row], list[str]]:
    rows, faults = read_rows(path)
    places: dict[str, list[str]] = {}
    for row in rows:
        fault = _row_fault(row.fields, input_key, label_key, metadata_key, apply_chat_template)
        if fault:
            places.setdefault(fault, []).append(row.where)
    for fault, where in places.items():
        others = f" (and {len(where) - 1} more rows)" if len(where) > 1 else ""
        faults.append(f"{where[0]}{others}: {fault}")
    return rows, summarize(faults)


def _row_fault(
    fields: Mapping[str, Any], input_key: str, label_key: str | None, metadata_key: str, apply_chat_template: bool
) -> str | None:
    names = ", ".join(fields) or "none"
    if input_key not in fields:
        return f"no field {input_key!r} for --input-key (fields: {names})"
    if label_key is not None and label_key not in fields:
        return f"no field {label_key!r} for --label-key (fields: {names})"
    if label_key is not None and fields[label_key] is None:
        return f"field {label_key!r} for --label-key is null"
    metadata = fields.get(metadata_key)
    if metadata is not None and not isinstance(metadata, dict):
        return f"field {metadata_key!r} is not a mapping (--metadata-key names another)"
    prompt = fields[input_key]
    if isinstance(prompt, str):
        return None if prompt else f"field {input_key!r} is empty"
    if not isinstance(prompt, list) or not prompt:
        return f"field {input_key!r} is neither text nor a list of messages"
    for position, message in enumerate(prompt, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            return f"entry {position} of {input_key!r} is not a message with role and content"
    return None if apply_chat_template else f"field {input_key!r} holds messages: give --apply-chat-template"


def _route_fault(row: Row, metadata_key: str, routes: tuple[str, Sequence[str]] | None) -> str | None:
    if routes is None:
        return None
    key, names = routes
    route = (row.fields.get(metadata_key) or {}).get(key)
    if isinstance(route, str) and route in names:
        return None
    found = "missing" if route is None else repr(route)
    return (
        f"{row.where}: the metadata field {key!r} is {found}, --opd-teachers has {spoken(names)}: correct the prompts, "
        "--opd-teachers or --opd-teacher-route-key"
    )


def load_prompt_records(
    path: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    input_key: str,
    label_key: str | None,
    metadata_key: str,
    apply_chat_template: bool,
    chat_template_kwargs: Mapping[str, Any],
    extra_keys: Sequence[str] = (),
) -> list[PromptRecord]:
    """Read, check and tokenise a prompt file.

    With the chat template, a plain string counts as one user message, the template adds the generation prompt, and its
    text is encoded as it stands: a template writes its special tokens itself. A plain prompt is encoded with the
    tokenizer's own special tokens (such as a leading BOS), but an end token that the tokenizer appends is removed: the
    response continues the prompt. ``label_key`` None takes the field ``label`` of the rows that have it;
    ``extra_keys`` go to the records' ``extras``.

    Raises :class:`UserError` with every fault of :func:`check_prompt_file`, and when the tokenizer has no chat
    template, the template refuses a row, or a prompt has no tokens.
    """
    rows, faults = _read_checked(path, input_key, label_key, metadata_key, apply_chat_template)
    if faults:
        raise UserError("; ".join(faults))
    if apply_chat_template and not tokenizer.chat_template:
        raise UserError(f"{path}: the tokenizer has no chat template: leave out --apply-chat-template")
    prompts = [row.fields[input_key] for row in rows]
    if apply_chat_template:
        texts = [render_chat(row.where, row.fields[input_key], tokenizer, chat_template_kwargs) for row in rows]
    else:
        texts = prompts
    token_ids = encode_prompts(tokenizer, texts, add_special_tokens=not apply_chat_template)
    records = []
    for index, (row, text, ids) in enumerate(zip(rows, texts, token_ids, strict=True)):
        if not ids:
            raise UserError(f"{row.where}: the tokenizer makes no token of this prompt")
        tokens = np.asarray(ids, dtype=np.int64)
        tokens.setflags(write=False)
        label = row.fields.get(label_key or DEFAULT_LABEL_KEY)
        metadata = dict(row.fields.get(metadata_key) or {})
        extras = {key: row.fields.get(key, metadata.get(key)) for key in extra_keys}
        records.append(PromptRecord(index, prompts[index], text, tokens, label, metadata, extras))
    return records


def text_of_records(
    records: Sequence[PromptRecord], tokenizer: PreTrainedTokenizerBase, *, count: int, longest: int
) -> list[np.ndarray]:
    """Texts that a model of this task knows: ids ``[L]`` of ``count`` prompts, evenly spread, each with its label.

    A label that is no text, or a word or two that would not follow the prompt at once, is left out. Texts are cut at
    ``longest`` tokens; those of fewer than 4 are passed over.
    """
    texts = []
    for record in records[:: max(1, len(records) // count)][:count]:
        label = record.label if isinstance(record.label, str) and len(record.label.split()) > LABEL_WORDS else ""
        ids = [*record.prompt_tokens.tolist(), *tokenizer.encode(label, add_special_tokens=False)]
        if len(ids) >= 4:
            texts.append(np.array(ids[:longest], dtype=np.int64))
    return texts


def render_chat(
    where: str, prompt: Any, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
) -> str:
    """The text of a prompt, a string or messages, with the generation prompt; ``where`` names its row in errors."""
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    settings = {"add_generation_prompt": True, **chat_template_kwargs, "tokenize": False}
    try:
        return str(tokenizer.apply_chat_template(messages, **settings))
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{where}: the chat template refuses this prompt ({_one_line(error)})") from error


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool
) -> list[list[int]]:
    """Ids of texts that a response continues: without an end token that the tokenizer appends."""
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    if not add_special_tokens:
        return encoded
    bare: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [
        ids[:-1] if ids and ids[-1] == end and plain[-1:] != [end] else ids
        for ids, plain in zip(encoded, bare, strict=True)
    ]


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class PromptSet:
    """Hands out prompts batch after batch and epoch after epoch, and can say and restore where it stands.

    A batch that reaches the end of an epoch goes on in the next one, so every batch is full and no prompt is dropped.
    With ``shuffle``, the order of an epoch is a permutation that depends on ``(seed, epoch)`` only.
    """

    def __init__(self, records: Sequence[PromptRecord], shuffle: bool, seed: int) -> None:
        if not records:
            raise UserError("a prompt set needs at least one prompt")
        self.records = list(records)
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._offset = 0
        self._order = self._epoch_order()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def epoch(self) -> int:
        """Completed passes over the prompts."""
        return self._epoch

    def rollouts_for_epochs(self, num_epoch: int, batch: int) -> int:
        """The fewest rollouts of ``batch`` prompts in which every prompt is used at least ``num_epoch`` times."""
        return -(-num_epoch * len(self.records) // batch)

    def next_batch(self, n: int) -> list[PromptRecord]:
        """The next ``n`` prompts; raises ``ValueError`` if ``n`` is negative."""
        if n < 0:
            raise ValueError(f"a batch of {n} prompts")
        batch: list[PromptRecord] = []
        while len(batch) < n:
            taken = self._order[self._offset : self._offset + n - len(batch)]
            batch.extend(self.records[position] for position in taken)
            self._offset += len(taken)
            if self._offset == len(self.records):
                self._epoch += 1
                self._offset = 0
                self._order = self._epoch_order()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; ready for JSON."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "beside": self._beside,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; raises :class:`UserError` if it was saved with other prompts or another order.

        What stands beside the prompts, such as given responses, must be the same where both runs read it.
        """
        saved, own = state.get("beside", {}), self._beside
        if state["fingerprint"] != self._fingerprint or any(saved[name] != own[name] for name in saved.keys() & own):
            raise UserError(
                "the prompts are not those of the checkpoint (another file, slice, tokenizer, chat template or "
                "privileged text): restore --prompt-data and the options that say how it is read, or start a new run "
                "from these weights with --ref-load"
            )
        if state["shuffle"] != self._shuffle or (self._shuffle and state["seed"] != self._seed):
            flags = f"{'with' if state['shuffle'] else 'without'} --rollout-shuffle and with --seed {state['seed']}"
            raise UserError(f"the order of the prompts is not that of the checkpoint: resume {flags}")
        self._epoch = int(state["epoch"])
        self._offset = int(state["offset"])
        self._order = self._epoch_order()

    def _epoch_order(self) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self.records))
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self.records))

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(record.prompt_tokens.tobytes())
            rest = [record.label, record.metadata]
            digest.update(json.dumps(rest, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def _beside(self) -> dict[str, str]:
        """A digest of the teacher's own prompts, and of each further field that is read."""
        columns: dict[str, list[Any]] = {}
        for record in self.records:
            for name, value in record.extras.items():
                columns.setdefault(f"field {name}", []).append(value)
            if record.teacher_prompt_tokens is not None:
                columns.setdefault("teacher's prompt", []).append(record.teacher_prompt_tokens.tolist())
        return {
            name: hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
            for name, values in columns.items()
        }
