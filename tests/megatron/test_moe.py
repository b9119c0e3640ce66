"""Mixtures of experts in one process: the forward pass, the auxiliary loss and the metrics against transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opd_megatron.megatron import moe
from opd_megatron.megatron.batching import BatchingRule
from opd_megatron.megatron.checkpoint import save_checkpoint
from opd_megatron.megatron.moe import balance_loss
from opd_megatron.megatron.safe_checkpoint import StepReader
from opd_megatron.megatron.weight_map import parameter_maps
from opd_megatron.questions import LogProbs
from opd_megatron.rollout.feed_forward import tensors_by_stored_name
from opd_megatron.sample import Sample
from tests.megatron.support import (
    GRADIENT_FLAGS,
    MIXTURES,
    architecture_of,
    assert_equal_tensors,
    assert_same_tensors,
    exported,
    load_reference,
    logits,
    make_samples,
    make_trainer,
    reference_logits,
    reference_loss,
    relative_error,
    save_reference,
    step_gradients,
    tiny_config,
)

COEFFICIENT = 0.3


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    return {family: save_reference(root / family, tiny_config(family)) for family in MIXTURES}


def _error(trainer: Any, folder: Path) -> float:
    model, samples = load_reference(folder), make_samples(0)
    found = logits(trainer, samples)
    with torch.no_grad():
        return max(
            relative_error(torch.from_numpy(found[place]), reference_logits(model, sample))
            for place, sample in enumerate(samples)
            if sample.response_length
        )


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 3}),
        ("qwen2_moe", {}),
        ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": []}),
        ("qwen2_moe", {"num_experts_per_tok": 1}),
    ],
)
def test_logits_agree_with_transformers(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = save_reference(tmp_path / "model", tiny_config(family, **overrides), seed=3)
    trainer = make_trainer(folder)
    assert _error(trainer, folder) <= 1e-5
    assert_equal_tensors(exported(trainer), load_file(folder / "model.safetensors"))


def test_a_router_that_does_not_normalise_would_be_noticed(mixtures: dict[str, Path]) -> None:
    trainer = make_trainer(mixtures["qwen3_moe"])
    trainer.student.config.moe_router_pre_softmax = True
    assert _error(trainer, mixtures["qwen3_moe"]) > 1e-2


@pytest.mark.parametrize("family", MIXTURES)
def test_the_table_s_moves_are_inverse_to_each_other(mixtures: dict[str, Path], family: str) -> None:
    architecture, state = architecture_of(mixtures[family]), load_file(mixtures[family] / "model.safetensors")
    seen: dict[str, Tensor] = {}
    for row in parameter_maps(architecture, padded_vocab_size=64):
        full = row.layout.merge([state[name] for name in row.hf_names])
        assert torch.equal(row.layout.unshard([row.layout.shard(full, rank, 2) for rank in range(2)]), full)
        parts = row.layout.split(full)
        assert tuple(tuple(part.shape) for part in parts) == row.hf_shapes
        seen |= dict(zip(row.hf_names, parts, strict=True))
        assert row.is_expert == (".mlp.experts." in row.hf_names[0])
    assert_equal_tensors(seen, state)


def test_checkpoints_have_transformer_engine_s_keys(tmp_path: Path, mixtures: dict[str, Path]) -> None:
    """Layers of one kind and all experts of a layer are one tensor each; where the kinds differ, layers have keys."""
    trainer = make_trainer(mixtures["qwen3_moe"])
    written = save_checkpoint(tmp_path, "release", trainer.student, hf_folder=mixtures["qwen3_moe"])
    metadata = StepReader(written).read_metadata()
    sizes = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
    assert sizes["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (2, 4, 48, 32)
    assert sizes["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == (2, 4, 32, 24)
    assert sizes["decoder.layers.mlp.router.weight"] == (2, 4, 32)
    assert sizes["decoder.layers.pre_mlp_layernorm.weight"] == (2, 32)


class Routing:
    """What the routers of a transformers model say of each sample's input tokens, by layer with experts."""

    def __init__(self, model: Any, samples: Sequence[Sample]) -> None:
        self.topk = model.config.num_experts_per_tok
        self.logits: list[list[Tensor]] = []
        for sample in samples:
            tokens = torch.from_numpy(sample.tokens[:-1])[None]
            if tokens.shape[1]:
                self.logits.append(list(model(input_ids=tokens, output_router_logits=True).router_logits))

    def balance(self, groups: Sequence[Sequence[int]]) -> Tensor:
        """Sum over layers and groups of samples of ``samples of the group / all samples * E sum_e f_e P_e``.

        ``f_e`` is the share of the choices that fell on expert e and ``P_e`` its mean probability.
        """
        total = torch.zeros((), dtype=torch.float64)
        for layer in zip(*self.logits, strict=True):
            for group in groups:
                scores = torch.softmax(torch.cat([layer[place] for place in group]).double(), dim=-1)
                chosen = scores.topk(self.topk, dim=-1).indices
                share = torch.bincount(chosen.flatten(), minlength=scores.shape[1]) / chosen.numel()
                total = total + len(group) / len(layer) * scores.shape[1] * (share * scores.mean(0)).sum()
        return total


def _reference_gradients(folder: Path, samples: Sequence[Sample], groups: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    model = load_reference(folder)
    loss = reference_loss(model, samples, loss_type="sft_loss")
    if groups:
        loss = loss + COEFFICIENT * Routing(model, samples).balance(groups)
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    return {name: tensor.detach().clone() for name, tensor in tensors_by_stored_name(model).items()}


EACH = [[place] for place in range(12)]
THREES = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("none", {}),
        ("seq_aux_loss", {}),
        ("seq_aux_loss", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
        ("aux_loss", {"micro_batch_size": 1}),
        ("aux_loss", {}),
    ],
)
def test_gradients_agree_with_transformers(
    mixtures: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, kind: str, flags: dict[str, Any]
) -> None:
    samples = [sample for seed in range(2) for sample in make_samples(seed) if len(sample.tokens) > 1][:12]
    monkeypatch.setattr("opd_megatron.megatron.batching.plan", _in_order)
    coefficient = 0.0 if kind == "none" else COEFFICIENT
    settings = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coefficient, "loss_type": "sft_loss"}
    trainer = make_trainer(mixtures[family], **GRADIENT_FLAGS, **settings, **flags)
    metrics, found = step_gradients(trainer, samples)
    groups = {"none": [], "seq_aux_loss": EACH, "aux_loss": EACH if "micro_batch_size" in flags else THREES}[kind]
    assert_same_tensors(found, _reference_gradients(mixtures[family], samples, groups), 1e-5)
    model = load_reference(mixtures[family])
    assert ("train/load_balancing_loss" in metrics) == bool(groups)
    with torch.no_grad():
        routing = Routing(model, samples)
        if groups:
            layers = len(routing.logits[0])
            assert metrics["train/load_balancing_loss"] == pytest.approx(float(routing.balance(groups)) / layers, 1e-5)


def _in_order(lengths: list[int], rule: BatchingRule, **_: Any) -> list[list[tuple[int, ...]]]:
    """Micro-batches of one rank in the samples' order, so that it is known who is in one together."""
    size = rule.micro_batch_size
    return [[tuple(range(len(lengths))[start : start + size]) for start in range(0, len(lengths), size)]]


@pytest.mark.parametrize("family", MIXTURES)
def test_metrics_of_the_routers(mixtures: dict[str, Path], family: str) -> None:
    samples = [sample for sample in make_samples(2) if len(sample.tokens) > 1][:6]
    trainer = make_trainer(mixtures[family], rollout_batch_size=6)
    trainer.ask(LogProbs("student"), samples)
    found = trainer.train(samples).metrics
    assert found is not None
    entropies, loads = [], []
    with torch.no_grad():
        routing = Routing(load_reference(mixtures[family]), samples)
    for layer in zip(*routing.logits, strict=True):
        scores = torch.softmax(torch.cat(layer).double(), dim=-1)
        entropies.append(float(-(scores * scores.log()).sum(-1).mean()))
        counts = torch.bincount(scores.topk(routing.topk, dim=-1).indices.flatten(), minlength=scores.shape[1])
        loads.append(float(counts.max() / counts.double().mean()))
    assert found["train/router_entropy"] == pytest.approx(sum(entropies) / len(entropies), 1e-6)
    assert found["train/expert_load_max"] == pytest.approx(sum(loads) / len(loads), 1e-9)
    assert trainer.train(samples).metrics is not None, "counts begin anew with each step"


def test_nothing_is_counted_or_balanced_while_scoring(mixtures: dict[str, Path]) -> None:
    trainer = make_trainer(mixtures["qwen3_moe"], moe_aux_loss_coeff=COEFFICIENT, reference=mixtures["qwen3_moe"])
    for name in ("student", "reference"):
        trainer.ask(LogProbs(name), make_samples(0))
    models = [trainer.student, *(frozen.model for frozen in trainer.scorers.frozen.values())]
    routers = [part for model in models for part in model.modules() if isinstance(part, moe.ExpertRouter)]
    assert len(routers) == 4
    assert all(router.tally is None for router in routers)
    assert not any(router.balancing.active for router in routers[2:])


@pytest.mark.parametrize("router_dtype", [None, "fp32"])
def test_the_router_s_precision(mixtures: dict[str, Path], router_dtype: str | None) -> None:
    trainer = make_trainer(mixtures["qwen3_moe"], bf16=True, moe_router_dtype=router_dtype)
    router = next(part for part in trainer.student.modules() if isinstance(part, moe.ExpertRouter))
    assert router.weight.dtype == torch.bfloat16
    hidden = torch.randn(5, 1, 32).bfloat16()
    scores = router.gating(hidden)
    assert scores.dtype == (torch.float32 if router_dtype else torch.bfloat16)
    metrics = trainer.train(make_samples(0)).metrics
    assert metrics is not None
    assert math.isfinite(metrics["train/grad_norm"])


def test_the_balance_loss_of_even_routing_is_one_and_of_nothing_is_zero() -> None:
    scores = torch.full((8, 4), 0.25, dtype=torch.float64, requires_grad=True)
    routing_map = torch.eye(4, dtype=torch.bool).repeat(2, 1) | torch.eye(4, dtype=torch.bool).roll(1, 1).repeat(2, 1)
    member = torch.zeros(8, 3, dtype=torch.bool)
    member[:4, 0] = member[4:, 1] = True
    loss = balance_loss(scores, routing_map, member, topk=2)
    assert loss.tolist() == [1.0, 1.0, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert torch.isfinite(gradient).all()


def test_training_without_the_mask_of_sequences_is_refused(mixtures: dict[str, Path]) -> None:
    model = make_trainer(mixtures["qwen3_moe"]).student.train()
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask of its sequences"):
        model(tokens, torch.arange(4)[None], None)
