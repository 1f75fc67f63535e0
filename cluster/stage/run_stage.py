"""One stage on the cluster: placement, index service, trainers; wait for the first to end, shut down once.

    driver (this file)          starts everything at once, prints the console of rank 0, starts the trainers again
      |-- index service         shards, refresh workers, coordinator (`service.py`); lives as long as the stage
      '-- Ray Train             one process per trainer, each runs `training.stage.Stage`; when one dies, all are
                                started again and resume from the newest checkpoint in the run directory

The trainers wait for the index (bounded by `wait_timeout_s`); nobody waits for the driver. Index and trainers come up
side by side. A thread of the driver waits for the index (bounded by cluster.start_timeout_s); where that fails it stops
what there is of it, so that the trainers fail too, and its own error is the one that is raised.
"""

import hashlib
import json
import logging
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cluster.config.experiment import load, to_yaml
from cluster.config.moved import with_absolute_paths
from cluster.config.preflight import UNDECISIVE, check_where, uses_index, with_absolute_models
from cluster.config.settings import Settings
from cluster.machines.events import EventLog
from cluster.machines.run_lock import holding
from cluster.machines.stopping import Interrupted
from cluster.planning.check_fit import check_fit
from cluster.planning.placement import PlacementPlan
from cluster.prepare.corpus_changes import open_to_changes, passage_sides
from cluster.prepare.stores import Prepared
from cluster.refresh.snapshots import PREFIX
from cluster.service.room import hold_trainers, node_labels, release
from cluster.service.start import IndexServiceHandle, await_ready, index_identity, start_index_service
from cluster.stage.inherit import inherit_corpus, inherit_index
from cluster.stage.stop_request import make_desk, run_until_stopped, watch
from indexing.corpus.snapshot import TornSnapshot, is_complete
from indexing.corpus.stores.filters import parse_filter
from indexing.corpus.stores.passages import Store
from training.checkpoint import newest_checkpoint, saved_names, step_of
from training.feeding.mixture import pretrains
from training.job import StageJob, StageSettings
from training.models.retriever.encoder import with_towers_of
from training.objectives.dispatch import needs
from training.refreshing.policy import RefreshPlan
from training.reporting.jsonl import read_rows
from training.stage import EVALUATION_FILE
from training.training_settings import PREFERENCE

if TYPE_CHECKING:
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.util.placement_group import PlacementGroup

CONSOLE = "console.log"  # what rank 0 prints; the driver follows it
RESULT_POLL_S = 0.2  # Seconds between two looks at the console of rank 0
HOPELESS = (ValueError, FloatingPointError, TimeoutError)  # in a trainer: starting it again would end the same way


def run_stage(
    settings: Settings, prepared: Prepared, *, init_from: str, placement: PlacementPlan, namespace: str
) -> None:
    """Run the stage to its end, or from where an interrupted one stood. What it measured stands in its run directory.

    Raises ValueError for settings and for a stage that does not fit the machines' memory, RuntimeError with the place
    of the traceback when the trainers fail for good.
    """
    settings = with_absolute_models(settings)
    passages = Store.open(prepared.passages, verify=False)
    run_dir = Path(settings.run.directory) / settings.run.name
    job = make_job(settings, prepared, init_from, run_dir)
    check_fit(replace(settings, encoder=job.settings.encoder), placement, len(passages))
    with holding(run_dir):
        _run_held(job, settings, prepared, passages=passages, placement=placement, namespace=namespace)


def _run_held(
    job: StageJob,
    settings: Settings,
    prepared: Prepared,
    *,
    passages: Store,
    placement: PlacementPlan,
    namespace: str,
) -> None:
    """Run the stage in a folder that this process holds."""
    run_dir = Path(job.run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(with_absolute_paths(settings)), encoding="utf-8")
    log = inherit_corpus(job.init_from, run_dir, passages, lambda: passage_sides(settings, prepared.tokenizers))
    check_where(settings, prepared.passages, log.folder)
    events = EventLog(run_dir / "events.jsonl")
    checkpoint = newest_checkpoint(run_dir, lambda _: None)
    events("stage_started", step=step_of(checkpoint))
    service, timeout_s = None, settings.cluster.start_timeout_s
    serving = open_to_changes(log.folder, prepared, uses_index(settings))
    with serving, _console(run_dir / CONSOLE):
        held = None
        try:
            held = hold_trainers(placement, timeout_s)  # before shards and workers take their places
            if uses_index(settings):
                snapshot = None if checkpoint is None else snapshot_of(checkpoint)
                if checkpoint is None:
                    identity = index_identity(passages, settings.encoder, settings.index)
                    snapshot = inherit_index(settings, job.init_from, run_dir=run_dir, identity=identity, log=log)
                try:
                    service = _start_index(
                        settings, prepared, placement=placement, run_dir=run_dir, namespace=namespace, snapshot=snapshot
                    )
                except TornSnapshot as torn:  # the checkpoint's weights make the index anew
                    events("snapshot_refused", why=str(torn))
                    print(f"{torn}; the index is encoded again", flush=True)
                    snapshot = None
                    service = _start_index(
                        settings, prepared, placement=placement, run_dir=run_dir, namespace=namespace, snapshot=snapshot
                    )
                job.index_from_snapshot = snapshot is not None and service.complete
            with _started(service, placement, timeout_s):
                desk = make_desk()
                sent = {"job": pickle.dumps((job, service)), "desk": desk}  # as bytes: the controller imports no torch
                run_until_stopped(lambda: _fit(sent, run_dir, settings, placement, held), desk)
        except Interrupted as signal:
            signal.saved = newest_checkpoint(run_dir, lambda _: None, contents=False)
            events("stage_stopped", signal=str(signal), step=step_of(signal.saved))
            raise
        finally:
            if held is not None:
                release(held)
            if service is not None:
                service.stop()
    events("stage_finished")


@contextmanager
def _started(service: IndexServiceHandle | None, placement: PlacementPlan, timeout_s: float) -> Iterator[None]:
    """Wait beside the block until the service is ready. Raises what kept it from that, whatever the block raised."""
    failures: list[Exception] = []

    def wait() -> None:
        assert service is not None
        try:
            await_ready(service, placement, timeout_s=timeout_s)
        except Exception as error:  # the edge of a thread: raised below
            failures.append(error)
            service.stop()

    thread = threading.Thread(target=wait, name="index-start", daemon=True)
    if service is not None:
        thread.start()
    try:
        yield
    except Exception as error:
        if failures:
            raise failures[0] from error
        raise


def _start_index(
    settings: Settings,
    prepared: Prepared,
    *,
    placement: PlacementPlan,
    run_dir: Path,
    namespace: str,
    snapshot: Path | None,
) -> IndexServiceHandle:
    return start_index_service(
        run_dir=run_dir,
        namespace=namespace,
        store=prepared.passages,
        tokenizer=prepared.tokenizers / "retriever",
        encoder=settings.encoder,
        index=settings.index,
        refresh=settings.refresh,
        checkpoint=settings.checkpoint,
        placement=placement,
        snapshot=snapshot,
        start_timeout_s=settings.cluster.start_timeout_s,
        where=parse_filter(settings.retrieval.where),
        wait=snapshot is not None or placement.shares_gpus,
        lexical=prepared.lexical,
    )


def is_finished(settings: Settings) -> bool:
    """Return whether this very stage has been run to its end: by the fingerprint that its evaluation carries, or where
    the run folder was moved since, by the settings that it keeps."""
    run_dir = Path(settings.run.directory) / settings.run.name
    path = run_dir / EVALUATION_FILE
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8")).get("fingerprint") == fingerprint(with_absolute_models(settings)):
        return True
    rows = read_rows(run_dir / "events.jsonl")
    marks = [row["event"] for row in rows if row.get("event") in ("stage_started", "stage_finished")]
    if marks[-1:] != ["stage_finished"] or not (run_dir / "config.yaml").is_file():
        return False  # the evaluation may be of other settings than config.yaml
    try:
        recorded = load([str(run_dir)], []).settings
    except ValueError:  # written by a version with other settings
        return False
    return _outcome(with_absolute_paths(recorded)) == _outcome(with_absolute_paths(settings))


def fingerprint(settings: Settings) -> str:
    """Hash of what decides a stage's outcome; console, places and machines do not."""
    return hashlib.sha256(json.dumps(_outcome(settings), sort_keys=True).encode()).hexdigest()[:16]


def _outcome(settings: Settings) -> dict[str, Any]:
    """What decides a stage's outcome."""
    sections = {k: v for k, v in asdict(settings).items() if k not in UNDECISIVE}
    sections["run"] = {"seed": settings.run.seed, "init_from": settings.run.init_from}
    for section, name in (("objective", "function"), ("evaluation", "metrics")):  # earlier versions lack them
        if not sections[section][name]:
            del sections[section][name]
    return sections


def make_job(settings: Settings, prepared: Prepared, init_from: str, run_dir: Path) -> StageJob:
    """Return the job that is sent to the trainer processes."""
    contrastive = needs(settings.objective).in_batch
    questions = settings.questions
    asked = None if contrastive else prepared.questions.get(questions.evaluate)  # none for an index alone
    trains = not contrastive and settings.training.train != "none" and not pretrains(settings.pretraining)
    if settings.objective.name in PREFERENCE:
        learned_from = prepared.preferences.get("train")
    else:
        learned_from = prepared.questions.get(questions.train)
    pairs = prepared.preferences.get("evaluate")
    return StageJob(
        settings=stage_settings(settings, init_from),
        run_dir=str(run_dir.resolve()),  # a trainer's working folder is another one
        passages=str(prepared.passages.resolve()),
        train_questions=str(learned_from.resolve()) if trains and learned_from is not None else "",
        evaluate_questions=str(asked.resolve()) if asked is not None else "",
        evaluate_preferences=str(pairs.resolve()) if pairs is not None and not contrastive else "",
        tokenizers=str(prepared.tokenizers.resolve()),
        init_from=str(Path(init_from).resolve()) if init_from else "",
        seed=settings.run.seed,
        threads=settings.cluster.threads_per_trainer,
        fingerprint=fingerprint(settings),
        duplicates=str(prepared.duplicates.resolve()) if prepared.duplicates is not None else "",
        config=asdict(settings),
        corpus=str(run_dir.resolve() / "corpus"),
    )


def stage_settings(settings: Settings, init_from: str) -> StageSettings:
    """Return what the trainers read of the settings, with the towers that the checkpoint `init_from` has."""
    sections = {entry.name: vars(settings)[entry.name] for entry in fields(StageSettings)}
    refresh = RefreshPlan(**{entry.name: vars(settings.refresh)[entry.name] for entry in fields(RefreshPlan)})
    encoder = with_towers_of(settings.encoder, saved_names(Path(init_from)) if init_from else ())
    return StageSettings(**sections | {"refresh": refresh, "encoder": encoder})


def snapshot_of(checkpoint: Path) -> Path | None:
    """Return the index generation that a checkpoint names, if it is on disk with all its files."""
    generation = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["generation"]
    directory = checkpoint.parents[1] / "index" / f"{PREFIX}{generation}"
    return directory if generation >= 0 and is_complete(directory) else None


def _fit(
    sent: dict[str, Any], run_dir: Path, settings: Settings, placement: PlacementPlan, held: "PlacementGroup"
) -> None:
    """Ray Train, again while cluster.max_failures allows; each attempt resumes from the newest checkpoint. What another
    attempt would meet again is raised at once. `sent` is what each trainer gets, `held` the room that is kept for
    them."""
    from ray.exceptions import RayActorError, WorkerCrashedError
    from ray.train import TrainingFailedError

    events = EventLog(run_dir / "events.jsonl")
    for attempt in range(settings.cluster.max_failures + 1):
        if attempt:
            held = hold_trainers(placement, settings.cluster.start_timeout_s)
        release(held)  # Ray Train makes a placement group of its own, on the same nodes
        try:
            _trainer(sent, run_dir, settings, placement).fit()
            return
        except (RayActorError, WorkerCrashedError) as error:  # the controller itself; its trainers ended with it
            kind, what, cause = "controller_lost", "the controller of the trainers was lost", error
        except TrainingFailedError as error:
            kind, what, cause = "trainers_lost", "a trainer was lost", _cause(error)
            if isinstance(cause, HOPELESS):
                raise cause from error
        why = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        if attempt == settings.cluster.max_failures:
            raise RuntimeError(f"{what}, time {attempt + 1} (cluster.max_failures): {why}") from cause
        events(kind, attempt=attempt, why=f"{type(cause).__name__}: {why}")
        print(f"{what}; training goes on from the last checkpoint", flush=True)


def _trainer(sent: dict[str, Any], run_dir: Path, settings: Settings, placement: PlacementPlan) -> "TorchTrainer":
    """Return one attempt, which is not started yet."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    seat = placement.trainers
    resources = {"CPU": seat.cpus} | ({"GPU": seat.gpus} if seat.gpus else {})
    return TorchTrainer(
        _train_loop,
        train_loop_config=sent,
        scaling_config=ScalingConfig(
            num_workers=seat.number,
            use_gpu=seat.gpus > 0,
            resources_per_worker=resources,
            label_selector=node_labels(placement),
        ),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str(run_dir.resolve() / "ray"),
            # `_fit` knows which failures are worth another attempt; Ray Train would wait for room for ever
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
        torch_config=TorchConfig(backend="nccl" if seat.gpus else "gloo", timeout_s=int(settings.engine.timeout_s)),
    )


def _cause(error: "TrainingFailedError") -> Exception:
    """What happened in the trainers: a mistake that one of them named, else the first rank's failure."""
    failures = list(getattr(error, "worker_failures", {}).values())
    return next((failure for failure in failures if isinstance(failure, HOPELESS)), failures[0] if failures else error)


def _train_loop(config: dict[str, Any]) -> None:
    """Run one trainer process."""
    import os

    import ray.train
    import torch

    from training.stage import Stage
    from training.stopped import Stopped

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    job, service = pickle.loads(config["job"])
    context = ray.train.get_context()
    if torch.cuda.is_available():
        torch.cuda.set_device(context.get_local_rank())
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    client = service.connect() if service is not None else None
    stream: TextIO | None = None
    if context.get_world_rank() == 0:
        stream = open(Path(job.run_dir) / CONSOLE, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    with suppress(Stopped):  # the driver, which asked for it, knows
        Stage(job, client, stream, watch(config["desk"])).run()


@contextmanager
def _console(path: Path) -> Iterator[None]:
    """Print what is appended to `path` while the block runs."""
    path.touch()
    stop = threading.Event()

    def follow() -> None:
        with path.open(encoding="utf-8", errors="replace") as file:
            file.seek(0, 2)
            while True:
                ended = stop.is_set()  # read once more after the end
                for line in file:
                    sys.stdout.write(line)
                sys.stdout.flush()
                if ended:
                    return
                stop.wait(RESULT_POLL_S)

    thread = threading.Thread(target=follow, name="console", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)
