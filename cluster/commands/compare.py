"""Runs the verb `compare`: every cell of a matrix with every seed, under one Ray session, then one table.

    runs/<name>/compare/seed-S/<stage>     what cells start from: stages before the base stage, once for each seed
    runs/<name>/compare/seed-S/<cell>      the base stage as the cell has it
    runs/<name>/compare/{comparison.json, report.html}

A run that is finished is not run again, an interrupted one goes on from its checkpoint. Beside each run lies a mark of
everything that decides its outcome: its settings, its data and the mark of what it starts from. Where that is another
one now, the run is deleted and runs anew. A run that fails is reported, and the others go on.
"""

import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.commands.common import placement_of, prepared_data, ray_session, run_folder, say, starting_checkpoint
from cluster.config.experiment import Experiment
from cluster.config.matrix import Matrix, folder_of
from cluster.config.preflight import check_models, with_absolute_models
from cluster.config.settings import Settings
from cluster.prepare.stores import Prepared
from cluster.results.comparison import write_comparison
from cluster.stage.run_stage import fingerprint, is_finished, run_stage
from training.reporting.progress import duration

MARK_FILE, ERROR_FILE = "compared.json", "error.log"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of the matrix."""

    name: str  # of a cell or of a stage
    seed: int
    settings: Settings
    mark: str  # of everything that decides its outcome
    start: "Task | None" = None  # task that must have run before

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return run_folder(self.settings)


Run = Callable[[Task, Prepared, str], None]  # of a task, its data and a name for its actors
Failures = dict[tuple[str, int], str]  # sentence of the error, by name and seed


def run_matrix(experiment: Experiment, run: Run | None = None) -> int:
    """Run what is not finished, write the comparison; 1 when something failed. `run` stands in for one stage on the
    cluster. Raises ValueError for mistakes that can be seen before anything starts."""
    matrix = experiment.matrix
    if matrix is None:
        raise ValueError("compare.cells: the configuration has no compare section; see configs/compare_quickstart.yaml")
    root = experiment.directory / "compare"
    data = _data(experiment, matrix)
    tasks = tasks_of(experiment, matrix, {name: found.passages.parent.name for name, found in data.items()})
    waiting = [task for task in tasks if not is_done(task)]
    say(f"compare: {len(matrix.cells)} cells x {len(matrix.seeds)} seeds; {len(waiting)} of {len(tasks)} runs to do")
    begin = time.monotonic()
    failures: Failures = {}
    try:
        with ray_session(experiment.directory) if waiting and run is None else nullcontext("") as namespace:
            for number, task in enumerate(waiting):
                _attempt(
                    task,
                    data[task.name],
                    namespace=f"{namespace}-{number}",
                    failures=failures,
                    run=run or _run_on_cluster,
                )
                _tell_progress(
                    task, number + 1, total=len(waiting), seconds=time.monotonic() - begin, failures=failures
                )
    finally:  # an interrupted matrix has a table, too, of its finished runs
        found = {name: {task.seed: task.folder for task in tasks if task.name == name} for name in matrix.cells}
        base = experiment.stages[matrix.base_stage]
        write_comparison(
            matrix,
            base,
            folders=found,
            done={task.folder for task in tasks if is_done(task)},
            failures=failures,
            root=root,
        )
    return 1 if failures else 0


def tasks_of(experiment: Experiment, matrix: Matrix, data: dict[str, str]) -> list[Task]:
    """Return every run, in order: seed by seed, each start before the first cell that needs it. `data` has a name for
    the data of each stage and cell."""
    return [task for seed in matrix.seeds for task in _tasks_of_seed(experiment, matrix, data, seed)]


def _tasks_of_seed(experiment: Experiment, matrix: Matrix, data: dict[str, str], seed: int) -> list[Task]:
    by_folder = {str(run_folder(stage)): name for name, stage in experiment.stages.items()}
    starts: dict[str, Task] = {}
    tasks: list[Task] = []

    def add(name: str, settings: Settings, is_cell: bool) -> Task:
        """Append the task of a cell or a stage after that of the stage that it starts from; return it."""
        init_from, start = by_folder.get(settings.run.init_from, settings.run.init_from), None
        if init_from and init_from in experiment.stages:
            start = starts.get(init_from) or add(init_from, experiment.stages[init_from], False)
            init_from = str(start.folder)
        place = f"{experiment.settings.run.name}/compare/seed-{seed}/{folder_of(name)}"
        placed = replace(settings, run=replace(settings.run, name=place, seed=seed, init_from=init_from))
        parts = [fingerprint(with_absolute_models(placed)), data[name], start.mark if start is not None else ""]
        mark = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        task = Task(name=name, seed=seed, settings=placed, mark=mark, start=start)
        tasks.append(task)
        if not is_cell:
            starts[name] = task
        return task

    for name, settings in matrix.cells.items():
        add(name, settings, True)
    return tasks


def is_done(task: Task) -> bool:
    """Return true if this very run was run to its end."""
    return _mark_of(task) == task.mark and is_finished(task.settings)


def _mark_of(task: Task) -> str:
    path = task.folder / MARK_FILE
    return json.loads(path.read_text(encoding="utf-8"))["mark"] if path.is_file() else ""


def _data(experiment: Experiment, matrix: Matrix) -> dict[str, Prepared]:
    """Return the stores of every cell, and of every stage that one may start from; seeds share them. Refuses, by name,
    what can be refused before anything starts."""
    before = list(experiment.stages)[: list(experiment.stages).index(matrix.base_stage)]
    wanted = {name: experiment.stages[name] for name in before} | matrix.cells
    found = {}
    for name, settings in wanted.items():
        try:
            check_models(settings)
            if settings.run.init_from and settings.run.init_from not in experiment.stages and name in matrix.cells:
                starting_checkpoint(settings, experiment.stages)
            found[name] = prepared_data(settings, experiment.directory)
        except ValueError as error:
            raise ValueError(f"compare {'cell' if name in matrix.cells else 'stage'} {name}: {error}") from None
    return found


def _attempt(task: Task, data: Prepared, *, namespace: str, failures: Failures, run: Run) -> None:
    """Run one task, from where an interrupted one stood; what it raises is kept."""
    if task.start is not None and (task.start.name, task.seed) in failures:
        failures[task.name, task.seed] = f"not run: {task.start.name}, which it starts from, failed"
        return
    if task.folder.exists() and _mark_of(task) != task.mark:
        say(f"compare: {task.name}, seed {task.seed}: was run with other settings or data, and is run anew")
        shutil.rmtree(task.folder)
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / MARK_FILE).write_text(json.dumps({"mark": task.mark, "name": task.name}), encoding="utf-8")
    try:
        run(task, data, namespace)
    except Exception as error:  # of whatever kind: the other cells are worth having
        (task.folder / ERROR_FILE).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        sentence = next((line for line in str(error).splitlines() if line.strip()), "no message")
        failures[task.name, task.seed] = f"{type(error).__name__}: {sentence.strip()}"


def _run_on_cluster(task: Task, data: Prepared, namespace: str) -> None:
    start = starting_checkpoint(task.settings, {})
    run_stage(task.settings, data, init_from=start, placement=placement_of(task.settings), namespace=namespace)


def _tell_progress(task: Task, done: int, *, total: int, seconds: float, failures: Failures) -> None:
    how = failures.get((task.name, task.seed))
    left = f", about {duration(seconds / done * (total - done))} left" if done < total else ""
    say(f"compare: {done}/{total} {task.name}, seed {task.seed}: {f'FAILED: {how}' if how else 'done'}{left}")
