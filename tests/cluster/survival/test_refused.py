"""What must never be served: numbers that are not finite, a snapshot with a wrong bit, an index of another encoder; and
a snapshot for which there is no room."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.refresh.snapshots import WEIGHTS
from cluster.service.start import IndexServiceHandle
from indexing.corpus.snapshot import TornSnapshot, verify
from indexing.corpus.stores.passages import Store
from indexing.shard.shard import Shard, shard_ranges
from indexing.shard.shard_files import INDEX_FILE
from tests.cluster.small_corpus import ENCODER, NUM_PASSAGES
from tests.cluster.survival.conftest import INDEX, Victim, answer
from tests.cluster.survival.observers import kill, status_of, wait_until

NUM_OFFSETS = 40  # of each file that is damaged


def test_a_vector_that_is_not_finite_is_refused_by_name(victim: Victim) -> None:
    """One word of the vocabulary gets NaN: the first passage that has it is named, and the old generation serves."""
    generation, store = answer(victim), Store.open(victim.corpus.store)
    rows = [set(row.tolist()) for row in store.tokens("retriever").rows(range(NUM_PASSAGES))]
    word = min(set().union(*rows), key=lambda word: (sum(word in row for row in rows), word))
    first = next(number for number, row in enumerate(rows) if word in row)
    version = next(victim.versions)
    weights = victim.corpus.weights(version)
    (name,) = (name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = weights[name].copy()
    weights[name][word] = np.nan
    named = rf"passage {store.ids([first])[0]!r} \(number {first}\) a vector that is not finite"
    with victim.checker(bound_s=10.0):
        victim.client.publish(version, weights)
        with pytest.raises(RuntimeError, match=named):
            victim.client.wait_for_version(version, 60.0)
        assert answer(victim) == generation
        assert victim.events("refresh_failed")[-1]["given_up"]
        assert not any(status_of(shard).staged for shard in victim.shards)
        victim.await_version(victim.publish())
        assert answer(victim) > generation


def damage(path: Path, chance: np.random.Generator) -> Callable[[], None]:
    """Flip one bit, or cut the file; returns what undoes it."""
    whole = path.read_bytes()
    offset = int(chance.integers(len(whole)))
    broken = bytearray(whole)
    broken[offset] ^= 1 << int(chance.integers(8))
    path.write_bytes(whole[:offset] if chance.random() < 0.25 else bytes(broken))

    def undo() -> None:
        path.write_bytes(whole)

    return undo


def test_no_service_starts_from_a_damaged_snapshot(
    victim: Victim, launch: Callable[..., IndexServiceHandle], tmp_path: Path
) -> None:
    """A cut or a bit anywhere in any file is found: sizes and manifests before an actor starts, contents by the shard
    that loads them, and weights where they are read."""
    generation = answer(victim)
    path = Path(victim.client.save_generation(generation, 30.0))
    chance = np.random.default_rng(3)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert sum(file.name == INDEX_FILE for file in files) == 3
    for file in files:
        for _ in range(NUM_OFFSETS // (1 if file.name == INDEX_FILE else 4)):
            undo = damage(file, chance)
            with pytest.raises(TornSnapshot, match="incomplete or damaged"):
                load(path, generation)
            undo()
    load(path, generation)
    undo = damage(path / "shard-0002" / INDEX_FILE, chance)
    with pytest.raises(TornSnapshot, match=r"shard-0002.* is incomplete or damaged"):
        launch(tmp_path / "run", snapshot=path)
    undo()


def load(path: Path, generation: int) -> None:
    """Read a whole generation as a service does that starts from it. Raises TornSnapshot."""
    verify(path, contents=False)
    for number, (start, stop) in enumerate(shard_ranges(NUM_PASSAGES, INDEX.num_shards)):
        Shard(number, start, stop=stop, config=INDEX).load(generation, path)
    if (path / WEIGHTS).is_dir():
        verify(path / WEIGHTS)


def test_an_index_of_another_encoder_is_refused(
    victim: Victim, launch: Callable[..., IndexServiceHandle], tmp_path: Path
) -> None:
    path = victim.client.save_generation(answer(victim), 30.0)
    with pytest.raises(ValueError, match="another encoder or tokeniser: it cannot serve this run"):
        launch(tmp_path / "run", snapshot=path, encoder=replace(ENCODER, pooling="cls"))


def test_a_shard_does_not_come_back_from_a_damaged_snapshot(victim: Victim) -> None:
    """It is encoded again from the weights instead."""
    victim.await_version(victim.publish())  # a generation whose weights the coordinator has
    generation, restored = answer(victim), len(victim.events("shard_restored"))
    path = Path(victim.client.save_generation(generation, 30.0))
    undo = damage(path / "shard-0001" / INDEX_FILE, np.random.default_rng(4))
    try:
        with victim.checker():
            kill(victim.shards[1])
            assert answer(victim) == generation
            wait_until(lambda: len(victim.events("shard_restored")) > restored, "shard_restored")
        assert victim.events("shard_restored")[-1]["source"] == "weights"
        assert "shard-0001" in victim.events("snapshot_refused")[-1]["why"]
    finally:
        undo()


def test_a_snapshot_on_a_full_disk_leaves_everything_else_as_it_is(victim: Victim) -> None:
    """The generation before it stays whole on disk, the refresh goes on, the error is clear, and what comes later is
    saved again."""
    if not victim.disk_is_small:
        pytest.skip("waits for the right to mount a small file system")
    before = Path(victim.client.save_generation(answer(victim), 30.0))
    failed, filler = len(victim.events("snapshot_failed")), victim.index_folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(victim.index_folder).free))
    try:
        with victim.checker(bound_s=10.0):
            victim.await_version(victim.publish())
            generation = answer(victim)
            wait_until(lambda: len(victim.events("snapshot_failed")) > failed, "snapshot_failed")
            with pytest.raises(OSError, match=f"index generation {generation} could not be saved.*No space left"):
                victim.client.save_generation(generation, 30.0)
            verify(before)
            assert not list(victim.index_folder.glob(f"generation-{generation}"))
            victim.await_version(victim.publish())
            assert answer(victim) > generation
    finally:
        filler.unlink()
    victim.await_version(victim.publish())
    verify(victim.client.save_generation(answer(victim), 30.0))
