"""The store: text, ids, tokens, fingerprints; torn ones refused."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from indexing.corpus.files.corpus import Passage
from indexing.corpus.snapshot import MANIFEST, TornSnapshot
from indexing.corpus.stores import passages as passage_stores
from indexing.corpus.stores.passages import Store, write_store
from tests.indexing.helpers import make_passages, make_store, words_side


def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage_stores, "BATCH_PASSAGES", 7)
    passages = make_passages(50)
    sides = [words_side("retriever"), words_side("generator", 8)]
    store = write_store(tmp_path / "store", iter(passages), sides, {"corpus": "small"})
    assert len(store) == 50
    assert [store.passage(row) for row in range(50)] == passages
    assert [store.row_of(passage.id) for passage in passages] == list(range(50))
    assert store.row_of("p/0") is None
    assert store.ids([3, 1]) == [passages[3].id, passages[1].id]
    for side in sides:
        expected = side.tokenize([(passage.title, passage.text) for passage in passages])
        assert [row.tolist() for row in store.tokens(side.name).rows(range(50))] == expected
        assert store.side_fingerprint(side.name) == side.fingerprint
    assert store.extra == {"corpus": "small"}
    again = Store.open(tmp_path / "store")
    assert (again.fingerprint, again.passage(7)) == (store.fingerprint, passages[7])


def test_fingerprint_follows_every_field_and_the_order(tmp_path: Path) -> None:
    passages = make_passages(5)
    variants = [
        passages,
        passages[::-1],
        passages[:4],
        [replace(passages[0], id="other"), *passages[1:]],
        [replace(passages[0], title="other"), *passages[1:]],
        [replace(passages[0], title=passages[0].title + "x", text=passages[0].text[1:]), *passages[1:]],
    ]
    stores = [write_store(tmp_path / str(number), variant, []) for number, variant in enumerate(variants)]
    assert len({store.fingerprint for store in stores}) == len(variants)
    assert write_store(tmp_path / "again", passages, [words_side("a")]).fingerprint == stores[0].fingerprint


def test_ids_whose_hashes_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage_stores, "_hash", lambda _: 5)
    store = make_store(tmp_path / "store", 6)
    assert [store.row_of(f"p/{number} é") for number in range(6)] == list(range(6))
    assert store.row_of("p/7 é") is None


@pytest.mark.parametrize("collide", [False, True])
def test_repeated_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collide: bool) -> None:
    if collide:
        monkeypatch.setattr(passage_stores, "_hash", lambda _: 5)
    passages = [Passage("a", "", "x"), Passage("b", "", "y"), Passage("c", "", "y"), Passage("a", "", "z")]
    with pytest.raises(ValueError, match="passages 0 and 3 have the same id 'a'"):
        write_store(tmp_path / "store", passages, [])
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no passages"):
        write_store(tmp_path / "empty", [], [])
    with pytest.raises(ValueError, match="different names"):
        write_store(tmp_path / "sides", make_passages(1), [words_side("a"), words_side("a")])
    short = replace(words_side("a"), tokenize=lambda pairs: [[1]])
    with pytest.raises(ValueError, match="made 1 token rows of 2 texts"):
        write_store(tmp_path / "short", make_passages(2), [short])
    store = make_store(tmp_path / "store", 2)
    with pytest.raises(FileExistsError, match="store"):
        make_store(tmp_path / "store", 2)
    with pytest.raises(ValueError, match=r"no side 'reader', only \['generator', 'retriever'\]"):
        store.tokens("reader")
    with pytest.raises(IndexError, match="rows 0 to 1"):
        store.passage(2)


def test_torn_at_every_file_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", 20).path
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for damage in (
            whole[:-1],
            whole + b"\0",
            bytes([whole[0] ^ 1]) + whole[1:],
            whole[:-1] + bytes([whole[-1] ^ 128]),
        ):
            file.write_bytes(damage)
            with pytest.raises(TornSnapshot, match="store"):
                Store.open(path)
            if len(damage) != len(whole) or file.name == MANIFEST:
                with pytest.raises(TornSnapshot, match="store"):
                    Store.open(path, verify=False)
        file.write_bytes(whole)
    assert len(Store.open(path)) == 20


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    """Nothing in a store depends on the clock, the process or the directory."""
    digests = []
    for name in ("one", "two"):
        path = make_store(tmp_path / name, 10).path
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())])
    assert digests[0] == digests[1]
