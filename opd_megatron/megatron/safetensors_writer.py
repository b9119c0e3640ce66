"""A safetensors file written tensor by tensor, so that nothing but the tensor at hand is in memory.

The format (https://github.com/huggingface/safetensors#format) has its header first and allows spaces at the end of it.
So room for the header is left at the start of the file and filled in when all tensors are known.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types of weights that are supported, by their names in safetensors."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_BYTES = 2**16
_LONGEST_ENTRY = 200
"""Bytes of a header's entry beside the tensor's name."""


class SafetensorsWriter:
    """Writes ``path``; tensors are added one after the other, then :meth:`close` completes the file."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._stream.seek(8 + _HEADER_BYTES)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = _LONGEST_ENTRY
        self.data_bytes = 0

    def has_room(self, name: str) -> bool:
        """Whether the header can name one more tensor."""
        return self._header_bytes + len(json.dumps(name)) + _LONGEST_ENTRY <= _HEADER_BYTES

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of one of the supported types."""
        end = self.data_bytes + tensor.nbytes
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.data_bytes, end],
        }
        self._header_bytes += len(json.dumps(name)) + _LONGEST_ENTRY
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(self._stream)
        self.data_bytes = end

    def close(self) -> list[str]:
        """Write the header and sync the file to disk; returns the names of its tensors."""
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(_HEADER_BYTES)
        self._stream.seek(0)
        self._stream.write(len(header).to_bytes(8, "little") + header)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return [name for name in self._header if name != "__metadata__"]
