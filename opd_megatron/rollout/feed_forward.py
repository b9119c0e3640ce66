"""The feed-forward part of a layer while decoding: a single gated unit, or a mixture of experts.

Both run the weights of the transformers modules. Shape legend: ``N`` tokens, ``h`` hidden size, ``f`` feed-forward
size, ``F`` twice that, ``E`` experts, ``k`` experts of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FeedForward = Callable[[Tensor, Tensor], Tensor]
"""Of the residual and the normed hidden states, ``[N, h]`` each, to the residual with the layer's output added."""


def join(modules: Sequence[nn.Module], name: str) -> Tensor:
    """Join a parameter of several modules along dimension 0 and leave each module a view of its part.

    Weights that later arrive in the modules are then in the joined tensor as well, and nothing is held twice.
    """
    parts = [getattr(module, name) for module in modules]
    joined = torch.cat([part.detach() for part in parts])
    for module, part in zip(modules, joined.split([len(part) for part in parts]), strict=True):
        setattr(module, name, nn.Parameter(part, requires_grad=False))
    return joined


def read_feed_forward(mlp: Any) -> FeedForward:
    """The computation of a transformers ``mlp`` module, whose weights become views of joined tensors."""
    if not hasattr(mlp, "experts"):
        return _read_unit(mlp)
    has_shared = hasattr(mlp, "shared_expert")
    return Experts(
        router_Eh=mlp.gate.weight,
        gate_up_EFh=mlp.experts.gate_up_proj,
        down_Ehf=mlp.experts.down_proj,
        topk=int(mlp.gate.top_k),
        normalise=bool(mlp.gate.norm_topk_prob),
        shared=_read_unit(mlp.shared_expert) if has_shared else None,
        shared_gate_1h=mlp.shared_expert_gate.weight if has_shared else None,
    )


def _read_unit(mlp: Any) -> GatedUnit:
    return GatedUnit(join([mlp.gate_proj, mlp.up_proj], "weight"), mlp.down_proj.weight)


@dataclass(frozen=True)
class GatedUnit:
    """``down(silu(gate(x)) * up(x))`` with gate and up in one matrix, ``[2f, h]``."""

    gate_up_Fh: Tensor
    down_hf: Tensor

    def __call__(self, residual_Nh: Tensor, normed_Nh: Tensor) -> Tensor:
        return torch.addmm(residual_Nh, _activation(normed_Nh, self.gate_up_Fh), self.down_hf.t())


def _activation(normed_Nh: Tensor, gate_up_Fh: Tensor) -> Tensor:
    """``silu(gate(x)) * up(x)``, ``[N, f]``."""
    gate, up = F.linear(normed_Nh, gate_up_Fh).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _unit(normed_Nh: Tensor, gate_up_Fh: Tensor, down_hf: Tensor) -> Tensor:
    return F.linear(_activation(normed_Nh, gate_up_Fh), down_hf)


@dataclass(frozen=True)
class Experts:
    """The ``topk`` most probable of ``E`` gated units for each token, and a shared one for all."""

    router_Eh: Tensor
    gate_up_EFh: Tensor
    down_Ehf: Tensor
    topk: int
    normalise: bool
    shared: GatedUnit | None
    shared_gate_1h: Tensor | None

    def __call__(self, residual_Nh: Tensor, normed_Nh: Tensor) -> Tensor:
        weight_Nk, chosen_Nk = torch.softmax(F.linear(normed_Nh, self.router_Eh).float(), dim=-1).topk(self.topk)
        if self.normalise:
            weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        # Tokens in the order of their experts, so that each expert multiplies once.
        chosen = chosen_Nk.flatten()
        order = chosen.argsort(stable=True)
        rows = order // self.topk
        counts = torch.bincount(chosen, minlength=len(self.router_Eh)).tolist()
        outputs = [
            _unit(part, self.gate_up_EFh[expert], self.down_Ehf[expert])
            for expert, part in enumerate(normed_Nh[rows].split(counts))
            if len(part)
        ]
        weighted = torch.cat(outputs) * weight_Nk.flatten()[order, None].to(normed_Nh.dtype)
        total_Nh = residual_Nh.index_add(0, rows, weighted)
        if self.shared is None or self.shared_gate_1h is None:
            return total_Nh
        shared_Nh = _unit(normed_Nh, self.shared.gate_up_Fh, self.shared.down_hf)
        return torch.addcmul(total_Nh, torch.sigmoid(F.linear(normed_Nh, self.shared_gate_1h)), shared_Nh)


def tensors_by_stored_name(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a transformers model under the names that its checkpoints have, tied ones under each of theirs.

    transformers keeps the experts of a layer in two tensors and stores them one by one: those are views.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer, separator, kind = name.partition(".mlp.experts.")
        if not separator:
            found[name] = parameter
            continue
        for number, weight in enumerate(parameter.detach()):
            parts = weight.chunk(2) if kind == "gate_up_proj" else (weight,)
            projections = ("gate", "up") if kind == "gate_up_proj" else ("down",)
            for projection, part in zip(projections, parts, strict=True):
                found[f"{layer}.mlp.experts.{number}.{projection}_proj.weight"] = part
    return found
