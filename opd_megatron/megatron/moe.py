"""Mixtures of experts: the layer spec, experts on plain torch, and a router that balances and counts.

Megatron-Core's own layer, token dispatcher and router do the work. What is added here: grouped experts built from torch
that have Transformer Engine's parameter names and checkpoint keys, and a router whose auxiliary loss is a part of the
step's loss whatever the layout.

Shape legend: ``N`` tokens of this rank's micro-batch, ``n`` its sequences, ``E`` experts, ``k`` experts of one token,
``h`` hidden size, ``G`` groups of tokens that are balanced each on their own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from opd_megatron.config.mixture import MixtureOfExperts
from opd_megatron.config.options import Options, ParallelOptions


def mixture_settings(mixture: MixtureOfExperts, parallel: ParallelOptions, router_dtype: str | None) -> dict[str, Any]:
    """The part of Megatron's ``TransformerConfig`` that describes a mixture and its layout."""
    uniform = all(mixture.moe_layer_freq)
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_ffn_hidden_size": mixture.moe_ffn_hidden_size,
        "moe_router_topk": mixture.moe_router_topk,
        "moe_router_pre_softmax": mixture.moe_router_pre_softmax,
        "moe_router_dtype": router_dtype,
        # Layers of one kind are stored as one tensor; else each layer has keys of its own.
        "moe_layer_freq": 1 if uniform else list(mixture.moe_layer_freq),
        "moe_shared_expert_intermediate_size": mixture.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": mixture.moe_shared_expert_gate,
        "moe_grouped_gemm": True,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        # The router balances by itself, see ExpertRouter.
        "moe_router_load_balancing_type": "none",
    }


def layer_pattern(config: TransformerConfig) -> list[bool]:
    """Which of all the model's layers have experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    return [True] * config.num_layers if isinstance(frequency, int) else [bool(entry) for entry in frequency]


def transformer_engine_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """A layer with experts from Transformer Engine's modules."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
    )
    spec.submodules.mlp.submodules.router = ExpertRouter
    return spec


def torch_layer_spec(dense: ModuleSpec, norm: type) -> ModuleSpec:
    """The layer ``dense`` with experts in place of its feed-forward part; ``norm`` is the norm before them."""
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    grouped = MLPSubmodules(linear_fc1=GroupedColumnLinear, linear_fc2=GroupedRowLinear)
    spec = copy.deepcopy(dense)
    spec.submodules.pre_mlp_layernorm = norm
    spec.submodules.mlp = ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=TEGroupedMLP, submodules=grouped),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linear),
            router=ExpertRouter,
        ),
    )
    return spec


class GroupedLinear(torch.nn.Module):
    """One linear map per expert of this rank, ``weight0`` ``[out, in]`` and so on, as Transformer Engine names them.

    ``split_dim`` is the dimension that the tensor-parallel ranks of an expert share. Tokens come from the dispatcher
    sorted by expert and are already those of this rank, so there is no communication.
    """

    split_dim: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.groups = pg_collection
        shape = [output_size, input_size]
        shape[self.split_dim] //= pg_collection.expt_tp.size()
        for expert in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, tokens_Nh: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """``[N, in]`` tokens, ``tokens_per_expert`` of each expert in turn -> ``[N, out]``."""
        parts = tokens_Nh.split(tokens_per_expert)
        outputs = [F.linear(part, getattr(self, f"weight{expert}")) for expert, part in enumerate(parts)]
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """All experts of all ranks as one tensor ``weight`` whose first dimension counts them."""
        rank, ranks = self.groups.ep.rank(), self.groups.ep.size()
        found: dict[str, Any] = {}
        for expert in range(self.num_gemms):
            place = (len(sharded_offsets), rank * self.num_gemms + expert, ranks * self.num_gemms)
            weight = getattr(self, f"weight{expert}")
            (sharded,) = make_sharded_tensors_for_checkpoint(
                {"weight": weight},
                prefix,
                {"weight": self.split_dim},
                (*sharded_offsets, place),
                tp_group=self.groups.expt_tp,
                dp_cp_group=self.groups.expt_dp,
            ).values()
            found[f"{prefix}weight{expert}"] = sharded
        return found


class GroupedColumnLinear(GroupedLinear):
    """Grouped linear maps whose outputs are split over the tensor-parallel ranks of an expert."""

    split_dim = 0


class GroupedRowLinear(GroupedLinear):
    """Grouped linear maps whose inputs are split over the tensor-parallel ranks of an expert."""

    split_dim = 1


def mark_expert_weights(model: MegatronModule) -> None:
    """Tell Megatron which weights are those of experts.

    ``allreduce`` off means that the gradient is summed over the ranks with the same experts only. Every rank that
    counts an expert's gradient norm has another part of it, hence the mark of a shard.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            setattr(parameter, "allreduce", model.config.expert_model_parallel_size == 1)  # noqa: B010
            if not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, int("linear_fc2" in name), 1)


@dataclass(frozen=True)
class LoadBalancing:
    """The auxiliary loss: ``aux_loss``, ``seq_aux_loss`` or ``none``, its coefficient, and the sequences of a step."""

    kind: str = "none"
    coefficient: float = 0.0
    sequences_per_step: int = 1

    @property
    def active(self) -> bool:
        return self.kind != "none" and self.coefficient > 0


def balance_loss(scores_NE: Tensor, routing_map_NE: Tensor, member_NG: Tensor, topk: int, group: Any = None) -> Tensor:
    """Auxiliary loss ``[G]`` of each group of tokens; this rank's share of it where ``group`` splits the tokens.

    ``L = E / (k T^2) * sum_e c_e sum_t p_te`` over the ``T`` tokens of the group, with ``c_e`` the tokens sent to
    expert e and ``p_te`` the softmax over all experts: 1 if all experts get the same. The gradient goes through ``p``
    alone. It is the load balancing loss of the Switch Transformer (arXiv 2101.03961, eq. 4 to 6) for k experts per
    token.

    ``scores_NE`` are the softmax, ``routing_map_NE`` and ``member_NG`` bool; tokens of no group are left out, and a
    group without tokens has the loss 0.
    """
    members = member_NG.to(scores_NE.dtype)
    counts_GE = members.t() @ routing_map_NE.to(scores_NE.dtype)
    if group is not None and group.size() > 1:
        dist.all_reduce(counts_GE, group=group)
    tokens_G = counts_GE.sum(1) / topk
    scale_G = scores_NE.shape[1] / (topk * tokens_G.square().clamp(min=1.0))
    return scale_G * (counts_GE * (members.t() @ scores_NE)).sum(1)


class ExpertRouter(TopKRouter):
    """Megatron's top-k router with an auxiliary loss that is a sum over the step, and with counts for the metrics.

    The loss is ``coefficient * sum_G n_G L_G / sequences_per_step`` for each layer, ``n_G`` being the sequences of the
    group. The groups of ``seq_aux_loss`` are the sequences, so no layout changes it. Those of ``aux_loss`` are the
    micro-batches: it depends on which samples are in one together, and on nothing else.
    """

    balancing = LoadBalancing()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tally: Tensor | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choices ``[N, E]`` for ``logits`` ``[s, b, E]``.

        ``padding_mask`` ``[s, b, n]`` bool says which of the micro-batch's sequences each position is of (none: it is
        padding); under sequence parallelism it is that of the whole sequence.
        """
        probs_NE, routing_map_NE = super().routing(logits)
        if self.training and torch.is_grad_enabled():
            scores_NE = torch.softmax(logits.flatten(0, 1).float(), dim=-1)
            member_Nn = self._members(padding_mask, len(scores_NE))
            balance = None
            if self.balancing.active:
                balance = self._balance(scores_NE, routing_map_NE, member_Nn)
                probs_NE = MoEAuxLossAutoScaler.apply(probs_NE, self.balancing.coefficient * balance)
            self._count(scores_NE.detach(), routing_map_NE, member_Nn.any(1), balance)
        return probs_NE, routing_map_NE

    def _members(self, mask_sbn: Tensor | None, rows: int) -> Tensor:
        """Membership ``[N, n]`` of this rank's positions."""
        if mask_sbn is None:
            raise ValueError("a mixture of experts is trained with the mask of its sequences")
        member_Nn = mask_sbn.flatten(0, 1)
        if len(member_Nn) != rows:  # sequence parallelism: each rank has a piece of all sequences
            member_Nn = mask_sbn.chunk(self.tp_group.size())[self.tp_group.rank()].flatten(0, 1)
        return member_Nn

    def _balance(self, scores_NE: Tensor, routing_map_NE: Tensor, member_Nn: Tensor) -> Tensor:
        """This rank's share of the layer's loss, without its coefficient."""
        share = 1 / self.balancing.sequences_per_step
        if self.balancing.kind == "aux_loss":
            share *= member_Nn.shape[1]
            member_Nn = member_Nn.any(1, keepdim=True)
        loss_G = balance_loss(scores_NE, routing_map_NE, member_Nn, self.topk, self.tp_cp_group)
        return loss_G.sum() * share

    @torch.no_grad()
    def _count(self, scores_NE: Tensor, routing_map_NE: Tensor, is_token_N: Tensor, balance: Tensor | None) -> None:
        """Add this micro-batch to ``tally``: tokens per expert, sum of entropies, tokens, balance loss."""
        entropy_N = torch.special.entr(scores_NE).sum(1)
        sums = torch.stack([entropy_N[is_token_N].sum(), is_token_N.sum(), torch.zeros_like(entropy_N.sum())])
        if balance is not None:
            sums[2] = balance.detach()
        row = torch.cat([routing_map_NE[is_token_N].sum(0), sums]).double()
        self.tally = row if self.tally is None else self.tally + row


def _routers(chunks: Sequence[torch.nn.Module]) -> list[ExpertRouter]:
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, ExpertRouter)]


def set_load_balancing(chunks: Sequence[torch.nn.Module], options: Options) -> None:
    """Give the routers of a model that is trained their auxiliary loss; a dense model has none."""
    balancing = LoadBalancing(
        options.model.moe_router_load_balancing_type, options.model.moe_aux_loss_coeff, options.global_batch_size
    )
    for router in _routers(chunks):
        router.balancing = balancing


@contextlib.contextmanager
def unbalanced(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Passes that a step does not count: no auxiliary loss, and nothing of them in :func:`router_statistics`."""
    before = [(router, router.balancing, router.tally) for router in _routers(chunks)]
    for router, _, _ in before:
        router.balancing = LoadBalancing()
    try:
        yield
    finally:
        for router, balancing, tally in before:
            router.balancing, router.tally = balancing, tally


def router_statistics(chunks: Sequence[MegatronModule]) -> dict[str, float]:
    """Metrics of the routers since the last call, on every rank; a dense model has none. All ranks call it.

    Means over the layers with experts of: the entropy of the distribution over experts (nats, over the step's tokens),
    the tokens of the busiest expert over those of the average one, and the auxiliary loss where there is one.
    """
    config = chunks[0].config
    if config.num_moe_experts is None:
        return {}
    routers = _routers(chunks)
    device = next(chunks[0].parameters()).device
    table = torch.zeros(config.num_layers, config.num_moe_experts + 3, dtype=torch.float64, device=device)
    for router in routers:
        if router.tally is not None:
            table[router.layer_number - 1] += router.tally
            router.tally = None
    dist.all_reduce(table)
    table = table[torch.tensor(layer_pattern(config), device=device)]
    counts_LE, (entropy_L, tokens_L, balance_L) = table[:, :-3], table[:, -3:].unbind(1)
    means = {
        "train/router_entropy": entropy_L / tokens_L,
        "train/expert_load_max": counts_LE.amax(1) / counts_LE.mean(1),
    }
    if bool(balance_L.any()):
        means["train/load_balancing_loss"] = balance_L
    return {name: float(values_L.mean()) for name, values_L in means.items()}
