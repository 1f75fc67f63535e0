"""The index as a trainer sees it: `training.retrieving.retrieve.IndexService` over the actors of one index service.

A search goes from this process to every shard at once and back, without anything in between. The client pins a
generation: all shards are asked for it, and a query whose answers are not all of it is asked again as a whole. Every
answer tells which generation its shard committed last; when all shards have a newer one, that is pinned next.
`cluster/service/fanout.py` asks them, and looks after replicas and slow shards.

Who waits for whom: `submit`, `publish` and `status` return at once. `result` waits for the shards; a shard that died is
asked again until the repair has brought it back, bounded by index.search_timeout_s, or by index.slow_after_s where
index.on_slow is refuse. `wait_for_version` and
`save_generation` poll the coordinator until their own deadline. A coordinator that died comes back without the weights
it was given; the client that published them keeps them, and hands them in again when a status shows that they are
missing.
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cluster.machines.events import EventLog
from cluster.machines.processes import Place
from cluster.refresh.coordinator import CoordinatorStatus
from cluster.refresh.ports import Weights
from cluster.service.actors import Gone
from cluster.service.fanout import WAIT, Answer, Fanout, PendingAnswers, SearchRefused, Slowness
from cluster.service.lexical_actor import LexicalClient
from cluster.service.ray_ports import NamedActor, get, own_error
from indexing.attempts import Attempts
from indexing.corpus.stores.filters import Filter
from indexing.hits import Hits, Indexed, ShardHits, ShardIndexed, check_k, joined, merge
from indexing.shard.serving import GenerationGone
from training.retrieving.retrieve import IndexStatus

INLINE_BYTES = 100_000  # larger queries are put into the object store once instead of being sent with every call
ASK_S = 5.0  # Seconds for one status
STATUS_AGE_S = 0.05  # Seconds: a younger status is not asked for again


@dataclass(frozen=True, kw_only=True)
class IndexAddress:
    """The names of an index service's actors, and what clients need to know of it."""

    namespace: str
    coordinator: str
    shards: tuple[str, ...]  # names of the actors: every shard's first replica, then every shard's second, ...
    num_passages: int
    search_timeout_s: float
    events_path: str
    hung_after_s: float  # a coordinator silent for so long is killed, and starts again
    replicas: int = 1
    slowness: Slowness = WAIT
    where: Filter | None = None  # of every search that names no other one; num_passages are those that pass it
    lexical: str = ""  # actor of the lexical index; empty: there is none

    def by_shard(self) -> list[tuple[str, ...]]:
        """Return the names of each shard's replicas."""
        num_shards = len(self.shards) // self.replicas
        return [self.shards[number::num_shards] for number in range(num_shards)]


def new_publish_id() -> int:
    """Return a number that no other publish has."""
    return secrets.randbits(62) + 1


class Search:
    """A search under way (`PendingHits`)."""

    def __init__(
        self,
        client: "IndexClient",
        queries: np.ndarray,
        *,
        k: int,
        num_vectors: int,
        where: Filter | None = None,
        allow_fewer: bool = False,
    ) -> None:
        self._client = client
        self._k, self._num_vectors, self._where, self._allow_fewer = k, num_vectors, where, allow_fewer
        self._queries: Any = queries if queries.nbytes < INLINE_BYTES else ray.put(queries)
        self._question = self._ask()
        self._hits: Hits | None = None

    def result(self) -> Hits:
        """Wait for the hits. Raises TimeoutError (SearchRefused where index.on_slow says so), and ValueError for
        queries that the index refuses."""
        if self._hits is None:
            self._hits = self._wait()
            self._queries = None
        return self._hits

    def _wait(self) -> Hits:
        why = ""
        attempts = Attempts(self._client.patience_s)  # of waiting, not of training meanwhile
        for attempt in attempts:
            if attempt:
                self._question = self._ask()
            try:
                answers = self._question.answers(attempts.deadline)
            except GetTimeoutError:
                silent = ", ".join(map(str, self._question.silent()))
                raise self._client.too_late(why or f"no answer of shard {silent}") from None
            except RayTaskError as error:
                raise own_error(error) from error
            except RayError as error:
                why = f"a shard is not there ({type(error).__name__})"
            else:
                hits = [answer for answer in answers if isinstance(answer, ShardHits)]
                again_at_once = self._client.learn(answers, self._where)
                if len(hits) == len(answers) and len({one.generation for one in hits}) == 1:
                    return merge(hits, self._k, self._allow_fewer)
                why = "no generation is served by every shard"
                if again_at_once:
                    attempts.skip_pause()
                    continue
            self._client.hand_in_again()
        raise self._client.too_late(why)

    def _ask(self) -> PendingAnswers:
        return self._client.ask_shards(self._queries, self._k, num_vectors=self._num_vectors, where=self._where)


class IndexClient:
    """Implements `training.retrieving.retrieve.IndexService`; may be pickled, and used from several threads."""

    def __init__(self, address: IndexAddress) -> None:
        self.address = address
        self.num_passages = address.num_passages
        self._coordinator = NamedActor(address.coordinator, address.namespace)
        self._events = EventLog(address.events_path)
        replicas = [[NamedActor(name, address.namespace) for name in names] for names in address.by_shard()]
        self._fanout = Fanout(replicas, address.slowness, self._events)
        self.lexical = None
        if address.lexical:
            self.lexical = LexicalClient(
                address.lexical, address.namespace, address.search_timeout_s, address.events_path
            )
        self._lock = threading.Lock()
        self._pinned: int | None = None
        self._published: Weights | None = None
        self._handed_in: Any = None  # the call that carries them to the coordinator
        self._taken_by: Place | None = None  # the coordinator that has them
        self._status = CoordinatorStatus()
        self._status_at = 0.0
        self._asked: Any = None  # the status call under way
        self._probe: Any = None  # the oldest status call that the coordinator may not have answered
        self._probe_at = 0.0
        self._publish_failures = 0

    def __reduce__(self) -> tuple[type["IndexClient"], tuple[IndexAddress]]:
        return IndexClient, (self.address,)

    # Search.

    def submit(
        self,
        queries: np.ndarray,
        k: int,
        num_vectors: int = 0,
        *,
        where: Filter | None = None,
        allow_fewer: bool = False,
    ) -> Search:
        """Start a search of float32 `queries` [batch, dim]; the first `num_vectors` hits come with their vectors, where
        the kind of index keeps them. `where`: among the passages alone that pass it (None: the address's filter, if it
        has one). Raises ValueError for a k that the corpus does not hold; where fewer than k passages pass, `result`
        raises it, or has fewer columns with `allow_fewer`."""
        where = self.address.where if where is None else where
        if where == self.address.where and not (where is not None and allow_fewer):
            check_k(k, self.num_passages)
        return Search(
            self,
            np.ascontiguousarray(queries, np.float32),
            k=k,
            num_vectors=num_vectors,
            where=where,
            allow_fewer=allow_fewer,
        )

    def ask_shards(self, queries: Any, k: int, num_vectors: int, where: Filter | None) -> PendingAnswers:
        """Ask every shard for its hits in the pinned generation."""
        return self._fanout.ask("search", queries, k, self._pinned, num_vectors, where)

    def indexed(self, ids: np.ndarray, generation: int, with_vectors: bool = True) -> Indexed:
        """Return what `generation` has of passages `ids` int64 [...].

        Raises GenerationGone if it is not served any more, and TimeoutError as a search does.
        """
        wanted, places = np.unique(ids, return_inverse=True)
        attempts, why = Attempts(self.patience_s), "a shard does not answer"
        for _ in attempts:
            asked = self._fanout.ask("indexed", wanted, generation, with_vectors)
            try:
                answers = asked.answers(attempts.deadline)
                gone = [answer.committed for answer in answers if isinstance(answer, Gone)]
                if not gone:
                    found = joined([answer for answer in answers if isinstance(answer, ShardIndexed)], len(wanted))
                    return found.at(places.reshape(np.shape(ids)))
                if min(gone) >= 0:  # released; a shard that came back empty is repaired
                    raise GenerationGone(generation, min(gone))
                why = f"generation {generation} is not served by every shard"
            except RayTaskError as error:
                raise own_error(error) from error
            except (RayError, GetTimeoutError) as error:  # it is being restarted, or silent until the repair finds it
                why = f"a shard is not there ({type(error).__name__})"
            self.hand_in_again()
        raise self.too_late(why)

    @property
    def patience_s(self) -> float:
        """Seconds that a search waits before it is an error."""
        refuses = self.address.slowness.action == "refuse"
        return self.address.slowness.after_s if refuses else self.address.search_timeout_s

    def too_late(self, why: str) -> TimeoutError:
        """Return the error of a search that has waited so long; count it if it is refused."""
        if self.address.slowness.action == "refuse":
            self._fanout.count("refused")
            limit = self.address.slowness.after_s
            return SearchRefused(f"search refused after {limit:g} s (index.slow_after_s, index.on_slow=refuse): {why}")
        limit = self.address.search_timeout_s
        return TimeoutError(f"search found no complete index for {limit:g} s (index.search_timeout_s): {why}")

    def learn(self, answers: list[Answer], where: Filter | None = None) -> bool:
        """Pin the newest generation that all shards have committed; `where` is the filter of the search.

        Returns True if it is another one than before, so that the same query would be answered by it at once.
        """
        hits = [answer for answer in answers if isinstance(answer, ShardHits)]
        counts = [answer.num_living if where is None else answer.num_allowed for answer in hits]
        if len(hits) == len(answers) and min(counts) >= 0 and where == self.address.where:
            self.num_passages = sum(counts)
        committed = min(answer.committed for answer in answers if not isinstance(answer, ShardIndexed))
        if committed < 0:  # a shard came back empty
            return False
        changed = committed != self._pinned
        self._pinned = committed
        return changed

    # Weights and generations.

    def publish(self, weights_version: int, weights: dict[str, np.ndarray], only: np.ndarray | None = None) -> None:
        """Hand out weights, for all passages or for the sorted numbers `only`; returns at once. A failure is an event,
        and the next publish tries again."""
        try:
            reference = ray.put(weights)
        except RayError as error:
            self._note_failure(weights_version, error)
            return
        with self._lock:
            self._published = Weights(weights_version, new_publish_id(), [reference], only)
            self._hand_in()

    def wait_for_version(
        self,
        weights_version: int,
        timeout_s: float,
        report: Callable[[int, str], None] = lambda encoded, doing: None,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wait until a generation of that version or a newer one serves, and search it from now on. The wait ends early
        if `stop` returns true.

        A version that this client published itself is awaited as that very publish. `report` hears how many passages
        were encoded since, and what shards do with them, which has bounds of its own. Raises TimeoutError after
        `timeout_s` without a further passage or such work, and RuntimeError when its refresh was given up.
        """
        attempts = Attempts(timeout_s)
        encoded, begun_with, doing = -1, -1, ""
        for _ in attempts:
            status = self._ask(min(ASK_S, max(0.1, attempts.left_s)))
            if status is not None and (status.passages_encoded, status.doing) != (encoded, doing):
                encoded, doing = status.passages_encoded, status.doing
                attempts.extend()
                begun_with = encoded if not 0 <= begun_with <= encoded else begun_with  # a new coordinator counts anew
                report(encoded - begun_with, doing)
            if status is not None and self._serves(status, weights_version):
                self._pinned = status.generation
                return
            if status is not None and self._gave_up(status, weights_version) and not self._forgotten():
                raise RuntimeError(f"no index of version {weights_version}: {status.given_up}")
            if stop():
                return
        raise TimeoutError(
            f"no index of version {weights_version} after {timeout_s:g} s without progress; version "
            f"{self._status.weights_version} serves (-1: none); see {self.address.events_path}"
        )

    def wait_for_corpus(self, corpus_version: int, timeout_s: float) -> bool:
        """Wait until the changes of the corpus up to this version are served; False where what was added waits for
        weights to be encoded with. Raises TimeoutError after `timeout_s` without a further passage."""
        attempts, encoded = Attempts(timeout_s, longest_s=0.02), -1
        for _ in attempts:
            status = self._ask(min(ASK_S, max(0.1, attempts.left_s)))
            if status is not None and status.corpus_version >= corpus_version:
                self._pinned = status.generation
                return True
            if status is not None and status.needs_weights:
                return False
            if status is not None and status.passages_encoded != encoded:
                encoded = status.passages_encoded
                attempts.extend()
        raise TimeoutError(f"version {corpus_version} of the corpus is not served after {timeout_s:g} s")

    def keep_newest(self) -> int:
        """Return the number of the newest generation on disk, which is protected from now on; -1 if there is none, or
        if the coordinator does not answer within a few seconds."""
        try:
            return int(get(self._coordinator.submit("keep_newest"), ASK_S))
        except RayError:  # silent or restarting
            return -1

    def save_generation(self, generation: int, timeout_s: float) -> str:
        """Make sure that `generation` is on disk, and protected; returns its directory.

        Raises TimeoutError, and OSError when it is not served any more or could not be written.
        """
        attempts = Attempts(timeout_s)
        for _ in attempts:
            try:
                path = get(self._coordinator.submit("save_generation", generation), max(0.1, attempts.left_s))
            except RayTaskError as error:
                raise own_error(error) from error
            except RayError:  # silent or restarting
                path = None
            if path is not None:
                return path
        raise TimeoutError(f"index generation {generation} was not on disk after {timeout_s:g} s")

    # Status.

    def status(self) -> IndexStatus:
        """Return the newest known state; ask for a newer one, and do not wait for it."""
        with self._lock:
            self._collect()
            if self._asked is None and time.monotonic() - self._status_at > STATUS_AGE_S:
                self._asked = self._coordinator.submit("status")
                if self._probe is None:
                    self._probe, self._probe_at = self._asked, time.monotonic()
            status, counts = self._status, self._fanout.counts
        return IndexStatus(
            generation=status.generation,
            weights_version=status.weights_version,
            generations_committed=status.generations_committed,
            refresh_seconds=status.refresh_seconds,
            refresh_passages_per_s=status.refresh_passages_per_s,
            failures=status.failures + self._publish_failures,
            slow=counts["slow"],
            hedged=counts["hedged"],
            refused=counts["refused"],
            oldest_version=status.oldest_version,
            figures=status.figures,
            doing=status.doing,
        )

    def hand_in_again(self) -> None:
        """Ask for a status, and hand in the weights again if it lacks them: what a waiting search can do."""
        self.status()

    def _ask(self, timeout_s: float) -> CoordinatorStatus | None:
        """Return the state now, None if the coordinator does not answer."""
        self.status()
        if self._asked is not None:
            ray.wait([self._asked], timeout=timeout_s)
        with self._lock:
            return self._status if self._collect() else None

    def _collect(self) -> bool:
        """Take a status that has arrived; returns whether one has. Call with the lock held."""
        self._end_silence()
        if self._asked is None:
            return time.monotonic() - self._status_at <= STATUS_AGE_S
        if not ray.wait([self._asked], timeout=0)[0]:
            return False
        asked, self._asked = self._asked, None
        try:
            self._status, self._coordinator.place = get(asked)
        except RayError:  # it is being restarted
            return False
        self._status_at = time.monotonic()
        if self._status.num_passages:
            self.num_passages = self._status.num_passages
        if self._forgotten():
            self._hand_in()
        elif self._status.needs_weights and self._published is not None and self._handed_in is None:
            self._published = replace(self._published, publish_id=new_publish_id(), only=None)
            self._hand_in()
        return True

    def _end_silence(self) -> None:
        """Kill a coordinator that hangs; one client sees to it, the one that publishes. Call with the lock held."""
        if self._probe is None:
            return
        if ray.wait([self._probe], timeout=0)[0]:
            self._probe = None
            return
        silent_s = time.monotonic() - self._probe_at
        if self._published is not None and silent_s > self.address.hung_after_s:
            self._events("coordinator_killed", why=f"silent for {silent_s:.0f} s")
            self._coordinator.kill()
            self._asked = self._probe = None

    def _hand_in(self) -> None:
        """Send the published weights to the coordinator. Call with the lock held."""
        self._handed_in, self._taken_by = self._coordinator.submit("publish", self._published), None
        self._asked = None  # a status from before would seem to have forgotten them

    def _forgotten(self) -> bool:
        """Return True if the coordinator that now answers never got the newest publish of this client."""
        if self._handed_in is not None and ray.wait([self._handed_in], timeout=0)[0]:
            handed_in, self._handed_in = self._handed_in, None
            try:
                self._taken_by = get(handed_in)
            except RayError as error:
                assert self._published is not None
                self._note_failure(self._published.version, error)
        return self._published is not None and self._handed_in is None and self._taken_by != self._coordinator.place

    def _serves(self, status: CoordinatorStatus, weights_version: int) -> bool:
        published = self._published_here(weights_version)
        if published is None:
            return status.weights_version >= weights_version
        restarted = status.publish_id == 0 and status.weights_version == weights_version
        return restarted or status.publish_id == published.publish_id or status.weights_version > weights_version

    def _gave_up(self, status: CoordinatorStatus, weights_version: int) -> bool:
        """Return True if the coordinator gave up what is awaited, and not an older publish of this client."""
        published = self._published_here(weights_version)
        return bool(status.given_up) and (published is None or status.given_up_publish in (0, published.publish_id))

    def _published_here(self, weights_version: int) -> Weights | None:
        """Return the newest publish of this client if its version is the one that is waited for."""
        published = self._published
        return published if published is not None and published.version == weights_version else None

    def _note_failure(self, weights_version: int, error: Exception) -> None:
        self._publish_failures += 1
        self._events("publish_failed", weights_version=weights_version, why=type(error).__name__)
