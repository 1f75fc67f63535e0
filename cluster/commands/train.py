"""Runs the verbs `train`, `prepare`, `index`, `evaluate`, `compare` and `ask` on an experiment."""

import os
import time
from contextlib import nullcontext

from cluster.commands.common import (
    newest_of,
    num_passages,
    placement_of,
    prepared_data,
    ray_session,
    run_folder,
    say,
    starting_checkpoint,
)
from cluster.commands.compare import run_matrix
from cluster.commands.measure import at_date, build_index, measure
from cluster.config.experiment import Experiment
from cluster.config.preflight import changes_since, check_models, check_same_run
from cluster.config.settings import Settings
from cluster.machines.run_lock import clear, holding
from cluster.planning.check_fit import check_fit
from cluster.planning.placement import nodes_of_cluster
from cluster.prepare.recorded_stores import check_same_data, root_of_stores
from cluster.prepare.stores import Prepared
from cluster.results.findings import Findings, read_measured
from cluster.results.summary import seconds_of, write_findings
from cluster.stage.run_stage import is_finished, run_stage


def train(experiment: Experiment) -> int:
    """Train every stage in order, then update; finished stages do not run again. Writes the summary and the report.
    Raises ValueError for a run folder that another job works in."""
    if experiment.settings.cluster.dry_run:
        return dry_run(experiment)
    _check(experiment)
    with holding(experiment.directory):
        return _train(experiment)


def _train(experiment: Experiment) -> int:
    root, stages = experiment.directory, experiment.stages
    if experiment.settings.run.overwrite:
        clear(root)
    begin = time.monotonic()
    prepared = {name: prepared_data(settings, root) for name, settings in stages.items()}
    for name, settings in stages.items():
        check_same_data(run_folder(settings), prepared[name].passages, prepared[name].questions)
    if _is_finished(experiment):
        say(f"{root}: finished before, not run again")
        _report(experiment, seconds_of(root))
        return 0
    here = not os.environ.get("RAY_ADDRESS")
    if here:
        _refuse_misfits(stages, prepared)
    with ray_session(root) as namespace:
        placements = {name: placement_of(settings) for name, settings in stages.items()}
        if not here:
            _refuse_misfits(stages, prepared)
        for name, settings in stages.items():
            if is_finished(settings):
                say(f"{settings.run.name}: finished before, not run again")
                continue
            say(f"stage {settings.run.name}")
            if changes := changes_since(settings):
                say(f"{run_folder(settings)} was finished before; it goes on with {', '.join(changes)}")
            start = starting_checkpoint(settings, stages)
            run_stage(
                settings,
                prepared[name],
                init_from=start,
                placement=placements[name],
                namespace=f"{namespace}-{name or 'run'}",
            )
        for name in experiment.update.stages:
            _after_update(experiment, name, namespace)
    _report(experiment, time.monotonic() - begin)
    return 0


def prepare(experiment: Experiment) -> int:
    """Validate and tokenise what the stages need."""
    for name, settings in experiment.stages.items():
        prepared = prepared_data(settings, experiment.directory)
        say(f"{name or experiment.settings.run.name}: {prepared.passages}")
    return 0


def index(experiment: Experiment) -> int:
    """Build and save the index of the last stage's corpus with its newest checkpoint, without training."""
    build_index(experiment, experiment.last_name)
    return 0


def evaluate(experiment: Experiment) -> int:
    """Measure the last stage's newest checkpoint on its evaluation split, and with `update.as_of` after the update."""
    measure(experiment, experiment.last_name)
    return 0


def compare(experiment: Experiment) -> int:
    """Run the matrix of the file's `compare` section; 1 when a cell failed. Raises ValueError for a folder that another
    job works in."""
    with holding(experiment.directory / "compare"):
        return run_matrix(experiment)


def ask(experiment: Experiment, questions: list[str]) -> int:
    """Answer a question, put in one or several ways, from the newest checkpoint; print the passages with scores."""
    from cluster.commands.ask import answer_question

    settings = experiment.last
    checkpoint = newest_of(settings)
    print(answer_question(settings, root_of_stores(experiment.directory), checkpoint, questions))
    return 0


def dry_run(experiment: Experiment) -> int:
    """Do all that needs no weights, and print the placement; needs no Ray if the machines are known."""
    from cluster.planning.dry_run import describe

    known = not os.environ.get("RAY_ADDRESS") or all(s.cluster.dry_run_nodes for s in experiment.stages.values())
    with nullcontext() if known else ray_session(experiment.directory):
        for settings in experiment.stages.values():
            print(describe(settings, nodes_of_cluster()))
    return 0


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
                placement_of(settings)
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}" if name else str(error)) from None
        earlier.add(str(run_folder(settings)))


def _refuse_misfits(stages: dict[str, Settings], prepared: dict[str, Prepared]) -> None:
    """Refuse, before anything starts, a stage whose memory the machines do not have. Each stage warns by itself."""
    for name, settings in stages.items():
        if not is_finished(settings):
            check_fit(settings, placement_of(settings), num_passages(prepared[name]), lambda _: None)


def _updated(experiment: Experiment, name: str) -> Settings:
    """Return the settings that ask a stage again about the updated corpus."""
    settings = experiment.stages[name]
    checkpoint = newest_of(settings)
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
    say(f"stage {run_name}: the corpus as of {experiment.update.as_of}, encoded anew without training")
    prepared = prepared_data(updated, experiment.directory, splits=[updated.questions.evaluate])
    start = updated.run.init_from
    run_stage(
        updated,
        prepared,
        init_from=start,
        placement=placement_of(updated),
        namespace=f"{namespace}-{name or 'run'}-updated",
    )


def _report(experiment: Experiment, seconds: float) -> None:
    run_dirs = {name or "run": run_folder(settings) for name, settings in experiment.stages.items()}
    findings = Findings(seconds=seconds)
    for name, run_dir in run_dirs.items():
        measured = read_measured(name, run_dir)
        if measured is not None:
            findings.stages[name] = measured
    for name in experiment.update.stages:
        after = read_measured(name, run_folder(_updated(experiment, name)))
        if after is not None:
            findings.updates[name] = (findings.stages[name or "run"], after)
    num_examples = experiment.last.evaluation.examples
    write_findings(findings, experiment.directory, run_dirs, num_examples=num_examples)
