"""Takes the steps that verbs share: prepares the data of a stage, places it, connects to Ray, finds a checkpoint."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.config.preflight import check_index, check_where
from cluster.config.settings import Settings
from cluster.machines import session
from cluster.planning.placement import PlacementPlan, nodes_of_cluster, plan
from cluster.prepare.recorded_stores import root_of_stores
from cluster.prepare.stores import Prepared, prepare_data
from indexing.corpus.stores.passages import Store
from indexing.declare import refuse
from training.checkpoint import newest_checkpoint


def say(text: str) -> None:
    """Print one line without delay."""
    print(text, flush=True)


def run_folder(settings: Settings) -> Path:
    """Return the run folder of a stage."""
    return Path(settings.run.directory) / settings.run.name


def prepared_data(settings: Settings, root: Path, splits: list[str] | None = None) -> Prepared:
    """Prepare and return the stores of a stage. Raises ValueError, also for an index that does not fit them."""
    prepared = prepare_data(settings, root_of_stores(root), say, splits)
    check_index(settings, num_passages(prepared))
    check_where(settings, prepared.passages, _changes(settings))
    return prepared


def _changes(settings: Settings) -> Path | None:
    """Return the folder with the changes of a stage's corpus: that in its run folder, else that of the run that it
    starts from, if that is known already. `run_stage` looks again."""
    folder, start = run_folder(settings), Path(settings.run.init_from)
    places = [folder, folder.parent / start, start, *list(start.parents)[1:2]] if settings.run.init_from else [folder]
    return next((place / "corpus" for place in places if (place / "corpus" / "versions").is_dir()), None)


def num_passages(prepared: Prepared) -> int:
    """Return the number of passages in a stage's store."""
    return len(Store.open(prepared.passages, verify=False))


def placement_of(settings: Settings) -> PlacementPlan:
    """Return the placement of a stage on the machines. Raises ValueError where there is no room."""
    return plan(settings.cluster, settings.refresh, settings.index, nodes_of_cluster())


def newest_of(settings: Settings, warn: Callable[[str], None] = say) -> str:
    """Return the newest complete checkpoint of a stage. Raises ValueError where there is none."""
    folder = run_folder(settings)
    found = newest_checkpoint(folder, warn) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"{folder} has no complete checkpoint yet: train it first (tandem train)")
    return str(found)


def starting_checkpoint(settings: Settings, stages: dict[str, Settings]) -> str:
    """Return the checkpoint folder that `run.init_from` names by a stage of the same file, a run folder, or itself.
    Raises ValueError if it names none, or a folder without a complete checkpoint."""
    name = settings.run.init_from
    if not name:
        return ""
    if name in stages:
        folder = Path(stages[name].run.directory) / stages[name].run.name
    else:
        folder = Path(name)
    if (folder / "model.safetensors").is_file():
        return str(folder)
    found = newest_checkpoint(folder, say) if folder.is_dir() else None
    if found is None:
        known = f" or a stage of this file ({', '.join(stages)})" if "" not in stages else ""
        raise refuse("run.init_from", name, f"must be a checkpoint or run folder{known} with a complete checkpoint")
    return str(found)


@contextmanager
def ray_session(root: Path) -> Iterator[str]:
    """Connect to Ray for the time of a block. Yields a name for the actors of this experiment."""
    namespace = f"tandem-{root.name}-{time.time_ns() % 10**9}"
    connection = session.start_or_join(namespace, log_to_driver=False)
    try:
        yield namespace
    finally:
        connection.stop()
