"""The gated unit ``silu(gate) * up`` (SwiGLU, arXiv 2002.05202) in as few passes over memory as torch allows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor


def gated_unit(gate_up: Tensor) -> Tensor:
    """``[..., 2f]`` gate and up side by side -> ``silu(gate) * up`` ``[..., f]``."""
    product: Tensor = _GatedUnit.apply(gate_up)
    return product


class _GatedUnit(torch.autograd.Function):
    """Keeps its input alone; both gradients are written into the one tensor that the layer before wants."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        gradient = torch.empty_like(gate_up)
        grad_gate, grad_up = gradient.chunk(2, -1)
        torch.mul(F.silu(gate), grads[0], out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return gradient


class GatedMLP(MLP):
    """Megatron's feed-forward part with :func:`gated_unit` where Megatron has four operators.

    For layers without bias, clamp or offset, which are all of the families that are known here.
    """

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        gate_up, _bias = self.linear_fc1(hidden_states)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(gated_unit(gate_up))
        return output
