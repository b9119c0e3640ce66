"""What a mixture of experts asks of the layout and of the options."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import Options, ParallelOptions

SizeName = Callable[[str, int], str]
"""From the end of a flag, such as ``tensor-model-parallel-size``, and its value to what messages call them."""


def plain_size(name: str, value: int) -> str:
    """The flag of a student, or of the one model of a tool."""
    return f"--{name} {value}"


def expert_layout_faults(parallel: ParallelOptions, ranks: int, named: SizeName = plain_size) -> Iterator[str]:
    """Whether the groups of ranks that hold the experts divide all ``ranks``."""
    tensor, experts = parallel.expert_tensor_size, parallel.expert_model_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    if experts > 1 and ranks % (tensor * experts * pipeline):
        yield (
            f"{named('expert-model-parallel-size', experts)} x {named('pipeline-model-parallel-size', pipeline)} x "
            f"{tensor} tensor-parallel ranks of an expert does not divide the {ranks} ranks: the experts are spread "
            "over the ranks that the other kinds of parallelism leave, or over the tensor-parallel ones with "
            f"{named('expert-tensor-parallel-size', 1)}"
        )
    if experts == 1 and tensor != parallel.tensor_model_parallel_size:
        yield (
            f"{named('expert-tensor-parallel-size', tensor)} is not "
            f"{named('tensor-model-parallel-size', parallel.tensor_model_parallel_size)}, which needs "
            f"{named('expert-model-parallel-size', 2)} or more"
        )


def expert_model_faults(
    parallel: ParallelOptions, model: ModelArchitecture, owner: str, named: SizeName
) -> Iterator[str]:
    """What of the experts of ``model`` cannot be split; ``owner`` stands in the messages."""
    mixture = model.mixture
    if mixture is None:
        return
    experts, tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    if mixture.num_experts % experts:
        what = f"{mixture.num_experts} experts"
        yield f"{named('expert-model-parallel-size', experts)} does not divide the {owner}'s {what}"
    if mixture.moe_ffn_hidden_size % tensor:
        flag = "expert-tensor-parallel-size" if parallel.expert_tensor_parallel_size else "tensor-model-parallel-size"
        what = f"{mixture.moe_ffn_hidden_size} feed-forward channels of an expert"
        yield f"{named(flag, tensor)} does not divide the {owner}'s {what}"
    shared, size = mixture.moe_shared_expert_intermediate_size or 0, parallel.tensor_model_parallel_size
    if shared % size:
        what = f"{shared} feed-forward channels of the shared expert"
        yield f"{named('tensor-model-parallel-size', size)} does not divide the {owner}'s {what}"


def expert_option_faults(options: Options, student: ModelArchitecture) -> Iterator[str]:
    """Training options of a mixture that the student is not, and what training one needs."""
    if student.mixture is None:
        for name in ("moe_router_dtype", "moe_router_load_balancing_type", "moe_aux_loss_coeff"):
            if name in options.given:
                yield f"{flag_of(name)} is for a mixture of experts, which the student is not: leave it out"
        return
    parallel, model = options.parallel, options.model
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield "--tensor-model-parallel-size above 1 with a mixture of experts needs --sequence-parallel: add it"
    if parallel.recompute_method == "block":
        # Megatron hands the mask of the sequences, which routers need, to no layer that is not recomputed.
        yield "--recompute-method block does not go with a mixture of experts: use uniform"
    if model.moe_router_load_balancing_type == "none" and model.moe_aux_loss_coeff > 0:
        yield "--moe-aux-loss-coeff has no effect with --moe-router-load-balancing-type none: leave out one of them"
