"""A disk and a build that take longer than anybody expected, on a real Ray."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.machines.session import Session
from cluster.refresh.ports import Serving, ShardLost
from cluster.refresh.shards import ShardGroup
from cluster.refresh.snapshots import IndexIdentity, Snapshots
from cluster.service import ray_ports
from cluster.service.actors import SHARD_THREADS, ShardActor
from cluster.service.ray_ports import NamedActor, Patience, RayShard
from indexing.corpus.snapshot import verify
from indexing.corpus.stores.changes import ChangeLog
from indexing.indexing_settings import IndexConfig
from indexing.shard.shard import Shard

NUM_ROWS, DIM = 12, 4
NAMESPACE = "slow-steps"
IDENTITY = IndexIdentity(encoder_fingerprint="e", corpus_fingerprint="c", factory="Flat", ranges=((0, NUM_ROWS),))


class SlowShard(ShardActor):
    """A shard whose disk and processor stand still while there is a file `slow` in a folder, where each save leaves a
    mark."""

    def __init__(self, folder: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        from indexing.shard import shard, staging

        write, build = shard.write_generation, staging.build_base

        def stand() -> None:
            while (Path(folder) / "slow").exists():
                time.sleep(0.02)

        def slow_write(path: Path, *rest: Any, **named: Any) -> None:
            (Path(folder) / f"save-{time.monotonic_ns()}").touch()
            stand()
            write(path, *rest, **named)

        def slow_build(*rest: Any, **named: Any) -> Any:
            stand()
            return build(*rest, **named)

        shard.write_generation, staging.build_base = slow_write, slow_build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that makes the shard slow."""
    path = tmp_path / "machine"
    path.mkdir()
    return path


@pytest.fixture
def shard(ray_session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayShard]:
    """The shard, as one sees it who gives up after a second."""
    monkeypatch.setattr(ray_ports, "LOOK_S", 0.1)
    remote: Any = remote_class()
    actor = remote.options(name="slow", namespace=NAMESPACE, num_cpus=0, max_restarts=-1).remote(
        str(folder), 0, 0, NUM_ROWS, IndexConfig(), 1
    )
    ray.get(actor.place.remote())
    yield RayShard(0, 0, stop=NUM_ROWS, actor=NamedActor("slow", NAMESPACE), patience=Patience(1.0, 4.0))
    ray.kill(actor)


def remote_class() -> Any:
    """The class as Ray's: its stubs know no concurrency groups."""
    remote: Any = ray.remote
    return remote(concurrency_groups=SHARD_THREADS)(SlowShard)


def stage(shard: RayShard, generation: int) -> None:
    """Give the shard all rows of a generation."""
    vectors = np.random.default_rng(generation).standard_normal((NUM_ROWS, DIM), np.float32)
    shard.call(Shard.begin, generation, generation)
    shard.call(Shard.stage, generation, generation, 0, vectors)


def test_a_save_that_passes_its_bound_is_not_begun_again_beside_itself(
    shard: RayShard, folder: Path, tmp_path: Path
) -> None:
    """It is given up, and said; then it is waited for, and the generation is written once more, without remains."""
    stage(shard, 1)
    shard.call(Shard.prepare, 1)
    shard.call(Shard.commit, 1)
    events = list[dict[str, Any]]()
    snapshots = Snapshots(
        tmp_path / "index",
        ShardGroup([shard]),
        identity=IDENTITY,
        events=lambda event, **fields: events.append({"event": event, **fields}),
        keep=2,
        keep_protected=2,
        log=ChangeLog(tmp_path / "corpus", "c", NUM_ROWS),
    )
    (folder / "slow").touch()
    snapshots.want(Serving(generation=1, weights_version=1, publish_id=1, weights=None))
    assert snapshots.work()
    for _ in range(10):
        assert not snapshots.work()
    assert [event["event"] for event in events] == ["snapshot_failed", "snapshot_waits"]
    assert "shard 0 has been at save for 1 s; about 0 s were expected (refresh.chunk_timeout_s=1" in events[0]["why"]
    assert "shard 0 still writes generation 1" in events[1]["why"]
    assert len(list(folder.glob("save-*"))) == 1
    with pytest.raises(OSError, match="generation 1 is still being written"):
        shard.call(Shard.save, 1, str(tmp_path))
    (folder / "slow").unlink()
    while not snapshots.work():
        time.sleep(0.05)
    assert len(list(folder.glob("save-*"))) == 2
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["generation-1"]
    verify(tmp_path / "index" / "generation-1")
    assert not snapshots.pending()


def test_a_build_reports_what_it_is_at_and_passes_its_bound_as_such(shard: RayShard, folder: Path) -> None:
    stage(shard, 1)
    (folder / "slow").touch()
    heard, ended = set[str](), threading.Event()

    def listen() -> None:
        while not ended.wait(0.05):
            heard.add(shard.doing)

    thread = threading.Thread(target=listen)
    thread.start()
    with pytest.raises(ShardLost, match=r"shard 0 has been at prepare for \d s; about 0 s were expected"):
        shard.call(Shard.prepare, 1)
    ended.set()
    thread.join()
    assert any(one.startswith("shard 0 builds generation 1: ") for one in heard)
    assert not shard.doing
    (folder / "slow").unlink()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # it was ended, and comes back empty
        try:
            assert shard.status().staged == []
            break
        except ShardLost:
            time.sleep(0.1)
    stage(shard, 1)
    shard.call(Shard.prepare, 1)
    shard.call(Shard.commit, 1)
    assert shard.status().committed == 1
