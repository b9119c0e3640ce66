"""Trainer ranks as Ray actors: placement, calls to all of them, and an orderly end when one fails."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opd_megatron.cluster.group import TrainerError, TrainerGroup
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ClusterOptions
from opd_megatron.megatron import cpu
from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.trainer import MegatronTrainer, TrainerSpec
from opd_megatron.system import free_port

PLACEMENT_SECONDS = 120.0


class Place(NamedTuple):
    """Where an actor runs: the address of its node and Ray's names of its devices there (none without GPUs)."""

    node: str
    devices: tuple[int | str, ...]


def rank_order(places: Sequence[Place]) -> list[int]:
    """Positions of actors in the order of their ranks: node after node, on a node by device.

    Ray fills nodes in any order. Ranks that follow one another form the tensor-parallel groups, which must lie within a
    node to be fast. Nodes come in the order of their first actor, so that rank 0 stays where the first one is.
    """
    nodes = list(dict.fromkeys(place.node for place in places))
    keys = [(nodes.index(place.node), place.devices, position) for position, place in enumerate(places)]
    return [position for _, _, position in sorted(keys)]


def local_ranks(nodes: Sequence[str]) -> list[int]:
    """Number of each rank among those of its node."""
    return [nodes[:rank].count(node) for rank, node in enumerate(nodes)]


class _TrainerRank:
    """What runs in an actor: one rank, built after all of them are placed."""

    def __init__(self) -> None:
        self._trainer: MegatronTrainer | None = None

    def place(self) -> Place:
        """The node and the device that this actor was given."""
        return Place(ray.util.get_node_ip_address(), tuple(sorted(ray.get_gpu_ids())))

    def port(self) -> int:
        """A port where the ranks can meet on this actor's node."""
        return free_port()

    def build(self, spec: TrainerSpec, rendezvous: Rendezvous) -> None:
        self._trainer = MegatronTrainer(spec, rendezvous)

    def call(self, method: str, *arguments: Any) -> Any:
        found = getattr(self._trainer, method)(*arguments)
        return list(found) if isinstance(found, Iterator) else found


class RayTrainerGroup(TrainerGroup):
    """One actor per rank on the nodes of a Ray cluster, which is started on this machine unless an address is given.

    Raises :class:`UserError` if the cluster cannot place the ranks and :class:`TrainerError` if one fails, after all of
    them were ended.
    """

    def __init__(self, spec: TrainerSpec) -> None:
        cluster = spec.options.cluster
        self._world_size = spec.options.world_size
        self._owns_cluster = not ray.is_initialized()
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        if self._owns_cluster:
            _connect(cluster, self._world_size)
        try:
            self._place(cluster)
            nodes = self._sort_actors()
            port = self._wait([self._actors[0].port.remote()])[0]
            local = local_ranks(nodes)
            self._wait(
                [
                    actor.build.remote(
                        spec,
                        Rendezvous(
                            rank=rank,
                            world_size=self._world_size,
                            local_rank=local[rank],
                            address=nodes[0],
                            port=port,
                        ),
                    )
                    for rank, actor in enumerate(self._actors)
                ]
            )
        except BaseException:
            self.close()
            raise

    def _place(self, cluster: ClusterOptions) -> None:
        available = ray.cluster_resources()
        gpus = 1 if cpu.has_cuda() or available.get("GPU", 0) else 0
        bundle: dict[str, float] = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
        have = {name: available.get(name, 0.0) for name in bundle}
        needed = (
            f"--actor-num-nodes {cluster.actor_num_nodes} x --actor-num-gpus-per-node "
            f"{cluster.actor_num_gpus_per_node} need {self._world_size} times {bundle}, the cluster has {have}"
        )
        if any(have[name] < self._world_size * amount for name, amount in bundle.items()):
            raise UserError(needed)
        group = placement_group([bundle] * self._world_size, strategy="PACK")
        self._group = group
        if not group.wait(PLACEMENT_SECONDS):
            raise UserError(f"{needed}, but others use it: nothing was free for {PLACEMENT_SECONDS:.0f} seconds")
        remote = ray.remote(_TrainerRank)
        self._actors = [
            remote.options(
                num_cpus=1,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(self._world_size)
        ]

    def _sort_actors(self) -> list[str]:
        """Put the actors into the order of their ranks; the node of each."""
        places: list[Place] = self._wait([actor.place.remote() for actor in self._actors])
        order = rank_order(places)
        self._actors = [self._actors[position] for position in order]
        return [places[position].node for position in order]

    def _wait(self, references: list[Any]) -> list[Any]:
        """Results of one call per rank. The first failure ends every rank: the others would wait for it forever."""
        pending = list(references)
        results: dict[Any, Any] = {}
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            try:
                results[done[0]] = ray.get(done[0])
            except ray.exceptions.RayError as error:
                rank = references.index(done[0])
                self.close()
                raise _readable(rank, error) from error
        return [results[reference] for reference in references]

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        shared = [ray.put(argument) for argument in arguments]  # once for all ranks
        return self._wait([actor.call.remote(method, *shared) for actor in self._actors])

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._owns_cluster and ray.is_initialized():
            ray.shutdown()


def _connect(cluster: ClusterOptions, world_size: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if cluster.ray_address is not None:
        try:
            ray.init(address=cluster.ray_address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"--ray-address {cluster.ray_address}: {str(error).splitlines()[0]}") from error
        return
    if cluster.actor_num_nodes > 1:
        raise UserError("--actor-num-nodes above 1 needs --ray-address: start a Ray cluster on the nodes first")
    threads = max(1, (os.cpu_count() or 1) // world_size)
    ray.init(
        num_cpus=world_size,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}},
        **quiet,
    )


def _readable(rank: int, error: Exception) -> Exception:
    """The error of a rank as one message, of the kind that it was in the rank."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, UserError):
        return UserError(str(cause))
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return TrainerError(f"trainer rank {rank} failed: {type(cause).__name__}: {lines[0] if lines else ''}")
