"""The lexical index as a part of the index service: one actor that maps it, and its client.

    trainer --texts--> LexicalActor (maps data/.../lexical-HASH) --> passage numbers, scores, which corpus
            --vectors--> shards                                  --> passage numbers, scores, which corpus
                                      (both follow the log of changes, `indexing/corpus/stores/changes.py`)

It depends on the corpus alone: no refresh touches it, and every generation names it in its manifest. It follows the
changes of the corpus by itself, from the log on disk (`indexing/lexical/live_lexical.py`): nobody tells it. A search
names the state of the corpus that it wants an answer from, and the answer says which one it came from;
`training/retrieving/hybrid.py` puts dense and lexical hits together only where these agree.

Who waits for whom: `submit` returns at once. `result` waits for the actor. One that died is started again by Ray, maps
its directory again, and is asked again, as is one that does not see the newest change of the corpus yet; one that
stays silent for a quarter of index.search_timeout_s is killed first. Whatever happens, `result` ends with hits or an
error within index.search_timeout_s. The constructor of the actor waits for nothing: the first call maps the index.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cluster.machines.events import EventLog
from cluster.machines.processes import Place, here
from cluster.service.ray_ports import NamedActor, get, own_error
from indexing.attempts import Attempts
from indexing.corpus.stores.filters import Filter
from indexing.hits import CorpusState
from indexing.lexical.lexical import LexicalHits
from indexing.lexical.live_lexical import CorpusLag, LiveLexical

THREADS = {"search": 4, "status": 2}


class LexicalActor:
    """`indexing.lexical.live_lexical.LiveLexical` in its own process."""

    def __init__(self, path: str, store: str, corpus: str, where: Filter | None) -> None:
        """Take the paths of the index, its base store and the folder of changes; `where` restricts what is found."""
        self._parts = path, store, corpus, where
        self._index: LiveLexical | None = None
        self._lock = threading.Lock()

    @ray.method(concurrency_group="status")
    def place(self) -> Place:
        return here()

    @ray.method(concurrency_group="status")
    def load(self) -> None:
        """Map the index before it is searched."""
        self._open()

    @ray.method(concurrency_group="search")
    def search(self, texts: list[str], n: int, wanted: CorpusState | None, of: np.ndarray | None) -> LexicalHits:
        return self._open().search(texts, n, wanted, of)

    def _open(self) -> LiveLexical:
        with self._lock:
            if self._index is None:
                self._index = LiveLexical.open(*self._parts)
            return self._index


class LexicalClient:
    """Implements `training.retrieving.hybrid.LexicalService`."""

    def __init__(self, name: str, namespace: str, timeout_s: float, events_path: str) -> None:
        self.actor = NamedActor(name, namespace)
        self.timeout_s, self.events = timeout_s, EventLog(events_path)
        self.wanted: CorpusState | None = None  # of the last search that named one

    def submit(
        self, texts: Sequence[str], n: int, wanted: CorpusState | None = None, of: np.ndarray | None = None
    ) -> "PendingLexical":
        """Start a search of question texts for the best `n` passages of the corpus as `wanted` (None: as in the last
        search that named one), with the scores of the passages `of` int64 [batch, m]. Returns at once."""
        self.wanted = wanted or self.wanted
        return PendingLexical(self, (list(texts), n, self.wanted, of))

    def find_place(self) -> None:
        """Learn where the process is, so that one that is silent later can be ended; no news is no error."""
        try:
            self.actor.find_place()
        except (RayError, ValueError):
            self.actor.place = None


class PendingLexical:
    """A lexical search under way."""

    def __init__(self, client: LexicalClient, arguments: tuple[Any, ...]) -> None:
        self._client, self._arguments = client, arguments
        self._asked: Any = None
        self._hits: LexicalHits | None = None
        self._ask()

    def result(self) -> LexicalHits:
        """Wait for the hits. Raises TimeoutError, and ValueError or TornSnapshot for an index that cannot be had."""
        if self._hits is None:
            self._hits = self._wait()
        return self._hits

    def _wait(self) -> LexicalHits:
        client, attempts = self._client, Attempts(self._client.timeout_s)
        hung_s, why = client.timeout_s / 4, "it does not answer"
        for attempt in attempts:
            if attempt:
                self._ask()
            try:
                if self._asked is not None:
                    hits = get(self._asked, min(attempts.left_s, hung_s))
                    client.find_place()
                    return hits
                why = "there is no such actor"
            except RayTaskError as error:
                cause = own_error(error)
                if not isinstance(cause, CorpusLag):
                    raise cause from error
                why = str(cause)
            except GetTimeoutError:
                why = f"silent for {hung_s:g} s"
                self._kill(why)
            except RayError as error:
                why = type(error).__name__
                client.events("lexical_lost", why=why)
                client.actor.place = None
        raise TimeoutError(
            f"no lexical hits for {client.timeout_s:g} s (index.search_timeout_s): {why}; see {client.events.path}"
        )

    def _kill(self, why: str) -> None:
        self._client.events("lexical_killed", why=why)
        try:
            self._client.actor.kill()
        except (RayError, ValueError) as error:
            self._client.events("lexical_not_killed", why=type(error).__name__)

    def _ask(self) -> None:
        try:
            self._asked = self._client.actor.submit("search", *self._arguments)
        except ValueError:  # not there yet, or not any more
            self._asked = None
