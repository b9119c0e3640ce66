"""What the vocabulary head takes on a rank: the buffers of log-probabilities, of distributions, of the exact KL.

``tests/megatron/test_memory.py`` holds the numbers against measured allocations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_megatron.config.activations import Work, number_bytes
from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import (
    has_megatron_teacher,
    has_own_layout,
    needs_teacher_hidden,
    sampled_tokens_learn,
    selects_by_divergence,
    teaches_itself_now,
)
from opd_megatron.config.vocab_chunks import (
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    LEAST_CHUNK_TOKENS,
    DeviceKind,
    tokens_of_chunk,
)

STATISTICS_BYTES = 64
"""Bytes per response token of ids, log-probabilities, weights and the like on the device."""


DIVERGENCE_BLOCKS: dict[str, int] = {
    "reverse_kl": 5,
    "forward_kl": 6,
    "jsd": 9,
    "skew_kl": 8,
    "skew_reverse_kl": 8,
    "alpha": 11,
}
"""Blocks that a divergence has at once while it takes in a block of both sides' logits."""
BLOCKS_OF_A_SUM = 3
"""Further blocks of a weighted sum of two divergences."""
RECORD_NUMBERS = 7.5
"""Numbers of 4 bytes for each token of a top-k record while a block of a chunk's logits is read."""
RECORD_NUMBERS_BEFORE_BLOCKS = 6
"""The same while the chunk's logits are made."""
RECORD_NUMBERS_IN_BACKWARD = 5
"""The same in backward."""
SORTING_NUMBERS = 12
"""Numbers of 4 bytes for each token of a record while the most probable ones are put in order."""


@dataclass(frozen=True)
class _Buffers:
    """Bytes of what the head works with: a chunk's logits in float32, one of its blocks, gradients.

    ``short`` are the bytes of a number of the student where it has fewer than float32, else 0. ``product`` is a chunk's
    part of a gradient, ``gradients`` are those of hidden rows and weight, ``rows`` are the student's hidden rows once.
    ``tokens`` and ``weight`` count tokens and numbers.
    """

    tokens: int
    logits: int
    block: int
    short: int
    product: int
    gradients: int
    rows: int
    weight: int

    @classmethod
    def of(cls, options: Options, student: ModelArchitecture, device: DeviceKind) -> _Buffers:
        number = number_bytes(options.optimizer)
        tokens = Work.of(options, student).rows
        tensor = options.parallel.tensor_model_parallel_size
        padded = student.padded_vocab_size(options.model.make_vocab_size_divisible_by, tensor) // tensor
        columns = min(padded, student.vocab_size)
        chunk = min(tokens, tokens_of_chunk(padded, CHUNK_ELEMENTS[device], LEAST_CHUNK_TOKENS))
        logits = chunk * columns
        block = min(max(1, BLOCK_ELEMENTS[device] // columns) * columns, logits)
        weight = padded * student.hidden_size
        rows = number * tokens * student.hidden_size
        return cls(
            tokens=tokens,
            logits=4 * logits,
            block=4 * block,
            short=number if number < 4 else 0,
            product=number * max(chunk * student.hidden_size, min(logits, weight) // 4),
            gradients=rows + 4 * weight,
            rows=rows,
            weight=weight,
        )

    def in_short(self, of_numbers: int) -> int:
        """Bytes of ``of_numbers`` float32 bytes once more in the student's precision, where that is shorter."""
        return self.short * of_numbers // 4

    @property
    def of_backward(self) -> int:
        """What a chunk's gradients take besides its logits and the gradients themselves."""
        return max(self.in_short(self.logits) + self.product, self.short * self.weight)


def head_bytes(
    options: Options, student: ModelArchitecture, frozen: Sequence[ModelArchitecture], device: DeviceKind
) -> int:
    """Largest of what the vocabulary head holds besides its inputs: forward, backward, or measuring the exact KL.

    Forward: a chunk's logits in float32 and three blocks of temporaries (with ``--bf16`` first the logits in that).
    Backward: gradients of hidden rows and of the weight, the latter in float32, a chunk's logits and its part of
    either gradient; with ``--bf16`` also the logits' gradient, and at the end the weight's, in that. For
    ``--opd-loss distribution`` and the exact KL see below; ``frozen`` are the models whose hidden rows are kept.
    """
    buffers = _Buffers.of(options, student, device)
    forward = buffers.logits + max(3 * buffers.block, buffers.in_short(buffers.logits))
    backward = buffers.gradients + buffers.logits + buffers.of_backward
    exact = _exact_bytes(options, frozen, buffers) if frozen else 0
    compared = _distribution_bytes(options, frozen, buffers)
    return max(forward, backward, exact, compared) + STATISTICS_BYTES * buffers.tokens


def _teacher_side(options: Options, teacher: ModelArchitecture, buffers: _Buffers) -> int:
    """The teacher's hidden rows on the device; and its output weight where the teacher itself is elsewhere."""
    held = teacher_number_bytes(options, hidden=True) * buffers.tokens * teacher.hidden_size
    if options.offload.offload_teacher or has_own_layout(options) or teaches_itself_now(options):
        held += teacher_head_bytes(options, teacher)
    return held


def _teacher_short(options: Options, buffers: _Buffers) -> int:
    """A chunk's logits of a teacher in bf16, before they are float32."""
    number = teacher_number_bytes(options)
    return number * buffers.logits // 4 if number < 4 else 0


def _exact_bytes(options: Options, frozen: Sequence[ModelArchitecture], buffers: _Buffers) -> int:
    """A chunk's logits of both models and two blocks of temporaries; a teacher's in bf16 are first made in that.

    Diagnostics need the blocks of all their divergences, one after the other, and the likeliest tokens in order; the
    choice of tokens by a divergence those of the Jensen-Shannon divergence.
    """
    opd = options.opd
    measured = measures_whole_distributions(options) or selects_by_divergence(opd)
    if not opd.use_opd or not (measured or opd.opd_baseline != "none"):
        return 0
    blocks = DIVERGENCE_BLOCKS["jsd"] if opd.opd_diagnostics_interval or selects_by_divergence(opd) else 2
    listed = 4 * buffers.tokens * opd.opd_diagnostics_top_k if opd.opd_diagnostics_interval else 0
    working = 2 * buffers.logits + max(blocks * buffers.block, _teacher_short(options, buffers))
    working = max(working, buffers.logits + 3 * buffers.block + int(RECORD_NUMBERS * listed), SORTING_NUMBERS * listed)
    return working + sum(_teacher_side(options, model, buffers) for model in frozen)


def _distribution_bytes(options: Options, frozen: Sequence[ModelArchitecture], buffers: _Buffers) -> int:
    """Forward and backward of ``--opd-loss distribution``.

    Over the vocabulary both models' logits of a chunk are there in either pass. The tokens that count are picked out of
    either side's hidden rows first, and where several parts of the loss reach the output weight, the gradients of one
    wait for those of the next.
    """
    opd = options.opd
    if not opd.use_opd or opd.opd_loss != "distribution":
        return 0
    waiting = buffers.rows + (buffers.short or 4) * buffers.weight
    parts = 1 + int(opd.opd_entropy_aware > 0) + int(sampled_tokens_learn(options))
    gradients = buffers.gradients + (parts - 1) * waiting
    standing = buffers.rows
    for model in frozen:
        standing += _teacher_side(options, model, buffers)
        standing += teacher_number_bytes(options, hidden=True) * buffers.tokens * model.hidden_size
    if opd.opd_support == "full":
        names = [name for name in (opd.opd_divergence, opd.opd_divergence_to) if name is not None]
        names += ["forward_kl"] if opd.opd_entropy_aware > 0 else []
        blocks = max(DIVERGENCE_BLOCKS[name] for name in names)
        blocks += BLOCKS_OF_A_SUM if opd.opd_divergence_to is not None else 0
        short = max(buffers.of_backward, _teacher_short(options, buffers))
        return standing + gradients + 2 * buffers.logits + max(blocks * buffers.block, short)
    listed = 4 * buffers.tokens * (opd.opd_top_k or 0)
    forward = buffers.logits + max(
        3 * buffers.block + int(RECORD_NUMBERS * listed),
        buffers.in_short(buffers.logits) + RECORD_NUMBERS_BEFORE_BLOCKS * listed,
    )
    backward = gradients + buffers.logits + buffers.of_backward + RECORD_NUMBERS_IN_BACKWARD * listed
    return standing + max(forward, backward, SORTING_NUMBERS * listed)


def teacher_head_bytes(options: Options, teacher: ModelArchitecture) -> int:
    """The teacher's output weight for the columns that the student has on a rank."""
    tensor = options.parallel.tensor_model_parallel_size
    columns = teacher.padded_vocab_size(options.model.make_vocab_size_divisible_by, tensor) // tensor
    return teacher_number_bytes(options) * columns * teacher.hidden_size


def measures_whole_distributions(options: Options) -> bool:
    """Whether some rollouts are measured with the teacher's hidden rows."""
    return options.opd.opd_exact_kl_interval > 0 or options.opd.opd_diagnostics_interval > 0


def keeps_hidden_rows(options: Options) -> bool:
    """Whether the teacher's hidden rows of a rollout are kept on the host, for the exact KL or the term itself."""
    measured = has_megatron_teacher(options) and measures_whole_distributions(options)
    return measured or needs_teacher_hidden(options)


def teacher_number_bytes(options: Options, hidden: bool = False) -> int:
    """Bytes of a weight of the teacher or, with ``hidden``, of its hidden rows on the host."""
    own = options.opd.opd_teacher_dtype
    if hidden and options.opd.opd_teacher_hidden_dtype != "same":
        own = options.opd.opd_teacher_hidden_dtype
    return {"same": number_bytes(options.optimizer), "float32": 4, "bfloat16": 2}[own]
