"""The project's own task: addition and subtraction of 4-digit numbers, written out column by column.

A prompt is ``4827+1936=`` and its response ``7+6+0=13,2+3+1=06,8+9+0=17,4+1+1=06;6763`` and the end token. Columns run
from the units; each is ``digit of the first number, sign, digit of the second, sign, incoming carry = outgoing carry
and result digit``. After ``;`` comes the answer without leading zeros. An addition may carry into a fifth digit. In a
subtraction the first number is not the smaller one, and the flag is the borrow.

A fixed tenth of all problems is held out, chosen by a hash that knows nothing of seeds or machines.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opd_megatron.config.errors import UserError
from opd_megatron.data.tokenizer import save_backend
from opd_megatron.sample import Sample, Status

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALLEST, LARGEST = 1000, 9999
"""Range of the operands, both inclusive."""

CHARACTERS = "0123456789+-=,;"
PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN = "<pad>", "<eos>", "<unk>"

MOST_PROBLEMS = 1_000_000
"""Most problems drawn at once: few enough that drawing again after a repeat stays rare."""

_PROMPT = re.compile(r"(\d{4})([+-])(\d{4})=", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """``a op b``; raises ``ValueError`` unless both have four digits and a difference is not negative."""

    a: int
    op: Literal["+", "-"]
    b: int

    def __post_init__(self) -> None:
        if self.op not in ("+", "-"):
            raise ValueError(f"the sign {self.op!r} is neither + nor -")
        if not (SMALLEST <= self.a <= LARGEST and SMALLEST <= self.b <= LARGEST):
            raise ValueError(f"{self.a}{self.op}{self.b}: numbers are {SMALLEST} to {LARGEST}")
        if self.op == "-" and self.a < self.b:
            raise ValueError(f"{self.a}-{self.b}: the larger number stands first")

    @classmethod
    def from_prompt(cls, prompt: str) -> Problem:
        """Inverse of :meth:`prompt`; raises ``ValueError`` for any other text."""
        match = _PROMPT.fullmatch(prompt)
        if match is None:
            raise ValueError(f"{prompt!r} is not a problem such as 4827+1936=")
        return cls(int(match[1]), "+" if match[2] == "+" else "-", int(match[3]))

    def prompt(self) -> str:
        return f"{self.a}{self.op}{self.b}="

    def answer(self) -> str:
        return str(self.a + self.b if self.op == "+" else self.a - self.b)

    def response(self) -> str:
        """The columns and the answer, without the end token."""
        columns, flag = [], 0
        for first, second in zip(reversed(str(self.a)), reversed(str(self.b)), strict=True):
            x, y = int(first), int(second)
            total = x + y + flag if self.op == "+" else x - y - flag
            carried = int(total > 9 or total < 0)
            columns.append(f"{x}{self.op}{y}{self.op}{flag}={carried}{total % 10}")
            flag = carried
        return ",".join(columns) + ";" + self.answer()

    def key(self) -> str:
        """What makes two problems the same: the prompt, with the operands of a sum in ascending order."""
        first, second = sorted((self.a, self.b)) if self.op == "+" else (self.a, self.b)
        return f"{first}{self.op}{second}"


def is_held_out(problem: Problem) -> bool:
    """Whether a problem belongs to the fixed tenth that is never trained on; ``a+b`` goes with ``b+a``."""
    digest = hashlib.sha256(problem.key().encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def sample_problems(n: int, seed: int, held_out: bool) -> list[Problem]:
    """Draw ``n`` different problems of one side, additions and subtractions with equal odds.

    ``a+b`` and ``b+a`` count as one. The first problems do not depend on ``n``. Raises ``ValueError`` if ``n`` is not
    in 0 to :data:`MOST_PROBLEMS`.
    """
    if not 0 <= n <= MOST_PROBLEMS:
        raise ValueError(f"cannot draw {n} problems (0 to {MOST_PROBLEMS})")
    generator = random.Random(seed)
    drawn: dict[str, Problem] = {}
    while len(drawn) < n:
        a, b = generator.randint(SMALLEST, LARGEST), generator.randint(SMALLEST, LARGEST)
        problem = Problem(a, "+", b) if generator.random() < 0.5 else Problem(max(a, b), "-", min(a, b))
        if is_held_out(problem) == held_out:
            drawn.setdefault(problem.key(), problem)
    return list(drawn.values())


def build_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Save the task's character tokenizer as a Hugging Face folder and return it.

    One id per character and ``<pad>``, ``<eos>`` and ``<unk>``; encoding adds nothing and decoding puts nothing between
    characters. Any other character becomes ``<unk>``, so that no text of a server's own (a warm-up) has zero tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate([PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return save_backend(backend, folder, eos_token=END_TOKEN, pad_token=PAD_TOKEN, unk_token=UNKNOWN_TOKEN)


def verify(prompt: str, response: str, ended: bool) -> bool:
    """Whether ``response`` answers ``prompt``: it ended by itself and what follows its only ``;`` is the answer.

    ``ended`` says that the end token was sampled; one that is spelled out at the end of ``response`` is ignored. The
    columns before ``;`` are not judged. Raises ``ValueError`` if ``prompt`` is not a problem of this task.
    """
    return _answers(Problem.from_prompt(prompt).answer(), response, ended)


def reward(sample: Sample) -> float:
    """1.0 for a right response, else 0.0; the answer is the label, or follows from the prompt if there is none.

    Raises :class:`UserError` if the prompt is needed and is not a problem of this task.
    """
    ended = sample.status is Status.COMPLETED
    if sample.label is not None:
        return float(_answers(str(sample.label), sample.response, ended))
    try:
        return float(verify(str(sample.prompt), sample.response, ended))
    except ValueError as error:
        raise UserError(f"sample {sample.index}: no label, and {error}") from error


def _answers(answer: str, response: str, ended: bool) -> bool:
    parts = response.removesuffix(END_TOKEN).split(";")
    return ended and len(parts) == 2 and parts[1] == answer
