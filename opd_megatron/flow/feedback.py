"""Self-distillation from feedback (SDPO, arXiv 2601.20802): what the teacher sees is known when a sample was judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import hears_feedback
from opd_megatron.data.privileged import PrivilegedPrompts
from opd_megatron.flow.masking import leave_out
from opd_megatron.reward.base import RewardError, name_sample
from opd_megatron.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FeedbackPrompts:
    """Gives samples that have their reward the prompt that ``--opd-teacher self`` sees: ``--opd-self-feedback``."""

    def __init__(self, options: Options, tokenizer: PreTrainedTokenizerBase) -> None:
        self._key = str(options.opd.opd_self_context_key)
        self._prompts = PrivilegedPrompts(options, tokenizer)

    def __call__(self, sample: Sample) -> None:
        """Put the feedback in the sample's metadata before its prompt, or leave a sample without any out of the term.

        Raises :class:`RewardError` where the feedback is no text, or none that the template and the tokenizer take.
        """
        feedback = sample.metadata.get(self._key)
        if feedback is None or feedback == "":
            leave_out(sample)
            return
        if not isinstance(feedback, str):
            raise RewardError(
                f"the feedback of {name_sample(sample)}, {self._key!r} of its metadata, is a "
                f"{type(feedback).__name__}, not a text"
            )
        where = f"the feedback of {name_sample(sample)}"
        try:
            text = self._prompts.text(sample.prompt, feedback, where)
            text.encode("utf-8")
            (sample.teacher_prompt_tokens,) = self._prompts.ids([text], [where])
        except UnicodeEncodeError as error:
            raise RewardError(f"{where} has half of a character, which no tokenizer reads") from error
        except UserError as error:  # a fault of the run by now: what was learned is saved
            raise RewardError(str(error)) from error


def feedback_prompts(options: Options, tokenizer: PreTrainedTokenizerBase) -> FeedbackPrompts | None:
    """None where no feedback is listened to."""
    return FeedbackPrompts(options, tokenizer) if hears_feedback(options) else None
