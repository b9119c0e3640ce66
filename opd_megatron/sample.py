"""The one record that travels through every room: a sampled response and all that is known about it.

Shape legend: ``T`` response tokens of one sample, ``K`` teacher top-k entries.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from opd_megatron.system import replacing

LARGEST_REWARD = float(np.finfo(np.float32).max)
"""Size of a reward beyond which advantages are no numbers: the loss is in float32."""


class Status(enum.StrEnum):
    """How the generation of a response ended."""

    COMPLETED = "completed"
    """The end token or a stop string was sampled."""
    TRUNCATED = "truncated"
    """The response was cut at the length limit."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """Nothing was generated because the prompt does not fit; the response is empty."""


def _per_token(dtype: type) -> Any:
    return field(default=None, metadata={"per_token": np.dtype(dtype)})


@cache
def _per_token_fields(kind: type) -> tuple[tuple[str, np.dtype], ...]:
    """Names and dtypes of the per-token fields that a record declares; records are checked several times a rollout."""
    return tuple((item.name, item.metadata["per_token"]) for item in fields(kind) if "per_token" in item.metadata)


def _coerce_per_token(record: Any, length: int, owner: str) -> None:
    """Turn every declared per-token field into an array of its dtype and check its length."""
    for name, dtype in _per_token_fields(record.__class__):
        value = getattr(record, name)
        if value is None:
            continue
        array = np.asarray(value, dtype=dtype)
        if array.ndim == 0 or array.shape[0] != length:
            raise ValueError(f"{owner}: {name} has shape {array.shape}, expected {length} tokens")
        setattr(record, name, array)


@dataclass
class TeacherScores:
    """What a teacher says about the ``T`` response tokens of one sample.

    ``log_probs_T`` are log-probabilities at ``temperature``; where ``valid_T`` is false they mean nothing.
    ``top_ids_TK`` are the most probable tokens of the teacher, or of the student where it was asked about those, in
    descending order. ``top_log_probs_TK`` are the teacher's log-probabilities of them and ``tail_log_mass_T`` the log
    of its mass outside them.
    """

    log_probs_T: np.ndarray = _per_token(np.float32)
    valid_T: np.ndarray = _per_token(np.bool_)
    top_ids_TK: np.ndarray | None = _per_token(np.int32)
    top_log_probs_TK: np.ndarray | None = _per_token(np.float32)
    tail_log_mass_T: np.ndarray | None = _per_token(np.float32)
    temperature: float = 1.0
    teacher: str = ""
    weight_version: str = ""

    def __post_init__(self) -> None:
        if self.log_probs_T is None:
            raise ValueError("TeacherScores need log_probs_T")
        length = len(self.log_probs_T)
        if self.valid_T is None:
            self.valid_T = np.ones(length, dtype=np.bool_)
        _coerce_per_token(self, length, f"scores of teacher {self.teacher!r}")


@dataclass
class Sample:
    """A prompt, the response sampled for it, and what reward, teacher and trainer add.

    ``index`` is unique in a rollout; samples of one prompt share ``group_index``. ``loss_mask`` is 1 on the response
    tokens that are trained on. ``rollout_log_probs`` come from the rollout engine at the sampling temperature.
    ``old_log_probs`` and ``ref_log_probs`` come from the trainer, and so do ``entropies``, the student's at the tokens
    before the step, where tokens are chosen by them; ``advantages`` exclude the OPD term, which is added
    in the loss, multiplied by ``opd_weights`` (None: 1); ``opd_future`` is what its discount adds of the tokens that
    follow, and ``opd_target`` takes the place of the teacher's log-probabilities in it (None: theirs). ``values`` are
    what a critic expected before each token and ``returns`` what it is to learn; both are of the task alone.
    ``greedy_reward`` is that of the greedy response to the prompt, where an estimator compares with it.
    ``teacher_failure`` is the kind of failure for which the sample has no teacher scores, while the task still trains
    on it: its ``teacher_scores`` are valid nowhere. ``weight_version`` is that of the engine's weights that made the
    response and ``weight_versions`` all of them, in order, where there were several. Every per-token field covers the
    response only and has ``T`` entries; ``T`` may be 0. ``teacher_prompt_tokens`` are the ids of the prompt that the
    teacher sees before the response (None: the student's).
    ``from_data`` says that the student did not sample the response: it stands in the prompt's row, or the teacher
    sampled it. It has neither reward nor advantage and takes no part in what the student's samples estimate.
    """

    index: int
    group_index: int
    prompt: Any
    prompt_tokens: np.ndarray
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    response: str = ""
    response_tokens: np.ndarray = _per_token(np.int64)
    loss_mask: np.ndarray = _per_token(np.bool_)
    rollout_log_probs: np.ndarray | None = _per_token(np.float32)
    old_log_probs: np.ndarray | None = _per_token(np.float32)
    ref_log_probs: np.ndarray | None = _per_token(np.float32)
    entropies: np.ndarray | None = _per_token(np.float32)
    advantages: np.ndarray | None = _per_token(np.float32)
    values: np.ndarray | None = _per_token(np.float32)
    returns: np.ndarray | None = _per_token(np.float32)
    opd_weights: np.ndarray | None = _per_token(np.float32)
    opd_future: np.ndarray | None = _per_token(np.float32)
    opd_target: np.ndarray | None = _per_token(np.float32)
    teacher_scores: TeacherScores | None = None
    teacher_failure: str | None = None
    reward: float | None = None
    reward_error: str | None = None
    greedy_reward: float | None = None
    status: Status = Status.COMPLETED
    weight_version: str = ""
    weight_versions: tuple[str, ...] = ()
    teacher_prompt_tokens: np.ndarray | None = None
    from_data: bool = False

    def __post_init__(self) -> None:
        self.status = Status(self.status)
        self.weight_versions = tuple(self.weight_versions)
        self.prompt_tokens = np.asarray(self.prompt_tokens, dtype=np.int64).reshape(-1)
        if self.teacher_prompt_tokens is not None:
            self.teacher_prompt_tokens = np.asarray(self.teacher_prompt_tokens, dtype=np.int64).reshape(-1)
        if self.response_tokens is None:
            self.response_tokens = np.zeros(0, dtype=np.int64)
        if self.loss_mask is None:
            self.loss_mask = np.ones(len(self.response_tokens), dtype=np.bool_)
        self.validate()

    def validate(self) -> None:
        """Check that every per-token field has one entry per response token; raises ``ValueError`` if not."""
        _coerce_per_token(self, len(self.response_tokens), f"sample {self.index}")
        if self.teacher_scores is not None and len(self.teacher_scores.log_probs_T) != len(self.response_tokens):
            raise ValueError(
                f"sample {self.index}: the teacher scored {len(self.teacher_scores.log_probs_T)} tokens, "
                f"the response has {len(self.response_tokens)}"
            )

    @property
    def target_log_probs(self) -> np.ndarray | None:
        """What the distillation term compares with, ``[T]``; None where no teacher scored the sample."""
        if self.opd_target is not None or self.teacher_scores is None:
            return self.opd_target
        return self.teacher_scores.log_probs_T

    @property
    def response_length(self) -> int:
        return len(self.response_tokens)

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and response ids as one int64 array."""
        return np.concatenate([self.prompt_tokens, self.response_tokens])

    def seen_by_teacher(self) -> Sample:
        """This response behind the prompt that the teacher sees; the sample itself where that is the student's."""
        if self.teacher_prompt_tokens is None:
            return self
        return replace(self, prompt_tokens=self.teacher_prompt_tokens, teacher_prompt_tokens=None)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping that :meth:`from_json` reads back without loss (float32 survives exactly)."""
        return _to_json(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Sample:
        """Inverse of :meth:`to_json`; raises ``TypeError`` or ``ValueError`` on a record that is not a sample."""
        record = dict(record)
        scores = record.pop("teacher_scores", None)
        return cls(**record, teacher_scores=None if scores is None else TeacherScores(**scores))


def sampled_by_student(samples: Iterable[Sample]) -> list[Sample]:
    """Those of which the student made the response."""
    return [sample for sample in samples if not sample.from_data]


def prompt_as_response(sample: Sample) -> Sample:
    """``sample`` with all tokens but the first as its response; what is per token is 0 on those of the prompt.

    Raises ``ValueError`` for an empty prompt.
    """
    count = len(sample.prompt_tokens) - 1
    if count < 0:
        raise ValueError(f"sample {sample.index} has an empty prompt")
    tokens, scores = sample.tokens, sample.teacher_scores
    return replace(
        sample,
        **_preceded(sample, count),
        prompt_tokens=tokens[:1],
        response_tokens=tokens[1:],
        teacher_scores=None if scores is None else replace(scores, **_preceded(scores, count)),
    )


def _preceded(record: Any, count: int) -> dict[str, Any]:
    """The per-token fields of a record with ``count`` zeros before them, but for the tokens themselves."""
    found = {}
    for name, _ in _per_token_fields(record.__class__):
        values = getattr(record, name)
        if values is not None and name != "response_tokens":
            found[name] = np.concatenate([np.zeros((count, *values.shape[1:]), dtype=values.dtype), values])
    return found


def _to_json(record: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, TeacherScores):
            value = _to_json(value)
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        out[item.name] = value
    return out


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write one JSON object a line, through a temporary name."""
    with replacing(Path(path)) as stream:
        for sample in samples:
            stream.write(json.dumps(sample.to_json(), ensure_ascii=False) + "\n")


def read_samples(path: str | Path) -> Iterator[Sample]:
    """Read what :func:`write_samples` wrote; a bad line raises ``ValueError`` with its number."""
    with Path(path).open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield Sample.from_json(json.loads(line))
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: not a recorded sample ({error})") from error
