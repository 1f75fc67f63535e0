"""Runs the verb plan: the smallest machines that fit a run, the staleness of its index, and its cost.

It needs no GPU, no weights and no network, and starts nothing. Sizes come from the run's store, the corpus and the
models' configurations; if one is missing, a message names the setting of section `plan` that gives it.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config.experiment import Experiment
from cluster.config.preflight import uses_index
from cluster.config.settings import Settings
from cluster.planning.hardware import GB, GPUS, gpu_at_hand, planned_host, this_host
from cluster.planning.sizing import SHARED_GPU, Costs, Counts, Machines, Work, costs
from cluster.planning.smallest import MAX_PLANNED, smallest
from indexing.corpus.files.corpus import corpus_path, iterate_corpus
from indexing.corpus.snapshot import is_complete
from indexing.corpus.stores.passages import Store
from training.measuring.sizes import encoder_size, generator_size
from training.objectives.dispatch import needs
from training.training_settings import PREFERENCE, SAMPLING, LoraConfig

RETRIEVER = "retriever"
# Number of processors, and bytes, per GPU of a machine: AWS p4d and p5 and DGX have 12 to 28 CPUs and 128 to 256 GB
GPU_CPUS, GPU_MEMORY = 12, 128 * GB


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one stage."""

    stage: str
    work: Work
    machines: Machines
    counts: Counts
    costs: Costs
    notes: tuple[str, ...]


def run(experiment: Experiment, only_json: bool = False) -> int:
    """Print a table for each stage, then one JSON line for all of them. Raises ValueError if nothing fits."""
    plans = [plan(settings, experiment.directory, name) for name, settings in experiment.stages.items()]
    if not only_json:
        print("\n\n".join(table(one) for one in plans), flush=True)
    print(json.dumps([as_json(one) for one in plans]), flush=True)
    return 0


def plan(settings: Settings, root: Path, stage: str = "") -> Plan:
    """Return the smallest placement that fits this stage, and its costs. Raises ValueError."""
    try:
        work, notes = work_of(settings, root)
        machines = machines_of(settings, work)
        counts = smallest(work, machines)
    except ValueError as error:
        raise ValueError(f"stage {stage}: {error}" if stage else str(error)) from None
    return Plan(
        stage=stage or settings.run.name,
        work=work,
        machines=machines,
        counts=counts,
        costs=costs(work, machines, counts),
        notes=notes,
    )


def work_of(
    settings: Settings, root: Path, num_passages: int = 0, on_gpu: bool | None = None
) -> tuple[Work, tuple[str, ...]]:
    """Return the work of a stage and the sources of its numbers. `num_passages` overrides the corpus; `on_gpu` tells if
    trainers compute on GPUs (None: by `plan.gpu`). Raises ValueError that names what is missing."""
    planned, encoder, generator, training = settings.plan, settings.encoder, settings.generator, settings.training
    needed = needs(settings.objective)
    passages, tokens, notes = _corpus(settings, root, num_passages)
    tower = encoder_size(encoder, planned.encoder)
    vocabulary = encoder.tokenizer.vocabulary if not encoder.name else generator.tokenizer.vocabulary
    reader = None if needed.in_batch else generator_size(generator, vocabulary, planned.generator)
    trained, held = _parameters(settings, tower.parameters, layers=tower.layers, hidden=tower.hidden, reader=reader)
    precision = settings.engine.precision
    if precision == "auto":
        half = planned.gpu not in ("t4", "cpu") if on_gpu is None else on_gpu
        precision = "bf16_autocast" if half else "fp32"
    work = Work(
        passages=passages,
        tokens=tokens,
        dim=tower.dim,
        encoder=tower,
        reader=reader,
        trained=trained,
        frozen=held - trained,
        published=tower.parameters,
        encodes_passages=training.train in ("both", "retriever_only"),
        fused=needed.fused,
        uses_index=uses_index(settings),
        factory=settings.index.factory,
        halves=settings.index.rescore_candidates > 0 or settings.index.products == "bfloat16",
        index_on_gpu=settings.index.device == "gpu",
        replicas=settings.index.replicas,
        nprobe=settings.index.nprobe,
        training_sample=settings.index.training_sample,
        batch=training.batch_size,
        accumulation=settings.engine.gradient_accumulation,
        trainers=settings.cluster.num_trainers,
        k=1 if needed.in_batch else settings.retrieval.k,
        question_tokens=encoder.max_question_tokens,
        prompt_tokens=generator.max_question_tokens + min(tokens, generator.max_passage_tokens),
        answer_tokens=generator.max_answer_tokens,
        checkpointing=(encoder.gradient_checkpointing, generator.gradient_checkpointing),
        cached_passages=encoder.gradient_cache_passages,
        loss_chunk=generator.loss_chunk_tokens,
        zero_stage=settings.engine.zero_stage,
        offload=settings.engine.offload_optimizer,
        precision=precision,
        published_bytes=2 if settings.refresh.precision == "bfloat16" else 4,
        every_steps=settings.refresh.every_steps if training.train in ("both", "retriever_only") else 0,
        steps=0 if training.train == "none" else training.steps,
        step_seconds=planned.step_seconds,
        batch_tokens=settings.refresh.batch_tokens,
    )
    return work, notes


def machines_of(settings: Settings, work: Work) -> Machines:
    """Return the machines that section `plan` describes; this one is measured if `plan.gpu` is cpu."""
    planned, cluster = settings.plan, settings.cluster
    gpu = gpu_at_hand() if planned.gpu == "auto" else planned.gpu
    limit = planned.gpus or MAX_PLANNED
    network, margin = planned.network_gbit_s * 1e9 / 8, cluster.memory_margin
    threads = (cluster.threads_per_trainer, settings.refresh.threads)
    if gpu == "cpu":
        host = this_host(work.dim, work.batch)
        cpus, memory = planned.node_cpus or host.cpus, planned.node_memory_gb * GB or host.memory_bytes
        host = replace(host, cpus=cpus, memory_bytes=memory)
        return Machines(
            device=None, host=host, gpus_per_node=0, limit=limit, network=network, margin=margin, threads=threads
        )
    per_node = min(planned.gpus_per_node, limit)
    cpus = planned.node_cpus or GPU_CPUS * per_node
    host = planned_host(cpus, planned.node_memory_gb * GB or GPU_MEMORY * per_node)
    return Machines(
        device=GPUS[gpu],
        host=host,
        gpus_per_node=per_node,
        limit=limit,
        network=network,
        margin=margin,
        threads=threads,
    )


def _corpus(settings: Settings, root: Path, num_passages: int) -> tuple[int, float, tuple[str, ...]]:
    """Return the number of passages, their mean tokens, and the source of both."""
    planned, longest = settings.plan, settings.encoder.max_passage_tokens
    store = newest_store(root)
    passages = num_passages or planned.passages
    if passages:
        source = "plan.passages" if not num_passages else "the store"
    elif store is not None:
        passages, source = len(store), f"the store {store.path}"
    else:
        passages, source = _counted(settings), "counted in the corpus"
    if planned.tokens_per_passage:
        tokens, from_where = min(planned.tokens_per_passage, longest), "plan.tokens_per_passage"
    elif store is not None:
        tokens, from_where = float(store.tokens(RETRIEVER).lengths.mean()), "mean of the store"
    else:
        tokens, from_where = float(longest), "encoder.max_passage_tokens, the most there can be"
    return passages, tokens, (f"passages: {source}", f"tokens a passage: {from_where}")


def newest_store(root: Path) -> Store | None:
    """Return the passages that were prepared last for the run in `root`."""
    found = [path for path in root.glob("data/*/passages") if is_complete(path)]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else Store.open(newest, verify=False)


def _counted(settings: Settings) -> int:
    corpus = settings.corpus
    if not corpus.path:  # the synthetic world has one passage for each relation of a person
        from indexing.corpus.files.world_words import RELATIONS

        return corpus.world.num_people * len(RELATIONS)
    try:
        corpus_path(corpus)
    except ValueError as error:
        raise ValueError(f"how many passages? No prepared store, and {error}: set plan.passages=NUMBER") from None
    return sum(1 for _ in iterate_corpus(corpus)[0])


def _parameters(settings: Settings, tower: int, *, layers: int, hidden: int, reader: Any) -> tuple[int, int]:
    """Return the parameters (that train, that a trainer holds), also those of an alignment's frozen reference."""
    train = settings.training.train
    towers = settings.encoder.num_towers(train)
    writes = 0 if reader is None else reader.parameters
    trained = {"both": towers * tower, "retriever_only": towers * tower, "query_only": tower}.get(train, 0)
    if trained and settings.encoder.lora.rank:
        trained = _adapters(settings.encoder.lora, layers, hidden) * (trained // tower)
    if train in ("both", "query_only", "generator_only") and reader is not None:
        lora = settings.generator.lora
        trained += _adapters(lora, reader.layers, reader.hidden) if lora.rank else writes
    compares = settings.objective.name in (*PREFERENCE, *SAMPLING) and settings.alignment.reference == "copy"
    held = towers * tower + writes
    return trained, max(held, trained) * (2 if compares else 1)


def _adapters(lora: LoraConfig, layers: int, hidden: int) -> int:
    """Return the parameters of two thin matrices beside each linear layer: four of h x h, two of h x 4 h."""
    return lora.rank * layers * hidden * (4 * 2 + 2 * 5)


# ---------------------------------------------------------------- what is printed


def table(one: Plan) -> str:
    """Return the plan as lines of label and value."""
    work, machines, counts, cost = one.work, one.machines, one.counts, one.costs
    device = machines.device
    kind = "CPU" if device is None else device.name
    if device is None:
        what = f"{counts.nodes} machine(s) of {machines.host.cpus} processors and {_bytes(machines.host.memory_bytes)}"
    else:
        what = f"{counts.gpus} x {kind} in {counts.nodes} machine(s) of {machines.gpus_per_node}"
    shards = f"{counts.shards} shard(s){f' x {work.replicas} replicas' if work.replicas > 1 else ''}"
    rows = [
        ("stage", one.stage),
        ("corpus", f"{work.passages:,} passages x {work.tokens:.0f} tokens, {work.dim} numbers a vector"),
        ("models", _models(work)),
        ("smallest placement", what),
        ("who", f"{counts.trainers} trainer(s), {shards}, {counts.workers} refresh worker(s)"),
        ("where", counts.layout(machines, counts.shards * work.replicas * work.index_on_gpu)),
        ("launch with", " ".join(overrides(one))),
        ("trainer", f"{_bytes(cost.trainer_bytes)} of {_bytes(_room(machines))}, ZeRO {work.zero_stage}"),
    ]
    if work.uses_index:
        place = "GPU" if work.index_on_gpu else "memory"
        rows += [
            (
                "a shard",
                f"{work.factory} in {place}: {_bytes(cost.shard_serving_bytes)} serving, "
                f"{_bytes(cost.shard_refreshing_bytes)} while the next generation comes, at most "
                f"{_bytes(cost.shard_at_most_bytes)}",
            ),
            ("a refresh worker", _bytes(cost.worker_bytes)),
            (
                "search",
                f"{duration(cost.search_s)} a batch of {work.batch}; "
                f"shards are busy {_busy(cost.search_share_of_step)}",
            ),
        ]
    rows.append(("a step", f"{duration(cost.step_s)}{'' if work.step_seconds else ' (estimated)'}"))
    if cost.refresh_s:
        parts = ", ".join(
            f"{what} {duration(seconds)}"
            for what, seconds in (
                ("encode", cost.encode_s),
                ("stage", cost.stage_s),
                ("build", cost.build_s),
                ("network", cost.network_s),
            )
            if seconds
        )
        rows.append(("a refresh", f"{duration(cost.refresh_s)} ({parts})"))
    if cost.staleness_at_commit_steps:
        steps = f"{cost.staleness_at_commit_steps:.0f} steps at a commit, at most {cost.staleness_at_most_steps:.0f}"
        late = " (slower than it is published: some versions are skipped)" if _is_late(one) else ""
        rows.append(("staleness", f"{steps}; published every {work.every_steps}{late}"))
    if counts.nodes > 1 or counts.shards > 1:
        step = f"a step {_bytes(cost.query_bytes_per_step)} of queries, {_bytes(cost.hit_bytes_per_step)} of hits"
        refresh = (
            f"{_bytes(cost.vector_bytes_per_refresh)} of vectors, {_bytes(cost.published_bytes_per_refresh)} of weights"
        )
        rows.append(("network", f"{step}; a refresh {refresh}"))
    unit = "GPU" if device is not None else "machine"
    rows.append(("cost", f"{cost.hours_per_refresh:.2f} {unit}-hours a refresh, {cost.hours_per_run:.1f} the run"))
    rows += [("from", note) for note in one.notes]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def overrides(one: Plan) -> list[str]:
    """Return the settings that launch this placement."""
    counts = one.counts
    found = [f"cluster.num_trainers={counts.trainers}"]
    if one.work.uses_index:
        found += [f"index.num_shards={counts.shards}", f"refresh.num_workers={counts.workers}"]
    if counts.shared:
        found += [f"cluster.trainer_gpus={SHARED_GPU[0]}", f"cluster.refresh_gpus={SHARED_GPU[1]}"]
        found += [f"cluster.shard_gpus={SHARED_GPU[2]}"] if one.work.index_on_gpu else []
    elif one.machines.device is not None and one.work.uses_index:
        found.append("cluster.refresh_gpus=1")
    return found


def as_json(one: Plan) -> dict[str, Any]:
    """Return the plan as numbers."""
    work, machines, counts = one.work, one.machines, one.counts
    return {
        "stage": one.stage,
        "passages": work.passages,
        "tokens_per_passage": round(work.tokens, 2),
        "dim": work.dim,
        "encoder_parameters": work.encoder.parameters,
        "generator_parameters": 0 if work.reader is None else work.reader.parameters,
        "trained_parameters": work.trained,
        "factory": work.factory,
        "gpu": machines.device.name if machines.device is not None else "cpu",
        "gpus_per_node": machines.gpus_per_node,
        "network_bytes_per_s": machines.network,
        **asdict(counts),
        "overrides": overrides(one),
        **{name: float(f"{value:.6g}") for name, value in asdict(one.costs).items()},
    }


def _busy(share: float) -> str:
    if share <= 1:
        return f"{share:.0%} of a step"
    return f"{share:.1f} times as long as the models would need: search sets the pace of training"


def _is_late(one: Plan) -> bool:
    return bool(one.work.every_steps) and one.costs.refresh_s > one.work.every_steps * one.costs.step_s


def _room(machines: Machines) -> float:
    return machines.host_room if machines.device is None else machines.device_room


def _models(work: Work) -> str:
    tower = (
        f"encoder {work.encoder.parameters / 1e6:.1f} M ({work.encoder.flops(work.tokens) / 1e9:.3g} GFLOP a passage)"
    )
    return tower if work.reader is None else f"{tower}, generator {work.reader.parameters / 1e6:.1f} M"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Return seconds in a unit that suits them."""
    if not math.isfinite(seconds):
        return "unknown"
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"
