"""The critic's network: the student's decoder with one number per position in place of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from opd_megatron.megatron.model import HiddenStateModel


class ValueHead(torch.nn.Module):
    """``w . h + b`` for each position, ``[s, b, hidden] -> [s, b, 1]`` float32; zero until it has learned something.

    Every tensor-parallel rank has the whole of it. With sequence parallelism each sees its own positions, so its
    gradient is summed over the ranks.
    """

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", True)  # noqa: B010  how Megatron marks what it sums

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float())


class ValueModel(HiddenStateModel):
    """A decoder whose last stage returns values, ``[s, b, 1]`` float32 (of this rank with sequence parallelism).

    It has no output weight, tied or not. The head comes by :meth:`add_head`, after the decoder's weights were loaded
    from a model that has none.
    """

    has_split_head = False

    def __init__(self, **settings: Any) -> None:
        # a tied output weight on the last stage would be a second copy of the embedding
        super().__init__(**(settings | {"share_embeddings_and_output_weights": False}))
        if self.post_process:
            del self.output_layer

    def add_head(self) -> None:
        """Begin to have values: a head that says 0 everywhere, where this is the last stage."""
        if self.post_process:
            norm = self.decoder.final_layernorm.weight
            self.value_head = ValueHead(self.config.hidden_size, dtype=self.config.params_dtype, device=norm.device)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        values: Tensor = self.value_head(hidden_states)
        return values

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Where the parameters lie in a checkpoint; GPTModel's own looks for an output weight."""
        return MegatronModule.sharded_state_dict(self, *args, **kwargs)
