"""Refuses runs before anything is written, started or trained, each time by one ValueError."""

from dataclasses import replace
from pathlib import Path

from cluster.config.experiment import load
from cluster.config.moved import with_absolute_paths
from cluster.config.paths import check_model_folders
from cluster.config.settings import Settings
from indexing.corpus.stores.filters import parse_filter
from indexing.corpus.stores.metadata import count_passing
from indexing.declare import refuse, values_of
from indexing.dense.faiss_build import check_config
from indexing.dense.kinds import check_dim, parse
from indexing.hits import check_k
from indexing.shard.shard import shard_ranges
from training.checkpoint import newest_checkpoint
from training.feeding.mixture import pretrains
from training.feeding.rewards import load_reward
from training.feeding.tasks import find_recognizer
from training.measuring.user_metrics import load_metrics
from training.models.generators.shape import check_context, read_shape
from training.models.retriever.reranker import check_cross_encoder, has_tokenizer
from training.objectives.check import samples_answers
from training.objectives.dispatch import needs
from training.objectives.user_objective import load_objective
from training.plug_ins import with_absolute_file
from training.stage import EVALUATION_FILE

UNDECISIVE = ("monitor", "cluster", "run", "checkpoint", "plan")  # sections that do not decide a stage's outcome
# A resume goes on with the same model, data and seed; everything else may be set anew.
SAME_RUN = (
    *("run.seed", "run.init_from", "corpus.", "questions.path", "questions.train", "questions.as_of"),
    *("encoder.name", "encoder.fresh.", "encoder.tokenizer.", "encoder.towers", "encoder.pooling", "encoder.normalize"),
    *("encoder.max_", "generator.kind", "generator.name", "generator.fresh.", "generator.tokenizer.", "generator.max_"),
    *("encoder.lora.", "generator.lora."),
    *("objective.name", "objective.function", "training.train", "pretraining."),
    *("questions.target", "questions.refusal", "questions.labels"),
    *("questions.choice_template", "generator.template", "generator.passage_template", "generator.chat_template"),
    "generator.system_prompt",
    *("retrieval.hybrid", "lexical.", "reranker.mode", "reranker.name", "reranker.fresh.", "reranker.max_"),
    *("preferences.path", "preferences.train", "preferences.format", "preferences.max_length_ratio"),
)


def check_models(settings: Settings) -> None:
    """Refuse a model folder or a recogniser that is not there (whether a name of the hub exists is seen when it is
    read), and passages that a generator has no context for."""
    check_model_folders(settings)
    reranker = settings.reranker
    if has_tokenizer(reranker) and Path(reranker.name).is_dir():
        check_cross_encoder(reranker)
    if settings.objective.function:
        load_objective(settings.objective.function)
    load_metrics(settings.evaluation.metrics)
    if samples_answers(settings.objective):
        load_reward(settings.objective.reward)
    if pretrains(settings.pretraining):
        find_recognizer(settings.pretraining.recognizer)
    needed = needs(settings.objective)
    if needed.attention:
        shape = read_shape(settings.generator)
        if shape is not None and not shape.attention:
            allowed = f"must have attention with objective.name={settings.objective.name}; this is a state-space model"
            raise refuse("generator.name", settings.generator.name or settings.generator.fresh.family, allowed)
    if not needed.in_batch and settings.retrieval.source != "none":
        decoding = (settings.evaluation.decoding.mode, *settings.evaluation.also)
        check_context(settings.generator, settings.retrieval.k, fused=needed.fused or "fused" in decoding)
        check_long_prompts(settings)


def check_long_prompts(settings: Settings) -> None:
    """Refuse prompts of many passages that the generator does not take, before it is read."""
    shape = read_shape(settings.generator)
    wanted = {"evaluation.needle.lengths": max(settings.evaluation.needle.lengths, default=0)}
    if settings.retrieval.source == "long" or "long" in settings.evaluation.also:
        wanted["retrieval.max_context_tokens"] = settings.retrieval.max_context_tokens
    for setting, tokens in wanted.items():
        if shape is not None and shape.context and tokens > shape.context:
            raise refuse(setting, tokens, f"must be at most {shape.context}, the generator's context")


def check_same_run(settings: Settings) -> None:
    """Refuse to resume, under other settings, what an earlier call of this name has trained."""
    run_dir = Path(settings.run.directory) / settings.run.name
    if not (run_dir / "config.yaml").is_file() or newest_checkpoint(run_dir, lambda _: None, contents=False) is None:
        return
    for setting, (before, now) in _changed(settings, run_dir).items():
        if setting.startswith(SAME_RUN):
            allowed = f"{run_dir} was trained with {before!r}: take another run.name, or set run.overwrite=true"
            raise refuse(setting, now, allowed)


def changes_since(settings: Settings) -> list[str]:
    """Return the settings that decide a stage's outcome and differ from those that its run folder was finished with, as
    `name before -> now`; none if it was not finished, or by a version with other settings."""
    run_dir = Path(settings.run.directory) / settings.run.name
    if not (run_dir / EVALUATION_FILE).is_file() or not (run_dir / "config.yaml").is_file():
        return []
    changed = _changed(settings, run_dir).items()
    return [f"{name} {before} -> {now}" for name, (before, now) in changed if name.partition(".")[0] not in UNDECISIVE]


def _changed(settings: Settings, run_dir: Path) -> dict[str, tuple[object, object]]:
    """Return the settings that differ from those that the run folder keeps: the value there, and the value now."""
    recorded, now = (
        values_of(with_absolute_models(with_absolute_paths(one)))
        for one in (load([str(run_dir)], []).settings, settings)
    )
    return {name: (recorded[name], value) for name, value in now.items() if recorded[name] != value}


def check_index(settings: Settings, num_passages: int) -> None:
    """Refuse a k, a number of shards or an index kind for which the corpus, or a vector, is too small."""
    if not uses_index(settings):
        return
    check_k(settings.retrieval.k, num_passages)
    k, factor = settings.retrieval.k, settings.retrieval.rescore
    if k * factor > num_passages:
        allowed = f"must be at most {num_passages // k}: so many times retrieval.k={k} passages of {num_passages}"
        raise refuse("retrieval.rescore", factor, f"{allowed} are scored again")
    ranges = shard_ranges(num_passages, settings.index.num_shards)
    on_cpu = replace(settings.index, device="cpu")  # whether shards see a GPU is not known here
    check_config(on_cpu, min(stop - start for start, stop in ranges))
    if not settings.encoder.name:  # what another encoder makes is known when it is read
        check_dim(parse(settings.index.factory), settings.encoder.fresh.hidden)


def check_where(settings: Settings, passages: Path, corpus: Path | None = None) -> None:
    """Refuse a filter that asks for a field that no passage of the store has, or that fewer than k passages pass.
    `corpus`: the folder of its changes."""
    where, k = parse_filter(settings.retrieval.where), settings.retrieval.k
    if where is None or not uses_index(settings):
        return
    passing = count_passing(passages, where, corpus)
    if passing < k:
        allowed = f"must let retrieval.k={k} passages pass, but of this corpus {passing} do"
        raise refuse("retrieval.where", str(where), allowed)


def uses_index(settings: Settings) -> bool:
    """Return False for a warm start, closed-book training and long prompts, which search nothing."""
    return not needs(settings.objective).in_batch and settings.retrieval.source not in ("none", "long")


def with_absolute_models(settings: Settings) -> Settings:
    """Return `settings` with absolute paths of models and code: trainers and workers run in another working folder."""

    def absolute(name: str) -> str:
        return str(Path(name).resolve()) if name and Path(name).is_dir() else name

    encoder = replace(settings.encoder, name=absolute(settings.encoder.name))
    objective, pretraining, evaluation = settings.objective, settings.pretraining, settings.evaluation
    files = {"reward": with_absolute_file(objective.reward), "function": with_absolute_file(objective.function)}
    return replace(
        settings,
        encoder=encoder,
        generator=replace(settings.generator, name=absolute(settings.generator.name)),
        reranker=replace(settings.reranker, name=absolute(settings.reranker.name)),
        objective=replace(objective, **files),
        pretraining=replace(pretraining, recognizer=with_absolute_file(pretraining.recognizer)),
        evaluation=replace(evaluation, metrics=[with_absolute_file(name) for name in evaluation.metrics]),
    )
