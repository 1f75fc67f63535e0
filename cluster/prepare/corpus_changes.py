"""The verb `corpus`: passages added to, deleted from and updated in the corpus of a run, while it trains or afterwards.

    corpus add RUN new.jsonl[.gz]        ids must be new
    corpus update RUN changed.jsonl[.gz] ids must be there; the old texts are never returned again
    corpus delete RUN id ... | --file ids.txt
    corpus show RUN                      versions and counts

Who waits for whom: the command appends to the run's log (`indexing/corpus/stores/changes.py`), taking turns with other
commands by the log's lock, and is then done with the change: it is in the corpus of this run from now on, whatever
ends. Where a job serves the run it goes on to wait, with a bound, until `corpus/serving.json` says that the change is
served; the job's coordinator looks at the log ten times a second and needs no call. Where none does, the next `train`,
`evaluate` or `ask` encodes what is new, and nothing else.

`corpus/running.json` says that a job serves the run: where its driver is, and since when.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.machines.run_lock import lives, read_holder, this_process
from cluster.prepare.recorded_stores import record_stores, recorded_stores, root_of_stores
from indexing.corpus.files.corpus import Passage, read_passages
from indexing.corpus.snapshot import TornSnapshot, write_file
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.corpus.stores.passages import TokenSide

if TYPE_CHECKING:
    from cluster.config.settings import Settings
    from cluster.prepare.stores import Prepared

RUNNING_FILE, SERVING_FILE = "running.json", "serving.json"
ALIVE_S = 10.0  # Seconds within which a job on another machine shows a sign of life: ten of its beats
POLL_S = 0.05  # Seconds between two looks at a small file, which the disk's cache answers
ACTIONS = ("add", "update", "delete", "show")
USAGE = "tandem corpus add|update RUN file.jsonl, corpus delete RUN id ... (or --file ids.txt), corpus show RUN"


@dataclass
class Command:
    """The command as it was given."""

    action: str
    run: str
    file: str = ""
    ids: list[str] = field(default_factory=list)


def parse(arguments: list[str]) -> Command:
    """Return the command of `corpus ARGUMENTS`. Raises ValueError."""
    if not arguments or arguments[0] not in ACTIONS:
        given = f"corpus {arguments[0]}" if arguments else "corpus"
        raise ValueError(f"{given}: allowed are {', '.join(ACTIONS)}: {USAGE}")
    action, rest = arguments[0], arguments[1:]
    if not rest:
        raise ValueError(f"corpus {action} needs a run folder: {USAGE}")
    command, rest = Command(action, rest[0]), rest[1:]
    if action == "delete" and rest[:1] == ["--file"]:
        if len(rest) != 2:
            raise ValueError(f"corpus delete --file needs one file of ids, a line each: {USAGE}")
        command.file = rest[1]
    elif action == "delete":
        command.ids = rest
        if not rest:
            raise ValueError(f"corpus delete needs ids: {USAGE}")
    elif action != "show":
        if len(rest) != 1:
            raise ValueError(f"corpus {action} needs one file of passages: {USAGE}")
        command.file = rest[0]
    elif rest:
        raise ValueError(f"corpus show takes a run folder alone, not {rest[0]!r}: {USAGE}")
    if command.file and not Path(command.file).is_file():
        raise ValueError(f"corpus {action}: {command.file} does not exist")
    return command


@dataclass(frozen=True, kw_only=True)
class Changed:
    """A change that was made."""

    version: int  # of the corpus
    num_put: int
    num_deleted: int
    num_passages: int  # in the corpus now
    generation: int | None  # of the index that serves the change; None: no job serves the run


def run(command: Command, settings: "Settings", folder: Path) -> int:
    """Carry out what the command line asks of the run folder `folder`; returns the exit code. Raises as `change`."""
    begin = time.monotonic()
    if command.action == "show":
        return _show(_open(settings, folder)[0])
    done = change(settings, folder, _wanted(command, settings))  # bad lines first: nothing else was read yet
    line = f"{done.num_put} put in, {done.num_deleted} taken away: version {done.version} of the corpus"
    line = f"{line}, {done.num_passages} passages"
    seconds = time.monotonic() - begin
    if done.generation is None:
        print(f"{line} ({seconds:.1f} s); no job serves this run: its next start encodes what is new")
    else:
        print(f"{line}, generation {done.generation} serves ({seconds:.1f} s)")
    return 0


def change(settings: "Settings", folder: Path, wanted: Wanted) -> Changed:
    """Change the corpus of the run folder `folder`, and wait until a job that serves the run serves the change. Raises
    ValueError before anything is changed, TimeoutError where the job does not serve the change in time."""
    store, tokenizers = _open(settings, folder)
    corpus = folder / "corpus"
    sides = passage_sides(settings, tokenizers) if wanted.put else []
    made = change_corpus(store, wanted, sides=sides, keep=settings.retrieval.k)
    timeout_s = settings.cluster.change_timeout_s
    served = wait_until_served(corpus, made.version, timeout_s) if is_running(corpus) else {}
    return Changed(
        version=made.version,
        num_put=len(wanted.put),
        num_deleted=len(made.deleted),
        num_passages=served.get("num_passages", store.log.num_living()),
        generation=served.get("generation"),
    )


@contextmanager
def open_to_changes(corpus: Path, prepared: "Prepared", has_index: bool = True) -> Iterator[None]:
    """Say in `corpus`, the folder of a run's changes, what they are made to, and while the block runs that they are
    served, by a job that has an index."""
    record_stores(corpus.parent, prepared.passages, prepared.tokenizers)
    (corpus / SERVING_FILE).unlink(missing_ok=True)
    if has_index:
        write_file(corpus / RUNNING_FILE, [json.dumps(asdict(this_process())).encode()])
    try:
        yield
    finally:
        for name in (RUNNING_FILE, SERVING_FILE):
            with suppress(OSError):
                (corpus / name).unlink(missing_ok=True)


def is_running(corpus: Path) -> bool:
    """Return true if a job serves the run. Of one on another machine a sign of life is awaited."""
    driver = read_holder(corpus / RUNNING_FILE)
    return driver is not None and lives(driver, corpus / SERVING_FILE, silent_s=ALIVE_S, look_s=POLL_S)


def wait_until_served(corpus: Path, version: int, timeout_s: float) -> dict[str, Any]:
    """Wait until the job serves `version` of the corpus; what `serving.json` says then. Raises TimeoutError with what
    the job waits for, and RuntimeError when the job ends: the change is made in either case."""
    deadline, looked = time.monotonic() + timeout_s, time.monotonic()
    served: dict[str, Any] = {}
    watched = (corpus / RUNNING_FILE).exists()  # whose end is to be noticed
    while True:
        served = _read(corpus / SERVING_FILE) or served
        if served and served["version"] >= version:
            return served
        if time.monotonic() > deadline:
            why = served.get("waits") or "the job does not say why"
            raise TimeoutError(f"version {version} is made, but not served after {timeout_s:g} s: {why}")
        if watched and time.monotonic() - looked > ALIVE_S:
            looked = time.monotonic()
            if not is_running(corpus):
                raise RuntimeError(f"version {version} is made, but the job ended before it served it")
        time.sleep(POLL_S)


def _open(settings: "Settings", folder: Path) -> tuple[LiveStore, Path]:
    """Open the corpus of a run; return it, and where its tokenisers lie. Raises ValueError."""
    places = recorded_stores(folder)
    if places is None:
        from cluster.prepare.stores import prepare_data

        prepared = prepare_data(settings, root_of_stores(folder), lambda _: None, splits=[])
        places = prepared.passages, prepared.tokenizers
    try:
        return LiveStore.open_with(places[0], folder / "corpus"), places[1]
    except TornSnapshot as torn:
        raise ValueError(str(torn)) from torn


def _wanted(command: Command, settings: "Settings") -> Wanted:
    if command.action == "delete":
        return Wanted(delete=_read_ids(Path(command.file)) if command.file else command.ids)
    passages: list[Passage] = read_passages(Path(command.file), settings.corpus.max_characters)
    return Wanted(put=passages, mode=command.action)


def _read_ids(path: Path) -> list[str]:
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 (byte {error.start + 1})") from None
    if not ids:
        raise ValueError(f"{path} has no ids: needed is one a line")
    return ids


def passage_sides(settings: "Settings", tokenizers: Path) -> list[TokenSide]:
    """Return how the models of a run read passages, with the tokenisers in this folder."""
    from training.run_text import RunText

    return RunText.load(settings, tokenizers).passage_sides


def _show(store: LiveStore) -> int:
    log = store.log
    print(f"{store.path}: {log.num_base} passages; {log.num_living()} living in version {log.version} ({log.folder})")
    for change in log.changes:
        updated = int((change.replaces >= 0).sum())
        counts = f"{change.num_added - updated} added, {updated} updated, {len(change.deleted) - updated} deleted"
        print(f"  version {change.version}: {counts}; {log.num_living(change.version)} passages")
    served = _read(log.folder / SERVING_FILE)
    if served and is_running(log.folder):
        print(f"  a job serves version {served['version']} in generation {served['generation']}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a small JSON file that is replaced as a whole; {} if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
