"""Configuration sections of the run and of its place on the machines, and the root of all sections."""

from dataclasses import dataclass, field

from indexing.indexing_settings import CorpusConfig, IndexConfig, LexicalConfig, PreferencesConfig, QuestionsConfig
from training.training_settings import (
    AlignmentConfig,
    CheckpointConfig,
    EncoderConfig,
    EngineConfig,
    EvaluationConfig,
    GeneratorConfig,
    MonitorConfig,
    ObjectiveConfig,
    PretrainingConfig,
    RerankerConfig,
    RetrievalConfig,
    TrainingConfig,
)


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
    """When and how the index follows the encoder; the contract stands in `cluster/refresh/coordinator.py`."""

    every_steps: int = 50  # publish the encoder every so many steps; 0: never; not read with policy on_drift
    # Training waits when a passage of the index is staler (after partial refreshes: the one encoded longest ago); 0: it
    # never waits
    max_staleness_steps: int = 0
    # every_steps | on_drift | both: what asks for a refresh (training/refreshing/policy.py)
    policy: str = "every_steps"
    # Share of the k best that fresh scores keep among the k best, on the probe; below it, drift asks for a refresh
    drift_threshold: float = 0.0
    check_every_steps: int = 0  # drift is looked at every so many steps; every_steps looks at every publish
    # Share of the corpus that refreshes may encode per optimiser step, averaged over the stage (0.02: a whole refresh
    # in 50 steps); those that drift asks for wait beyond it. 0: no budget
    max_share: float = 0.0
    probe_questions: int = 32  # on which drift is measured, a fixed sample of the training questions; 0: it is not
    partial: float = 0.0  # share of the corpus that a partial refresh encodes, the most read and oldest first; 0: off
    whole_every: int = 5  # with partial: one of so many refreshes is whole; 0: none
    num_workers: int = 1
    chunk_passages: int = 2048  # passages that a worker encodes at a time
    batch_tokens: int = 4096  # padded tokens of one encoder call; a GPU wants more
    # float32 | bfloat16: of the published weights, and of products where workers have such (a GPU, a CPU with AMX)
    precision: str = "float32"
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
    check_fit: str = (
        "refuse"  # refuse | warn | off: a launch whose memory, as `plan` counts it, the machines do not have
    )
    memory_margin: float = 0.1  # share of every memory that `plan` and the check before a launch leave free
    dry_run: bool = False  # print the placement, build what can be built without weights, stop
    dry_run_nodes: str = ""  # plan for these machines instead of those at hand: MACHINESxGPUSxCPUS, "2x8x96"


@dataclass
class PlanConfig:
    """What the verb `plan` computes with, where it is not to be the corpus or the machine at hand. Changes no run."""

    passages: int = 0  # 0: those of the prepared store, else counted in the corpus
    tokens_per_passage: float = 0.0  # mean, for the encoder; 0: the store's, else encoder.max_passage_tokens
    encoder: str = ""  # LAYERSxHIDDENxVOCABULARY, "12x768x30522"; empty: the configuration of encoder.name or .fresh
    generator: str = ""  # likewise; layers of encoder and decoder together
    gpu: str = "auto"  # auto (what this machine has) | h100 | h200 | a100-80g | a100-40g | l40s | a10g | t4 | cpu
    gpus: int = 0  # at hand (machines, with cpu); 0: the smallest number that does it, up to 1,024
    gpus_per_node: int = 8
    node_cpus: int = 0  # 0: 12 for each of its GPUs; those of this machine, with cpu
    node_memory_gb: float = 0.0  # 0: 128 for each of its GPUs; this machine's, with cpu
    network_gbit_s: float = 100.0  # of each machine
    step_seconds: float = 0.0  # of training; 0: estimated from the models' operations


@dataclass
class Settings:
    """The root: everything that one run (one stage of a file with stages) is made of."""

    run: RunConfig = field(default_factory=RunConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    reranker: RerankerConfig = field(default_factory=RerankerConfig)
    lexical: LexicalConfig = field(default_factory=LexicalConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass
class UpdateConfig:
    """After the last stage: apply corpus updates, encode again without training, ask again."""

    as_of: str = ""  # "end" or a date YYYY-MM-DD; empty: no update
    stages: list[str] = field(
        default_factory=list
    )  # stages whose system is asked again; empty in a file without stages


@dataclass
class CompareConfig:
    """A matrix of runs; its cells and axes stand beside these in the file (`cluster/config/matrix.py`)."""

    base_stage: str = ""  # stage that every cell is, but for what the cell sets; empty in a file without stages
    baseline: str = ""  # cell that the others are compared with
    seeds: list[int] = field(default_factory=lambda: [0])
