"""What a decoder is made of, read from a Hugging Face config or from MODEL_ARGS; no torch, no Megatron.

The families agree in everything but a few switches (QKV bias, QK norm, RoPE scaling), so one frozen record describes
the student, the reference and a teacher of any size.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.config.errors import UserError
from opd_megatron.config.mixture import FIELDS, MixtureOfExperts, as_options, layer_pattern, mixture_from_hf
from opd_megatron.config.options import ModelOptions

FAMILIES = ("qwen2", "qwen3", "llama", "qwen2_moe", "qwen3_moe")
"""``model_type`` of the configs this library knows."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling; lengths in tokens.

    Source: the ``rope_scaling`` record of the Llama 3.1 configs (``rope_type: llama3``).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelArchitecture:
    """A decoder-only transformer with RMSNorm, SwiGLU and rotary positions.

    ``kv_channels`` is the size of one head; ``vocab_size`` is unpadded. ``ffn_hidden_size`` is that of the dense
    layers; ``mixture`` describes the layers with experts, if there are any.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    norm_epsilon: float
    add_qkv_bias: bool
    qk_layernorm: bool
    untie_embeddings_and_output_weights: bool
    rope_scaling: RopeScaling | None = None
    init_method_std: float = 0.02
    mixture: MixtureOfExperts | None = None

    @property
    def dense_layers(self) -> int:
        """Layers whose feed-forward part is a single one."""
        return self.num_layers - (sum(self.mixture.moe_layer_freq) if self.mixture else 0)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, chooses among experts."""
        return self.mixture is not None and bool(self.mixture.moe_layer_freq[layer])

    def padded_vocab_size(self, divisible_by: int, tensor_parallel_size: int) -> int:
        """Smallest multiple of ``divisible_by * tensor_parallel_size`` that holds the vocabulary."""
        multiple = divisible_by * tensor_parallel_size
        return -(-self.vocab_size // multiple) * multiple


def architecture_from_hf(config: Mapping[str, Any], source: str = "config") -> ModelArchitecture:
    """Read a Hugging Face ``config.json`` mapping; raises :class:`UserError` naming what is not supported.

    Both spellings of the rotary settings are read: ``rope_parameters`` (transformers 5) and
    ``rope_theta``/``rope_scaling`` (transformers 4).
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{source}: model_type {family!r} is not supported (known: {', '.join(FAMILIES)})")
    _refuse_unsupported(config, source)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    heads = _number(config, "num_attention_heads", int, source)
    hidden = _number(config, "hidden_size", int, source)
    if config.get("head_dim") is None and (family == "qwen3" or hidden % heads):
        # Qwen3's head size is independent of hidden size / heads, so a guess would load the wrong shapes.
        raise UserError(f"{source}: head_dim is missing")
    groups = heads if config.get("num_key_value_heads") is None else _number(config, "num_key_value_heads", int, source)
    if heads % groups:
        raise UserError(f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    theta = {"rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10000.0}
    spread = {"initializer_range": config.get("initializer_range") or 0.02}
    return ModelArchitecture(
        family=family,
        num_layers=_number(config, "num_hidden_layers", int, source),
        hidden_size=hidden,
        ffn_hidden_size=_number(config, "intermediate_size", int, source),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=hidden // heads if config.get("head_dim") is None else _number(config, "head_dim", int, source),
        vocab_size=_number(config, "vocab_size", int, source),
        max_position_embeddings=_number(config, "max_position_embeddings", int, source),
        rotary_base=_number(theta, "rope_theta", float, source),
        norm_epsilon=_number(config, "rms_norm_eps", float, source),
        add_qkv_bias=family == "qwen2" or (family == "qwen2_moe" and config.get("qkv_bias", True)),
        qk_layernorm=family in ("qwen3", "qwen3_moe"),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        rope_scaling=_rope_scaling(rope, source),
        init_method_std=_number(spread, "initializer_range", float, source),
        mixture=mixture_from_hf(config, source) if family.endswith("_moe") else None,
    )


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act {config['hidden_act']!r} is not supported (only silu)")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise UserError(f"{source}: sliding-window attention is not supported")
    biased = [key for key in ("mlp_bias", "attention_bias") if config.get(key)]
    if biased:
        raise UserError(f"{source}: {', '.join(biased)} is not supported")
    if config.get("quantization_config"):
        raise UserError(f"{source}: quantized weights are not supported: take the bfloat16 checkpoint of the model")


def _number(config: Mapping[str, Any], key: str, kind: type, source: str) -> Any:
    """A positive number of the config as ``kind``."""
    value = config.get(key)
    if value is None:
        raise UserError(f"{source}: {key} is missing")
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and kind(value) == value
    if not fits:
        raise UserError(f"{source}: {key} {value!r} is no positive {'whole ' if kind is int else ''}number")
    return kind(value)


def _rope_scaling(rope: Mapping[str, Any], source: str) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{source}: rope_type {rope_type!r} is not supported (default, llama3)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is not supported")
    if rope_type == "default":
        return None
    kinds = {"original_max_position_embeddings": int}
    names = [item.name for item in dataclasses.fields(RopeScaling)]
    return RopeScaling(**{name: _number(rope, name, kinds.get(name, float), f"{source}: rope") for name in names})


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The mapping in ``folder/config.json``; raises :class:`UserError` if it is missing or not JSON."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "no config.json" if missing else f"config.json cannot be read ({error.strerror})"
        raise UserError(f"{folder}: {reason}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON mapping")
    return config


def architecture_from_model_args(model: ModelOptions) -> ModelArchitecture:
    """The model that MODEL_ARGS describe by themselves, for sizes: what only its arithmetic needs is left at a default.

    Raises :class:`UserError` naming the options that are missing.
    """
    needed = [*sorted(_DEFINING), "vocab_size"]
    if model.num_experts is not None:
        needed += ["moe_ffn_hidden_size", "moe_router_topk"]
    missing = ["--" + name.replace("_", "-") for name in needed if getattr(model, name) is None]
    if missing:
        raise UserError(f"MODEL_ARGS without --hf-checkpoint lack {', '.join(missing)}")
    values: dict[str, Any] = {name: getattr(model, name) for name in (*_DEFINING, "vocab_size", "add_qkv_bias")}
    heads, layers = values["num_attention_heads"], values["num_layers"]
    mixture = None
    if model.num_experts is not None:
        try:
            pattern = layer_pattern(model.moe_layer_freq or "1", layers)
        except ValueError as error:
            raise UserError(f"--moe-layer-freq {model.moe_layer_freq}: {error}") from None
        mixture = MixtureOfExperts(**{name: getattr(model, name) for name in FIELDS} | {"moe_layer_freq": pattern})
    return ModelArchitecture(
        **values,
        family="MODEL_ARGS",
        num_query_groups=(model.num_query_groups or heads) if model.group_query_attention else heads,
        kv_channels=model.kv_channels or values["hidden_size"] // heads,
        max_position_embeddings=model.max_position_embeddings or sys.maxsize,
        rotary_base=model.rotary_base or 10000.0,
        norm_epsilon=model.norm_epsilon or 1e-6,
        qk_layernorm=model.qk_layernorm,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        mixture=mixture,
    )


def differences(first: ModelArchitecture, second: ModelArchitecture) -> list[str]:
    """Every field in which two models differ, except the spread of random weights: ``num_layers 4 (not 2)``."""
    mine, theirs = _fields(first), _fields(second)
    return [f"{name} {mine[name]} (not {theirs[name]})" for name in mine if mine[name] != theirs[name]]


def _fields(model: ModelArchitecture) -> dict[str, Any]:
    """What tells models apart, those of the mixture among them, without the family's name."""
    names = [item.name for item in dataclasses.fields(model)]
    own = [name for name in names if name not in ("family", "init_method_std", "mixture")]
    return {name: getattr(model, name) for name in own} | as_options(model.mixture)


_DEFINING = frozenset({"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"})
"""Where all of these are given, MODEL_ARGS describe a whole model and a switch that is left out says no."""


def disagreements(given: frozenset[str], model: ModelOptions, architecture: ModelArchitecture) -> list[str]:
    """Every MODEL_ARGS option that says something else than the checkpoint's config, as ``--num-layers 4 (config: 2)``.

    A few options given alone are compared one by one. MODEL_ARGS that describe a whole model (layers, hidden,
    feed-forward and head count) are read as Megatron reads them: a switch that was left out is off, and heads have
    size ``hidden size / heads``, so ``--qk-layernorm is missing (config: True)`` is a disagreement, too.
    """
    expected = _as_model_options(architecture)
    whole = given >= _DEFINING
    found: list[str] = []
    for name, theirs in expected.items():
        flag, mine = "--" + name.replace("_", "-"), getattr(model, name)
        if name in given:
            if not _agree(name, mine, theirs, architecture):
                said = flag if mine is True else f"{flag}=false" if mine is False else f"{flag} {mine}"
                found.append(f"{said} (config: {theirs})")
        elif whole and _must_be_said(name, theirs, model):
            found.append(f"{flag} is missing (config: {theirs})")
    return found


def _agree(name: str, mine: Any, theirs: Any, architecture: ModelArchitecture) -> bool:
    if name != "moe_layer_freq" or theirs is None:
        return bool(mine == theirs)
    try:
        return layer_pattern(mine, architecture.num_layers) == theirs
    except ValueError:
        return False


def _must_be_said(name: str, theirs: Any, model: ModelOptions) -> bool:
    """Whether MODEL_ARGS of a whole model mean something else than ``theirs`` by leaving the option out."""
    if name == "kv_channels":
        return bool(theirs * model.num_attention_heads != model.hidden_size)
    if name == "moe_layer_freq":
        return theirs is not None and not all(theirs)
    return theirs is True or (name in FIELDS and theirs not in (None, False))


def _as_model_options(architecture: ModelArchitecture) -> dict[str, Any]:
    """What MODEL_ARGS would have to say about ``architecture``, for the options that tell models apart."""
    names = {item.name for item in dataclasses.fields(ModelOptions)}
    shared = [item.name for item in dataclasses.fields(ModelArchitecture) if item.name in names - {"init_method_std"}]
    scaling = architecture.rope_scaling
    return {name: getattr(architecture, name) for name in shared} | {
        "group_query_attention": architecture.num_query_groups != architecture.num_attention_heads,
        "use_rope_scaling": scaling is not None,
        "rope_scaling_factor": scaling.factor if scaling else None,
        **as_options(architecture.mixture),
    }
