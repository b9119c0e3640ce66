"""Two ranks for all layout tests, four for the products of layouts, and the single process to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from opd_megatron.megatron.distributed import Rendezvous
from tests.megatron.support import FAMILIES, save_reference, tiny_config
from tests.parallel.pool import WorkerPool

transformers.utils.logging.disable_progress_bar()


def _pool(size: int) -> Iterator[WorkerPool]:
    pool = WorkerPool(size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two() -> Iterator[WorkerPool]:
    yield from _pool(2)


@pytest.fixture(scope="module")
def four() -> Iterator[WorkerPool]:
    yield from _pool(4)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One Hugging Face folder per family, a tied Qwen2, and a teacher of another family and size."""
    root = tmp_path_factory.mktemp("families")
    found = {family: save_reference(root / family, tiny_config(family)) for family in FAMILIES}
    found["qwen2-tied"] = save_reference(root / "qwen2-tied", tiny_config("qwen2", tie_word_embeddings=True))
    larger = tiny_config("llama", hidden_size=48, num_hidden_layers=4, num_attention_heads=6)
    found["teacher"] = save_reference(root / "teacher", larger, seed=9)
    return found


@pytest.fixture(scope="session")
def alone() -> Callable[..., Any]:
    """Do a task of ``tests.parallel.work`` in this process, with world size 1; results are kept."""

    @cache
    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(Rendezvous(), *[dict(part) if isinstance(part, tuple) else part for part in arguments])
        finally:
            torch.set_num_threads(threads)

    return run
