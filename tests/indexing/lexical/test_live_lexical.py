"""BM25 over a corpus that changes: by hand with the statistics of the base, for every state of the corpus."""

import math
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from indexing.corpus.files.corpus import Passage
from indexing.corpus.stores.filters import Filter, parse_filter
from indexing.corpus.stores.live_store import LiveStore, Wanted, change_corpus
from indexing.corpus.stores.passages import Store, write_store
from indexing.hits import CorpusState
from indexing.indexing_settings import LexicalConfig
from indexing.lexical.lexical import build_lexical, lexical_name, write_lexical
from indexing.lexical.live_lexical import CorpusLag, LiveLexical
from tests.indexing.helpers import words_side

PLAIN = LexicalConfig(stemmer="", stop_words="")
WORDS = ["red", "blue", "sea", "sky", "lion", "city", "3", "11"]
QUESTIONS = ["red lion", "sky sea sky", "3 11 city", "nothing of it"]
SIDES = [words_side("retriever")]


def bm25(base: Sequence[str], texts: Sequence[str], question: str, config: LexicalConfig = PLAIN) -> np.ndarray:
    """float64 [texts]: scores of `texts` with the counts and lengths of `base`, whose words they have."""
    counts, lengths = [Counter(text.lower().split()) for text in base], [len(text.split()) for text in base]
    mean, found = sum(lengths) / len(base), np.zeros(len(texts))
    for word in question.lower().split():
        having = sum(word in count for count in counts)
        idf = math.log(1 + (len(base) - having + 0.5) / (having + 0.5))
        for place, text in enumerate(texts):
            number = text.lower().split().count(word)
            share = 1 - config.b + config.b * len(text.split()) / mean
            found[place] += idf * number / (number + config.k1 * share) if number else 0.0
    return found


def best(scores: np.ndarray, living: np.ndarray, n: int) -> list[int]:
    """Numbers of the `n` best living passages above 0."""
    scores = np.where(living, np.float32(scores), 0)
    order = np.argsort(-scores, kind="stable")[:n]
    return [int(number) if scores[number] > 0 else -1 for number in order]


def random_text(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(1, 12)))


@pytest.fixture
def base(tmp_path: Path) -> Store:
    random = np.random.default_rng(0)
    return write_store(tmp_path / "store", [Passage(f"p{n}", "", random_text(random)) for n in range(25)], SIDES)


def live(base: Store, lag_s: float = 1.0, where: Filter | None = None) -> LiveLexical:
    """As another process opens it."""
    path = base.path.parent / lexical_name(PLAIN, base.fingerprint)
    if not path.exists():
        write_lexical(PLAIN, base, path)
    found = LiveLexical.open(path, base.path, base.path.parent / "corpus", where)
    found.lag_s = lag_s
    return found


def writer_of(base: Store) -> LiveStore:
    return LiveStore.open_with(base.path, base.path.parent / "corpus")


def texts_of_numbers(store: LiveStore) -> list[str]:
    return [store.passage(number).text for number in range(len(store))]


def test_every_state_of_the_corpus_is_answered_as_by_hand(base: Store) -> None:
    """By an index that was open all the time, by one that opens now, and for states that are over: those lack what came
    later, and what was deleted since."""
    random, writer, early = np.random.default_rng(1), writer_of(base), live(base)
    first = [base.passage(number).text for number in range(25)]
    for step in range(12):
        living = [id for id in (f"p{n}" for n in range(25)) if writer.row_of(id) is not None]
        some = [str(id) for id in random.permutation(living)[:2]]
        put = [Passage(f"new-{step}-{i}", "", random_text(random)) for i in range(random.integers(0, 3))]
        put += [Passage(some[1], "", random_text(random))]
        change_corpus(writer, Wanted(put=put, delete=some[:1], mode="upsert"), sides=SIDES)
        texts, log = texts_of_numbers(writer), writer.log
        numbers = np.arange(len(texts))
        scores = np.stack([bm25(first, texts, question) for question in QUESTIONS])
        for index in (early, live(base)):
            for added in (log.version, max(0, log.version - 3), 0):
                state = None if added == log.version and step % 2 else CorpusState(added, log.version)
                of = random.integers(-1, len(texts), (len(QUESTIONS), 6))
                found = index.search(QUESTIONS, 7, state, of)
                assert found.corpus == CorpusState(added, log.version)
                there = log.is_living(numbers) & (numbers < log.num_numbers(added))
                for row in range(len(QUESTIONS)):
                    assert found.ids[row].tolist() == best(scores[row], there, 7)
                    wanted = np.where(found.ids[row] < 0, 0, scores[row, found.ids[row]])
                    np.testing.assert_allclose(found.scores[row], wanted, rtol=1e-5)
                assert found.of is not None
                expected = np.where(of < 0, 0, np.take_along_axis(scores, np.maximum(of, 0), axis=1))
                np.testing.assert_allclose(found.of, expected, rtol=1e-5)


def test_a_filter_finds_what_brute_force_finds_among_those_that_pass(tmp_path: Path) -> None:
    """In the base and in what was added, by an index that was open all the time and by one that opens now."""
    random = np.random.default_rng(2)
    some = [Passage(f"p{n}", "", random_text(random), {"year": 2000 + n}) for n in range(25)]
    base = write_store(tmp_path / "store", some, SIDES)
    first, where = [passage.text for passage in some], parse_filter({"year": {">=": 2010, "<": 2030}})
    writer, early = writer_of(base), live(base, where=where)
    for step in range(5):
        years = random.integers(2000, 2040, 3)
        put = [Passage(f"new-{step}-{i}", "", random_text(random), {"year": int(y)}) for i, y in enumerate(years)]
        deleted = [f"p{n}" for n in (step, 10 + step)]
        change_corpus(writer, Wanted(put=put, delete=deleted), sides=SIDES)
        texts = texts_of_numbers(writer)
        there = writer.log.is_living(np.arange(len(texts)))
        there &= [2010 <= writer.metadata(number)["year"] < 2030 for number in range(len(texts))]
        for index in (early, live(base, where=where)):
            found = index.search(QUESTIONS, 9)
            for row, question in enumerate(QUESTIONS):
                assert found.ids[row].tolist() == best(bm25(first, texts, question), there, 9)
    with pytest.raises(ValueError, match=r"retrieval\.where\.month"):
        live(base, where=parse_filter({"month": 3}))


def test_words_that_the_base_does_not_know_count_among_what_was_added(base: Store) -> None:
    writer, index = writer_of(base), live(base)
    put = [Passage("a", "", "quasar red"), Passage("b", "", "quasar quasar sea"), Passage("c", "", "sea")]
    change_corpus(writer, Wanted(put=put), sides=SIDES)
    found = index.search(["quasar", "red quasar"], 3)
    assert found.ids[0].tolist() == [26, 25, -1]
    assert found.ids[1, 0] == 25
    first = [base.passage(number).text for number in range(25)]
    mean = np.mean([len(text.split()) for text in first])
    idf = math.log(1 + (25 - 2 + 0.5) / (2 + 0.5))
    expected = idf * 2 / (2 + 1.2 * (0.25 + 0.75 * 3 / mean))
    assert found.scores[0, 0] == pytest.approx(expected, rel=1e-5)


def test_a_state_that_the_log_does_not_show_is_waited_for_and_not_for_ever(base: Store) -> None:
    writer, index = writer_of(base), live(base, lag_s=0.3)
    for state in (CorpusState(1, 0), CorpusState(0, 1)):
        with pytest.raises(CorpusLag, match=r"shows version 0 of the corpus, and not 1 after 0\.3 s"):
            index.search(QUESTIONS, 3, state)
    index.lag_s = 20.0
    later = threading.Timer(0.3, lambda: change_corpus(writer, Wanted(delete=["p3"]), sides=SIDES))
    later.start()
    assert index.search(QUESTIONS, 3, CorpusState(0, 1)).corpus == CorpusState(0, 1)
    later.join()


def test_an_index_of_another_corpus_is_refused(base: Store) -> None:
    with pytest.raises(ValueError, match="was built from another corpus"):
        LiveLexical(build_lexical(PLAIN, "other", ["red"]), writer_of(base))
