"""Fixtures of the engine room's tests: one process, world size 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.megatron.support import FAMILIES, save_reference, tiny_config

transformers.utils.logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    # said by Megatron-Core about its own calls
    for category in ("DeprecationWarning", "UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}:megatron")


@pytest.fixture(autouse=True)
def _single_thread() -> Iterator[None]:
    """Threads of a library on small tensors cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One Hugging Face folder per family."""
    root = tmp_path_factory.mktemp("families")
    return {family: save_reference(root / family, tiny_config(family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another family, size and weights than any student here, but with the same vocabulary."""
    config = tiny_config("llama", hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3)
    return save_reference(tmp_path_factory.mktemp("teacher") / "model", config, seed=9)
