"""Decides which process gets which processors and GPUs of which node, once, before launch.

A Ray CPU is a ticket, not a core. Trainers always hold theirs; shards and refresh workers hold one only if enough are
left, so that the same plan starts on a laptop with two cores. Each process is started on the node that it has here:
left to itself, Ray spreads shards and workers until no node has room for a trainer, and then waits for ever.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from cluster.config.settings import ClusterConfig, RefreshConfig
from cluster.machines.session import logical_cpus
from cluster.planning.hardware import GPUS
from cluster.planning.sizing import SHARED_GPU
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
    id: str = ""  # that Ray gives it; "": it is no part of a Ray


@dataclass(frozen=True, kw_only=True)
class Seat:
    """The resources that each of `number` like processes holds."""

    name: str
    number: int
    cpus: float
    gpus: float
    threads: int  # Number of computing threads; 0: the library's default
    places: tuple[int, ...] = ()  # the node of each process, counted from 0

    @property
    def device(self) -> str:
        """Return cuda or cpu."""
        return "cuda" if self.gpus > 0 else "cpu"

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU each" if self.gpus else ", on CPU"
        threads = f", {self.threads} threads" if self.threads else ""
        here = sorted(Counter(self.places).items())
        nodes = "; " + ", ".join(f"{number} on node {node + 1}" for node, number in here) if len(here) > 1 else ""
        return f"{self.number} x {self.name}: {self.cpus:g} CPU each{gpus}{threads}{nodes}"


@dataclass(frozen=True)
class PlacementPlan:
    """The resources of trainers, shards and refresh workers, and the nodes that they were planned for."""

    trainers: Seat
    shards: Seat
    workers: Seat
    nodes: tuple[Node, ...]

    @property
    def multi_node(self) -> bool:
        """Return True if the processes have several nodes to run on."""
        return len(self.nodes) > 1

    @property
    def shares_gpus(self) -> bool:
        """Return True if trainers leave parts of a node's several GPUs to others. The others take them while the room
        of the trainers is held; otherwise all of them could end on one GPU, where a trainer would lack room."""
        return 0 < self.trainers.gpus < 1 and any(node.gpus > 1 for node in self.nodes)

    def node_ids(self, seat: Seat) -> tuple[str, ...]:
        """Return Ray's id of the node of each process of a seat; "" where there is one node, and any will do."""
        places = seat.places if self.multi_node else ()
        return tuple(self.nodes[place].id for place in places) or ("",) * seat.number

    def __str__(self) -> str:
        cpus, gpus = _sum(self.nodes, "cpus"), _sum(self.nodes, "gpus")
        first = f"placement on {len(self.nodes)} node(s) with {cpus:g} CPU and {gpus:g} GPU:"
        return "\n".join([first, *(f"  {seat}" for seat in self.seats())])

    def seats(self) -> tuple[Seat, Seat, Seat]:
        """Return the seats in the order in which they are placed."""
        return self.trainers, self.shards, self.workers


def nodes_of_cluster() -> list[Node]:
    """Return the living machines of the Ray that this process is connected to, its own first, or the one that it would
    be started on."""
    import ray

    if not ray.is_initialized():
        import torch

        count = torch.cuda.device_count()
        each = float(torch.cuda.get_device_properties(0).total_memory) if count else 0.0
        return [Node(float(logical_cpus()), float(count), usable_memory()[1], each)]
    here = ray.get_runtime_context().get_node_id()
    usable = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]  # a head may offer none
    return [
        Node(one.get("CPU", 0.0), one.get("GPU", 0.0), one.get("memory", 0.0), gpu_memory(one), node["NodeID"])
        for node in sorted(usable, key=lambda node: node["NodeID"] != here)
        for one in [node["Resources"]]
    ]


def gpu_memory(resources: Mapping[str, float]) -> float:
    """Return the bytes of each GPU of a Ray node, by the kind that Ray reports; 0 if that is not known."""
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    return min((gpu.memory_bytes for gpu in GPUS.values() for kind in kinds if kind in gpu.ray_names), default=0.0)


def plan(cluster: ClusterConfig, refresh: RefreshConfig, index: IndexConfig, nodes: Sequence[Node]) -> PlacementPlan:
    """Place all processes. Raises ValueError with the numbers if the nodes cannot hold the plan."""
    cpus, gpus = _sum(nodes, "cpus"), _sum(nodes, "gpus")
    num_shards = index.num_shards * index.replicas
    trainer_gpus, shard_gpus, worker_gpus = _gpus_of_each(cluster, refresh, index, int(gpus))
    wanted = {"trainer_gpus": trainer_gpus, "shard_gpus": shard_gpus, "refresh_gpus": worker_gpus}
    _check_gpus(wanted, index.device)
    trainer_threads = 0 if trainer_gpus else cluster.threads_per_trainer
    trainer_cpus = float(max(1, trainer_threads))
    left_cpus = cpus - cluster.num_trainers * trainer_cpus - 1  # one ticket stays for the controller of the trainers
    tickets = (1.0, 0.0) if left_cpus >= num_shards + refresh.num_workers else (0.0,)

    def placed(helper_cpus: float, spread: bool) -> PlacementPlan:
        number, threads = cluster.num_trainers, 0 if worker_gpus else refresh.threads
        helpers = (
            ("index shard", num_shards, shard_gpus, 0),
            ("refresh worker", refresh.num_workers, worker_gpus, threads),
        )
        seats = [
            Seat(name="trainer", number=number, cpus=trainer_cpus, gpus=trainer_gpus, threads=trainer_threads),
            *(Seat(name=n, number=m, cpus=helper_cpus, gpus=g, threads=t) for n, m, g, t in helpers),
        ]
        return _place(seats, nodes, spread)

    plans = (placed(*how) for how in product(tickets, (True, False)))
    found = next((one for one in plans if _without_room(one) is None), None)
    if found is None:
        raise ValueError(_refusal(placed(0.0, spread=False)))
    return _with_threads(found, cluster.threads_per_trainer)


def _gpus_of_each(
    cluster: ClusterConfig, refresh: RefreshConfig, index: IndexConfig, gpus: int
) -> tuple[float, float, float]:
    """Return the GPUs of each trainer, shard and refresh worker. Where trainers and shards would leave none to encode
    with, and no setting says who has how much, all share: on a CPU, encoding takes days."""
    trainer = cluster.trainer_gpus if cluster.trainer_gpus >= 0 else float(gpus > 0)
    shard = cluster.shard_gpus if cluster.shard_gpus >= 0 else float(index.device == "gpu")
    num_shards = index.num_shards * index.replicas
    if cluster.refresh_gpus >= 0:
        return trainer, shard, cluster.refresh_gpus
    left = gpus - cluster.num_trainers * trainer - num_shards * shard
    if left <= 0 and gpus >= cluster.num_trainers and cluster.trainer_gpus < 0 and cluster.shard_gpus < 0:
        helpers = refresh.num_workers + num_shards * (index.device == "gpu")
        part = int(100 * (1 - SHARED_GPU[0]) / math.ceil(helpers / gpus) + EPSILON) / 100
        return SHARED_GPU[0], part * (index.device == "gpu"), part
    return trainer, shard, _share(left, refresh.num_workers)


def _share(left_gpus: float, num_workers: int) -> float:
    """Return the GPUs of each refresh worker out of those that are left: a whole one, a fraction, or none."""
    share = max(0.0, left_gpus) / num_workers
    return 1.0 if share >= 1 else int(share * 100) / 100


def _with_threads(placed: PlacementPlan, of_trainer: int) -> PlacementPlan:
    """Return the plan with the threads of its helpers. A shard has an even share of the cores that trainers and workers
    leave on its node, on the node where that is the least. Beside trainers on GPUs, which need few, workers on a CPU
    have a share of all cores, and shards on a CPU as much."""
    trainers, shards, workers = (Counter(seat.places) for seat in placed.seats())
    left = {number: node.cpus - trainers[number] * of_trainer for number, node in enumerate(placed.nodes)}
    each = placed.workers.threads
    if each and placed.trainers.gpus:
        parts = 1 if placed.shards.gpus else 2
        each = max(each, min(int(left[node] / parts // number) for node, number in workers.items()))
    shares = [(left[node] - workers[node] * max(1, each)) // number for node, number in shards.items()]
    return replace(
        placed,
        shards=replace(placed.shards, threads=max(1, int(min(shares)))),
        workers=replace(placed.workers, threads=each),
    )


def _check_gpus(wanted: dict[str, float], device: str) -> None:
    for name, gpus in wanted.items():
        if gpus > 1 and gpus != int(gpus):
            raise refuse(f"cluster.{name}", f"{gpus:g}", "must be -1, a fraction below 1, or a whole number")
    if device == "gpu" and wanted["shard_gpus"] == 0:
        raise refuse("cluster.shard_gpus", 0, "must be above 0 with index.device=gpu")


@dataclass
class _Room:
    """The resources of a node that no process holds yet."""

    cpus: float
    gpus: list[float]  # Share of each GPU
    processes: int = 0

    def holds(self, seat: Seat) -> bool:
        """Return True if there is room for one more process; a share of a GPU must be free on one GPU."""
        whole, share = divmod(seat.gpus, 1)
        full = sum(gpu + EPSILON >= 1 for gpu in self.gpus) >= whole
        part = not share or any(gpu + EPSILON >= share for gpu in self.gpus)
        return full and part and self.cpus + EPSILON >= seat.cpus

    def take(self, seat: Seat) -> None:
        """Give one process its part. A share is taken from the GPU that it fills best, as Ray does."""
        self.cpus -= seat.cpus
        self.processes += 1
        for _ in range(int(seat.gpus)):
            self.gpus.remove(max(self.gpus))
        if share := seat.gpus % 1:
            best = min((n for n, gpu in enumerate(self.gpus) if gpu + EPSILON >= share), key=self.gpus.__getitem__)
            self.gpus[best] -= share


def _place(seats: Sequence[Seat], nodes: Sequence[Node], spread: bool) -> PlacementPlan:
    """Give every process a node as far as there is room, those that need most first. Trainers, which talk most, are
    packed on the largest nodes; shards, their replicas and workers are spread, or packed as well if that does not
    fit."""
    rooms = [_Room(node.cpus, [1.0] * int(node.gpus)) for node in nodes]
    placed: dict[str, Seat] = {}
    for seat in sorted(seats, key=lambda seat: (-seat.gpus, -seat.cpus)):
        places: list[int] = []
        here = Counter[int]()
        for _ in range(seat.number):
            fitting = [number for number, room in enumerate(rooms) if room.holds(seat)]
            if not fitting:
                break
            if spread and seat.name != "trainer":
                best = min(fitting, key=lambda number: (here[number], rooms[number].processes))
            else:
                best = max(fitting, key=lambda number: nodes[number].gpus if seat.gpus else nodes[number].cpus)
            rooms[best].take(seat)
            places.append(best)
            here[best] += 1
        placed[seat.name] = replace(seat, places=tuple(places))
    trainers, shards, workers = (placed[seat.name] for seat in seats)
    return PlacementPlan(trainers, shards, workers, tuple(nodes))


def _without_room(plan: PlacementPlan) -> Seat | None:
    """Return a seat that has processes without a node, or None."""
    return next((seat for seat in plan.seats() if len(seat.places) < seat.number), None)


def _refusal(plan: PlacementPlan) -> str:
    cpus = sum(s.number * s.cpus for s in plan.seats())
    gpus = sum(s.number * s.gpus for s in plan.seats())
    seat = _without_room(plan)
    assert seat is not None
    return (
        f"the cluster cannot hold this run: it wants {cpus:g} CPU and {gpus:g} GPU, and no node has room for "
        f"{seat.name} {len(seat.places) + 1} of {seat.number} ({seat.cpus:g} CPU, {seat.gpus:g} GPU).\n{plan}\n"
        "Lower cluster.num_trainers, index.num_shards, index.replicas, refresh.num_workers, cluster.trainer_gpus, "
        "cluster.shard_gpus, cluster.refresh_gpus or cluster.threads_per_trainer, or add machines"
    )


def _sum(nodes: Sequence[Node], what: str) -> float:
    return float(sum(node.cpus if what == "cpus" else node.gpus for node in nodes))
