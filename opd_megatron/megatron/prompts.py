"""``--opd-include-prompt``: the tokens of the prompt as places where whole distributions are compared, too.

The trainer reads a sample as if its prompt were the first token alone, and masks what else was the prompt: the
divergence sees it, nothing else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_megatron.config.options import Options
from opd_megatron.objectives.weights import step_weights
from opd_megatron.sample import Sample, mask_with_prompt, prompt_as_response


@dataclass(frozen=True)
class PromptReading:
    """Samples in both forms: ``read`` has the prompt's tokens but the first before those of the response, masked."""

    samples: Sequence[Sample]
    read: Sequence[Sample]

    @classmethod
    def of(cls, samples: Sequence[Sample], includes_prompt: bool) -> PromptReading:
        """Without the prompts, ``read`` are the samples as they are."""
        return cls(samples, [prompt_as_response(sample) for sample in samples] if includes_prompt else samples)

    def cut(self, found: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Arrays by place, of the responses alone."""
        if self.read is self.samples:
            return found
        return {place: values[self._before(place) :] for place, values in found.items()}

    def step_weights(self, options: Options, number: int) -> list[np.ndarray] | None:
        """Weights of the distillation term in optimizer step ``number``, by place as ``step_loss_weights`` gives them.

        None where they are those of the loss, without the prompts. Else they are made as those of the loss are, and the
        prompt's tokens but the first count as trained ones do: in the mean over a sequence, and in its divisor.
        """
        if self.read is self.samples:
            return None
        size = options.global_batch_size
        first = number * size
        masks = [mask_with_prompt(sample) for sample in self.samples[first : first + size]]
        weights = step_weights(options.objective, masks)
        return [np.zeros(0, dtype=np.float32)] * first + [weights_T.numpy() for weights_T in weights]

    def _before(self, place: int) -> int:
        return len(self.samples[place].prompt_tokens) - 1
