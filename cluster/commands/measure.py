"""Measures a trained stage on its questions, asks it again about another state of the corpus, or builds its index,
without training. Weights come from the newest checkpoint; every index is built anew, in a folder of its own."""

import time
from dataclasses import replace

from cluster.commands.common import newest_of, placement_of, prepared_data, ray_session, run_folder, say
from cluster.config.experiment import Experiment
from cluster.config.settings import Settings
from cluster.results.findings import Findings, read_measured
from cluster.results.summary import write_findings
from cluster.stage.run_stage import is_finished, run_stage
from indexing.declare import refuse
from training.example_settings import PretrainingConfig
from training.objectives.dispatch import needs
from training.training_settings import NeedleConfig, ObjectiveConfig

AFTER = "after_update"


def measure(experiment: Experiment, name: str) -> None:
    """Measure a stage; with `update.as_of`, once more after the update. The table has the other finished stages of the
    file beside it, as their training left them. Raises ValueError for a stage without a generator or a checkpoint."""
    settings, as_of = experiment.stages[name], experiment.update.as_of
    if needs(settings.objective).in_batch:
        allowed = "must have a generator: a retriever alone answers nothing"
        raise refuse("objective.name", settings.objective.name, allowed)
    if as_of and as_of == settings.corpus.as_of:
        raise refuse("update.as_of", as_of, "must be another date than corpus.as_of, which the stage was trained on")
    checkpoint = newest_of(settings)
    asked = without_training(settings, f"{settings.run.name}/evaluate", checkpoint)
    stages = {"evaluate": asked}
    if as_of:
        stages[AFTER] = at_date(settings, as_of, f"{settings.run.name}/evaluate_{AFTER}", checkpoint)
    prepared = {
        key: prepared_data(stage, experiment.directory, [stage.questions.evaluate]) for key, stage in stages.items()
    }
    begin = time.monotonic()
    with ray_session(experiment.directory) as namespace:
        for key, stage in stages.items():
            run_stage(
                stage,
                prepared[key],
                init_from=checkpoint,
                placement=placement_of(stage),
                namespace=f"{namespace}-{key}",
            )
    findings = Findings(seconds=time.monotonic() - begin)
    for other, stage in experiment.stages.items():
        found = read_measured(other, run_folder(stage)) if other != name and is_finished(stage) else None
        if found is not None:
            findings.stages[other] = found
    measured = read_measured("evaluate", run_folder(asked))
    assert measured is not None
    findings.stages["evaluate"] = measured
    after = read_measured(AFTER, run_folder(stages[AFTER])) if as_of else None
    if after is not None:
        findings.updates["evaluate"] = (measured, after)
    run_dirs = {key: run_folder(stage) for key, stage in stages.items()}
    write_findings(findings, run_folder(asked), run_dirs, num_examples=settings.evaluation.examples)


def build_index(experiment: Experiment, name: str) -> None:
    """Build the index of a stage's corpus; any retriever has one, also after a warm start alone."""
    settings = experiment.stages[name]
    checkpoint = newest_of(settings)
    asked = without_training(settings, f"{settings.run.name}/index_only", checkpoint)
    asked = replace(asked, objective=ObjectiveConfig(), retrieval=replace(asked.retrieval, source="index"))
    asked = replace(asked, checkpoint=replace(asked.checkpoint, index=True), pretraining=PretrainingConfig())
    prepared = prepared_data(asked, experiment.directory, [])
    with ray_session(experiment.directory) as namespace:
        run_stage(
            asked, prepared, init_from=checkpoint, placement=placement_of(asked), namespace=f"{namespace}-index_only"
        )
    say(f"index in {run_folder(asked) / 'index'}")


def without_training(settings: Settings, run_name: str, init_from: str) -> Settings:
    """Return the settings that take the same system from a checkpoint and train nothing."""
    return replace(
        settings,
        run=replace(settings.run, name=run_name, init_from=init_from),
        training=replace(settings.training, train="none", steps=0),
    )


def at_date(settings: Settings, as_of: str, run_name: str, init_from: str) -> Settings:
    """Return the settings that ask the same system about another version of the corpus and train nothing."""
    return replace(
        without_training(settings, run_name, init_from),
        corpus=replace(settings.corpus, as_of=as_of),
        questions=replace(settings.questions, as_of=as_of),
        evaluation=replace(settings.evaluation, also=[], needle=NeedleConfig()),
    )
