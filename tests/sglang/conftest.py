"""Real SGLang servers on the CPU, each with a tiny random model; nothing here stands in for the server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd_megatron.config.options.engine import EngineOptions
from opd_megatron.data.column_arithmetic import build_tokenizer
from opd_megatron.data.tokenizer import train_bpe_tokenizer
from opd_megatron.rollout.sglang_launch import server_launches
from opd_megatron.sample import Sample
from opd_megatron.servers import LocalServer, local_server
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.e2e.support import make_model, write_prompts
from tests.sglang.speakers import Speaker, sglang_python

REPOSITORY = Path(__file__).parents[2]
CONTEXT = 256


def server_command(model: Path) -> list[str]:
    """The server that ``make test-sglang`` installs (OPD_SGLANG_VENV names another environment)."""
    python = REPOSITORY / os.environ.get("OPD_SGLANG_VENV", ".venv-sglang") / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} does not exist: run tools/sglang_cpu/install.sh .venv-sglang")
    launcher = REPOSITORY / "tools" / "sglang_cpu" / "launch.py"
    return [str(python), str(launcher), "--model-path", str(model), "--port", "{port}"]


def sglang_server(model: Path, log_path: Path) -> AbstractContextManager[LocalServer]:
    """That server on a free port."""
    return local_server(server_command(model), log_path=log_path)


def make_qwen(folder: Path, seed: int) -> Any:
    """The quickstart's kind of model: tied embeddings, a character tokenizer, which is returned, and its vocabulary."""
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        initializer_range=0.2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return tokenizer


class Served:
    """A running server, its model's folder, and the same model in transformers."""

    def __init__(self, server: LocalServer, folder: Path, tokenizer: Any) -> None:
        self.server = server
        self.folder = folder
        self.tokenizer = tokenizer
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.vocab_size: int = self.model.config.vocab_size

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probabilities of ``tokens[1:]`` by transformers."""
        with torch.no_grad():
            logits = self.model(torch.as_tensor(tokens)[None]).logits[0].double()
        return logits.log_softmax(-1)[:-1].gather(1, torch.as_tensor(tokens)[1:, None])[:, 0].numpy()

    def random_sample(self, generator: np.random.Generator, prompt: int, response: int, index: int = 0) -> Sample:
        tokens = generator.integers(self.vocab_size, size=prompt + response)
        return Sample(index, 0, "", prompt_tokens=tokens[:prompt], response_tokens=tokens[prompt:])

    def is_alive(self) -> bool:
        sample = self.random_sample(np.random.default_rng(0), 2, 2)
        with_retries = SGLangTeacher(self.server.url, vocab_size=self.vocab_size, timeout=30)
        return len(with_retries.score([sample])) == 1


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = make_qwen(folder, seed=0)
    with sglang_server(folder, folder / "server.log") as server:
        yield Served(server, folder, tokenizer)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tokenizer with a chat template, and a vocabulary with more rows than the tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = train_bpe_tokenizer(["the cat sat on the mat", "2 + 3 = 5, and 12 * 34 = 408"] * 4, 290, folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 21, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    with sglang_server(folder, folder / "server.log") as server:
        yield Served(server, folder, tokenizer)


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs fails; servers are started before the clock."""
    seconds = 300

    def hangs(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{request.node.name} takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_model(tmp_path / "student", seed=1)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 40, seed=3)


@pytest.fixture
def connect() -> Iterator[Callable[..., SGLangTeacher]]:
    """Makes teachers that are closed after the test."""
    teachers: list[SGLangTeacher] = []

    def make(served: Served, url: str | Sequence[str] | None = None, **settings: Any) -> SGLangTeacher:
        settings = {"vocab_size": served.vocab_size, "max_retries": 2, "backoff": 0.05, "timeout": 60.0, **settings}
        teachers.append(SGLangTeacher(url or served.server.url, **settings))
        return teachers[-1]

    yield make
    for teacher in teachers:
        teacher.close()


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    """A student, and what stands for its trainer."""
    return Speaker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="session")
def spoken(speaker: Speaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one server with the speaker's model, without its weights."""
    logs = tmp_path_factory.mktemp("spoken")
    options = EngineOptions(sglang_python=sglang_python())
    (launch,) = server_launches(options, speaker.served, logs, on_cpu=True)
    server = launch()
    try:
        server.wait_until_healthy(600)
        yield server.url
    finally:
        server.end()
