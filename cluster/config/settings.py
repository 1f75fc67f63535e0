"""Declares the settings of the run and of its place on the machines, and the root of all sections."""

import re
from dataclasses import dataclass

from indexing.declare import POINT_VALUES, is_point, section, setting
from indexing.indexing_settings import CorpusConfig, IndexConfig, LexicalConfig, PreferencesConfig, QuestionsConfig
from training.example_settings import AlignmentConfig, PretrainingConfig
from training.refreshing.policy import POLICIES
from training.training_settings import (
    DTYPES,
    CheckpointConfig,
    EncoderConfig,
    EngineConfig,
    EvaluationConfig,
    GeneratorConfig,
    MonitorConfig,
    ObjectiveConfig,
    RerankerConfig,
    RetrievalConfig,
    TrainingConfig,
)

GPUS = ("h100", "h200", "a100-80g", "a100-40g", "l40s", "a10g", "t4")  # that a plan knows
_SIZE = re.compile(r"([1-9]\d*x[1-9]\d*x[1-9]\d*)?")
_SIZE_VALUES = "LAYERSxHIDDENxVOCABULARY, for instance 12x768x30522"
_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_GPU_VALUES = "-1 (automatic), a share between 0 and 1, or a whole number of GPUs"


def _is_gpus(number: float) -> bool:
    return number == -1 or 0 <= number <= 1 or (number > 1 and number == int(number))


# Tables of settings, laid out by hand.
# fmt: off


@dataclass(kw_only=True)
class RunConfig:
    """Name, place and seed of a run."""

    name: str = setting("run", "Name of the run, and of its folder below run.directory.", holds=_RUN_NAME.fullmatch,
        allowed="letters, digits and ._- (the name of a folder)")
    directory: str = setting("runs", "Folder that holds the run folders.", holds=bool, allowed="the path of a folder")
    seed: int = setting(0, "Seed of weights, order of the data, dropout and samples.")
    init_from: str = setting("", "Start of the weights: a checkpoint folder, a run folder, or the name of a stage of "
        "the same file. Empty: fresh or named models.")
    overwrite: bool = setting(False, "Deletes an earlier run of this name instead of resuming it.")


@dataclass(kw_only=True)
class RefreshConfig:
    """When and how the index follows the encoder; the contract stands in `cluster/refresh/coordinator.py`."""

    every_steps: int = setting(50, "Number of steps from one publish of the encoder to the next; not read with policy "
        "on_drift. 0: never.", unit="steps")
    max_staleness_steps: int = setting(0, "Number of steps of staleness of the index's oldest passage beyond which "
        "training waits for a refresh. 0: it never waits.", unit="steps")
    policy: str = setting("every_steps", "Reason for a refresh: the clock, measured drift, or both "
        "(`training/refreshing/policy.py`).", choices=POLICIES)
    drift_threshold: float = setting(0.0, "Share of the k best by fresh scores that the index's k best must contain on "
        "the probe; below it, drift asks for a refresh.", unit="share", least=0, most=1)
    check_every_steps: int = setting(0, "Number of steps from one look at drift to the next; policy every_steps looks "
        "at every publish.", unit="steps")
    max_share: float = setting(0.0, "Share of the corpus that refreshes may encode for each optimiser step, averaged "
        "over the stage (0.02: a whole refresh in 50 steps); those that drift asks for wait beyond it. 0: no budget.",
        unit="share", least=0, most=1)
    probe_questions: int = setting(32, "Number of training questions, a fixed sample, on which drift is measured. 0: "
        "it is not.", unit="questions")
    partial: float = setting(0.0, "Share of the corpus that a partial refresh encodes, the most read and oldest "
        "passages first. 0: every refresh is a whole one.", unit="share", least=0, below=1)
    whole_every: int = setting(5, "Number of refreshes of which one is whole, with refresh.partial. 0: none is.",
        unit="refreshes")
    num_workers: int = setting(1, "Number of processes that encode the corpus.", unit="workers", least=1)
    chunk_passages: int = setting(2048, "Number of passages that a worker encodes at a time.", unit="passages", least=1)
    batch_tokens: int = setting(4096, "Number of padded tokens of one encoder call; a GPU wants more.", unit="tokens",
        least=1)
    precision: str = setting("float32", "Precision of the published weights, and of products where workers have such "
        "(a GPU, a CPU with AMX).", choices=DTYPES)
    threads: int = setting(1, "Number of threads of a worker on CPU. Beside trainers on GPUs it takes its share of "
        "the CPUs that they leave, if that is more.", unit="threads", least=1)
    max_failures: int = setting(3, "Number of failures of one refresh before it is given up until the next publish.",
        unit="failures")
    chunk_timeout_s: float = setting(600.0, "Seconds that a worker may take for one chunk.", unit="s", above=0)
    estimate_slack: float = setting(4.0, "Number of times its estimated duration that a build, a save or a load of an "
        "index may take, beyond refresh.chunk_timeout_s, before it is given up.", unit="times", least=1)
    grace_s: float = setting(10.0, "Seconds that a replaced generation stays open for trainers that have not heard of "
        "the next one.", unit="s", least=0)
    snapshot_wait_s: float = setting(60.0, "Seconds that a refresh waits for the snapshot of a generation that has to "
        "make room; it is given up then.", unit="s", least=0)
    hung_after_s: float = setting(40.0, "Seconds without an answer after which the coordinator, which never waits, is "
        "ended and started again.", unit="s", above=0)


@dataclass(kw_only=True)
class ClusterConfig:
    """The processes of a run and their shares of the machines."""

    num_trainers: int = setting(1, "Number of trainer processes.", unit="trainers", least=1)
    trainer_gpus: float = setting(-1.0, "Number of GPUs of a trainer. -1: 1 if the cluster has GPUs (0.6 "
        "where none would be left to encode with), else 0.",
        unit="GPUs", holds=_is_gpus, allowed=_GPU_VALUES)
    refresh_gpus: float = setting(-1.0, "Number of GPUs of a refresh worker. -1: its share of what is left. 0: it "
        "encodes on CPU.",
        unit="GPUs", holds=_is_gpus, allowed=_GPU_VALUES)
    shard_gpus: float = setting(-1.0, "Number of GPUs of an index shard. -1: 1 with index.device=gpu (less where "
        "trainers share theirs), else 0.",
        unit="GPUs", holds=_is_gpus, allowed=_GPU_VALUES)
    threads_per_trainer: int = setting(1, "Number of threads of a trainer on CPU.", unit="threads", least=1)
    max_failures: int = setting(3, "Number of times that the trainers are started again before the run is given up.",
        unit="restarts")
    start_timeout_s: float = setting(300.0, "Seconds that the processes of the index may take to start, and that a "
        "stage waits for room for its trainers.", unit="s", above=0)
    stop_timeout_s: float = setting(30.0, "Seconds that a stopped run (SIGTERM, Ctrl-C, SIGHUP, SIGUSR1) may take to "
        "save and end. It is ended at once afterwards.", unit="s", above=0)
    change_timeout_s: float = setting(600.0, "Seconds that a job may take to serve a change of its corpus.", unit="s",
        above=0)
    check_fit: str = setting("refuse", "Reaction to a launch whose memory, as `plan` counts it, the machines do not "
        "have.", choices=("refuse", "warn", "off"))
    memory_margin: float = setting(0.1, "Share of every memory that `plan` and the check before a launch leave free.",
        unit="share", least=0, below=1)
    dry_run: bool = setting(False, "Prints the placement, builds what can be built without weights, and stops.")
    dry_run_nodes: str = setting("", "Machines that a dry run plans for, as MACHINESxGPUSxCPUS (\"2x8x96\"). Empty: "
        "those at hand.")


@dataclass(kw_only=True)
class PlanConfig:
    """Numbers that the verb `plan` computes with in place of the corpus and the machine at hand. Changes no run."""

    passages: int = setting(0, "Number of passages. 0: those of the prepared store, else counted in the corpus.",
        unit="passages", least=0, most=10**10, allowed="0 (counted) to 10000000000")
    tokens_per_passage: float = setting(0.0, "Number of tokens of a passage on average, for the encoder. 0: the "
        "store's, else encoder.max_passage_tokens.", unit="tokens")
    encoder: str = setting("", "Size of the encoder as LAYERSxHIDDENxVOCABULARY. Empty: that of encoder.name or "
        "encoder.fresh.", holds=_SIZE.fullmatch, allowed=_SIZE_VALUES)
    generator: str = setting("", "Size of the generator as LAYERSxHIDDENxVOCABULARY, layers of encoder and decoder "
        "together. Empty: that of generator.name or generator.fresh.", holds=_SIZE.fullmatch, allowed=_SIZE_VALUES)
    gpu: str = setting("auto", "Kind of GPU; auto takes the kind of this machine.", choices=("auto", *GPUS, "cpu"))
    gpus: int = setting(0, "Number of GPUs (of machines, with cpu). 0: the smallest number that does it, up to 1,024.",
        unit="GPUs", least=0, most=1024, allowed="0 (as many as are needed) to 1024")
    gpus_per_node: int = setting(8, "Number of GPUs of a machine.", unit="GPUs", least=1)
    node_cpus: int = setting(0, "Number of CPUs of a machine. 0: 12 for each of its GPUs; those of this machine, with "
        "cpu.", unit="CPUs")
    node_memory_gb: float = setting(0.0, "Gigabytes of memory of a machine. 0: 128 for each of its GPUs; this "
        "machine's, with cpu.", unit="GB")
    network_gbit_s: float = setting(100.0, "Gigabits that a machine sends in a second.", unit="Gbit/s", above=0)
    step_seconds: float = setting(0.0, "Seconds of a training step. 0: estimated from the models' operations.",
        unit="s")


@dataclass(kw_only=True)
class Settings:
    """The root: everything that one run (one stage of a file with stages) is made of."""

    run: RunConfig = section(RunConfig)
    corpus: CorpusConfig = section(CorpusConfig)
    questions: QuestionsConfig = section(QuestionsConfig)
    preferences: PreferencesConfig = section(PreferencesConfig)
    encoder: EncoderConfig = section(EncoderConfig)
    generator: GeneratorConfig = section(GeneratorConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    pretraining: PretrainingConfig = section(PretrainingConfig)
    alignment: AlignmentConfig = section(AlignmentConfig)
    retrieval: RetrievalConfig = section(RetrievalConfig)
    reranker: RerankerConfig = section(RerankerConfig)
    lexical: LexicalConfig = section(LexicalConfig)
    index: IndexConfig = section(IndexConfig)
    refresh: RefreshConfig = section(RefreshConfig)
    training: TrainingConfig = section(TrainingConfig)
    engine: EngineConfig = section(EngineConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    monitor: MonitorConfig = section(MonitorConfig)
    cluster: ClusterConfig = section(ClusterConfig)
    plan: PlanConfig = section(PlanConfig)


@dataclass
class UpdateConfig:
    """The steps after the last stage: apply corpus updates, encode again without training, ask again."""

    as_of: str = setting("", "Date up to which the updates are applied (end: all of them). Empty: no update.",
        holds=is_point, allowed=POINT_VALUES)
    stages: list[str] = setting([], "Stages whose system is asked again; left empty in a file without stages.")


@dataclass
class CompareConfig:
    """A matrix of runs; its cells and axes stand beside these in the file (`cluster/config/matrix.py`)."""

    base_stage: str = setting("", "Stage that every cell equals but for the settings of the cell. Empty: the run of a "
        "file without stages.")
    baseline: str = setting("", "Cell that the others are compared with.")
    seeds: list[int] = setting([0], "Seeds that every cell is run with.", least=0,
        allowed="one or more whole numbers of 0 or above, each once")
