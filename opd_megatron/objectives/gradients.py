"""What the gradient of an optimizer step is made of: the teacher's part, the task's part, signal and noise.

Let ``g_T`` be the gradient of the loss without the distillation term and ``g_O`` that of the term, so ``g = g_T + g_O``
is what the optimizer sees (before clipping). The prompts of the step are cut into two halves, and each gradient is the
sum of those of the halves, ``g = a + b``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALVES_OF_TASK, HALVES_OF_TEACHER = (0, 1), (2, 3)
"""Rows of the products that belong to each part."""


def gradient_statistics(products: Tensor) -> dict[str, float]:
    """Metrics from the scalar products ``[4, 4]`` of ``a_T, b_T, a_O, b_O``, the halves of both parts.

    - ``train/task_grad_norm`` and ``train/opd_grad_norm``: ``|g_T|`` and ``|g_O|``;
    - ``train/opd_grad_share``: ``|g_O| / (|g_O| + |g_T|)``;
    - ``train/grad_cosine``: the cosine between the two; below 0 teacher and task pull apart;
    - ``train/grad_snr``, ``train/task_grad_snr``, ``train/opd_grad_snr``: signal to noise in power, of the whole and of
      each part, ``4 <a, b> / |a - b|^2``. With halves that are independent and alike, ``E 4 <a, b> = |E g|^2`` and
      ``E |a - b|^2`` is the trace of the covariance of ``g``: the gradient's squared mean over its variance. An
      estimate below 0 says that the noise hides the signal.

    A ratio of nothing to nothing is NaN.
    """
    task, teacher = (_of(rows) for rows in (HALVES_OF_TASK, HALVES_OF_TEACHER))
    norms = {"train/task_grad_norm": _norm(products, task), "train/opd_grad_norm": _norm(products, teacher)}
    task_norm, teacher_norm = norms.values()
    inner = float(task @ products @ teacher)
    return {
        **norms,
        "train/opd_grad_share": _ratio(teacher_norm, teacher_norm + task_norm),
        "train/grad_cosine": _ratio(inner, task_norm * teacher_norm),
        "train/grad_snr": _signal_to_noise(products, (0, 2), (1, 3)),
        "train/task_grad_snr": _signal_to_noise(products, (0,), (1,)),
        "train/opd_grad_snr": _signal_to_noise(products, (2,), (3,)),
    }


def _of(rows: tuple[int, ...]) -> Tensor:
    """Coefficients of a sum of the four gradients."""
    return torch.tensor([float(row in rows) for row in range(4)], dtype=torch.float64)


def _norm(products: Tensor, of: Tensor) -> float:
    return math.sqrt(max(0.0, float(of @ products @ of)))


def _signal_to_noise(products: Tensor, first: tuple[int, ...], second: tuple[int, ...]) -> float:
    a, b = _of(first), _of(second)
    return _ratio(4.0 * float(a @ products @ b), float((a - b) @ products @ (a - b)))


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan
