"""Fixtures of the rollout's tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opd_megatron.rollout.local import LocalEngine
from tests.rollout.models import character_tokenizer, engine_with, reference_model, tiny_config


@pytest.fixture(autouse=True)
def _single_thread() -> Any:
    """Threads of a library on small tensors cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return character_tokenizer()


@pytest.fixture(scope="session")
def qwen3() -> Any:
    return reference_model(tiny_config("qwen3"))


@pytest.fixture
def engine(qwen3: Any, tokenizer: Any) -> LocalEngine:
    return engine_with(qwen3, tokenizer)
