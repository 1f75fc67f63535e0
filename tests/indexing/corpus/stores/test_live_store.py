"""The log of a live corpus and the store that follows it: numbers keep their text, and a crash leaves old or new."""

import itertools
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from indexing.corpus.files.corpus import Passage
from indexing.corpus.snapshot import TornSnapshot
from indexing.corpus.stores.changes import ChangeLog
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.corpus.stores.passages import Store
from tests.indexing.helpers import make_passages, make_store, words_side

SIDES = [words_side("retriever"), words_side("generator", 8)]


@pytest.fixture
def base(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", 12)


def live(base: Store) -> LiveStore:
    """As another process opens it."""
    return LiveStore.open_with(base.path, base.path.parent / "corpus")


def new(id: str, words: int = 3) -> Passage:
    return Passage(id, "T", " ".join(f"{id}{word}" for word in range(words)))


def contents(store: LiveStore) -> dict[str, str]:
    """Text by id of everything that is living."""
    numbers = np.arange(len(store))
    passages = [store.passage(int(number)) for number in numbers[store.is_living(numbers)]]
    assert len({passage.id for passage in passages}) == len(passages)
    assert len(passages) == store.log.num_living()
    return {passage.id: passage.text for passage in passages}


def test_random_changes_are_what_a_dictionary_says(base: Store) -> None:
    """Seen by the writer, by a reader that was open all the time, and by one that opens now."""
    random, writer, reader = np.random.default_rng(0), live(base), live(base)
    expected = {passage.id: passage.text for passage in make_passages(12)}
    texts = {number: base.passage(number).text for number in range(12)}
    for step in range(40):
        ids = sorted(expected)
        some = [str(id) for id in random.permutation(ids)[:2]] if len(ids) > 4 else []
        put, delete = (
            [new(f"n{step}-{i}", 1 + int(random.integers(40))) for i in range(random.integers(1, 4))],
            some[:1],
        )
        put += [new(id, 1 + int(random.integers(40))) for id in some[1:]]
        change = change_corpus(writer, Wanted(put=put, delete=delete, mode="upsert"), sides=SIDES)
        expected = {id: text for id, text in expected.items() if id not in delete} | {p.id: p.text for p in put}
        texts |= {change.first + i: passage.text for i, passage in enumerate(put)}
        reader.is_living(np.array([0]))
        for store in (writer, reader, live(base)):
            assert contents(store) == expected
            numbers = np.array(list(texts))
            assert {int(n): store.passage(int(n)).text for n in numbers} == texts  # deleted ones can still be read
            for side in SIDES:
                table = store.tokens(side.name)
                wanted = side.tokenize([(store.passage(int(n)).title, texts[int(n)]) for n in numbers])
                assert [row.tolist() for row in table.rows(numbers)] == wanted
                assert table.lengths.tolist() == [len(row) for row in wanted]
                chosen = random.permutation(numbers)[:5]
                ids_, mask = table.padded(chosen, pad_id=7)
                assert [row[keep == 1].tolist() for row, keep in zip(ids_, mask, strict=True)] == [
                    wanted[int(n)] for n in chosen
                ]
                assert (ids_[mask == 0] == 7).all()
    assert [writer.row_of(id) is not None for id in [*expected, "p/0 é", "never"]][: len(expected)] == [True] * len(
        expected
    )
    assert writer.row_of("never") is None


def test_a_number_that_is_not_known_yet_is_looked_up(base: Store) -> None:
    writer, reader = live(base), live(base)
    table = reader.tokens("retriever")
    change_corpus(writer, Wanted(put=[new("a")]), sides=SIDES)
    assert len(table.rows([12, 3])[0]) == 4
    assert reader.passage(12).id == "a"
    change_corpus(writer, Wanted(put=[new("b")]), sides=SIDES)
    assert table.padded(np.array([13]))[0].shape == (1, 4)
    for call in (lambda: table.rows([14]), lambda: table.padded(np.array([14])), lambda: reader.passage(14)):
        with pytest.raises(IndexError, match="14"):
            call()


def test_where_passages_stand_now(base: Store) -> None:
    """Updated, updated again, deleted, and put in again under the same id."""
    store, id = live(base), base.passage(3).id
    change_corpus(store, Wanted(put=[Passage(id, "", "second")], mode="update"), sides=SIDES)
    change_corpus(store, Wanted(put=[Passage(id, "", "third")], mode="update"), sides=SIDES)
    assert store.row_of(id) == 13
    assert store.current(np.array([3, 4, 12])).tolist() == [13, 4, 13]
    assert store.origin(np.array([13, 12, 3, 4])).tolist() == [3, 3, 3, 4]
    change_corpus(store, Wanted(delete=[id]), sides=SIDES)
    assert store.row_of(id) is None
    assert store.current(np.array([3, 4])).tolist() == [4]
    change_corpus(store, Wanted(put=[Passage(id, "", "fourth")]), sides=SIDES)
    assert store.current(np.array([3, 4])).tolist() == [14, 4]
    assert store.origin(np.array([14])).tolist() == [14]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(), "nothing to change"),
        (Wanted(put=[new("p/1 é")]), r"'p/1 é' is in the corpus already: use update"),
        (Wanted(put=[new("x")], mode="update"), "'x' is not in the corpus: use add"),
        (Wanted(delete=["x"]), "'x' is not in the corpus: it cannot be deleted"),
        (Wanted(put=[new("x"), new("x")]), "'x' comes twice"),
        (Wanted(delete=["p/1 é", "p/1 é"]), "comes twice"),
        (Wanted(delete=[f"p/{n} é" for n in range(10)]), r"2 passages would be left in the corpus: 3 are needed"),
    ],
)
def test_what_is_refused_changes_nothing(base: Store, wanted: Wanted, message: str) -> None:
    store = live(base)
    with pytest.raises(ValueError, match=message):
        change_corpus(store, wanted, sides=SIDES, keep=3)
    assert store.log.version == live(base).log.version == 0


def test_a_crash_between_any_two_writes_leaves_the_old_or_the_new_corpus(
    base: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename of the change fails once; what is left is opened, and the change is then made again."""
    change_corpus(live(base), Wanted(put=[new("a")]), sides=SIDES)
    rename = Path.rename
    for step in itertools.count():
        before, left = contents(live(base)), [step]

        def failing(self: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt("killed here")
            return rename(self, target)

        wanted = Wanted(put=[new(f"b{step}"), Passage("a", "", f"text {step}")], delete=[f"p/{step} é"], mode="upsert")
        monkeypatch.setattr(Path, "rename", failing)
        with suppress(KeyboardInterrupt):
            change_corpus(live(base), wanted, sides=SIDES)
        monkeypatch.setattr(Path, "rename", rename)
        after = contents(live(base))
        if left[0] >= 0:
            assert step > 5
            assert after["a"] == f"text {step}"
            break
        assert after == before
        change_corpus(live(base), wanted, sides=SIDES)  # nothing that was left behind is in its way
        after = contents(live(base))
        assert after["a"] == f"text {step}"
        assert f"p/{step} é" not in after


def test_a_damaged_segment_or_version_is_refused(base: Store) -> None:
    folder = base.path.parent / "corpus"
    change_corpus(live(base), Wanted(put=[new("a"), new("b")]), sides=SIDES)
    change_corpus(live(base), Wanted(delete=["a"]), sides=SIDES)
    for file in [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]:
        whole = file.read_bytes()
        for position in {0, len(whole) // 2, len(whole) - 1} if whole else set():
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            with pytest.raises((TornSnapshot, ValueError)):
                live(base)
        file.write_bytes(whole)
    assert live(base).log.version == 2
    first = ChangeLog(folder, base.fingerprint, len(base)).path(1)
    other = first.read_bytes()
    path = folder / "versions" / "version-000002.json"
    second = path.read_bytes()
    first.unlink()
    with pytest.raises(TornSnapshot, match=r"version-000001.*is missing, but later versions are there"):
        live(base)
    path.unlink()
    change_corpus(live(base), Wanted(put=[new("c")]), sides=SIDES)
    path.write_bytes(second)
    with pytest.raises(TornSnapshot, match="does not follow version-000001"):
        live(base)
    assert other != first.read_bytes()


def test_changes_of_another_corpus_are_refused(base: Store, tmp_path: Path) -> None:
    change_corpus(live(base), Wanted(put=[new("a")]), sides=SIDES)
    other = make_store(tmp_path / "other", 12, seed=1)
    with pytest.raises(ValueError, match="changes of another corpus"):
        LiveStore.open_with(other.path, tmp_path / "corpus")


def test_two_changes_at_once_take_turns_and_a_wait_has_a_bound(base: Store) -> None:
    def change(number: int) -> None:
        change_corpus(live(base), Wanted(put=[new(f"a{number}")], delete=[f"p/{number} é"]), sides=SIDES)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    store = live(base)
    assert store.log.version == 6
    assert {f"a{number}" for number in range(6)} <= contents(store).keys()
    with store.log.locked(1.0), pytest.raises(TimeoutError, match=r"under way for 0\.1 s: try again later"):
        change_corpus(live(base), Wanted(put=[new("z")]), sides=SIDES, timeout_s=0.1)


def test_shards_own_every_living_number_once(base: Store) -> None:
    store = live(base)
    ranges = [(0, 4), (4, 8), (8, 12)]

    def owned(version: int) -> list[int]:
        log = store.log
        parts = [log.owned(shard, 3, *ranges[shard], version) for shard in range(3)]
        return sorted(
            n for (a, b), part in zip(ranges, parts, strict=True) for n in (range(a, b) if part is None else part)
        )

    assert [store.log.owned(shard, 3, *ranges[shard], 0) for shard in range(3)] == [None] * 3
    change_corpus(store, Wanted(put=[new(f"a{n}") for n in range(7)], delete=["p/5 é"]), sides=SIDES)
    change_corpus(store, Wanted(put=[new("b")], delete=["a2", "p/0 é"]), sides=SIDES)
    assert owned(0) == list(range(12))
    assert owned(1) == [n for n in range(19) if n != 5]
    assert owned(2) == [n for n in range(20) if n not in (0, 5, 14)]
    assert store.log.owned(1, 3, start=4, stop=8, version=0) is None
    assert store.log.added_between(0, 2).tolist() == [12, 13, 15, 16, 17, 18, 19]
    assert store.log.added_between(1, 2).tolist() == [19]
    assert (store.log.num_living(0), store.log.num_living(1), store.log.num_living()) == (12, 18, 17)
