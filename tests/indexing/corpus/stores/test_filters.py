"""Filters: what conditions let pass, masks against the plain definition, shards under a filter, bad ones refused."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexing.corpus.files.corpus import Passage, read_corpus
from indexing.corpus.stores import metadata as metadata_module
from indexing.corpus.stores.filters import parse_filter
from indexing.corpus.stores.metadata import MetadataColumns, count_passing
from indexing.corpus.stores.passages import Store, write_store
from indexing.dense.exact import search_exactly
from indexing.hits import merge
from indexing.indexing_settings import CorpusConfig, IndexConfig
from indexing.shard.shard import Shard, shard_ranges
from tests.indexing.helpers import unit_vectors

NUM = 90
WORDS = ("en", "de", "2019", "true")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(2017, 2021), st.sampled_from([2018.5, 2019.0]), st.sampled_from(WORDS)
)
METADATA = st.dictionaries(
    st.sampled_from(["lang", "year"]), st.one_of(VALUES, st.lists(VALUES, max_size=2)), max_size=2
)
BOUND = st.dictionaries(
    st.sampled_from([">=", ">", "<=", "<"]), st.one_of(st.integers(2017, 2021), st.just("en")), min_size=1
)
CONDITION = st.one_of(VALUES, st.lists(VALUES, min_size=1, max_size=3), BOUND)


def store_with(folder: Path, rows: list[dict[str, Any]]) -> Store:
    return write_store(folder / "store", [Passage(f"p{n}", "", "text", row) for n, row in enumerate(rows)], [])


def described() -> list[dict[str, Any]]:
    return [{"lang": ("en", "de", "fr")[n % 3], "year": 2000 + n % 30, "tags": ["a", "b"][: n % 3]} for n in range(NUM)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_with(tmp_path_factory.mktemp("filters"), described())


@pytest.mark.parametrize(
    ("asked", "passing", "failing"),
    [
        ("en", ["en", ["de", "en"]], ["EN", None, 1, []]),
        (["en", "de"], ["en", "de"], ["fr", None]),
        (2019, [2019, 2019.0, "2019"], [2018, True, "x", 2019.5]),
        ("2019", [2019, "2019"], [2020]),
        (True, [True, "true"], [1, False, None]),
        (None, [None, "null"], [0, "", "x"]),
        ({">=": 2019}, [2019, 2020.5, "2024"], [2018, "x", None, True]),
        ({">": "2019", "<=": 2021}, [2020, 2021], [2019, 2022]),
        ({">=": 2019, "<": 2021}, [[2000, 2020]], [[2000, 2022]]),
        ({">=": "2024-01-01", "<": "2025-01-01"}, ["2024-01-01", "2024-12-31T10:00:00"], ["2025-01-01", 2024, None]),
    ],
)
def test_conditions(asked: object, passing: list[object], failing: list[object]) -> None:
    where = parse_filter({"field": asked})
    assert where is not None
    assert [value for value in passing if not where.passes({"field": value})] == []
    assert [value for value in failing if where.passes({"field": value})] == []
    assert where.passes({}) == where.passes({"field": None})


def test_all_conditions_must_hold_and_an_empty_value_lifts_one() -> None:
    where = parse_filter({"lang": "en", "year": {">=": 2019}})
    assert where is not None
    assert where.passes({"lang": "en", "year": 2020})
    assert not where.passes({"lang": "en", "year": 2018})
    assert not where.passes({"lang": "de", "year": 2020})
    assert parse_filter({"lang": ""}) is parse_filter({}) is None
    assert parse_filter({"year": 1, "lang": ""}) == parse_filter({"year": "1"})
    assert str(where) == "lang=en, year>=2019.0"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"year": {"=>": 1}}, r"retrieval\.where\.year=\{'=>': 1\}: bounds are >=, >, <=, <"),
        ({"year": {">=": True}}, "a bound is a number or a text"),
        ({"year": {">=": [1]}}, "a bound is a number or a text"),
        ({"year": {">=": float("inf")}}, "a bound must be finite"),
        ({"year": {}}, r"retrieval\.where\.year=\{\}: allowed are a value"),
        ({"lang": []}, r"retrieval\.where\.lang=\[\]: no passage could pass"),
        ({"lang": [["en"]]}, r"retrieval\.where\.lang=.*is no text, number, true, false or null"),
        ({"lang": float("nan")}, "is no text, number"),
        ({"": "en"}, "the name of a field is empty"),
        (["lang"], "must map fields"),
    ],
)
def test_bad_filters(where: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_filter(where)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(METADATA, min_size=1, max_size=20),
    asked=st.dictionaries(st.sampled_from(["lang", "year"]), CONDITION, min_size=1),
)
def test_masks_equal_the_plain_definition(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict], asked: dict
) -> None:
    where = parse_filter(asked)
    assert where is not None
    store = store_with(tmp_path_factory.mktemp("masks"), [*rows, {"lang": "en", "year": 2019}])
    expected = [where.passes(row) for row in rows]
    assert MetadataColumns(store.path, 0, stop=len(rows)).mask(where).tolist() == expected
    assert MetadataColumns(store.path, 1, stop=len(rows) + 1).mask(where)[: len(rows) - 1].tolist() == expected[1:]


def test_masks_are_kept_and_the_oldest_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_module, "MASKS_KEPT", 2)
    columns = MetadataColumns(store.path, 0, stop=NUM)
    filters = [parse_filter({"year": year}) for year in (2000, 2001, 2002)]
    masks = [columns.mask(where) for where in filters if where is not None]
    assert columns.mask(filters[2]) is masks[2]  # pyright: ignore[reportArgumentType]
    assert columns.mask(filters[0]) is not masks[0]  # pyright: ignore[reportArgumentType]
    assert columns.mask(filters[0]).tolist() == masks[0].tolist()  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="read-only"):
        masks[0][0] = True


def test_a_field_that_nobody_has_is_named(store: Store, tmp_path: Path) -> None:
    where = parse_filter({"langs": "en"})
    assert where is not None
    with pytest.raises(ValueError, match=r"retrieval\.where\.langs: no passage has this field; .* lang, tags, year"):
        count_passing(store.path, where)
    plain = store_with(tmp_path, [{}])
    with pytest.raises(ValueError, match=r"retrieval\.where\.langs: the passages in .* have no metadata"):
        count_passing(plain.path, where)


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF4,Flat", "HNSW8"])
@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_shards_return_only_what_passes(store: Store, factory: str, num_shards: int) -> None:
    vectors, queries = unit_vectors(NUM, 8), unit_vectors(6, 8, seed=1)
    shards = []
    for number, bounds in enumerate(shard_ranges(NUM, num_shards)):
        shard = Shard(
            number, *bounds, IndexConfig(factory=factory, nprobe=4), metadata=MetadataColumns(store.path, *bounds)
        )
        shard.stage(1, 10, bounds[0], vectors[slice(*bounds)])
        shard.prepare(1)
        shard.commit(1)
        shards.append(shard)
    for asked in ({"lang": "en"}, {"year": {"<": 2004}}, {"lang": "de", "year": 2001}, {"tags": "b"}, {"year": 1999}):
        where = parse_filter(asked)
        assert where is not None
        allowed = np.array([where.passes(row) for row in described()])
        found = [shard.search(queries, 5, where=where, num_vectors=2) for shard in shards]
        assert sum(one.num_allowed for one in found) == allowed.sum()
        hits = merge(found, 5, allow_fewer=True)
        assert hits.ids.shape == (6, min(5, allowed.sum()))
        assert allowed[hits.ids].all()
        if factory == "Flat" and hits.ids.size:
            assert hits.ids.tolist() == search_exactly(vectors, queries, hits.ids.shape[1], allowed)[1].tolist()
            assert hits.vectors is not None
            assert hits.vectors.shape[1] >= min(2, allowed.sum())
            assert (hits.vectors == vectors[hits.ids[:, : hits.vectors.shape[1]]]).all()
        if allowed.sum() < 5:
            with pytest.raises(
                ValueError,
                match=rf"must be at most {allowed.sum()}, the passages that pass the filter retrieval\.where",
            ):
                merge(found, 5)


def test_a_shard_without_metadata_says_so() -> None:
    shard = Shard(2, 0, stop=4, config=IndexConfig())
    with pytest.raises(ValueError, match=r"retrieval\.where=lang=en: must be empty: shard 2 knows no metadata"):
        shard.search(np.zeros((1, 4), np.float32), 1, where=parse_filter({"lang": "en"}))


def test_metadata_of_a_corpus(tmp_path: Path) -> None:
    lines = [
        '{"_id": "a", "text": "x", "metadata": {"lang": "en", "nested": {"k": [1]}}}',
        '{"_id": "b", "text": "y", "metadata": null}',
        '{"_id": "c", "text": "z"}',
        '{"_id": "d", "text": "z", "metadata": ["en"]}',
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    config = CorpusConfig(path=str(tmp_path / "corpus.jsonl"), on_bad="skip")
    passages, report = read_corpus(config)
    assert [passage.metadata for passage in passages] == [{"lang": "en", "nested": {"k": [1]}}, {}, {}]
    assert report.bad == {"missing_field": 1}
    assert "metadata is \"['en']\": needed is an object" in report.summary()
    store = write_store(tmp_path / "store", passages, [])
    assert [store.passage(row) for row in range(3)] == passages
    assert store.metadata_fields == ("lang", "nested")
    bare = write_store(tmp_path / "bare", [Passage(p.id, p.title, p.text) for p in passages], [])
    assert bare.fingerprint == store.fingerprint  # vectors do not depend on metadata
    assert not list((tmp_path / "bare").glob("metadata*"))
    assert bare.metadata(0) == {}


def test_metadata_of_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    day = datetime.date(2024, 5, 1)
    table = pyarrow.table(
        {
            "id": ["a", "b"],
            "text": ["x", "y"],
            "lang": ["en", None],
            "year": [2019, 2020],
            "day": [day, day],
            "share": [0.5, float("nan")],
            "tags": [["p", "q"], None],
            "vector": [[0.1], [0.2]],
            "raw": [b"1", b"2"],
        }
    )
    parquet.write_table(table, tmp_path / "c.parquet")
    passages, _ = read_corpus(CorpusConfig(path=str(tmp_path / "c.parquet")))
    assert [passage.metadata for passage in passages] == [
        {"lang": "en", "year": 2019, "share": 0.5, "day": "2024-05-01", "tags": ["p", "q"]},
        {"year": 2020, "day": "2024-05-01"},
    ]
