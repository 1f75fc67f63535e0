"""Makes runs objects: `train` makes one, `load` finds one again, and a `Run` answers questions."""

import io
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast, overload

from cluster.commands.answer import Answer, Passage
from cluster.config.settings import Settings
from tandem.results import Results, read_results

if TYPE_CHECKING:
    import numpy as np

    from cluster.commands.loaded_run import LoadedRun
    from cluster.config.experiment import Experiment


class Corpus:
    """The corpus of a run. Every change is a version; a run that trains meanwhile takes it up at once.

    Example
    -------
    >>> version = run.corpus.add([{"_id": "moon", "text": "The moon is made of green cheese."}])
    >>> run.corpus.delete("moon") == version + 1
    True
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder, self._settings = folder, settings

    def add(self, *passages: str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> int:
        """Add passages whose ids are new: files (.jsonl, .jsonl.gz, .parquet), or dictionaries with `_id`, `text` and,
        where there are any, `title` and `metadata`. Returns the version of the corpus. Raises ValueError for a bad
        passage, TimeoutError where a job that serves the run does not take the change up."""
        return self._put(passages, "add")

    def update(self, *passages: str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> int:
        """Replace passages that are there by their ids; arguments, result and errors as `add` has them."""
        return self._put(passages, "update")

    def delete(self, *ids: str) -> int:
        """Delete passages. Returns the version of the corpus. Raises ValueError for an id that is not there."""
        from indexing.corpus.stores.live_store import Wanted

        return self._change(Wanted(delete=list(ids)))

    @property
    def version(self) -> int:
        """Number of changes that were made to the corpus."""
        return len(list((self._folder / "corpus" / "versions").glob("version-*.json")))

    def _put(self, given: Sequence[str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]]], mode: str) -> int:
        from indexing.corpus.files.corpus import read_passages
        from indexing.corpus.stores.live_store import Wanted

        limit, rows = self._settings.corpus.max_characters, list[Mapping[str, Any]]()
        put = []
        for one in given:
            if isinstance(one, str | Path):
                if not Path(one).is_file():
                    raise ValueError(f"corpus {mode}: {one} does not exist")
                put += read_passages(Path(one), limit)
            else:
                rows += [cast(Mapping[str, Any], one)] if isinstance(one, Mapping) else list(one)
        if rows or not put:
            put += read_passages(rows, limit)
        return self._change(Wanted(put=put, mode=mode))

    def _change(self, wanted: Any) -> int:
        from cluster.prepare.corpus_changes import change

        return change(self._settings, self._folder, wanted).version


class Run:
    """A trained stage. Models, stores and index are read for the first question and stay loaded until `close`; a change
    of the corpus is taken up by the next question. Every method may be called from any thread.

    Example
    -------
    >>> with tandem.load(run.folder) as again:
    ...     again.ask("where does she live?").text == run.ask("where does she live?").text
    True
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Use `load` instead."""
        self.folder = folder
        self.settings = settings
        self.corpus: Corpus = Corpus(folder, settings)
        self._lock = threading.Lock()
        self._loaded: LoadedRun | None = None
        self._closed = False

    def ask(
        self, question: str, *phrasings: str, k: int | None = None, where: Mapping[str, Any] | None = None
    ) -> Answer:
        """Return the answer to a question. `phrasings` put the same question otherwise: each is searched, and the
        rankings are fused. `k` is the number of passages to read, `where` a filter on their metadata; None: as the
        settings of the run have them. Raises ValueError for an empty question, a wrong k or a filter that nothing
        passes, and for a run without a checkpoint."""
        return self._system().ask([question, *phrasings], k=k, where=where)

    @overload
    def search(  # pyright: ignore[reportOverlappingOverload]  (a text is a sequence of texts, too)
        self, questions: str, k: int | None = None, where: Mapping[str, Any] | None = None
    ) -> list[Passage]: ...
    @overload
    def search(
        self, questions: Sequence[str], k: int | None = None, where: Mapping[str, Any] | None = None
    ) -> list[list[Passage]]: ...
    def search(
        self, questions: str | Sequence[str], k: int | None = None, where: Mapping[str, Any] | None = None
    ) -> list[Passage] | list[list[Passage]]:
        """Return the best `k` passages for a question, or a list of them for each of several; arguments and errors as
        `ask` has them."""
        system = self._system()
        if isinstance(questions, str):
            return system.search(questions, k=k, where=where)
        return [system.search(question, k=k, where=where) for question in questions]

    def encode(self, texts: Sequence[str], kind: str = "question") -> "np.ndarray":
        """Return the vectors of texts, float32 [len(texts), dim]. `kind` is question, or passage: both encoders may
        have weights of their own. Raises ValueError for another kind."""
        return self._system().encode([texts] if isinstance(texts, str) else texts, kind)

    def evaluate(self, *overrides: str) -> Results:
        """Measure the run on its evaluation questions, on Ray, with settings changed by `section.field=value`. Returns
        the results, which are also written to the folder `evaluate` of the run. Raises ValueError as the command."""
        experiment = _read([str(self.folder), *overrides], "evaluate")
        from cluster.commands.measure import measure

        with _as_command(experiment):
            measure(experiment, experiment.last_name)
        return read_results(_folder_of(experiment) / "evaluate")

    def results(self) -> Results:
        """Return what was measured at the end of the training. Raises ValueError where nothing was measured yet."""
        return read_results(self.folder)

    def close(self) -> None:
        """Let go of models, stores and index. A closed run answers no more questions."""
        with self._lock:
            self._loaded, self._closed = None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"tandem.Run({str(self.folder)!r})"

    def _system(self) -> "LoadedRun":
        """Return the loaded models, stores and index; the first call reads them."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.folder}: this run was closed; load it again")
            if self._loaded is None:
                from cluster.machines import session

                session.set_environment()  # Ray reads it when it is imported
                from cluster.commands.common import newest_of
                from cluster.commands.loaded_run import LoadedRun
                from cluster.prepare.recorded_stores import root_of_stores

                checkpoint = newest_of(self.settings, lambda _: None)
                self._loaded = LoadedRun(self.settings, root_of_stores(self.folder), checkpoint)
            return self._loaded


def load(folder: str | Path) -> Run:
    """Return the run in `folder`, wherever that was moved; reads its config.yaml alone. Raises ValueError for a folder
    that is none of a run.

    Example
    -------
    >>> tandem.load(run.folder).settings.retrieval.k
    3
    """
    from cluster.config.experiment import load as read
    from cluster.config.moved import with_absolute_paths

    path = Path(folder).absolute()
    if not (path / "config.yaml").is_file():
        stages = ", ".join(str(Path(folder) / file.parent.name) for file in sorted(path.glob("*/config.yaml")))
        hint = f"; these are: {stages}" if stages else ""
        raise ValueError(f"{folder} is no run folder (it has no config.yaml){hint}")
    settings = with_absolute_paths(read([str(path)], []).settings)
    place = replace(settings.run, directory=str(Path(settings.run.directory).absolute()))
    return Run(path, replace(settings, run=place))


def train(*files_and_overrides: str | Path) -> Run:
    """Train what YAML files describe, with settings changed by `section.field=value`, as the command `train` does: Ray
    is started, or that of RAY_ADDRESS joined; finished stages are left alone, an interrupted one goes on. Returns the
    run of the last stage. Progress is printed as `monitor.console` says.

    Raises ValueError for a mistake in the configuration, RuntimeError where the trainers fail for good.

    Example
    -------
    >>> tandem.train(run.folder, "training.stepz=3")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...Did you mean training.steps?
    """
    experiment = _read([str(argument) for argument in files_and_overrides], "train")
    if experiment.settings.cluster.dry_run:
        raise ValueError("cluster.dry_run=true: must be false here; the command `tandem train` prints the placement")
    from cluster.commands.train import train as run_stages

    with _as_command(experiment):
        run_stages(experiment)
    return load(_folder_of(experiment))


def _read(arguments: list[str], verb: str) -> "Experiment":
    """Return the experiment that `arguments` describe; check every path, and set the environment that Ray reads."""
    from cluster import cli
    from cluster.machines import session

    experiment = cli.read_experiment(arguments)
    cli.check_named_paths(verb, experiment)
    session.set_environment()
    return experiment


def _folder_of(experiment: "Experiment") -> Path:
    run = experiment.last.run
    return Path(run.directory) / run.name


@contextmanager
def _as_command(experiment: "Experiment") -> Iterator[None]:
    """Print only where the settings ask for it, and raise a ValueError that Ray wrapped without the wrapping."""
    console = any(settings.monitor.console for settings in experiment.stages.values())
    try:
        with nullcontext() if console else redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError) and not isinstance(error, ValueError):
            raise ValueError(str(cause)) from error
        raise
