"""A mixture of experts: what describes it, in a Hugging Face config and in MODEL_ARGS; no torch, no Megatron."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError


@dataclass(frozen=True)
class MixtureOfExperts:
    """The feed-forward part of the layers that choose ``moe_router_topk`` of ``num_experts`` for each token.

    The fields have Megatron's names. Without ``moe_router_pre_softmax`` the weights of the chosen experts add up to 1
    (``norm_topk_prob`` of the Hugging Face configs); with it they are their share of the softmax over all experts.
    ``moe_layer_freq`` has a 1 for each layer with experts and a 0 for each dense one. The shared expert, which sees
    every token, may be weighed by a sigmoid gate.
    """

    num_experts: int
    moe_ffn_hidden_size: int
    moe_router_topk: int
    moe_router_pre_softmax: bool
    moe_layer_freq: tuple[int, ...]
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False


FIELDS = tuple(item.name for item in dataclasses.fields(MixtureOfExperts))
"""Names of the fields of a mixture, which are those of the options."""


def layer_pattern(text: str, num_layers: int) -> tuple[int, ...]:
    """Megatron's ``--moe-layer-freq`` as one 0 or 1 for each layer.

    A number N means every N-th layer, beginning with the first; otherwise it is a list of one 0 or 1 per layer, written
    out or with ``+`` and ``*``: ``[0]*3+[1]*45``. Raises ``ValueError`` if it is neither or has another length.
    """
    pattern = _evaluate(ast.parse(text.strip(), mode="eval").body)
    if isinstance(pattern, int):
        if pattern < 1:
            raise ValueError("the number must be at least 1")
        return tuple(int(layer % pattern == 0) for layer in range(num_layers))
    if set(pattern) - {0, 1}:
        raise ValueError("the list may hold 0 and 1 only")
    if len(pattern) != num_layers:
        raise ValueError(f"the list has {len(pattern)} entries for {num_layers} layers")
    return tuple(pattern)


def _evaluate(node: ast.expr) -> int | list[int]:
    """The value of an expression of whole numbers, lists of them, ``+`` and ``*``."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        entries = [_evaluate(entry) for entry in node.elts]
        if all(isinstance(entry, int) for entry in entries):
            return entries  # type: ignore[return-value]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int) and right <= 10_000:
            return left * right
    raise ValueError("neither a number nor a list")


def _layer_frequency(value: str) -> str | None:
    try:
        if isinstance(_evaluate(ast.parse(value.strip(), mode="eval").body), int | list):
            return None
    except (SyntaxError, ValueError):
        pass
    return "must be a number, or a list of one 0 or 1 per layer such as [0]*3+[1]*45"


@dataclass(frozen=True)
class MixtureOptions:
    """Options of a mixture of experts, a part of MODEL_ARGS"""

    num_experts: int | None = option(None, "experts of each layer that has any", minimum=1)
    moe_ffn_hidden_size: int | None = option(None, "feed-forward size of one expert", minimum=1)
    moe_router_topk: int | None = option(None, "experts that each token goes to", minimum=1)
    moe_router_pre_softmax: bool = option(
        False, "weigh experts by the softmax over all (default: over the chosen ones, so that the weights add up to 1)"
    )
    moe_layer_freq: str | None = option(
        None,
        "layers with experts: every N-th from the first, or a list such as [0]*3+[1]*45 (default: all)",
        check=_layer_frequency,
    )
    moe_shared_expert_intermediate_size: int | None = option(
        None, "feed-forward size of the expert that sees every token", minimum=1
    )
    moe_shared_expert_gate: bool = option(False, "weigh the shared expert by a sigmoid gate")
    moe_router_dtype: str | None = option(
        None, "precision of the router (default: that of the model)", choices=("fp32", "fp64")
    )
    moe_router_load_balancing_type: str = option(
        "aux_loss",
        "auxiliary loss over the tokens of a micro-batch, or of each sequence (which no layout changes)",
        choices=("aux_loss", "seq_aux_loss", "none"),
    )
    moe_aux_loss_coeff: float = option(0.0, "coefficient of the auxiliary loss", minimum=0.0)
    moe_token_dispatcher_type: str = option(
        "alltoall", "how tokens reach their experts (the others need sequences of one length)", choices=("alltoall",)
    )


def mixture_from_hf(config: Mapping[str, Any], source: str) -> MixtureOfExperts | None:
    """The mixture of a ``qwen2_moe`` or ``qwen3_moe`` config, None if no layer has one.

    Raises :class:`UserError` if a value is missing or cannot be.
    """
    layers, only_dense = config["num_hidden_layers"], set(config.get("mlp_only_layers") or ())
    experts = config["num_experts"] if "num_experts" in config else config.get("num_local_experts")
    step = config.get("decoder_sparse_step", 1)
    shared = config.get("shared_expert_intermediate_size") if config["model_type"] == "qwen2_moe" else None
    values: dict[str, Any] = {
        "num_experts": experts,
        "moe_intermediate_size": config.get("moe_intermediate_size"),
        "num_experts_per_tok": config.get("num_experts_per_tok"),
        "decoder_sparse_step": step,
    }
    if config["model_type"] == "qwen2_moe":
        values["shared_expert_intermediate_size"] = shared
    for name, value in values.items():
        if type(value) is not int or value < 1:
            problem = "is missing" if value is None else f"{value!r} is no positive whole number"
            raise UserError(f"{source}: {name} {problem}")
    topk, normalised = values["num_experts_per_tok"], bool(config.get("norm_topk_prob", False))
    if topk > experts:
        raise UserError(f"{source}: num_experts_per_tok {topk} is more than num_experts {experts}")
    if topk == 1 and normalised:
        raise UserError(f"{source}: norm_topk_prob with one expert per token leaves the router nothing to say")
    pattern = tuple(int(layer not in only_dense and (layer + 1) % step == 0) for layer in range(layers))
    if not any(pattern):
        return None
    return MixtureOfExperts(
        num_experts=values["num_experts"],
        moe_ffn_hidden_size=values["moe_intermediate_size"],
        moe_router_topk=topk,
        moe_router_pre_softmax=not normalised,
        moe_layer_freq=pattern,
        moe_shared_expert_intermediate_size=shared,
        moe_shared_expert_gate=shared is not None,
    )


def as_options(mixture: MixtureOfExperts | None) -> dict[str, Any]:
    """What MODEL_ARGS would have to say about ``mixture``; without one, nothing."""
    if mixture is None:
        return {
            name: False if name in ("moe_router_pre_softmax", "moe_shared_expert_gate") else None for name in FIELDS
        }
    return {name: getattr(mixture, name) for name in FIELDS}
