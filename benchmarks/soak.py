"""Does an index service stay right for minutes of searches, publishes, changes of the corpus, and deaths?

    python -m benchmarks.soak [--minutes 5] [--seed 0] [--replicas 1]

A real service on a local Ray (3 shards, 1 refresh worker). One client searches without a pause and compares every
answer with brute force over the vectors of the generation that it names. Meanwhile, drawn with the seed: one thread
adds and deletes passages; another publishes weights, and kills processes of shards, of the refresh worker and of the
coordinator (SIGKILL) or stops them (SIGSTOP, for ever or for seconds). Half of what is drawn comes before the service
has got over what came before it.

A violation: a wrong answer, one of two generations, one of a generation that was never committed, one of an older
generation than before (unless a coordinator took that one over, because the newer was lost before it was on disk), a
search that fails or takes longer than index.search_timeout_s, a passage that is missing after its addition was served,
one that is found by a search that began after its deletion was served, a publish or a change that is not served in the
end. Prints what it does, a table, and one JSON line; the exit code is 1 where there was a violation.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from cluster.machines import session

session.set_environment()

from cluster.config.settings import ClusterConfig, RefreshConfig  # noqa: E402
from cluster.planning.placement import nodes_of_cluster, plan  # noqa: E402
from cluster.prepare.corpus_changes import open_to_changes  # noqa: E402
from cluster.prepare.stores import Prepared  # noqa: E402
from cluster.service.search import IndexClient  # noqa: E402
from cluster.service.start import IndexServiceHandle, start_index_service  # noqa: E402
from indexing.indexing_settings import IndexConfig  # noqa: E402
from tests.cluster.small_corpus import ENCODER, Corpus, make_corpus  # noqa: E402
from tests.cluster.survival.checker import Checker, events_of  # noqa: E402
from tests.cluster.survival.living import LiveOracle  # noqa: E402
from tests.cluster.survival.observers import process_of, serve  # noqa: E402

NAMESPACE = "tests"  # where tests/cluster/survival looks for actors
WAIT_S = 180.0  # for a version to serve, whatever dies
KEEP = 200  # passages that are left
SEARCH_S = 120.0  # a stopped coordinator with a stopped shard takes most of it
ACTIONS = {"publish": 4, "kill": 3, "stop": 1, "pause": 1, "rest": 4}  # weights of the draw
VICTIMS = {"shard": 4, "worker": 2, "coordinator": 2}


class Soak:
    """A service, what is done to it, and what is found."""

    def __init__(self, service: IndexServiceHandle, corpus: Corpus, seed: int) -> None:
        self.service, self.corpus, self.chance = service, corpus, random.Random(seed)
        self.client: IndexClient = serve(service, 1, corpus.weights(1))
        self.oracle = LiveOracle(corpus, Path(service.address.events_path).parent)
        self.checker = Checker(service.connect(), self.oracle, SEARCH_S, seed=seed)
        self.editor = threading.Thread(target=self.edit, args=(random.Random(seed + 1),), daemon=True)
        self.ended = threading.Event()
        self.done: Counter[str] = Counter()
        self.version = 1
        self.violations: list[str] = []
        self.begin = time.monotonic()
        self.longest_change_s = 0.0
        self._asleep: dict[int, float] = {}  # process -> when it wakes up

    def run(self, seconds: float) -> None:
        """Do what is drawn until the time is over, then let the service recover once more."""
        self.checker.start()
        self.editor.start()
        while time.monotonic() - self.begin < seconds and len(self._all()) < 5:
            (action,) = self.chance.choices(list(ACTIONS), list(ACTIONS.values()))
            getattr(self, action)()
            self._wake()
            if self.chance.random() < 0.5:
                self.settle()
        self._wake(all_of_them=True)
        self.publish()
        self.settle()
        self.ended.set()
        while self.editor.is_alive():
            self.client.status()
            time.sleep(0.1)
        self.checker.finish()
        self.violations += self.checker.violations

    def publish(self) -> None:
        """Hand out new weights."""
        self.version += 1
        self.client.publish(self.version, self.corpus.weights(self.version))
        self.done["publishes"] += 1

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP for ever: whoever watches has to kill it. One at a time: one after the other may take longer than a
        search may."""
        self._wake(all_of_them=True)
        self.settle()
        self._signal(signal.SIGSTOP)

    def pause(self) -> None:
        """SIGSTOP for a few seconds."""
        process = self._signal(signal.SIGSTOP)
        if process is not None:
            self._asleep[process] = time.monotonic() + self.chance.uniform(0.5, 6.0)

    def rest(self) -> None:
        """Nothing but searches, and looks at the status, as in training."""
        until = time.monotonic() + self.chance.uniform(0.1, 1.5)
        while time.monotonic() < until:
            self.client.status()
            time.sleep(0.1)

    def edit(self, chance: random.Random) -> None:
        """Add and delete passages until the end; each change is awaited."""
        words = "abcdefghij"
        while not self.ended.wait(chance.uniform(0.1, 1.5)):
            number, living = chance.randint(1, 4), self.oracle.living()
            begin = time.monotonic()
            try:
                if chance.random() < 0.5 or len(living) < KEEP:
                    texts = [
                        " ".join("".join(chance.choices(words, k=4)) for _ in range(chance.randint(3, 11)))
                        for _ in range(number)
                    ]
                    self.oracle.add(texts, WAIT_S)
                    self.done["adds"] += number
                else:
                    self.oracle.delete(chance.sample(living, number), WAIT_S)
                    self.done["deletes"] += number
            except Exception as error:  # the edge of a thread
                self.violations.append(f"a change of the corpus: {type(error).__name__}: {error}")
                return
            self.longest_change_s = max(self.longest_change_s, time.monotonic() - begin)

    def settle(self) -> None:
        """Wait until the newest version serves."""
        try:
            self.client.wait_for_version(self.version, WAIT_S)
        except (TimeoutError, RuntimeError) as error:
            self.violations.append(f"version {self.version} does not serve: {error}")

    def _signal(self, number: signal.Signals) -> int | None:
        """Draw a process that answers, and send it a signal; returns it."""
        (kind,) = self.chance.choices(list(VICTIMS), list(VICTIMS.values()))
        address = self.service.address
        names = {"shard": address.shards, "worker": self.service.workers, "coordinator": (address.coordinator,)}[kind]
        name = self.chance.choice(names)
        try:
            process = process_of(name, timeout_s=3.0)
            os.kill(process, number)
        except Exception as error:  # it is dead or stopped already: nothing to kill
            self.say(f"{name} does not answer ({type(error).__name__})")
            return None
        self.done["kills"] += 1
        self.done[f"{number.name} of a {kind}"] += 1
        self.say(f"{number.name} {name}")
        return process

    def _wake(self, all_of_them: bool = False) -> None:
        """Let go on what was paused long enough."""
        now = time.monotonic()
        for process in [process for process, until in self._asleep.items() if all_of_them or until < now]:
            del self._asleep[process]
            try:
                os.kill(process, signal.SIGCONT)
            except ProcessLookupError:  # it was killed meanwhile
                continue

    def _all(self) -> list[str]:
        return [*self.violations, *self.checker.violations]

    def say(self, what: str) -> None:
        """One line of progress."""
        seconds, checker = time.monotonic() - self.begin, self.checker
        changes = f"{self.done['adds']} added, {self.done['deletes']} deleted"
        state = f"version {self.version}, {changes}, {checker.searches} searches, {len(self._all())} violations"
        print(f"{seconds:6.1f} s  {what}  ({state})", flush=True)

    def report(self) -> dict[str, float]:
        """The table on the console; returns what the JSON line says."""
        path, checker = self.service.address.events_path, self.checker
        kinds = ("refresh_committed", "refresh_failed", "corpus_changed", "worker_restarted", "index_taken_over")
        for kind in kinds:
            self.done[f"event {kind}"] = len(events_of(path, kind))
        for row in events_of(path, "shard_restored"):
            self.done[f"shard restored from {row['source']}"] += 1
        self.done |= {"generations answered": len(checker.answered), "steps back after a take-over": checker.back}
        print(f"\n{'searches':40} {checker.searches:8}\n{'longest search (s)':40} {checker.longest_s:8.2f}")
        print(f"{'longest change (s)':40} {self.longest_change_s:8.2f}")
        for name, number in sorted(self.done.items()):
            print(f"{name:40} {number:8}")
        for violation in self.violations:
            print(f"VIOLATION {violation}")
        return {
            "seconds": round(time.monotonic() - self.begin, 1),
            "searches": checker.searches,
            "publishes": self.done["publishes"],
            "kills": self.done["kills"],
            "adds": self.done["adds"],
            "deletes": self.done["deletes"],
            "violations": len(self.violations),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=1)
    arguments = parser.parse_args()
    slow = {"slow_after_s": 1.0, "on_slow": "hedge"} if arguments.replicas > 1 else {}
    index = IndexConfig(num_shards=3, search_timeout_s=SEARCH_S, replicas=arguments.replicas, **slow)
    refresh = RefreshConfig(num_workers=1, chunk_passages=20, chunk_timeout_s=25.0, max_failures=10)
    connection = session.start_or_join(NAMESPACE, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="tandem-soak-") as folder:
        try:
            corpus, run_dir = make_corpus(Path(folder)), Path(folder) / "run"
            prepared = Prepared(passages=corpus.store, questions={}, tokenizers=corpus.tokenizer)
            with open_to_changes(run_dir / "corpus", prepared):
                service = start_index_service(
                    run_dir=run_dir,
                    namespace=NAMESPACE,
                    store=corpus.store,
                    tokenizer=corpus.tokenizer,
                    encoder=ENCODER,
                    index=index,
                    refresh=refresh,
                    placement=plan(ClusterConfig(), refresh, index, nodes_of_cluster()),
                )
                try:
                    soak = Soak(service, corpus, arguments.seed)
                    soak.run(60 * arguments.minutes)
                    result = soak.report()
                finally:
                    service.stop()
        finally:
            connection.stop()
    print(json.dumps(result))
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
