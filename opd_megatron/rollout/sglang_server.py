"""One SGLang server that speaks for the student: started here and started again when it dies, or only talked to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from opd_megatron.config.errors import RunError, UserError
from opd_megatron.http_client import HttpClient, HttpError, HttpFault
from opd_megatron.rollout.sglang_answer import UnusableAnswerError, read_scores, score_body
from opd_megatron.rollout.weight_check import WeightCheck
from opd_megatron.servers import LocalServer
from opd_megatron.system import is_free

logger = logging.getLogger(__name__)

START_TIMEOUT = 1800.0
"""Seconds that a server has to become healthy."""
ALIVE_TIMEOUT = 60.0
"""Seconds that a server which runs already has to answer."""
FAREWELL_TIMEOUT = 10.0
"""Seconds that a server has to take notice of what was given up."""
_POLL = 0.25

_SHAPES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "moe_intermediate_size",
    "tie_word_embeddings",
)
"""Fields of a config that decide which weights a model has and of what shapes."""


class Launch(Protocol):
    """Starts the server's process, on a free port unless one is named, and returns at once."""

    def __call__(self, *, port: int | None = None) -> LocalServer: ...


class SGLangServer:
    """The exchanges with one server. ``launch`` starts it; without it ``url`` names one that runs already.

    All coroutines run in the engine's loop. ``lock`` is held while the server is being started or loaded again, and
    ``epoch`` counts how often it was: who met a fault looks whether another one has mended it meanwhile.
    """

    def __init__(
        self,
        check: WeightCheck,
        timeout: float,
        *,
        launch: Launch | None = None,
        url: str = "",
        api_key_env: str | None = None,
    ) -> None:
        self.check = check
        self.lock = asyncio.Lock()
        self.epoch = 0
        self.in_flight = 0
        self.lost = False
        self.fault = ""
        """Why it was lost."""
        self.address = url
        """Where the server listens, with what it takes to be let in."""
        self._timeout = timeout
        self._launch = launch
        self._process: LocalServer | None = None
        self.label = ""
        """What it was last given."""
        self._resting = False
        self._client: HttpClient | None = None
        if launch is not None:
            self._start(launch)
        else:
            self._client = HttpClient(url, kind="rollout engine", timeout=timeout, api_key_env=api_key_env)

    def _start(self, launch: Launch, port: int | None = None) -> None:
        self._process = launch(port=port)
        self.address = self._process.url
        self._client = HttpClient(self._process.url, kind="rollout engine", timeout=self._timeout)

    @property
    def client(self) -> HttpClient:
        assert self._client is not None
        return self._client

    @property
    def name(self) -> str:
        """The server in messages."""
        return self.client.server

    @property
    def is_ours(self) -> bool:
        return self._launch is not None

    @property
    def log(self) -> Path | None:
        """Where a server that was started here writes its output."""
        return None if self._process is None else self._process.log_path

    @property
    def has_ended(self) -> bool:
        """Whether its process, if it is ours, is gone."""
        return self._process is not None and self._process.has_ended()

    async def wait_until_healthy(self) -> None:
        """Return when the server can generate.

        Raises :class:`UserError` if one of ours ends or does not come up, :class:`HttpError` if another one does not
        answer.
        """
        if self._process is not None:
            process = self._process
            await asyncio.to_thread(process.wait_until_healthy, START_TIMEOUT)
            return
        deadline = time.monotonic() + ALIVE_TIMEOUT
        while True:
            try:
                await self.model_info()
                return
            except HttpError as error:
                if time.monotonic() > deadline or not error.transient:
                    raise
            await asyncio.sleep(_POLL)

    async def is_well(self) -> bool:
        """Whether the server, after a fault, generates nevertheless."""
        try:
            await self._exchange("GET", "/health_generate", None, timeout=ALIVE_TIMEOUT)
        except HttpError as error:
            return error.fault is HttpFault.MALFORMED  # all is well, and the answer has no content
        return True

    async def restart(self) -> None:
        """End what is left of our process and start it anew, to health.

        It listens where it did, as whoever asks it to score has that address, unless somebody took the port meanwhile.
        """
        assert self._launch is not None
        await self.close()
        self._resting = False
        port = urlsplit(self.address).port
        self._start(self._launch, port if port is not None and is_free(port) else None)
        try:
            await self.wait_until_healthy()
        except UserError as error:
            raise RunError(f"{self.name} died and did not come up again: {error}") from error

    async def model_info(self) -> dict[str, Any]:
        """What ``/model_info`` says; raises :class:`HttpError`, or :class:`UserError` where it is no SGLang server."""
        info = await self._exchange("GET", "/model_info", None, timeout=ALIVE_TIMEOUT)
        if not isinstance(info, dict) or "weight_version" not in info:
            raise UserError(f"{self.name} is no SGLang server: its /model_info has no weight_version")
        return info

    async def usable_positions(self, folder: Path) -> int:
        """How many tokens prompt and response may have together; what does not fit kills no server, but is refused.

        Raises :class:`UserError` where the server has another model than ``folder`` names: weights of another shape
        would end it. Its config is compared as far as it can be read here.
        """
        info = await self.model_info()
        mine = _read_config(folder)
        for place in (info.get("tokenizer_path"), info["model_path"]):
            theirs = _read_config(Path(str(place)))
            for field in _SHAPES:
                if mine.get(field) != theirs.get(field, mine.get(field)):
                    raise UserError(
                        f"{self.name} has another model than --hf-checkpoint: {field} is {theirs[field]} there and "
                        f"{mine.get(field)} here"
                    )
        return int((await self.server_info())["max_req_input_len"]) - 1

    async def server_info(self) -> dict[str, Any]:
        """What ``/server_info`` says; raises :class:`HttpError`."""
        info: dict[str, Any] = await self._exchange("GET", "/server_info", None, timeout=ALIVE_TIMEOUT)
        return info

    async def generate(self, body: dict[str, Any]) -> Any:
        """The answer to a request, which is aborted where it is given up."""
        self.in_flight += 1
        try:
            return await self._exchange("POST", "/generate", body)
        except (asyncio.CancelledError, HttpError):
            await asyncio.shield(self.abort(body["rid"]))
            raise
        finally:
            self.in_flight -= 1

    async def abort(self, rid: str) -> None:
        """End a request that nobody waits for; what the server says to it does not matter."""
        try:
            await self._exchange("POST", "/abort_request", {"rid": rid}, timeout=FAREWELL_TIMEOUT)
        except HttpError as error:
            logger.debug("abort of %s: %s", rid, error)  # its answer has no content

    async def load(self, folder: Path, label: str) -> None:
        """Replace the weights by those in ``folder``, which the server reads; nothing is generated meanwhile.

        Raises :class:`HttpError`, or :class:`RunError` where the server says that it has failed.
        """
        async with self.paused():
            await self.tell(
                "/update_weights_from_disk",
                {
                    "model_path": str(folder),
                    "load_format": "auto",
                    "weight_version": label,
                    "flush_cache": True,
                },
            )
        self.label = label

    async def tell(self, path: str, payload: Any, timeout: float | None = None) -> None:
        """A request that the server answers with nothing but its success; raises like :meth:`load`."""
        answer = await self._exchange("POST", path, payload, timeout)
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise RunError(f"{self.name}: POST {path} did not succeed: {answer}")

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncGenerator[None, None]:
        """Abort what is being generated, and generate nothing in the block."""
        await self._exchange("POST", "/pause_generation", {"mode": "abort"})
        async with afterwards(lambda seconds: self._exchange("POST", "/continue_generation", {}, seconds)):
            yield

    async def score(self, tokens: np.ndarray, rid: str, vocab_size: int) -> np.ndarray:
        """Log-probabilities float32 of ``tokens[1:]`` at temperature 1; raises like :meth:`load`."""
        answer = await self._exchange("POST", "/generate", score_body(tokens, rid))
        try:
            return read_scores(answer, tokens, vocab_size=vocab_size, server=self.name)
        except UnusableAnswerError as error:
            raise RunError(str(error)) from error

    async def release_memory(self) -> None:
        """Give the memory of weights and cache back; the server must be idle."""
        await self._exchange("POST", "/release_memory_occupation", {})
        self._resting = True

    async def resume_memory(self) -> None:
        """Take the memory again where it was given back; the weights are undefined until they are loaded."""
        # One that began anew meanwhile has its memory, and would end over the request.
        if self._resting and (await self.model_info())["weight_version"] == self.label:
            await self._exchange("POST", "/resume_memory_occupation", {})
        self._resting = False

    async def _exchange(self, method: str, path: str, payload: Any, timeout: float | None = None) -> Any:
        return await self.client.attempt(method, path, payload, f"{method} {path}", timeout=timeout or self._timeout)

    async def close(self) -> None:
        """End our process and everything it started; another one's server is left alone."""
        if self._client is not None:
            await self._client.aclose()
        if self._process is not None:
            await asyncio.to_thread(self._process.end)


@contextlib.asynccontextmanager
async def afterwards(request: Callable[[float | None], Awaitable[None]]) -> AsyncGenerator[None, None]:
    """Make ``request(seconds)``, with its time limit (None: the usual one), when the block is left.

    What ended the block is what is raised: a server that has just failed is not waited for a second time.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(RunError):
            await asyncio.shield(request(FAREWELL_TIMEOUT))
        raise
    await asyncio.shield(request(None))


def _read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder, {} where there is none to read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
