"""Searches the texts of a corpus by BM25: by words instead of vectors, beside the dense index.

One lexical index belongs to one state of the corpus and to no weights: it is built once for each state, written once,
and every process maps it. `bm25s` cuts texts into words (lower case, stop words, a Snowball stemmer); scores are BM25
as Lucene computes it (Kamphuis et al. 2020, table 1), computed when the index is made, as `bm25s` does (Lù 2024,
arXiv:2407.03618), so that a search adds up a few columns:

    score(q, z) = sum over words w of q of idf(w) * tf / (tf + k1 * (1 - b + b * length(z) / mean length))
    idf(w) = log(1 + (N - n(w) + 0.5) / (n(w) + 0.5))

Beside the scores the directory keeps counts and lengths, so that texts can be added without reading the others again
(`LexicalIndex.extended`). `indexing/lexical/live_lexical.py` searches a corpus that changes.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import Stemmer

from indexing.corpus.snapshot import write_file, write_once
from indexing.corpus.stores.passages import Store, batched, open_extra
from indexing.corpus.stores.table import Ragged, RaggedWriter, map_array
from indexing.declare import refuse
from indexing.hits import UNCHANGED, CorpusState
from indexing.indexing_settings import LexicalConfig
from indexing.lexical.lexical_check import check_lexical

KIND = "lexical index"
BATCH_TEXTS = 8192  # Number of texts cut into words together


@dataclass(frozen=True)
class LexicalHits:
    """The hits of a lexical search: passages that share a word with the question, best first, equal scores by number.
    If there are fewer than were asked for, ids end with -1 and scores with 0."""

    ids: np.ndarray  # int64 [batch, n]
    scores: np.ndarray  # float32 [batch, n], falling, above 0 but at -1
    corpus: CorpusState = UNCHANGED
    of: np.ndarray | None = None  # float32 [batch, m]: scores of passages that were asked for by number


@dataclass(kw_only=True)
class Postings:
    """The words and the passages that hold them: column w holds the passages of word w, rising."""

    words: dict[str, int]
    starts: np.ndarray  # int64 [words + 1]
    passages: np.ndarray  # int32 [postings]
    counts: np.ndarray  # int32 [postings]
    lengths: np.ndarray  # int32 [passages]: number of words of each

    def containing(self, word: str) -> int | None:
        """Return the number of passages that have a word; None for a word that none has."""
        column = self.words.get(word)
        return None if column is None else int(self.starts[column + 1] - self.starts[column])


class LexicalIndex:
    """A BM25 index of the texts of one corpus. Nothing changes after it is made; searching is safe from several
    threads."""

    def __init__(
        self,
        config: LexicalConfig,
        corpus: str,
        *,
        postings: Postings,
        weights: np.ndarray | None = None,
        statistics: Postings | None = None,
    ) -> None:
        """Make an index from counted words. `corpus` is the fingerprint of the texts, `weights` float32 [postings] the
        scores; None computes them, with the `statistics` of another index if they are given."""
        check_lexical(config)
        self.config, self.corpus, self.postings, self.statistics = config, corpus, postings, statistics
        self.weights = score_postings(config, postings, statistics) if weights is None else weights

    @property
    def num_passages(self) -> int:
        """Return the number of texts in the index."""
        return len(self.postings.lengths)

    def search(self, texts: Sequence[str], n: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the best `n` passages for each question text: scores float32 [batch, n] and ids int64 [batch, n].

        A passage without a word of the question is no hit: ids end with -1, scores with 0. `allowed` bool [passages] is
        True for those that may be returned. Raises ValueError for n < 1 or a mask of another size.
        """
        if n < 1:
            raise refuse("retrieval.candidates", n, "must be at least 1")
        if allowed is not None and allowed.shape != (self.num_passages,):
            raise ValueError(f"allowed has shape {allowed.shape}: needed is [{self.num_passages}]")
        scores = np.zeros((len(texts), n), np.float32)
        ids = np.full((len(texts), n), -1, np.int64)
        for row, columns in enumerate(self._columns(texts)):
            total = self._totals(columns)
            if allowed is not None:
                total = np.where(allowed, total, np.float32(0))
            found = _best(total, n)
            ids[row, : len(found)], scores[row, : len(found)] = found, total[found]
        return scores, ids

    def scores(self, texts: Sequence[str], ids: np.ndarray) -> np.ndarray:
        """Return float32 [batch, m]: the score of each passage in `ids` int64 [batch, m], exactly as in `search`; 0 if
        no word is shared, and for -1."""
        found = np.zeros(ids.shape, np.float32)
        starts, passages = self.postings.starts, self.postings.passages
        wanted = ids.astype(np.int32)
        for row, columns in enumerate(self._columns(texts)):
            for column in columns:
                first, last = starts[column], starts[column + 1]
                place = first + np.searchsorted(passages[first:last], wanted[row])
                place = np.where(place < last, place, first)
                hit = passages[place] == wanted[row]
                found[row] += np.where(hit, self.weights[place], np.float32(0))
        return found

    def extended(self, added: Iterable[str]) -> "LexicalIndex":
        """Return this index with `added` texts after its last number, equal to the one that would be built anew."""
        old = self.postings
        columns = np.repeat(np.arange(len(old.starts) - 1), np.diff(old.starts))
        more = _count(self.config, added, dict(old.words), first=self.num_passages)
        postings = _sorted(
            more.words,
            np.concatenate([columns, more.columns]),
            passages=np.concatenate([old.passages, more.passages]),
            counts=np.concatenate([old.counts, more.counts]),
            lengths=np.concatenate([old.lengths, more.lengths]),
        )
        return LexicalIndex(self.config, self.corpus, postings=postings, statistics=self.statistics)

    def save(self, path: str | Path) -> None:
        """Write a directory with a checksummed manifest. Raises FileExistsError, OSError with the path."""
        postings = self.postings
        extra = {"kind": KIND, "config": asdict(self.config), "corpus_fingerprint": self.corpus}
        with write_once(path, extra) as directory:
            with RaggedWriter(directory, "words", "uint8") as writer:
                for batch in batched(sorted(postings.words, key=lambda word: postings.words[word]), BATCH_TEXTS):
                    writer.append([word.encode() for word in batch])
            for name, array, dtype in (
                ("starts", postings.starts, np.int64),
                ("passages", postings.passages, np.int32),
                ("counts", postings.counts, np.int32),
                ("lengths", postings.lengths, np.int32),
                ("weights", self.weights, np.float32),
            ):
                write_file(directory / name, [np.asarray(array, dtype)])

    @classmethod
    def load(cls, path: str | Path, contents: bool = True) -> Self:
        """Load what `save` wrote; arrays are mapped, not read. `contents` compares every byte with its checksum,
        otherwise only sizes. Raises TornSnapshot if something is missing or altered, ValueError for a directory of
        another kind."""
        path = Path(path)
        extra = open_extra(path, KIND, contents)
        words = Ragged(path, "words", "uint8")
        postings = Postings(
            words={words.text(number): number for number in range(len(words))},
            starts=map_array(path / "starts", "int64"),
            passages=map_array(path / "passages", "int32"),
            counts=map_array(path / "counts", "int32"),
            lengths=map_array(path / "lengths", "int32"),
        )
        config = LexicalConfig(**extra["config"])
        weights = map_array(path / "weights", "float32")
        return cls(config, extra["corpus_fingerprint"], postings=postings, weights=weights)

    def _columns(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the known words of each text, each as often as it occurs."""
        known = self.postings.words
        return [[known[word] for word in row if word in known] for row in words_of(self.config, texts)]

    def _totals(self, columns: list[int]) -> np.ndarray:
        """Return float32 [passages]: the sum of some columns; a passage is in a column at most once."""
        starts, total = self.postings.starts, np.zeros(self.num_passages, np.float32)
        for column in columns:
            part = slice(starts[column], starts[column + 1])
            total[self.postings.passages[part]] += self.weights[part]
        return total


def build_lexical(config: LexicalConfig, corpus: str, texts: Iterable[str]) -> LexicalIndex:
    """Return the index of `texts`, numbered 0, 1, ...; they are read once and not kept. Raises ValueError for wrong
    settings."""
    check_lexical(config)
    counted = _count(config, texts, {}, first=0)
    parts = counted.columns, counted.passages, counted.counts, counted.lengths
    return LexicalIndex(config, corpus, postings=_sorted(counted.words, *parts))


def lexical_corpus(path: str | Path) -> str:
    """Return the fingerprint of the corpus that a lexical index on disk was built from. Raises as `LexicalIndex.load`
    does."""
    return open_extra(path, KIND, contents=False)["corpus_fingerprint"]


def write_lexical(config: LexicalConfig, store: Store, path: str | Path) -> LexicalIndex:
    """Build the index of a store's titles and texts, write it, and map it. Raises as `LexicalIndex.save` does."""
    build_lexical(config, store.fingerprint, texts_of(store, range(len(store)))).save(path)
    return LexicalIndex.load(path, contents=False)


def texts_of(store: Store, rows: Iterable[int]) -> Iterable[str]:
    """Yield the searched text of each passage: title and text."""
    passages = (store.passage(row) for row in rows)
    return (f"{passage.title} {passage.text}" for passage in passages)


def lexical_name(config: LexicalConfig, corpus: str) -> str:
    """Return the name of the directory of a corpus's index: other settings or another corpus have another one."""
    text = json.dumps([asdict(config), corpus], sort_keys=True)
    return f"lexical-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def words_of(config: LexicalConfig, texts: Sequence[str]) -> list[list[str]]:
    """Return the words of each text, in order, as the index counts them."""
    import bm25s  # it looks for accelerators when it is imported

    stemmer = Stemmer.Stemmer(config.stemmer) if config.stemmer else None  # its cache is not safe between threads
    options: dict[str, Any] = {"stopwords": config.stop_words or [], "stemmer": stemmer}
    rows = bm25s.tokenize(
        list(texts), token_pattern=config.token_pattern, return_ids=False, show_progress=False, **options
    )
    assert isinstance(rows, list)
    return rows


def score_postings(config: LexicalConfig, postings: Postings, statistics: Postings | None = None) -> np.ndarray:
    """Return float32 [postings]: the summand of one word in the score of one passage. The number of texts, their
    length, and the number of texts with a word come from `statistics` (None: `postings`); words that are not in there
    are counted here."""
    known = postings if statistics is None else statistics
    mean = known.lengths.mean() if len(known.lengths) else 1.0
    in_passages = np.diff(postings.starts)
    having = in_passages
    if statistics is not None:
        found = {column: statistics.containing(word) for word, column in postings.words.items()}
        having = in_passages.copy()
        for column, number in found.items():
            having[column] = in_passages[column] if number is None else number
    idf = np.log(1 + (len(known.lengths) - np.minimum(having, len(known.lengths)) + 0.5) / (having + 0.5))
    saturation = config.k1 * (1 - config.b + config.b * postings.lengths / max(mean, 1e-9))
    weights = postings.counts / (postings.counts + saturation[postings.passages])
    return (np.repeat(idf, in_passages) * weights).astype(np.float32)


@dataclass(kw_only=True)
class _Counted:
    """The words of texts, not yet in order."""

    words: dict[str, int]
    columns: np.ndarray  # int64 [postings]
    passages: np.ndarray  # int32 [postings]
    counts: np.ndarray  # int32 [postings]
    lengths: np.ndarray  # int32 [texts]


def _count(config: LexicalConfig, texts: Iterable[str], words: dict[str, int], first: int) -> _Counted:
    """Count the words of `texts`, numbered from `first` on; new words are added to `words`."""
    none = np.zeros(0, np.int32)
    found = _Counted(words=words, columns=np.zeros(0, np.int64), passages=none, counts=none, lengths=none)
    parts = [found]
    for batch in batched(texts, BATCH_TEXTS):
        rows = words_of(config, batch)
        lengths = np.array([len(row) for row in rows], np.int32)
        columns = np.array([words.setdefault(word, len(words)) for row in rows for word in row], np.int64)
        places = np.repeat(np.arange(len(rows)), lengths)
        keys, counts = np.unique(columns * len(rows) + places, return_counts=True)
        passages = first + keys % len(rows)
        parts.append(
            _Counted(
                words=words,
                columns=keys // len(rows),
                passages=passages.astype(np.int32),
                counts=counts.astype(np.int32),
                lengths=lengths,
            )
        )
        first += len(rows)
    joined = {
        name: np.concatenate([vars(part)[name] for part in parts])
        for name in ("columns", "passages", "counts", "lengths")
    }
    return replace(found, **joined)


def _sorted(
    words: dict[str, int], columns: np.ndarray, passages: np.ndarray, counts: np.ndarray, lengths: np.ndarray
) -> Postings:
    """Return the postings by word and then by passage."""
    used, columns = np.unique(columns, return_inverse=True)
    order = np.lexsort((passages, columns))
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=len(used)))]).astype(np.int64)
    number = {int(old): new for new, old in enumerate(used)}
    kept = {word: number[old] for word, old in words.items() if old in number}
    return Postings(
        words=kept,
        starts=starts,
        passages=passages[order].astype(np.int32),
        counts=counts[order].astype(np.int32),
        lengths=lengths.astype(np.int32),
    )


def _best(total: np.ndarray, n: int) -> np.ndarray:
    """Return rows of at most `n` best scores above 0, falling, equal ones by row."""
    rows = np.flatnonzero(total > 0)
    if len(rows) > n:
        least = np.partition(total[rows], len(rows) - n)[len(rows) - n]
        rows = rows[total[rows] >= least]
    return rows[np.lexsort((rows, -total[rows]))][:n]
