"""Whether an engine speaks with the weights that the trainer has: both score one fixed text.

A server may report success for an update that changed nothing, a part, or something else. Three questions are asked
after each update. Do the log-probabilities agree? Where the trainer's have moved since the last update that moved them:
have the engine's moved, too? And where they have moved by more than rounding does: have they at each token by as much?
The second one finds updates that were lost although their steps were smaller than the tolerance, the third one those of
which a part was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_megatron.config.errors import RunError

PROBE_TEXT = "The quick brown fox jumps over the lazy dog; 12 * 34 = 408, and 4827 + 1936 = 6763."
PROBE_TOKENS = 96
"""Length of the probe: tokens of the text, and then ids from all over the vocabulary."""
_PROBE_SEED = 20261121
_STANDS_STILL = 0.1
"""An engine that moved less than this part of what the trainer moved has not been updated."""
_PART_MISSING = 0.5
"""An engine whose movement differs from the trainer's by more than this part of it has been updated in part."""
_ABOVE_ROUNDING = 8.0
"""A movement this many times as large as what the two differed by before is not rounding."""


@dataclass(frozen=True)
class Tolerance:
    """``gap``: largest mean difference of two models with the same weights; ``movement``: smallest one to judge by.

    ``by_token``: smallest movement that is compared token by token.
    """

    gap: float
    movement: float
    by_token: float


TOLERANCES = {"float32": Tolerance(1e-3, 1e-5, 5e-5), "bfloat16": Tolerance(0.1, 1e-3, float("inf"))}
"""By data type of the weights, in nats per token of the probe."""


def probe_tokens(text_ids: Sequence[int], vocab_size: int, positions: int) -> np.ndarray:
    """The ids int64 ``[P]`` that are scored, the same in every run with this tokenizer.

    Half of them are the text's, as far as it goes; the rest is drawn from the vocabulary without repetition, so that a
    small vocabulary occurs as a whole and every row of its embedding is looked at.
    """
    length = min(PROBE_TOKENS, positions)
    known = np.asarray([token for token in text_ids if 0 <= token < vocab_size][: length // 2], dtype=np.int64)
    drawn = np.random.default_rng(_PROBE_SEED).permutation(vocab_size)[: length - len(known)]
    return np.concatenate([known, drawn.astype(np.int64)])


class WeightCheck:
    """Compares the scores of one engine with the trainer's, update by update."""

    def __init__(self, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self._before: tuple[np.ndarray, np.ndarray] | None = None
        self._version_before = ""

    def compare(self, engine: np.ndarray, trainer: np.ndarray, version: str, server: str) -> None:
        """Raise :class:`RunError` with the numbers unless the engine has the weights that the trainer has.

        ``engine`` and ``trainer`` are log-probabilities ``[P-1]`` of the probe.
        """
        wanted = self._tolerance
        difference = np.abs(engine.astype(np.float64) - trainer)
        gap = float(difference.mean())
        if not gap <= wanted.gap:
            worst = int(difference.argmax())
            raise RunError(
                f"{server}: after the update to weights {version} it does not speak with the trainer's weights: its "
                f"log-probabilities of the probe differ by {gap:.3g} in the mean (tolerance {wanted.gap:g}), most at "
                f"token {worst + 1} (engine {engine[worst]:.4f}, trainer {trainer[worst]:.4f}): the update was lost, "
                "partial or of another model"
            )
        if self._before is not None:
            engine_before, trainer_before = self._before
            engine_moved = engine.astype(np.float64) - engine_before
            trainer_moved = trainer.astype(np.float64) - trainer_before
            moved, expected = float(np.abs(engine_moved).mean()), float(np.abs(trainer_moved).mean())
            if expected > wanted.movement and moved < _STANDS_STILL * expected:
                raise RunError(
                    f"{server}: after the update to weights {version} it still speaks with weights "
                    f"{self._version_before}: its log-probabilities of the probe moved by {moved:.3g} in the mean, the "
                    f"trainer's by {expected:.3g}"
                )
            rounding = float(np.abs(engine_before.astype(np.float64) - trainer_before).mean())
            apart = float(np.abs(engine_moved - trainer_moved).mean())
            compared = expected > max(wanted.by_token, _ABOVE_ROUNDING * rounding)
            if compared and apart > _PART_MISSING * expected:
                raise RunError(
                    f"{server}: after the update to weights {version} a part of it is missing: token by token, the "
                    f"movement of its log-probabilities of the probe since weights {self._version_before} is "
                    f"{apart:.3g} from the trainer's, which is {expected:.3g} in the mean"
                )
            if expected <= wanted.movement or (not compared and np.isfinite(wanted.by_token)):
                return  # many small steps are judged together: each alone would be within the tolerance
        self._before, self._version_before = (engine, trainer), version
