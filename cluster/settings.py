"""Configuration sections of the run and of its place on the machines."""

from dataclasses import dataclass


@dataclass
class RunConfig:
    """Name, place and seed of a run."""

    name: str = "run"
    directory: str = "runs"
    seed: int = 0
    init_from: str = ""  # a checkpoint folder, a run folder, or the name of a stage of the same file
    overwrite: bool = False  # delete an earlier run of this name instead of resuming it


@dataclass
class RefreshConfig:
    """When and how the index follows the encoder; the contract stands in `cluster/refresh.py`."""

    every_steps: int = 50  # publish the encoder every so many steps; 0: never
    max_staleness_steps: int = 0  # training waits when hits are staler; 0: it never waits
    num_workers: int = 1
    chunk_passages: int = 2048  # passages that a worker encodes at a time
    batch_tokens: int = 16_384  # tokens of one encoder call
    precision: str = "float32"  # float32 | bfloat16: of the published weights
    threads: int = 1  # of a CPU worker
    max_failures: int = 3  # of one refresh, before it is given up until the next publish
    chunk_timeout_s: float = 600.0


@dataclass
class ClusterConfig:
    """Which machine part does what."""

    num_trainers: int = 1
    trainer_gpus: float = -1.0  # per trainer; -1: 1 if the cluster has GPUs, else 0
    refresh_gpus: float = -1.0  # per refresh worker; -1: what is left over
    shard_gpus: float = -1.0  # per shard; -1: 1 for index.device gpu, else 0
    threads_per_trainer: int = 1  # on CPU
    max_failures: int = 3  # trainer restarts before the run is given up
    start_timeout_s: float = 300.0
    dry_run: bool = False  # print the placement, build what can be built without weights, stop
