"""The moving average of the student's weights, a teacher that follows it: kept in float32, saved with the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from opd_megatron.config.errors import UserError
from opd_megatron.megatron.checkpoint import check_weights, read_entries
from opd_megatron.megatron.chunks import Entries, add_range, places_of
from opd_megatron.megatron.model import HiddenStateModel
from opd_megatron.megatron.safe_checkpoint import StepReader

PREFIX = "moving_average."
"""Stands before a weight's name in a checkpoint."""


class MovingAverage:
    r"""``theta_T <- decay * theta_T + (1 - decay) * theta_S`` for every weight, beginning at the student's.

    ``chunks`` are a model of the student's layout that speaks with the average; its weights are overwritten. Where
    they have less precision than float32, the average is kept beside them: a step of ``1 - decay`` would be rounded
    away. The ranks that hold the same weights compute the same average.
    """

    def __init__(self, chunks: Sequence[HiddenStateModel], student: Sequence[HiddenStateModel], decay: float) -> None:
        self.chunks = list(chunks)
        self._decay = decay
        self._student = [weight for chunk in student for weight in chunk.parameters()]
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()
        self._spoken = [weight for chunk in self.chunks for weight in chunk.parameters()]
        self._average: dict[Tensor, Tensor] = {}
        for spoken, own in zip(self._spoken, self._student, strict=True):
            spoken.data.copy_(own.data)
            exact = spoken.data if spoken.dtype == torch.float32 else own.data.to(torch.float32, copy=True)
            self._average[spoken] = exact

    @torch.no_grad()
    def follow(self) -> None:
        """Take a step towards the student's weights."""
        for spoken, own in zip(self._spoken, self._student, strict=True):
            self._average[spoken].lerp_(own.data.float(), 1.0 - self._decay)
        self._speak()

    def tensors(self) -> Iterator[Tensor]:
        """All memory on the device that the average takes, buffers of its model included."""
        yield from self._average.values()
        for chunk in self.chunks:
            yield from (weight.data for weight in chunk.parameters())
            yield from chunk.buffers()

    def entries(self, *, to_write: bool) -> Entries:
        """The pieces of a checkpoint that this rank has: all, to read into them, or those that it writes."""
        found: Entries = {}
        for weight, places in places_of(self.chunks).items():
            writer_axes = 3 if to_write else None
            exact = self._average[weight]
            add_range(found, places, _itself(exact), torch.float32, prefix=PREFIX, writer_axes=writer_axes)
        return found

    def restore(self, source: Path) -> None:
        """Go on from a step folder of any layout; raises ``UserError`` where it holds no average of this model."""
        reader, wanted = StepReader(source), self.entries(to_write=False)
        if not any(name.startswith(PREFIX) for name in reader.tensors()):
            raise UserError(
                f"{source} holds no moving average of the weights: resume with the --opd-self-weights that it was "
                "saved with, or begin a new average with --finetune"
            )
        check_weights(reader, wanted, self.chunks[0].architecture.vocab_size)
        read_entries(reader, wanted)
        self._speak()

    def _speak(self) -> None:
        """Give the model the average, rounded to its precision."""
        for spoken, exact in self._average.items():
            if exact.data_ptr() != spoken.data_ptr():
                spoken.data.copy_(exact)


def _itself(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
