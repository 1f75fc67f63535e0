"""Decides which process gets which processors and GPUs, once, from settings and the cluster's nodes, before launch.

A Ray CPU is a ticket, not a core. Trainers always hold theirs; shards and refresh workers hold one only if enough are
left, so that the same plan starts on a laptop with two cores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config.settings import ClusterConfig, RefreshConfig
from cluster.machines.session import logical_cpus
from cluster.planning.hardware import GPUS
from indexing.allowance import usable_memory
from indexing.declare import refuse
from indexing.indexing_settings import IndexConfig

EPSILON = 1e-6  # Ray counts in ten-thousandths


@dataclass(frozen=True)
class Node:
    """The resources of one machine of the cluster."""

    cpus: float
    gpus: float
    memory_bytes: float = 0.0  # bytes free for programs; 0: not known
    gpu_memory_bytes: float = 0.0  # bytes of each GPU; 0: not known


@dataclass(frozen=True, kw_only=True)
class Seat:
    """The resources that each of `number` like processes holds."""

    name: str
    number: int
    cpus: float
    gpus: float
    threads: int  # Number of computing threads; 0: the library's default

    @property
    def device(self) -> str:
        """Return cuda or cpu."""
        return "cuda" if self.gpus > 0 else "cpu"

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU each" if self.gpus else ", on CPU"
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.number} x {self.name}: {self.cpus:g} CPU each{gpus}{threads}"


@dataclass(frozen=True)
class PlacementPlan:
    """The resources of trainers, shards and refresh workers, and the nodes that they were planned for."""

    trainers: Seat
    shards: Seat
    workers: Seat
    nodes: tuple[Node, ...]

    @property
    def multi_node(self) -> bool:
        """Return True if shards and workers are to be spread over several nodes."""
        return len(self.nodes) > 1

    def __str__(self) -> str:
        cpus, gpus = _sum(self.nodes, "cpus"), _sum(self.nodes, "gpus")
        first = f"placement on {len(self.nodes)} node(s) with {cpus:g} CPU and {gpus:g} GPU:"
        return "\n".join([first, *(f"  {seat}" for seat in self.seats())])

    def seats(self) -> tuple[Seat, Seat, Seat]:
        """Return the seats in the order in which they are placed."""
        return self.trainers, self.shards, self.workers


def nodes_of_cluster() -> list[Node]:
    """Return the living machines of the Ray that this process is connected to, or the one that it would be started
    on."""
    import ray

    if not ray.is_initialized():
        import torch

        count = torch.cuda.device_count()
        each = float(torch.cuda.get_device_properties(0).total_memory) if count else 0.0
        return [Node(float(logical_cpus()), float(count), usable_memory()[1], each)]
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [
        Node(one.get("CPU", 0.0), one.get("GPU", 0.0), one.get("memory", 0.0), gpu_memory(one)) for one in resources
    ]


def gpu_memory(resources: Mapping[str, float]) -> float:
    """Return the bytes of each GPU of a Ray node, by the kind that Ray reports; 0 if that is not known."""
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    return min((gpu.memory_bytes for gpu in GPUS.values() for kind in kinds if kind in gpu.ray_names), default=0.0)


def plan(cluster: ClusterConfig, refresh: RefreshConfig, index: IndexConfig, nodes: Sequence[Node]) -> PlacementPlan:
    """Place all processes. Raises ValueError with the numbers if the nodes cannot hold the plan."""
    cpus, gpus = _sum(nodes, "cpus"), _sum(nodes, "gpus")
    trainer_gpus = cluster.trainer_gpus if cluster.trainer_gpus >= 0 else float(gpus > 0)
    shard_gpus = cluster.shard_gpus if cluster.shard_gpus >= 0 else float(index.device == "gpu")
    num_shards = index.num_shards * index.replicas
    left_gpus = gpus - cluster.num_trainers * trainer_gpus - num_shards * shard_gpus
    worker_gpus = cluster.refresh_gpus if cluster.refresh_gpus >= 0 else _share(left_gpus, refresh.num_workers)
    wanted = {"trainer_gpus": trainer_gpus, "shard_gpus": shard_gpus, "refresh_gpus": worker_gpus}
    _check_gpus(wanted, index.device)
    trainer_threads = 0 if trainer_gpus else cluster.threads_per_trainer
    trainer_cpus = float(max(1, trainer_threads))
    left_cpus = cpus - cluster.num_trainers * trainer_cpus - 1  # one ticket stays for the controller of the trainers
    shard_threads = _shard_threads(cluster, refresh, index, nodes)

    def seated(helper_cpus: float) -> PlacementPlan:
        return PlacementPlan(
            Seat(
                name="trainer",
                number=cluster.num_trainers,
                cpus=trainer_cpus,
                gpus=trainer_gpus,
                threads=trainer_threads,
            ),
            Seat(name="index shard", number=num_shards, cpus=helper_cpus, gpus=shard_gpus, threads=shard_threads),
            Seat(
                name="refresh worker",
                number=refresh.num_workers,
                cpus=helper_cpus,
                gpus=worker_gpus,
                threads=0 if worker_gpus else refresh.threads,
            ),
            tuple(nodes),
        )

    generous = seated(1.0)
    if left_cpus >= num_shards + refresh.num_workers and _without_room(generous) is None:
        return generous
    modest = seated(0.0)
    if (refused := _without_room(modest)) is not None:
        raise ValueError(_refusal(modest, *refused))
    return modest


def _share(left_gpus: float, num_workers: int) -> float:
    """Return the GPUs of each refresh worker out of those that are left: a whole one, a fraction, or none."""
    share = max(0.0, left_gpus) / num_workers
    return 1.0 if share >= 1 else int(share * 100) / 100


def _shard_threads(cluster: ClusterConfig, refresh: RefreshConfig, index: IndexConfig, nodes: Sequence[Node]) -> int:
    """Return the FAISS threads of a shard: an even share of the cores that trainers and workers leave."""
    used = cluster.num_trainers * cluster.threads_per_trainer + refresh.num_workers * refresh.threads
    return max(1, int((_sum(nodes, "cpus") - used) // (index.num_shards * index.replicas)))


def _check_gpus(wanted: dict[str, float], device: str) -> None:
    for name, gpus in wanted.items():
        if gpus > 1 and gpus != int(gpus):
            raise refuse(f"cluster.{name}", f"{gpus:g}", "must be -1, a fraction below 1, or a whole number")
    if device == "gpu" and wanted["shard_gpus"] == 0:
        raise refuse("cluster.shard_gpus", 0, "must be above 0 with index.device=gpu")


def _without_room(plan: PlacementPlan) -> tuple[Seat, int] | None:
    """Place every process on a node, those that need most first. Returns the first that finds no room, or None."""
    free = [[node.cpus, node.gpus] for node in plan.nodes]
    for seat in sorted(plan.seats(), key=lambda seat: (-seat.gpus, -seat.cpus)):
        for number in range(seat.number):
            room = next((f for f in free if f[0] + EPSILON >= seat.cpus and f[1] + EPSILON >= seat.gpus), None)
            if room is None:
                return seat, number
            room[0] -= seat.cpus
            room[1] -= seat.gpus
    return None


def _refusal(plan: PlacementPlan, seat: Seat, seated: int) -> str:
    cpus = sum(s.number * s.cpus for s in plan.seats())
    gpus = sum(s.number * s.gpus for s in plan.seats())
    return (
        f"the cluster cannot hold this run: it wants {cpus:g} CPU and {gpus:g} GPU, and no node has room for "
        f"{seat.name} {seated + 1} of {seat.number} ({seat.cpus:g} CPU, {seat.gpus:g} GPU).\n{plan}\n"
        "Lower cluster.num_trainers, index.num_shards, index.replicas, refresh.num_workers, cluster.trainer_gpus, "
        "cluster.shard_gpus, cluster.refresh_gpus or cluster.threads_per_trainer, or add machines"
    )


def _sum(nodes: Sequence[Node], what: str) -> float:
    return float(sum(node.cpus if what == "cpus" else node.gpus for node in nodes))
