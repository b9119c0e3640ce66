"""Weights on their way to an engine without a disk between: broadcast to each server over a process group of its own.

The group is one of gloo, made for one update and left after it, so that a server that begins anew finds nothing stale.
Its tensors come from this process's memory, whatever device the server keeps its own on. SGLang's part of it is
``init_weights_update_group``, whose rendezvous it makes as ``torch.distributed.init_process_group`` would.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
import socket
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.http_client import HttpError, HttpFault
from opd_megatron.rollout.sglang_server import SGLangServer, afterwards
from opd_megatron.threads import CallingThreads

BUCKET_BYTES = 2**29
"""Weights that a server holds beside its own at a time, if no single tensor is larger."""
_JOIN_SECONDS = 60.0
"""How long the ranks wait for each other."""

NamedTensors = Sequence[tuple[str, Tensor]]


class BroadcastWeights:
    """Weights kept in this process's memory until the next ones come. ``timeout`` in seconds limits one bucket."""

    def __init__(self, timeout: float, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._timeout = timeout
        self._bucket_bytes = bucket_bytes
        self.tensors: list[tuple[str, Tensor]] = []
        self._count = 0

    def take(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy them: the trainer's own change with its next step."""
        self.tensors = []  # those before leave before these come
        self.tensors = [(name, tensor.detach().to("cpu", copy=True).contiguous()) for name, tensor in named_tensors]

    async def load(self, server: SGLangServer, label: str) -> None:
        """See :class:`~opd_megatron.rollout.sglang_fleet.Weights`."""
        ranks = await _ranks(server)
        self._count += 1
        group = f"{label}-{self._count}"
        async with server.paused(), _update(server):
            with _Sender(_address_towards(server.client.url), group, ranks + 1, self._timeout) as sender:
                await sender.meet(server)
                last = None
                for bucket in buckets(self.tensors, self._bucket_bytes):
                    if last is not None:
                        await sender.send(server, last, {"flush_cache": False})
                    last = bucket
                await sender.send(server, last or [], {"flush_cache": True, "weight_version": label})
                await server.tell("/destroy_weights_update_group", {"group_name": group})
        server.label = label

    def remove(self) -> None:
        self.tensors = []


async def _ranks(server: SGLangServer) -> int:
    """The processes over which a server splits its tensors."""
    info = await server.server_info()
    for name in ("dp_size", "pp_size"):
        if info.get(name, 1) != 1:
            raise RunError(
                f"{server.name}: a server with {name} {info[name]} takes no weights by --rollout-weight-transfer "
                "distributed: use disk"
            )
    return int(info.get("tp_size", 1))


@contextlib.asynccontextmanager
async def _update(server: SGLangServer) -> AsyncGenerator[None, None]:
    """What SGLang wants around the parts of an update; one that somebody left open is ended."""
    try:
        await server.tell("/begin_weight_update", {"selector": "all"})
    except HttpError as error:
        if error.status != 400:
            raise
        await server.tell("/end_weight_update", {})
        await server.tell("/begin_weight_update", {"selector": "all"})
    async with afterwards(lambda seconds: server.tell("/end_weight_update", {}, seconds)):
        yield


def buckets(tensors: NamedTensors, most: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours of at most ``most`` bytes together, or one larger tensor alone."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > most:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


class _Sender:
    """Rank 0 of a group of ``size`` ranks that meet at ``address``, which is of this machine."""

    def __init__(self, address: str, name: str, size: int, timeout: float) -> None:
        self._address, self._name, self._size, self._timeout = address, name, size, timeout
        self._threads = CallingThreads(1, "weights")
        self._group: Any = None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as listener:
            # Bound here: the store itself would listen on every interface.
            listener.bind((address, 0))
            listener.listen()
            self._port = listener.getsockname()[1]
            self._store = dist.TCPStore(
                address,
                self._port,
                size,
                is_master=True,
                timeout=datetime.timedelta(seconds=_JOIN_SECONDS),
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, *error: object) -> None:
        # A broadcast to a server that does not take it ends with the connection, or at the time limit.
        self._threads.close()

    async def meet(self, server: SGLangServer) -> None:
        """Form the group; raises :class:`HttpError` where the server does not come."""
        asked = {
            "master_address": self._address,
            "master_port": self._port,
            "rank_offset": 1,
            "world_size": self._size,
            "group_name": self._name,
            "backend": "gloo",
        }
        await self._beside(server, server.tell("/init_weights_update_group", asked), self._threads.call(self._connect))

    async def send(self, server: SGLangServer, bucket: NamedTensors, more: dict[str, Any]) -> None:
        """Let the server take a bucket; raises :class:`HttpError` where it does not."""
        announced = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._name,
            **more,
        }
        told = server.tell("/update_weights_from_distributed", announced)
        await self._beside(server, told, self._threads.call(self._broadcast, [tensor for _, tensor in bucket]))

    async def _beside(self, server: SGLangServer, *both: Any) -> None:
        """The server's part and ours at once; the first failure ends the other."""
        tasks = [asyncio.ensure_future(one) for one in both]
        try:
            await asyncio.gather(*tasks)
        except RuntimeError as error:
            if isinstance(error, RunError):
                raise
            told = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split()))  # without the line of gloo's source
            reason = f"the broadcast failed ({told})"
            raise HttpError(server.name, "weights", reason, HttpFault.CONNECTION, transient=True) from None
        finally:
            for task in tasks:
                task.cancel()

    def _connect(self) -> None:
        # The prefixes under which torch.distributed keeps the addresses of a group of this name.
        store: Any = self._store
        for prefix in (self._name, f"{self._name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        gloo: Any = dist.ProcessGroupGloo  # whose stubs lack the options
        options = gloo._Options()
        options._timeout = datetime.timedelta(seconds=self._timeout)
        options._devices = [gloo.create_device(hostname=self._address)]
        self._group = gloo(store, 0, self._size, options)

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
            work.wait()


def _address_towards(url: str) -> str:
    """The address of this machine that the server at ``url`` sees; nothing is sent."""
    parts = urlsplit(url)
    family, _, _, _, where = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])
