"""Describes a run without loading its weights: placement, engine, data, and model sizes as far as they are known
here."""

from pathlib import Path
from typing import Any

import torch

from cluster.config.settings import Settings
from cluster.planning.placement import Node, PlacementPlan, plan
from indexing.corpus.files.corpus import corpus_path
from indexing.declare import refuse
from training.feeding.mixture import mixture, pretrains
from training.objectives.dispatch import needs


def describe(settings: Settings, nodes: list[Node]) -> str:
    """Return one paragraph per part. Raises ValueError if `cluster.dry_run_nodes` is malformed or cannot hold the
    plan."""
    placement = plan(settings.cluster, settings.refresh, settings.index, planned_nodes(settings, nodes))
    parts = [f"run {settings.run.name}", str(placement), _engine(settings, placement), _objective(settings)]
    return "\n".join([*parts, _data(settings), *_models(settings)])


def planned_nodes(settings: Settings, nodes: list[Node]) -> list[Node]:
    """Return the machines of `cluster.dry_run_nodes` ("2x8x96": machines x GPUs x CPUs), else `nodes`."""
    text = settings.cluster.dry_run_nodes
    if not text:
        return nodes
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers) or int(numbers[0]) < 1:
        raise refuse("cluster.dry_run_nodes", text, "must be MACHINESxGPUSxCPUS, for instance 2x8x96")
    machines, gpus, cpus = map(int, numbers)
    return [Node(cpus=float(cpus), gpus=float(gpus))] * machines


def _engine(settings: Settings, placement: PlacementPlan) -> str:
    engine, training = settings.engine, settings.training
    questions = placement.trainers.number * training.batch_size * engine.gradient_accumulation
    return (
        f"engine: ZeRO {engine.zero_stage}, {engine.precision}, {questions} questions x {settings.retrieval.k} "
        f"passages an update, {training.steps} updates"
    )


def _objective(settings: Settings) -> str:
    needed = needs(settings.objective)
    passes = [
        name for name in ("per_passage", "fused", "left_out", "attention", "null", "in_batch") if getattr(needed, name)
    ]
    refresh = f"every {settings.refresh.every_steps} steps" if settings.refresh.every_steps else "never"
    return (
        f"objective: {settings.objective.name} ({', '.join(passes)}), trains {settings.training.train}; index "
        f"{settings.index.factory} on {settings.index.num_shards} shards, refreshed {refresh}{_tasks(settings)}"
    )


def _tasks(settings: Settings) -> str:
    if not pretrains(settings.pretraining):
        return ""
    shares = ", ".join(f"{share:.0%} {task}" for task, share in mixture(settings.pretraining).items())
    return f"; pretrains on the corpus: {shares}"


def _data(settings: Settings) -> str:
    if not settings.corpus.path:
        return "data: the synthetic world, generated"
    try:
        path = corpus_path(settings.corpus)
    except ValueError as error:
        return f"data: not here ({error})"
    return f"data: {path}, {path.stat().st_size / 2**20:.1f} MiB on disk"


def _models(settings: Settings) -> list[str]:
    """Return sizes from the models' configurations; weights are neither read nor allocated."""
    encoder, generator = settings.encoder, settings.generator
    small, reader = encoder.fresh, generator.fresh
    fresh_encoder = f"fresh, {small.num_layers} layers x {small.hidden}, {encoder.tokenizer.vocabulary} word pieces"
    fresh_reader = f"fresh, {reader.num_encoder_layers} + {reader.num_decoder_layers} layers x {reader.hidden}"
    return [
        f"encoder: {_size_of(encoder.name) if encoder.name else fresh_encoder}, {encoder.towers} towers",
        f"generator ({generator.kind}): {_size_of(generator.name) if generator.name else fresh_reader}",
    ]


def _size_of(name: str) -> str:
    from transformers import AutoConfig, AutoModel

    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        return f"{name}: its configuration is not at hand here ({first})"
    with torch.device("meta"):
        module = AutoModel.from_config(config)
    place = "folder" if Path(name).is_dir() else "name"
    return f"{name} ({place}), {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters"
