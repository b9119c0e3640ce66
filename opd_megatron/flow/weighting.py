"""The weights of the distillation term: everything that is known of a rollout, turned into one number for each token.

The factors multiply: masks of responses and of special tokens, weights of prompts and responses, and the choice of
tokens among those that are left. They are made here, once for the whole rollout, and never again where it is split.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import selects_by_divergence, selects_tokens
from opd_megatron.objectives.sample_weights import (
    counted_samples,
    group_means,
    group_numbers,
    paced_weights,
    reward_weights,
)
from opd_megatron.objectives.sampling import effective_share
from opd_megatron.objectives.tensors import joined, owners
from opd_megatron.objectives.token_selection import sampled_tokens, token_scores, top_tokens
from opd_megatron.objectives.weights import step_weights
from opd_megatron.sample import Sample, Status

logger = logging.getLogger(__name__)

_SELECTION_STREAM = 0x709
"""Tells the random numbers that choose tokens from those that sample them, which come of the same seed."""


def pass_rate(metadata: Mapping[str, Any], key: str) -> float:
    """The pass rate in a prompt's metadata; raises ``ValueError`` unless it is a number from 0 to 1."""
    value = metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"metadata has {'no' if value is None else 'a bad'} {key}: give a number from 0 to 1")
    return float(value)


def check_pass_rates(options: Options, metadata: Iterable[Mapping[str, Any]], source: str) -> None:
    """Raise :class:`UserError` if weights of prompts come from their ``metadata`` and one has no pass rate."""
    opd = options.opd
    if not opd.use_opd or opd.opd_prompt_weight != "paced" or opd.opd_pass_rate != "metadata":
        return
    for number, entry in enumerate(metadata, start=1):
        try:
            pass_rate(entry, opd.opd_pass_rate_key)
        except ValueError as error:
            raise UserError(f"{source}, number {number}: {error} (--opd-pass-rate metadata)") from error


class OpdWeighting:
    """Gives samples their ``opd_weights``, and remembers how often the student passed at each prompt.

    ``special_ids`` are the tokenizer's special tokens. What is remembered (``--opd-pass-rate running``) belongs in a
    checkpoint: :meth:`state_dict`.
    """

    def __init__(self, options: Options, special_ids: Collection[int]) -> None:
        self._options = options
        self._special_ids = np.array(sorted(special_ids), dtype=np.int64)
        self._history: dict[str, list[float]] = {}

    def state_dict(self) -> dict[str, list[float]]:
        """Samples seen and passes among them of each prompt, by a digest of prompt and label."""
        return {name: list(counts) for name, counts in self._history.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._history = {name: list(counts) for name, counts in state.items()}

    @property
    def is_needed(self) -> bool:
        """Whether any option gives tokens other weights than 1."""
        opd = self._options.opd
        masks = opd.opd_on != "all" or opd.opd_mask_truncated or opd.opd_mask_special_tokens
        weights = opd.opd_prompt_weight != "none" or opd.opd_reward_beta is not None
        return opd.use_opd and (masks or weights or opd.opd_mask_longer_than is not None or selects_tokens(opd))

    def apply(
        self, samples: Sequence[Sample], rollout_id: int, answers: Sequence[np.ndarray] | None = None
    ) -> dict[str, float]:
        """Multiply the samples' ``opd_weights`` and return ``opd/*`` metrics; nothing where no option asks for it.

        ``samples`` are a whole rollout with rewards and teacher scores. ``answers`` are those of the student's pass
        before the step (:func:`~opd_megatron.flow.student_pass.ask_student`), which token selection needs.
        """
        if not self.is_needed:
            return {}
        found: dict[str, float] = {}
        lengths = [sample.response_length for sample in samples]
        scored_N = joined([_scored(sample) for sample in samples]).bool()
        weights_N = (self._of_samples(samples, rollout_id, found) * self._counted(samples))[owners(lengths)]
        weights_N = weights_N * self._of_tokens(samples)
        if answers is not None and selects_tokens(self._options.opd):
            weights_N = weights_N * self._selection(samples, rollout_id, answers, weights_N, scored_N)
        if scored_N.any() and not weights_N[scored_N].any():
            logger.warning("rollout %d: no token has a weight in the distillation term", rollout_id)
        for sample, weights_T in zip(samples, weights_N.split(lengths), strict=True):
            before_T = 1.0 if sample.opd_weights is None else sample.opd_weights
            sample.opd_weights = (weights_T.numpy() * before_T).astype(np.float32)
        return found | _metrics(joined([_opd_weights(sample) for sample in samples]).double()[scored_N])

    def _counted(self, samples: Sequence[Sample]) -> Tensor:
        opd = self._options.opd
        counted_B = counted_samples(
            _rewards(samples),
            torch.tensor([sample.status == Status.TRUNCATED for sample in samples], dtype=torch.bool),
            torch.tensor([sample.response_length for sample in samples], dtype=torch.int64),
            on=opd.opd_on,
            pass_above=opd.opd_pass_above,
            mask_truncated=opd.opd_mask_truncated,
            longest=opd.opd_mask_longer_than,
        )
        return counted_B.double()

    def _of_tokens(self, samples: Sequence[Sample]) -> Tensor:
        """``[N]``: 0 at special tokens where they are masked, else 1."""
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *(sample.response_tokens for sample in samples)])
        masked = np.isin(tokens, self._special_ids) & self._options.opd.opd_mask_special_tokens
        return torch.from_numpy(~masked).double()

    def _of_samples(self, samples: Sequence[Sample], rollout_id: int, found: dict[str, float]) -> Tensor:
        """``[B]``: weight of each sample's prompt times that of the sample within its prompt."""
        opd = self._options.opd
        groups = [sample.group_index for sample in samples]
        weights_B = torch.ones(len(samples), dtype=torch.float64)
        if opd.opd_prompt_weight == "paced":
            rates_P, samples_P = self._pass_rates(samples)
            weights_P = paced_weights(rates_P, alpha=opd.opd_paced_alpha, beta=opd.opd_paced_beta, samples_P=samples_P)
            if not weights_P.any():
                logger.warning(
                    "rollout %d: every prompt has weight 0, since its pass rate is 0 or 1: the teacher is not heard",
                    rollout_id,
                )
            found["opd/pass_rate"] = float(rates_P.mean())
            weights_B = weights_P[group_numbers(groups)[0]]
        if opd.opd_reward_beta is not None:
            weights_B = weights_B * reward_weights(_rewards(samples), groups, opd.opd_reward_beta)
        return weights_B

    def _pass_rates(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        """``[P]`` pass rates and, where they are the group's own, the samples that each comes from."""
        opd = self._options.opd
        firsts: dict[int, Sample] = {}
        for sample in samples:
            firsts.setdefault(sample.group_index, sample)
        if opd.opd_pass_rate == "metadata":
            check_pass_rates(
                self._options, (sample.metadata for sample in firsts.values()), "the prompts of the rollout"
            )
            rates = [pass_rate(sample.metadata, opd.opd_pass_rate_key) for sample in firsts.values()]
            return torch.tensor(rates, dtype=torch.float64), None
        passes_B = (_rewards(samples) > opd.opd_pass_above).double()
        rates_P, counts_P = group_means(passes_B, [sample.group_index for sample in samples])
        if opd.opd_pass_rate == "group":
            return rates_P, counts_P
        for sample, rate, count in zip(firsts.values(), rates_P.tolist(), counts_P.tolist(), strict=True):
            counts = self._history.setdefault(_digest(sample), [0.0, 0.0])
            counts[0] += count
            counts[1] += round(rate * count)
        seen = [self._history[_digest(sample)] for sample in firsts.values()]
        return torch.tensor([passes / count for count, passes in seen], dtype=torch.float64), None

    def _selection(
        self,
        samples: Sequence[Sample],
        rollout_id: int,
        answers: Sequence[np.ndarray],
        weights_N: Tensor,
        scored_N: Tensor,
    ) -> Tensor:
        """``[N]``: what the choice of tokens makes of those that have a weight."""
        opd = self._options.opd
        eligible_N = scored_N & (weights_N > 0)
        entropy_N = joined([answer["student_entropy"] for answer in answers]).double()
        divergence_N = None
        if selects_by_divergence(opd):
            divergence_N = joined([answer["divergence"] for answer in answers]).double()
        scores_N = token_scores(opd.opd_token_score, entropy_N, divergence_N, eligible_N)
        if opd.opd_token_select == "sample":
            seed = self._options.training.seed
            uniform_N = torch.from_numpy(np.concatenate([_uniform(seed, rollout_id, sample) for sample in samples]))
            return sampled_tokens(
                scores_N, eligible_N, uniform_N, ratio=opd.opd_token_ratio, floor=opd.opd_token_floor
            )[0]
        sizes_N = weights_N * self._loss_weights(samples)
        return top_tokens(scores_N, eligible_N, sizes_N, ratio=opd.opd_token_ratio, least=opd.opd_token_min_score)

    def _loss_weights(self, samples: Sequence[Sample]) -> Tensor:
        """``[N]``: how much each token counts in the loss of its optimizer step."""
        options, size = self._options, self._options.global_batch_size
        masks = [sample.loss_mask for sample in samples]
        steps = [step_weights(options.objective, masks[first : first + size]) for first in range(0, len(samples), size)]
        return torch.cat([weights_T for step in steps for weights_T in step]).double()


def _scored(sample: Sample) -> np.ndarray:
    """``[T]`` bool: tokens that are trained on and that the teacher scored."""
    assert sample.teacher_scores is not None
    return sample.loss_mask & sample.teacher_scores.valid_T


def _opd_weights(sample: Sample) -> np.ndarray:
    assert sample.opd_weights is not None
    return sample.opd_weights


def _rewards(samples: Sequence[Sample]) -> Tensor:
    """``[B]``; a sample without a reward has 0."""
    return torch.tensor([float(sample.reward or 0.0) for sample in samples], dtype=torch.float64)


def _uniform(seed: int, rollout_id: int, sample: Sample) -> np.ndarray:
    """``[T]`` numbers of [0, 1) that depend on nothing but the run's seed, the rollout and the sample's index."""
    return np.random.default_rng([_SELECTION_STREAM, seed, rollout_id, sample.index]).random(sample.response_length)


def _digest(sample: Sample) -> str:
    """The same for every sample of a prompt, in this and in later rollouts."""
    label = json.dumps(sample.label, sort_keys=True, default=str).encode()
    return hashlib.sha256(sample.prompt_tokens.tobytes() + b"\0" + label).hexdigest()[:24]


def _metrics(weights_N: Tensor) -> dict[str, float]:
    """Of the weights of scored tokens."""
    known = len(weights_N) > 0
    return {
        "opd/token_kept_frac": float((weights_N > 0).double().mean()),
        "opd/weight_mean": float(weights_N.mean()),
        "opd/weight_max": float(weights_N.max()) if known else float("nan"),
        "opd/weight_ess": effective_share(weights_N),
    }
