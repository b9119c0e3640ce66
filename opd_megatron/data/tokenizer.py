"""Tokenizers: loading one from a folder, and training a small one where there is none to download."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from opd_megatron.config.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""A tokenizer folder holds at least one of these."""

PAD_TOKEN = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '" + TURN_START + "' + message['role'] + '\\n' + message['content'] + '" + TURN_END + "\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + TURN_START + "assistant\\n' }}{% endif %}"
)
"""Every turn is ``<|im_start|>role``, a newline, the content and ``<|im_end|>``."""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; nothing is downloaded and no code of the folder is run.

    Raises :class:`UserError` if the folder does not exist or holds no tokenizer with an end token.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder (a tokenizer is read from a local Hugging Face folder)")
    # A folder with the config of some families alone would load as a tokenizer of one token.
    if not any((Path(folder) / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{folder}: no tokenizer here (none of {', '.join(VOCABULARY_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the files are the user's, and transformers raises anything from KeyError to OSError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: no tokenizer can be loaded from here ({reason})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer names no end token (eos_token in tokenizer_config.json)")
    return tokenizer


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with a ChatML template on ``texts``, save it in ``folder`` and return it.

    Digits are tokens of their own. ``<|im_end|>`` is the end token and ``<|endoftext|>`` the padding. ``vocab_size``
    counts the special tokens and is an upper bound: few texts give fewer merges. Raises ``ValueError`` if it does not
    even hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [PAD_TOKEN, TURN_START, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small: bytes and special tokens alone are {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return save_backend(backend, folder, eos_token=TURN_END, pad_token=PAD_TOKEN, chat_template=CHATML_TEMPLATE)


def save_backend(backend: Tokenizer, folder: str | Path, **settings: str) -> PreTrainedTokenizerBase:
    """Save a ``tokenizers`` tokenizer as a Hugging Face folder and load it from there.

    ``settings`` are special tokens and the chat template. Files appear in ``folder`` complete or not at all; others
    that lie there stay.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target, prefix=".tokenizer-"))
    try:
        tokenizer.save_pretrained(scratch)
        for item in scratch.iterdir():
            item.replace(target / item.name)
    finally:
        shutil.rmtree(scratch)
    return load_tokenizer(target)
