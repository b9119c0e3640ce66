"""Predicted bytes against those of real trainers, of the vocabulary head and of the rollout engine, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_megatron.config.architecture import architecture_from_hf
from opd_megatron.config.head_memory import head_bytes
from opd_megatron.config.memory import Models, estimate, rollout_bytes
from opd_megatron.config.options import EngineOptions
from opd_megatron.config.parameters import total_parameters
from opd_megatron.config.resolve import sampled_tokens_learn
from opd_megatron.megatron.distribution import DistributionTerm
from opd_megatron.megatron.vocab_head import Side, target_moments, token_log_probs
from opd_megatron.objectives.distribution import chosen_divergence
from opd_megatron.rollout.cache import CacheShape, KeyValueCache
from tests.megatron.live_bytes import LiveBytes, full_samples, held_bytes, measured_head, saved_activations
from tests.megatron.support import architecture_of, make_options, make_trainer, save_reference, tiny_config

LENGTHS: dict[str, Any] = {"rollout_max_prompt_len": 28, "rollout_max_response_len": 100}
WORK: dict[str, Any] = LENGTHS | {"rollout_batch_size": 4, "micro_batch_size": 4}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 4, "vocab_size": 3001},
    "llama": {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 2000},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 96, "vocab_size": 1000, "num_hidden_layers": 3},
    "qwen2_moe": {"hidden_size": 96, "intermediate_size": 256, "moe_intermediate_size": 64, "vocab_size": 1000},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True, "accumulate_allreduce_grads_in_fp32": True},
    "bf16-gradients": {"bf16": True},
    "distributed-optimizer": {"bf16": True, "use_distributed_optimizer": True},
    "sgd": {"optimizer": "sgd"},
}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "none": {},
    "bf16": {"bf16": True},
    "selective": {"recompute_granularity": "selective"},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that are large enough for the padding of buffers not to count."""
    root = tmp_path_factory.mktemp("sized")
    return {family: save_reference(root / family, tiny_config(family, **size)) for family, size in SIZES.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", SIZES)
def test_weights_gradients_and_optimizer(sized: dict[str, Path], family: str, precision: str) -> None:
    trainer = make_trainer(sized[family], **WORK, **PRECISIONS[precision])
    saved_activations(trainer)
    predicted = estimate(trainer.options, Models(trainer.spec.architecture), "cpu").device_parts
    measured = held_bytes(trainer)
    assert measured["optimizer"] > 0
    assert {name: predicted[name] for name in measured} == pytest.approx(measured, rel=0.1)


def test_frozen_models_are_counted_besides_the_student(sized: dict[str, Path]) -> None:
    trainer = make_trainer(
        sized["qwen3"], teacher=sized["llama"], reference=sized["qwen3"], **WORK,
        use_opd=True, opd_type="megatron", opd_teacher_load="teacher", use_kl_loss=True,
    )  # fmt: skip
    models = Models.of(trainer.options, trainer.spec.architecture, architecture_of(sized["llama"]))
    predicted, measured = estimate(trainer.options, models, "cpu"), held_bytes(trainer)
    assert min(measured["teacher"], measured["reference"]) > 0
    assert predicted.teacher == pytest.approx(measured["teacher"], rel=0.1)
    assert predicted.reference == pytest.approx(measured["reference"], rel=0.1)


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("family", SIZES)
def test_activations(sized: dict[str, Path], family: str, recompute: str) -> None:
    """Within a factor of 1.25: what is kept between forward and backward of a full micro-batch."""
    if recompute == "block" and "moe" in family:
        pytest.skip("Megatron-Core hands the mask of the sequences to no layer that is not recomputed")
    trainer = make_trainer(sized[family], **WORK, **RECOMPUTED[recompute])
    predicted = estimate(trainer.options, Models(trainer.spec.architecture), "cpu").activations
    measured = saved_activations(trainer)
    assert measured / 1.25 <= predicted <= measured * 1.25, predicted / measured


def test_a_recomputed_unit_is_what_its_layers_keep_otherwise(sized: dict[str, Path]) -> None:
    plain, again = (
        estimate(
            make_options(**WORK, **RECOMPUTED[name]), Models(architecture_of(sized["qwen3"])), "cpu"
        )
        for name in ("none", "uniform")
    )  # fmt: skip
    assert plain.recomputed == 0
    # beside its layers the plain step keeps what comes out of the last one
    assert again.recomputed == pytest.approx(plain.activations / 4, rel=0.15)
    assert again.activations < plain.activations / 4


def _head_options(bf16: bool, rows: int, **flags: Any) -> tuple[Any, Any]:
    """Options and a model whose micro-batch has ``rows`` response tokens."""
    settings = {"rollout_max_prompt_len": 1, "rollout_max_response_len": rows, "micro_batch_size": 1}
    config = tiny_config("llama", hidden_size=64, vocab_size=6000, max_position_embeddings=10**6)
    return make_options(bf16=bf16, rollout_batch_size=1, **settings, **flags), architecture_from_hf(config.to_dict())


@pytest.mark.parametrize("rows", [300, 4000], ids=["one-chunk", "several-chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_vocabulary_head(dtype: torch.dtype, rows: int) -> None:
    options, model = _head_options(dtype == torch.bfloat16, rows)
    padded = model.padded_vocab_size(options.model.make_vocab_size_divisible_by, 1)
    measured = measured_head(rows, model.hidden_size, padded, model.vocab_size, dtype)
    assert head_bytes(options, model, [], "cpu") == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("rows", [300, 4000], ids=["one-chunk", "several-chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_exact_divergence(dtype: torch.dtype, rows: int) -> None:
    options, model = _head_options(dtype == torch.bfloat16, rows)
    hidden_Nh, weight_Vh = torch.randn(rows, 64, dtype=dtype), torch.randn(6016, 64, dtype=dtype)
    with LiveBytes() as counter:
        teacher = Side(torch.randn(rows, 64, dtype=dtype), weight_Vh)
        target_moments(hidden_Nh, weight_Vh, teacher, temperature=1.0, vocab_size=6000, group=None)
    options = make_options(
        use_opd=True,
        opd_type="megatron",
        bf16=dtype == torch.bfloat16,
        rollout_batch_size=1,
        rollout_max_prompt_len=1,
        rollout_max_response_len=rows,
    )
    assert head_bytes(options, model, [model], "cpu") == pytest.approx(counter.peak, rel=0.1)


TOP_500: dict[str, Any] = {"opd_support": "teacher_topk", "opd_top_k": 500}
DISTILLED: dict[str, dict[str, Any]] = {
    "reverse": {},
    "forward": {"opd_divergence": "forward_kl"},
    "jsd": {"opd_divergence": "jsd"},
    "skew": {"opd_divergence": "skew_kl"},
    "skew-reverse": {"opd_divergence": "skew_reverse_kl"},
    "alpha": {"opd_divergence": "alpha"},
    "sum": {"opd_divergence_to": "jsd", "opd_divergence_mix": 0.5},
    "entropy-aware": {"opd_divergence": "jsd", "opd_entropy_aware": 0.5},
    "with-grpo": {"advantage_estimator": "grpo"},
    "top-64": {"opd_support": "student_topk", "opd_top_k": 64},
    "top-500": TOP_500,
    "top-500-with-grpo": TOP_500 | {"advantage_estimator": "grpo"},
}


@pytest.mark.parametrize("rows", [300, 4000], ids=["one-chunk", "several-chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", DISTILLED)
def test_distillation_by_distributions(form: str, dtype: torch.dtype, rows: int) -> None:
    bf16 = dtype == torch.bfloat16
    flags: dict[str, Any] = {"use_opd": True, "opd_type": "megatron", "opd_loss": "distribution"}
    flags |= {"opd_exact_kl_interval": 0, "advantage_estimator": "none"} | DISTILLED[form]
    options, model = _head_options(bf16, rows, **flags)
    head: dict[str, Any] = {"temperature": 1.0, "vocab_size": 6000, "group": None}
    student = Side(*(torch.randn(size, 64).to(dtype).requires_grad_() for size in (rows, 6016)))
    weight_Vh, target_N = torch.randn(6016, 64).to(dtype), torch.arange(rows)
    term = DistributionTerm(options.opd, chosen_divergence(options.opd, 0), head)
    with LiveBytes() as counter:
        teacher = Side(torch.randn(rows, 64, dtype=dtype), weight_Vh)
        with torch.set_grad_enabled(sampled_tokens_learn(options)):
            log_probs_N, _ = token_log_probs(*student, target_N, **head)
        (log_probs_N.sum() + term(student, teacher, torch.ones(rows, dtype=torch.bool)).sum()).backward()
    assert head_bytes(options, model, [model], "cpu") == pytest.approx(counter.peak, rel=0.1)


def test_the_rollout_engine() -> None:
    """The weights of transformers' model, and the cache of as many sequences as are decoded together."""
    config = tiny_config("qwen3", **SIZES["qwen3"])
    options = make_options(rollout_batch_size=12, rollout_engine_batch_size=8, **LENGTHS)
    architecture = architecture_from_hf(config.to_dict())
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert total_parameters(architecture) == weights
    with LiveBytes() as counter:
        shape = CacheShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        cache = KeyValueCache(torch.zeros(8, dtype=torch.long), False, 128, shape, torch.float32)
    logits = 3 * 4 * 8 * config.vocab_size
    assert cache.capacity == 128
    alone = rollout_bytes(options, architecture)
    assert alone == pytest.approx(4 * weights + counter.live + logits, rel=0.02)
    assert rollout_bytes(options, architecture, architecture) == alone
    answers = {"use_opd": True, "opd_student_data_fraction": 0.5, "opd_data_source": "teacher"}
    options = make_options(rollout_batch_size=12, rollout_engine_batch_size=8, **answers, **LENGTHS)
    assert rollout_bytes(options, architecture, architecture) == 2 * alone
    servers = replace(options, engine=EngineOptions(rollout_engine="sglang"))
    assert rollout_bytes(servers, architecture, architecture) == alone


@pytest.mark.parametrize("precision", ["float32", "distributed-optimizer"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_critic_is_counted_besides_the_student(sized: dict[str, Path], family: str, precision: str) -> None:
    """Tied and untied: it has an embedding and no output weight."""
    flags = {"advantage_estimator": "ppo", **PRECISIONS[precision]}
    trainer = make_trainer(sized[family], **WORK, **flags)
    samples = full_samples(trainer.options, trainer.spec.architecture.vocab_size)
    for sample in samples:
        sample.values, sample.returns = np.zeros(sample.response_length), np.ones(sample.response_length)
    trainer.train(samples)
    predicted = estimate(trainer.options, Models.of(trainer.options, trainer.spec.architecture, None), "cpu")
    assert trainer.critic is not None
    measured = held_bytes(trainer.critic)
    assert predicted.critic == pytest.approx(sum(measured.values()), rel=0.1)
    assert predicted.total - estimate(trainer.options, Models(trainer.spec.architecture), "cpu").total == (
        predicted.critic
    ), "without offloading it is there all the time"


def test_what_leaves_of_a_critic() -> None:
    """The student's passes do not see it when everything leaves, and the host has room for it."""
    model = architecture_from_hf(tiny_config("qwen3", **SIZES["qwen3"]).to_dict())
    totals = {}
    for flags in ({}, {"offload_optimizer": True}, {"offload_train": True}):
        options = make_options(**WORK, advantage_estimator="ppo", **flags)
        memory = estimate(options, Models(model, has_critic=True), "cpu")
        without = estimate(options, Models(model), "cpu")
        totals[next(iter(flags), "stays")] = memory.total - without.total, memory.host - without.host
    weights = 4 * total_parameters(model) + 4 * (model.hidden_size + 1)
    padding = 4 * model.hidden_size * 200
    assert totals["stays"] == (pytest.approx(4 * weights, abs=4 * padding), 0)
    assert totals["offload_optimizer"] == (
        pytest.approx(2 * weights, abs=2 * padding),
        pytest.approx(2 * weights, abs=2 * padding),
    )
    assert totals["offload_train"] == (0, pytest.approx(3 * weights, abs=3 * padding))
