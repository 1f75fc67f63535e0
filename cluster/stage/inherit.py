"""A stage takes over from the run that it starts from: the changes of its corpus, and its index, instead of
encoding the same passages again."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.config.settings import Settings
from cluster.refresh.snapshots import PREFIX, IndexIdentity, check_snapshot
from indexing.corpus.snapshot import TornSnapshot, write_file
from indexing.corpus.stores.changes import ChangeLog
from indexing.corpus.stores.live_store import LOCK_S
from indexing.corpus.stores.passages import Store, TokenSide, write_store
from indexing.dense.faiss_build import HALVES
from training.checkpoint import newest_checkpoint

PASSAGES_FIXED = ("query_only", "generator_only", "none")  # training.train that leaves the passage encoder alone


def inherit_corpus(
    init_from: str, run_dir: Path, passages: Store, sides: Callable[[], Sequence[TokenSide]] = lambda: ()
) -> ChangeLog:
    """Return the changes of this run's corpus. A run that has no checkpoint yet goes on with those of the run that it
    starts from, where that is over the same base; its own changes stay its own from then on. `sides`: how passages are
    tokenised in this run; what was added there is tokenised again where that run's tokenisers were others."""
    log = ChangeLog(run_dir / "corpus", passages.fingerprint, len(passages))
    folder = Path(init_from).parents[1] / "corpus" if init_from else log.folder
    begun = newest_checkpoint(run_dir, lambda _: None, contents=False) is not None
    if begun or folder.resolve() == log.folder.resolve():
        return log
    try:
        theirs = ChangeLog(folder, passages.fingerprint, len(passages))
    except ValueError:  # another corpus, of another date say
        return log
    shared = min(log.version, theirs.version)
    if log.version == theirs.version or [c.checksum for c in log.changes] != [
        c.checksum for c in theirs.changes[:shared]
    ]:
        return log
    with log.locked(LOCK_S):
        for change in theirs.changes[log.version :]:
            if change.num_added and not log.segment_path(change).exists():
                partial = log.segment_path(change).with_name(f".{change.segment}.tmp")
                shutil.rmtree(partial, ignore_errors=True)
                segment = Store.open(theirs.segment_path(change), verify=False)
                if all(segment.sides.get(name) == written for name, written in passages.sides.items()):
                    shutil.copytree(segment.path, partial, copy_function=_link)
                else:
                    write_store(partial, [segment.passage(row) for row in range(len(segment))], sides(), segment.extra)
                partial.rename(log.segment_path(change))
            log.path(change.version).parent.mkdir(parents=True, exist_ok=True)
            write_file(log.path(change.version), [theirs.path(change.version).read_bytes()])
            log.refresh()
    return log


def inherit_index(
    settings: Settings, init_from: str, *, run_dir: Path, identity: IndexIdentity, log: ChangeLog | None = None
) -> Path | None:
    """Link the generation that the checkpoint `init_from` names into `run_dir/index`; None if it cannot serve.

    It serves where it was built from the checkpoint's own passage encoder, which this stage does not train, and where
    corpus, tokeniser and kind of index are the same (`identity`), on any number of shards that it can be spread over;
    what changed in the corpus since it was built (`log`) is encoded when it serves.
    """
    if not init_from or settings.training.train not in PASSAGES_FIXED or settings.refresh.precision != "float32":
        return None
    checkpoint = Path(init_from)
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    name = f"{PREFIX}{state['generation']}"
    source, target = checkpoint.parents[1] / "index" / name, run_dir / "index" / name
    if not state.get("index_is_current") or not source.is_dir():
        return None
    if settings.index.rescore_candidates and not list(source.rglob(f"*{HALVES}")):
        return None
    try:
        check_snapshot(source, identity, log)
        if not target.exists():
            partial = target.with_name(f".{name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial, copy_function=_link)
            partial.rename(target)
        check_snapshot(target, identity, log)
    except (TornSnapshot, ValueError, OSError):
        return None
    return target


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it to another disk: files of a generation are never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
