"""Tiny models, recorded samples and independent references for the tests of the engine room."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from opd_megatron.config.architecture import ModelArchitecture, architecture_from_hf, read_hf_config
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import StartingPoint
from opd_megatron.megatron.batching import BatchingRule, plan, sequence_cost
from opd_megatron.megatron.chunks import ChunkedTensor
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.forward import add_over_context, run_micro_batches
from opd_megatron.megatron.frozen import FrozenModel, ModelName, teacher_model
from opd_megatron.megatron.micro_batch import MicroBatch
from opd_megatron.megatron.safe_checkpoint import StepReader
from opd_megatron.megatron.trainer import MegatronTrainer, TrainerSpec
from opd_megatron.sample import Sample, TeacherScores
from tests.support.models import FAMILIES as FAMILIES
from tests.support.models import MIXTURES as MIXTURES
from tests.support.models import family_config
from tests.support.models import reference_model as reference_model

VOCAB_SIZE = 53
ORIGINAL_CONTEXT = 16
"""Original context of the scaled RoPE of the tiny Llama."""

# One Adam step with these settings moves each weight by -LINEAR_STEP times its gradient (its denominator is eps), so
# exported weights show every parameter's gradient whatever the layout and whoever holds the optimizer state.
LINEAR_STEP = 1e4
GRADIENT_FLAGS: dict[str, Any] = {
    "adam_beta1": 0.0,
    "adam_beta2": 0.0,
    "adam_eps": 1e6,
    "lr": LINEAR_STEP * 1e6,
    "weight_decay": 0.0,
    "clip_grad": 1e9,
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A model with an odd vocabulary."""
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.2}
    if family != "llama":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 700.0}
    return family_config(family, original_context=ORIGINAL_CONTEXT, **(settings | overrides))


def save_reference(folder: Path, config: PreTrainedConfig, seed: int = 0) -> Path:
    """Write a random model of ``config`` as a Hugging Face folder."""
    reference_model(config, seed).save_pretrained(folder)
    return folder


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder as transformers computes it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def architecture_of(folder: Path) -> ModelArchitecture:
    return architecture_from_hf(read_hf_config(folder))


def make_options(**flags: Any) -> Options:
    """Options by their flat names, as a command line would give them; an unknown name is an error."""
    options = Options()
    for group in dataclasses.fields(Options):
        value = getattr(options, group.name)
        if not dataclasses.is_dataclass(value):
            continue
        names = {item.name for item in dataclasses.fields(value)}
        chosen = {name: flags.pop(name) for name in list(flags) if name in names}
        options = dataclasses.replace(options, **{group.name: dataclasses.replace(value, **chosen)})
    if flags:
        raise TypeError(f"unknown options {sorted(flags)}")
    return options


def make_spec(
    folder: Path,
    *,
    num_rollouts: int = 10,
    teacher: Path | None = None,
    reference: Path | None = None,
    further: Mapping[str, Path] | None = None,
    start: StartingPoint | None = None,
    **flags: Any,
) -> TrainerSpec:
    """What a trainer of the model in ``folder`` needs; frozen models come from Hugging Face folders."""
    settings: dict[str, Any] = {"rollout_batch_size": 12, "micro_batch_size": 3, "distributed_timeout_minutes": 0.5}
    options = make_options(**(settings | flags))
    frozen: dict[ModelName, FrozenModel] = {}
    if teacher is not None:
        frozen["teacher"] = teacher_model(options, architecture_of(teacher), teacher)
    if reference is not None:
        frozen["reference"] = FrozenModel(architecture_of(reference), reference)
    for name, model in (further or {}).items():
        frozen[name] = teacher_model(options, architecture_of(model), model)
    return TrainerSpec(
        options,
        architecture_of(folder),
        start or StartingPoint("hf_checkpoint", folder),
        num_rollouts,
        frozen,
    )


def make_trainer(folder: Path, **settings: Any) -> MegatronTrainer:
    """A single-process trainer; it replaces the process groups of the one before."""
    return MegatronTrainer(make_spec(folder, **settings), Rendezvous())


def make_samples(seed: int, count: int = 12, vocab_size: int = VOCAB_SIZE) -> list[Sample]:
    """A recorded rollout: groups of three, mixed lengths, one-token prompts, empty responses, holes in the loss mask.

    Teacher scores do not cover every token; task advantages are GRPO's, computed here by hand.
    """
    random = np.random.default_rng(seed)
    rewards = random.integers(0, 3, count).astype(np.float64)
    samples = []
    for index in range(count):
        length = 0 if index % 6 == 2 else int(random.integers(1, 30))
        group = rewards[index // 3 * 3 : index // 3 * 3 + 3]
        spread = group.std(ddof=1) if len(group) > 1 else 0.0
        advantage = (rewards[index] - group.mean()) / (spread + 1e-6)
        scores = TeacherScores(
            log_probs_T=-random.exponential(3.0, length), valid_T=random.random(length) > 0.15, teacher="recorded"
        )
        samples.append(
            Sample(
                index=index,
                group_index=index // 3,
                prompt="",
                prompt_tokens=random.integers(0, vocab_size, 1 if index % 5 == 0 else int(random.integers(2, 9))),
                response_tokens=random.integers(0, vocab_size, length),
                loss_mask=random.random(length) > 0.2,
                advantages=np.full(length, advantage),
                teacher_scores=scores,
                reward=float(rewards[index]),
            )
        )
    return samples


WHOLE_RESPONSES: dict[str, Any] = {
    "policy_loss": "gspo",
    "eps_clip": 0.1,
    "use_tis": True,
    "tis_level": "sequence",
    "tis_clip": 1.1,
    "use_opsm": True,
    "opsm_delta": 0.02,
    "use_opd": True,
}
"""A loss whose parts all need sums over whole responses."""


def off_policy_samples(seed: int) -> list[Sample]:
    """Samples of another policy: old log-probabilities near those of a random model, the engine's near the old ones.

    Masked tokens have none.
    """
    random, samples = np.random.default_rng(seed), make_samples(seed)
    for sample in samples:
        noise = random.normal(size=(2, sample.response_length))
        sample.old_log_probs = np.where(sample.loss_mask, -np.log(VOCAB_SIZE) - 1 + 0.5 * noise[0], np.nan)
        sample.rollout_log_probs = sample.old_log_probs + 0.05 * noise[1]
        sample.validate()
    return samples


def reference_logits(model: Any, sample: Sample) -> Tensor:
    """``[T, V]`` logits that predict the response tokens, from one unpadded forward pass of transformers."""
    tokens = torch.from_numpy(sample.tokens)[None]
    first = len(sample.prompt_tokens) - 1
    logits: Tensor = model(input_ids=tokens).logits[0, first : first + sample.response_length]
    return logits


def reference_log_probs(model: Any, sample: Sample, temperature: float = 1.0) -> Tensor:
    """``[T]`` log-probabilities of the response tokens by transformers, differentiable."""
    log_probs_TV = torch.log_softmax(reference_logits(model, sample).double() / temperature, dim=-1)
    return log_probs_TV.gather(1, torch.from_numpy(sample.response_tokens)[:, None])[:, 0]


def reference_loss(
    model: Any,
    samples: Sequence[Sample],
    *,
    loss_type: str = "policy_loss",
    opd_coef: float | None = None,
    per_token: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """The loss of one on-policy optimizer step, written out sample by sample with transformers."""
    tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    sequences = sum(bool(sample.loss_mask.any()) for sample in samples)
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        mask = torch.from_numpy(sample.loss_mask)
        if not mask.any():
            continue
        log_probs = reference_log_probs(model, sample, temperature)
        if loss_type == "sft_loss":
            loss = -log_probs
        else:
            assert sample.advantages is not None
            advantages = torch.from_numpy(sample.advantages).double()
            if opd_coef is not None:
                assert sample.teacher_scores is not None
                distance = log_probs.detach() - torch.from_numpy(sample.teacher_scores.log_probs_T).double()
                advantages = advantages - opd_coef * distance * torch.from_numpy(sample.teacher_scores.valid_T)
            # on-policy the ratio to the old policy is 1, and its gradient that of the log-probability
            loss = -(log_probs - log_probs.detach()).exp() * advantages
        total = total + loss[mask].sum() / (tokens if per_token else sequences * mask.sum())
    return total


def reference_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of ``loss`` for every parameter of a transformers model, by Hugging Face name."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def exported(trainer: MegatronTrainer) -> dict[str, Tensor]:
    """The student's weights by Hugging Face name; empty on ranks other than the first."""
    return dict(trainer.export_weights())


def step_gradients(trainer: MegatronTrainer, samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one optimizer step of a trainer built with ``GRADIENT_FLAGS``."""
    before = exported(trainer)
    metrics = trainer.train(samples).metrics or {}
    after = exported(trainer)
    return metrics, {name: (before[name].double() - after[name].double()) / LINEAR_STEP for name in before}


def optimizer_state(trainer: MegatronTrainer) -> dict[str, Tensor]:
    """This rank's part of the optimizer: the weights it steps and their state, numbered in the optimizer's order."""
    with trainer.memory.holding("weights", "optimizer"):
        return _optimizer_state(trainer)


def _optimizer_state(trainer: MegatronTrainer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part_number, part in enumerate(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])):
        weights = [weight for group in part.optimizer.param_groups for weight in group["params"]]
        for number, weight in enumerate(weights):
            state = {name: value for name, value in part.optimizer.state[weight].items() if torch.is_tensor(value)}
            for name, tensor in ({"weight": weight} | state).items():
                found[f"{part_number}.{number}.{name}"] = tensor.detach().clone()
    return found


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a torch_dist step folder as a whole: weights and optimizer state, by name."""
    reader = StepReader(folder)
    found: dict[str, Tensor] = {}
    for name, entry in reader.tensors().items():
        shape = tuple(entry.size)
        found[name] = torch.full(shape, torch.nan, dtype=entry.properties.dtype)
        whole = ChunkedTensor(shape, found[name].dtype)
        whole.add(((0,) * len(shape), shape), lambda name=name: found[name])  # type: ignore[misc]
        reader.read({name: whole})
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``max|found - expected| / max|expected|`` of one tensor."""
    scale = expected.abs().max().double().clamp(min=1e-30)
    return float((found.double() - expected.double()).abs().max() / scale)


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Both have the same names, and every tensor agrees relative to its largest entry."""
    assert found.keys() == expected.keys()
    wrong = {
        name: error for name in expected if not (error := relative_error(found[name], expected[name])) <= tolerance
    }
    assert not wrong, f"relative errors above {tolerance:.0e}: {wrong}"


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Both have the same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    wrong = [name for name in expected if found[name].dtype != expected[name].dtype]
    wrong += [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong, f"differ: {wrong}"


@torch.no_grad()
def logits(trainer: MegatronTrainer, samples: Sequence[Sample], name: ModelName = "student") -> dict[int, np.ndarray]:
    """``[T, V]`` logits of each response by place, on the ranks of the last stage that share the samples."""
    chunks = trainer.chunks if name == "student" else [trainer.scorers.frozen[name].model]
    model = chunks[-1]
    group = parallel_state.get_tensor_model_parallel_group()

    def last_stage(batch: MicroBatch, rows_Nh: Tensor) -> dict[int, np.ndarray]:
        local = rows_Nh @ model.head_weight().t()
        shards = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, local, group=group)
        return batch.split(torch.cat(shards, dim=1)[:, : model.architecture.vocab_size].float())

    size = trainer.options.data_parallel_size
    lengths = [len(sample.tokens) for sample in samples]
    shares = plan(lengths, BatchingRule(3, count_multiple=2), ranks=size, cost=sequence_cost(model.architecture))
    micro_batches = shares[parallel_state.get_data_parallel_rank()]
    results = run_micro_batches(chunks, model, samples, micro_batches, last_stage, with_gradients=False)
    if not parallel_state.is_pipeline_last_stage():
        return {}
    return add_over_context({place: array for part in results for place, array in part.items()})
