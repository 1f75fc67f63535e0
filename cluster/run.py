"""The verbs: what `train`, `prepare`, `index`, `evaluate` and `ask` do with an experiment."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from cluster import session
from cluster.beforehand import check_index, check_models, check_same_run
from cluster.config import Experiment
from cluster.fit import is_finished, run_stage
from cluster.placement import PlacementPlan, nodes_of_cluster, plan
from cluster.prepare import Prepared, prepare_data
from cluster.settings import Settings
from cluster.summary import Findings, read_measured, seconds_of, write_findings
from indexing.store import Store
from training.checkpoint import newest_checkpoint
from training.settings import ObjectiveConfig, PretrainingConfig


def train(experiment: Experiment) -> int:
    """Every stage in order, then the update; finished stages are not run again. Writes the summary and the report."""
    root, stages = experiment.directory, experiment.stages
    if experiment.settings.cluster.dry_run:
        return dry_run(experiment)
    _check(experiment)
    if experiment.settings.run.overwrite and root.exists():
        shutil.rmtree(root)
    begin = time.monotonic()
    prepared = {name: _prepare(settings, root) for name, settings in stages.items()}
    if _is_finished(experiment):
        _say(f"{root}: finished before, not run again")
        _report(experiment, seconds_of(root))
        return 0
    with _session(root) as namespace:
        placements = {name: _placement(settings) for name, settings in stages.items()}
        for name, settings in stages.items():
            if is_finished(settings):
                _say(f"{settings.run.name}: finished before, not run again")
                continue
            _say(f"stage {settings.run.name}")
            start = starting_checkpoint(settings, stages)
            run_stage(settings, prepared[name], start, placements[name], f"{namespace}-{name or 'run'}")
        for name in experiment.update.stages:
            _after_update(experiment, name, namespace)
    _report(experiment, time.monotonic() - begin)
    return 0


def prepare(experiment: Experiment) -> int:
    """Validate and tokenise what the stages need."""
    for name, settings in experiment.stages.items():
        prepared = _prepare(settings, experiment.directory)
        _say(f"{name or experiment.settings.run.name}: {prepared.passages}")
    return 0


def index(experiment: Experiment) -> int:
    """Build and save the index of the last stage's corpus with its newest checkpoint, without training."""
    settings = _last(experiment)
    return _without_training(experiment, settings, evaluate=False)


def evaluate(experiment: Experiment) -> int:
    """Measure the last stage's newest checkpoint on its evaluation split."""
    return _without_training(experiment, _last(experiment), evaluate=True)


def ask(experiment: Experiment, question: str) -> int:
    """Answer one question from the newest checkpoint and print the passages with their scores."""
    from cluster.ask import answer_question

    settings = _last(experiment)
    checkpoint = _checkpoint_of(settings, experiment)
    print(answer_question(settings, experiment.directory, checkpoint, question))
    return 0


def dry_run(experiment: Experiment) -> int:
    """Everything that can be done without weights, and the placement; without Ray where the machines are known."""
    from cluster.dry_run import describe

    known = not os.environ.get("RAY_ADDRESS") or all(s.cluster.dry_run_nodes for s in experiment.stages.values())
    with nullcontext() if known else _session(experiment.directory):
        for settings in experiment.stages.values():
            print(describe(settings, nodes_of_cluster()))
    return 0


def starting_checkpoint(settings: Settings, stages: dict[str, Settings]) -> str:
    """The checkpoint folder that `run.init_from` means: a stage of the same file, a run folder, or a checkpoint.

    Raises ValueError when it names none, or one without a complete checkpoint.
    """
    name = settings.run.init_from
    if not name:
        return ""
    if name in stages:
        folder = Path(stages[name].run.directory) / stages[name].run.name
    else:
        folder = Path(name)
    if (folder / "model.safetensors").is_file():
        return str(folder)
    found = newest_checkpoint(folder, _say) if folder.is_dir() else None
    if found is None:
        known = f" or a stage of this file ({', '.join(stages)})" if "" not in stages else ""
        raise ValueError(
            f"run.init_from={name!r}: needed is a checkpoint or run folder{known} with a complete checkpoint"
        )
    return str(found)


def at_date(settings: Settings, as_of: str, run_name: str, init_from: str) -> Settings:
    """The same system, asked about another version of the corpus: nothing trains."""
    return replace(
        settings,
        run=replace(settings.run, name=run_name, init_from=init_from),
        corpus=replace(settings.corpus, as_of=as_of),
        questions=replace(settings.questions, as_of=as_of),
        training=replace(settings.training, train="none", steps=0),
        evaluation=replace(settings.evaluation, also=[]),
    )


def _check(experiment: Experiment) -> None:
    """Refuse what can be refused before anything is written or started."""
    here = not os.environ.get("RAY_ADDRESS")
    earlier: set[str] = set()
    for name, settings in experiment.stages.items():
        try:
            check_models(settings)
            if not settings.run.overwrite:
                check_same_run(settings)
            if settings.run.init_from not in earlier:
                starting_checkpoint(settings, experiment.stages)
            if here:
                _placement(settings)
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}" if name else str(error)) from None
        earlier.add(str(_run_dir(settings)))


def _updated(experiment: Experiment, name: str) -> Settings:
    """A stage, asked again about the updated corpus."""
    settings = experiment.stages[name]
    checkpoint = _checkpoint_of(settings, experiment)
    return at_date(settings, experiment.update.as_of, f"{settings.run.name}/after_update", checkpoint)


def _is_finished(experiment: Experiment) -> bool:
    stages = experiment.stages.values()
    return all(is_finished(settings) for settings in stages) and all(
        is_finished(_updated(experiment, name)) for name in experiment.update.stages
    )


def _after_update(experiment: Experiment, name: str, namespace: str) -> None:
    """Encode the updated corpus with the stage's weights and ask again."""
    updated = _updated(experiment, name)
    if is_finished(updated):
        return
    run_name = experiment.stages[name].run.name
    _say(f"stage {run_name}: the corpus as of {experiment.update.as_of}, encoded anew without training")
    prepared = _prepare(updated, experiment.directory, splits=[updated.questions.evaluate])
    start = updated.run.init_from
    run_stage(updated, prepared, start, _placement(updated), f"{namespace}-{name or 'run'}-updated")


def _without_training(experiment: Experiment, settings: Settings, evaluate: bool) -> int:
    """The stage's newest checkpoint, its index built anew in a folder of its own; measured if `evaluate`."""
    checkpoint = _checkpoint_of(settings, experiment)
    verb = "evaluate" if evaluate else "index_only"
    asked = replace(
        settings,
        run=replace(settings.run, name=f"{settings.run.name}/{verb}", init_from=checkpoint),
        training=replace(settings.training, train="none", steps=0),
    )
    if not evaluate:  # any retriever has an index, also one that only had a warm start
        asked = replace(asked, objective=ObjectiveConfig(), retrieval=replace(asked.retrieval, source="index"))
        asked = replace(asked, checkpoint=replace(asked.checkpoint, index=True), pretraining=PretrainingConfig())
    prepared = _prepare(asked, experiment.directory, splits=[asked.questions.evaluate] if evaluate else [])
    begin = time.monotonic()
    with _session(experiment.directory) as namespace:
        run_stage(asked, prepared, checkpoint, _placement(asked), f"{namespace}-{verb}")
    run_dir = _run_dir(asked)
    measured = read_measured(verb, run_dir)
    if evaluate and measured is not None:
        write_findings(Findings({verb: measured}, seconds=time.monotonic() - begin), run_dir, {verb: run_dir})
    else:
        _say(f"index in {run_dir / 'index'}")
    return 0


def _report(experiment: Experiment, seconds: float) -> None:
    run_dirs = {name or "run": _run_dir(settings) for name, settings in experiment.stages.items()}
    findings = Findings(seconds=seconds)
    for name, run_dir in run_dirs.items():
        measured = read_measured(name, run_dir)
        if measured is not None:
            findings.stages[name] = measured
    for name in experiment.update.stages:
        after = read_measured(name, _run_dir(_updated(experiment, name)))
        if after is not None:
            findings.updates[name] = (findings.stages[name or "run"], after)
    write_findings(findings, experiment.directory, run_dirs)


def _checkpoint_of(settings: Settings, experiment: Experiment) -> str:
    folder = _run_dir(settings)
    found = newest_checkpoint(folder, _say) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"{folder} has no complete checkpoint yet: train it first (tandem train)")
    return str(found)


def _prepare(settings: Settings, root: Path, splits: list[str] | None = None) -> Prepared:
    prepared = prepare_data(settings, root, _say, splits)
    check_index(settings, len(Store.open(prepared.passages, verify=False)))
    return prepared


def _placement(settings: Settings) -> PlacementPlan:
    return plan(settings.cluster, settings.refresh, settings.index, nodes_of_cluster())


@contextmanager
def _session(root: Path) -> Iterator[str]:
    """A connection to Ray, and a name for the actors of this experiment."""
    namespace = f"tandem-{root.name}-{time.time_ns() % 10**9}"
    connection = session.start_or_join(namespace, log_to_driver=False)
    try:
        yield namespace
    finally:
        connection.stop()


def _last(experiment: Experiment) -> Settings:
    return list(experiment.stages.values())[-1]


def _run_dir(settings: Settings) -> Path:
    return Path(settings.run.directory) / settings.run.name


def _say(text: str) -> None:
    print(text, flush=True)
