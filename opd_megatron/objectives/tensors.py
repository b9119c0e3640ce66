"""Per-token data of a sample, whether it comes as a tensor or as a NumPy array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

TokenArray: TypeAlias = Tensor | np.ndarray
"""``[T]`` values of the response tokens of one sample."""


def as_mask(mask_T: TokenArray) -> Tensor:
    """``[T]`` bool; a number other than 0 counts as true."""
    return _as_tensor(mask_T).bool()


def as_float64(values_T: TokenArray) -> Tensor:
    """``[T]`` float64 without gradient."""
    return _as_tensor(values_T).detach().double()


def joined(samples: Sequence[TokenArray]) -> Tensor:
    """``[N]`` values of all samples in order, without gradient: one conversion instead of one for each sample."""
    arrays = [values_T for values_T in samples if isinstance(values_T, np.ndarray)]
    if arrays and len(arrays) == len(samples):
        return torch.from_numpy(np.concatenate(arrays))
    return torch.cat([torch.zeros(0), *(_as_tensor(values_T).detach() for values_T in samples)])


def owners(lengths: Sequence[int]) -> Tensor:
    """``[N]`` int64: of which sample each of the joined values is."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))


def _as_tensor(values_T: TokenArray) -> Tensor:
    # torch.tensor copies: arrays that arrive through Ray are read-only and torch cannot share them.
    return values_T if isinstance(values_T, Tensor) else torch.tensor(values_T)
