"""What tensors take: those alive at once during a piece of work, and those that autograd keeps for backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from opd_megatron.config.options import Options
from opd_megatron.megatron.critic import Critic
from opd_megatron.megatron.loss_inputs import StepLoss
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.megatron.vocab_head import token_log_probs
from opd_megatron.sample import Sample


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages that operators make while it is active, until they are freed.

    ``peak`` is the most that lived at once. Memory that an operator takes and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass
class SavedBytes:
    """Storages that autograd keeps, each counted once."""

    sizes: dict[int, int] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@contextmanager
def saved_for_backward(without: set[int]) -> Iterator[SavedBytes]:
    """Bytes that the forward passes inside keep, apart from the storages ``without`` (the weights)."""
    found = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in without:
            found.sizes[key] = tensor.untyped_storage().nbytes()
            found.held.append(tensor)  # or its address could be given out again
        return tensor

    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield found


def _bytes(tensors: Iterator[Tensor]) -> int:
    """Of all storages, each counted once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _optimizer_tensors(trainer: MegatronTrainer | Critic, weights: set[int]) -> Iterator[Tensor]:
    """Moments, and the main weights and gradients that are no views of the model's or of the gradient buffers."""
    buffers = {buffer.grad_data.untyped_storage().data_ptr() for buffer in _buffers(trainer)}
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                held = [weight, *([] if weight.grad is None else [weight.grad])]
                state = [value for value in part.optimizer.state[weight].values() if torch.is_tensor(value)]
                for tensor in [*held, *state]:
                    if tensor.untyped_storage().data_ptr() not in weights | buffers:
                        yield tensor


def _parameters(trainer: MegatronTrainer | Critic) -> Iterator[Tensor]:
    for chunk in trainer.chunks:
        yield from chunk.parameters()


def _buffers(trainer: MegatronTrainer | Critic) -> list[Any]:
    return [buffer for chunk in trainer.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def held_bytes(trainer: MegatronTrainer | Critic) -> dict[str, int]:
    """What this rank holds of a model in training after an optimizer step, by the names of an estimate."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in _parameters(trainer)}
    scorers = trainer.scorers.frozen if isinstance(trainer, MegatronTrainer) else {}
    frozen = {str(name): _bytes(scorer.model.parameters()) for name, scorer in scorers.items()}
    return {
        "weights": _bytes(_parameters(trainer)),
        "gradients": _bytes(buffer.grad_data for buffer in _buffers(trainer)),
        "optimizer": _bytes(_optimizer_tensors(trainer, weights)),
        "teacher": frozen.get("teacher", 0),
        "reference": frozen.get("reference", 0),
    }


def full_samples(options: Options, vocab_size: int) -> list[Sample]:
    """A rollout in which every prompt and response is as long as the options allow."""
    random = np.random.default_rng(0)
    prompt, response = options.rollout.rollout_max_prompt_len, options.rollout.rollout_max_response_len
    return [
        Sample(
            index=index,
            group_index=index,
            prompt="",
            prompt_tokens=random.integers(0, vocab_size, prompt),
            response_tokens=random.integers(0, vocab_size, response),
            loss_mask=np.ones(response, dtype=bool),
            advantages=np.ones(response),
        )
        for index in range(options.samples_per_rollout)
    ]


def saved_activations(trainer: MegatronTrainer) -> int:
    """Bytes that autograd keeps, before the loss, in an optimizer step of one full micro-batch on this rank."""
    samples = full_samples(trainer.options, trainer.spec.architecture.vocab_size)
    weights = {parameter.untyped_storage().data_ptr() for parameter in _parameters(trainer)}
    loss, kept = StepLoss.__call__, [0]
    with saved_for_backward(weights) as found, pytest.MonkeyPatch.context() as patch:

        def watched(*arguments: Any) -> Any:
            kept[0] = found.total
            return loss(*arguments)

        patch.setattr(StepLoss, "__call__", watched)
        trainer.train(samples)
    return kept[0] or found.total  # only the last pipeline stage has a loss


def measured_head(rows: int, hidden: int, padded: int, vocab_size: int, dtype: torch.dtype, group: Any = None) -> int:
    """Most bytes alive in a forward and a backward pass of the head, besides its inputs."""
    hidden_Nh = torch.randn(rows, hidden).to(dtype).requires_grad_()
    weight_Vh = torch.randn(padded, hidden).to(dtype).requires_grad_()
    target_N = torch.randint(0, vocab_size, (rows,))
    with LiveBytes() as counter:
        log_probs_N, _ = token_log_probs(
            hidden_Nh, weight_Vh, target_N, temperature=1.0, vocab_size=vocab_size, group=group
        )
        log_probs_N.sum().backward()
    return counter.peak
