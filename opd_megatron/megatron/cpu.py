"""Megatron-Core on a machine without CUDA: the only module that knows about one.

Megatron-Core names the CUDA device in three ways, each answered here in the narrowest scope that works:

- through functions of ``torch.cuda`` and ``Tensor.cuda`` -> replaced in the process by their CPU equivalents;
- through literal ``device="cuda"`` arguments -> the ``torch`` seen by exactly those Megatron modules is a view whose
  factory functions rewrite the argument. ``torch`` itself is left alone: replacing its factories for everyone corrupts
  buffers of models that other libraries load, without an error;
- through type names such as ``torch.cuda.FloatTensor`` in the optimizers -> answered inside
  :func:`cuda_type_names` only.

:func:`install` does nothing on a machine with CUDA, so callers never ask which device they are on.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from opd_megatron.megatron import cpu_products

_MODULES_WITH_LITERAL_DEVICES = (
    "megatron.core.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_FACTORIES = ("empty", "empty_like", "full", "ones", "ones_like", "tensor", "zeros", "zeros_like", "arange")


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def collective_backend() -> str:
    """Name of the ``torch.distributed`` backend for :func:`device`."""
    return "nccl" if has_cuda() else "gloo"


class _CpuTorch(ModuleType):
    """``torch`` as a Megatron module sees it: the same, but literal CUDA devices mean the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        requested = kwargs.get("device")
        if requested is not None and str(requested).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class _CudaTypeNames(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def cuda_type_names() -> contextlib.AbstractContextManager[Any]:
    """Inside this context ``tensor.type()`` names the CUDA type, as Megatron's optimizers expect."""
    return contextlib.nullcontext() if has_cuda() else _CudaTypeNames()


def _no_op() -> Callable[..., None]:
    """A new function each time: torch.compile's tables refuse one object under two names."""
    return lambda *args, **kwargs: None


@contextlib.contextmanager
def _no_stream(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _route_without_transformer_engine() -> None:
    """Define the function that Megatron's router looks for before it does without: the name is missing, not None."""
    utilities: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utilities, "te_general_gemm"):
        utilities.te_general_gemm = None


def _gather_padded(input_: torch.Tensor, group: Any, sizes: Sequence[int]) -> torch.Tensor:
    """Concatenate parts of ``sizes`` rows along dimension 0; gloo gathers parts of one size only."""
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_and_cut(input_: torch.Tensor, group: Any, sizes: Sequence[int]) -> torch.Tensor:
    """This rank's part, ``sizes[rank]`` rows, of the sum over the group."""
    total = input_.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total.split(list(sizes))[group.rank()].clone()


def _dispatch_tokens_on_cpu() -> None:
    """Let tokens be sent to experts: unequal parts over gloo, and counts that are on the host already."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, *rest)
        return _gather_padded(input_, group, output_split_sizes)

    def reduce_scatter_any(input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, *rest)
        return _reduce_and_cut(input_, group, input_split_sizes)

    def counts_to_host(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits"):
                counts = getattr(self, name)
                setattr(self, name, None if counts is None else counts.tolist())
        return tokens_per_expert

    mappings._gather_along_first_dim = gather_any
    mappings._reduce_scatter_along_first_dim = reduce_scatter_any
    dispatcher: Any = importlib.import_module(
        "megatron.core.transformer.moe.token_dispatcher"
    ).MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = contextlib.nullcontext()
    dispatcher._maybe_dtoh_and_synchronize = counts_to_host


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors.

    By default it gives each back to the system when it is freed, and the next one's pages are cleared anew. The process
    keeps what it needed at most.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older versions of glibc allow no more than 32 MiB; setting the other alone would fix this one at its least.
    if adjust is not None and (adjust(_MMAP_THRESHOLD, 2**30) or adjust(_MMAP_THRESHOLD, 2**25)):
        adjust(_TRIM_THRESHOLD, 2**31 - 1)


def install() -> None:
    """Prepare this process for Megatron-Core; safe to repeat. With CUDA only Megatron's own fault is mended."""
    if getattr(install, "done", False):
        return
    install.done = True  # type: ignore[attr-defined]
    _route_without_transformer_engine()
    if has_cuda():
        return
    cpu_products.install()
    _keep_freed_memory()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = _no_op()
    cuda.empty_cache = _no_op()
    cuda.set_device = _no_op()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.stream = _no_stream
    setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010  mypy rejects an assignment

    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _dispatch_tokens_on_cpu()
    view = _CpuTorch()
    for name in _MODULES_WITH_LITERAL_DEVICES:
        module: Any = importlib.import_module(name)
        module.torch = view
