"""A reward that gives feedback, to copy from: a wrong response hears of a right one to the same prompt.

    python train.py ... --custom-rm-path examples.own_objectives.feedback:right_sibling \
        --use-opd --opd-type megatron --opd-teacher self --opd-self-weights ema --opd-self-feedback \
        --opd-self-context-key feedback --opd-self-template $'{prompt}\n\nA right answer:\n{context}\n\nNow you.'
"""

from __future__ import annotations

from opd_megatron.sample import Sample


def right_sibling(samples: list[Sample]) -> list[float]:
    """1 for a response whose last word is the label, else 0.

    The parameter's name asks for all samples of a prompt together. What stands in a sample's metadata when this
    returns is what the teacher sees; a sample without it (a right one, or one of a prompt that nobody solved) is left
    out of the distillation term.
    """
    rewards = [float(sample.response.split()[-1:] == [str(sample.label)]) for sample in samples]
    right = [sample.response for sample, reward in zip(samples, rewards, strict=True) if reward]
    for sample, reward in zip(samples, rewards, strict=True):
        if right and not reward:
            sample.metadata["feedback"] = right[0]
    return rewards
