"""The lexical index as a part of the index service: one actor that maps it, and its client.

    trainer --texts--> LexicalActor (maps data/.../lexical-HASH) --> passage numbers, scores, which corpus
            --vectors--> shards                                  --> passage numbers, scores, which corpus

It depends on the corpus alone: no refresh touches it, and every generation names it in its manifest. A search names the
corpus that it wants an answer from, and the answer says which one it came from; `training/hybrid.py` puts dense and
lexical hits together only where these agree.

Who waits for whom: `submit` returns at once. `result` waits for the actor. One that died is started again by Ray, maps
its directory again, and is asked again; one that stays silent for a quarter of index.search_timeout_s is killed first.
Whatever happens, `result` ends with hits or an error within index.search_timeout_s. The constructor of the actor waits
for nothing: the first call maps the index.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cluster.events import EventLog
from cluster.handles import NamedActor, get, own_error
from cluster.processes import Place, here
from indexing.lexical import LexicalHits
from indexing.settings import LexicalConfig
from indexing.shelf import LexicalShelf

POLL_S = (0.02, 0.5)  # between attempts: the first pause, and the longest
THREADS = {"search": 4, "build": 1, "status": 1}  # a search never queues behind the index of the next corpus


class LexicalActor:
    """`indexing.shelf.LexicalShelf` in its own process."""

    def __init__(self, folder: str, config: LexicalConfig) -> None:
        self._shelf = LexicalShelf(folder, config)

    @ray.method(concurrency_group="status")
    def place(self) -> Place:
        return here()

    @ray.method(concurrency_group="build")
    def load(self, corpus: str) -> None:
        """Map the index of a corpus before it is searched."""
        self._shelf.index(corpus)

    @ray.method(concurrency_group="build")
    def derive(self, base: str, corpus: str, added: list[str], deleted: np.ndarray) -> None:
        self._shelf.derive(base, corpus, added, deleted)
        self._shelf.index(corpus)

    @ray.method(concurrency_group="search")
    def search(
        self, texts: list[str], n: int, corpus: str, of: np.ndarray | None, allowed: np.ndarray | None
    ) -> LexicalHits:
        return self._shelf.search(texts, n, corpus, of, allowed)


class LexicalClient:
    """Implements `training.hybrid.LexicalService`."""

    def __init__(self, name: str, namespace: str, corpus: str, timeout_s: float, events_path: str) -> None:
        """`corpus` is searched where none is named, until another one is."""
        self.actor = NamedActor(name, namespace)
        self.corpus, self.timeout_s, self.events = corpus, timeout_s, EventLog(events_path)

    def submit(
        self,
        texts: Sequence[str],
        n: int,
        corpus: str = "",
        of: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
    ) -> "PendingWords":
        """Start a search of question texts for the best `n` passages, with the scores of the passages `of` int64
        [batch, m]; `allowed` bool [passages]. Returns at once."""
        self.corpus = corpus or self.corpus
        return PendingWords(self, (list(texts), n, self.corpus, of, allowed))

    def find_place(self) -> None:
        """Learn where the process is, so that one that is silent later can be ended; no news is no error."""
        try:
            self.actor.find_place()
        except (RayError, ValueError):
            self.actor.place = None


class PendingWords:
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
        client, begin = self._client, time.monotonic()
        hung_s, pause_s, why = client.timeout_s / 4, POLL_S[0], "it does not answer"
        while True:
            left_s = begin + client.timeout_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(
                    f"no lexical hits for {client.timeout_s:g} s (index.search_timeout_s): {why}; see "
                    f"{client.events.path}"
                )
            try:
                if self._asked is not None:
                    hits = get(self._asked, min(left_s, hung_s))
                    client.find_place()
                    return hits
                why = "there is no such actor"
            except RayTaskError as error:
                raise own_error(error) from error
            except GetTimeoutError:
                why = f"silent for {hung_s:g} s"
                self._kill(why)
            except RayError as error:
                why = type(error).__name__
                client.events("lexical_lost", why=why)
                client.actor.place = None
            time.sleep(min(pause_s, max(0.0, left_s)))
            pause_s = min(2 * pause_s, POLL_S[1])
            self._ask()

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
