"""Cuts examples from the corpus while training; they take the place of a question store, and nothing is materialised.

Example `number` is a function of (seed, number) alone: a generator seeded with both draws the task, the passage and the
cut, so that a checkpoint only has to keep the place in the stream. The sides that tokenise questions turn text into
tokens. The passage that an example was cut from, and its near-duplicates, are never read for it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from indexing.corpus.stores.passages import Store, TokenSide
from indexing.hits import Hits, chosen, filled, without
from training.example_settings import PretrainingConfig
from training.feeding.mixture import answered
from training.feeding.tasks import MASK_WORD, MaskWords, find_recognizer, make_example
from training.retrieving.retrieve import IndexService, PendingHits, Search, dense_search
from training.run_text import RunText

ATTEMPTS = 200  # Number of passages in a row without the parts of a task after which it is refused
CACHED = 4096  # Number of examples; more than are searched ahead
HELD_OUT_SEED = 0  # holds out the same passages in every run, so that runs can be compared
TRAINING, HELD_OUT = 11, 12  # purposes of the random generators


@dataclass(frozen=True, kw_only=True)
class CorpusExample:
    """One example, tokenised."""

    task: str
    source: int  # passage number
    question: str  # as the generator reads it
    answer: str
    tokens: dict[str, np.ndarray]  # question rows by side
    answer_tokens: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ExampleSides:
    """The rules by which examples become tokens: the sides of questions, and each tokeniser's mask."""

    retriever: TokenSide
    generator: TokenSide
    answer: TokenSide
    retriever_mask: MaskWords
    generator_mask: MaskWords
    max_retriever_tokens: int
    max_generator_tokens: int


def example_sides(text: RunText) -> ExampleSides:
    """Return the sides of a run's models. Only an encoder-decoder gets sentinels: it alone was pretrained on them."""
    encoder, generator = text.settings.encoder, text.settings.generator
    sentinels = _sentinels(text.generator) if generator.traits.encoder_decoder else ()
    return ExampleSides(
        retriever=text.question_sides[0],
        generator=text.question_sides[1],
        answer=text.answer_side,
        retriever_mask=MaskWords(_mask_word(text.retriever)),
        generator_mask=MaskWords(_mask_word(text.generator), sentinels),
        max_retriever_tokens=encoder.max_question_tokens,
        max_generator_tokens=generator.max_question_tokens,
    )


class CorpusQuestions:
    """Examples by their number, which has no end; `Questions` of `training/data.py`."""

    def __init__(
        self, store: Store, rows: np.ndarray, *, config: PretrainingConfig, sides: ExampleSides, seed: int, purpose: int
    ) -> None:
        """Examples are cut from the passages `rows`. Raises ValueError if there is none, or for a mixture of
        nothing."""
        if not len(rows):
            raise ValueError(f"pretraining.held_out={config.held_out}: no passage is left to cut examples from")
        self.store, self.candidates, self.config, self.sides = store, rows, config, sides
        self.seed, self.purpose = seed, purpose
        self.shares = answered(config)
        self.recognize = find_recognizer(config.recognizer)
        self._made: OrderedDict[int, CorpusExample] = OrderedDict()

    def example(self, number: int) -> CorpusExample:
        """Return example `number`. Raises ValueError if no passage has the parts that its task needs."""
        made = self._made.get(number)
        if made is None:
            made = self._made[number] = self._make(number)
            if len(self._made) > CACHED:
                self._made.popitem(last=False)
        return made

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """Return the passages that examples were cut from; int64 [n]."""
        return np.array([self.example(int(number)).source for number in numbers], dtype=np.int64)

    def text(self, number: int) -> str:
        """Return the question as the generator reads it."""
        return self.example(number).question

    def tokens(self, side: str) -> "ExampleRows":
        """Return the token rows of the questions, by example number."""
        return ExampleRows(self, side)

    def answer_tokens(self, number: int) -> list[np.ndarray]:
        """Return the one answer."""
        return [self.example(number).answer_tokens]

    def target(self, number: int) -> int:
        """Return the place of the one answer."""
        return 0

    def gold_rows(self, number: int) -> np.ndarray:
        """Return no passage: the one that states the answer is never read."""
        return np.empty(0, dtype=np.int64)

    def _make(self, number: int) -> CorpusExample:
        random = np.random.default_rng([self.seed, self.purpose, number])
        task = list(self.shares)[int(random.choice(len(self.shares), p=list(self.shares.values())))]
        for _ in range(ATTEMPTS):
            source = int(self.candidates[int(random.integers(len(self.candidates)))])
            if not self.store.is_living(np.array([source]))[0]:
                continue
            made = self._cut(task, source, int(random.integers(2**62)))
            if made is not None:
                return made
        raise ValueError(
            f"pretraining.{task}={getattr(self.config, task)}: {ATTEMPTS} passages in a row lack what the task "
            f"needs ({NEEDED[task]}); set it to 0 or change the corpus"
        )

    def _cut(self, task: str, source: int, seed: int) -> CorpusExample | None:
        """Return an example whose question fits both tokenisers; a question that is too long is made of fewer words."""
        passage, sides = self.store.passage(source), self.sides
        words = self.config.context_words
        while True:
            random = np.random.default_rng(seed)
            example = make_example(
                task, passage, random=random, config=self.config, words=words, recognize=self.recognize
            )
            if example is None:
                return None
            if sides.generator_mask.sentinels and len(example.spans) >= len(sides.generator_mask.sentinels):
                return None
            question, answer = sides.generator_mask.question(example), sides.generator_mask.answer(example)
            retriever = _row(sides.retriever, sides.retriever_mask.question(example))
            generator = _row(sides.generator, question)
            fits = len(retriever) < sides.max_retriever_tokens and len(generator) < sides.max_generator_tokens
            if fits or words <= 2:
                break
            words = max(2, words * 3 // 4)
        answer_row = _row(sides.answer, answer)
        if not len(answer_row):
            return None
        return CorpusExample(
            task=task,
            source=source,
            question=question,
            answer=answer,
            tokens={"retriever": retriever, "generator": generator},
            answer_tokens=answer_row,
        )


@dataclass(frozen=True)
class ExampleRows:
    """The questions of `CorpusQuestions` as token rows of one side."""

    questions: CorpusQuestions
    side: str

    def rows(self, row_numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the int32 token rows, in that order."""
        return [self.questions.example(int(number)).tokens[self.side] for number in row_numbers]


NEEDED = {
    "span_corruption": "three words",
    "salient_span": "a span that pretraining.recognizer finds",
    "prefix_lm": "two words",
    "title_to_section": "a title",
}


def split_passages(groups: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the passages to cut training examples from, and those held out, int64 each. A seeded share of the corpus
    is held out together with its near-duplicates, so that no training example tells of a held-out one."""
    number = min(len(groups), round(held_out * len(groups))) if held_out else 0
    if held_out and not number:
        number = 1
    chosen = np.random.default_rng(HELD_OUT_SEED).permutation(len(groups))[:number]
    out = np.isin(groups, groups[chosen])
    return np.flatnonzero(~out), np.flatnonzero(out)


class FairSearch:
    """Searches for examples. The hits never hold the passage of an example or a near-duplicate of it.

    `margin` more passages are asked for than wanted. If too few are left, the batch is searched again as deep as the
    largest group of its sources makes necessary, without another encoding of the questions.
    """

    def __init__(
        self,
        service: IndexService,
        questions: CorpusQuestions,
        *,
        groups: np.ndarray,
        margin: int,
        search: Search | None = None,
    ) -> None:
        """`search` finds the hits that are cleaned; None: the service, by vectors alone."""
        self.search = search or dense_search(service)
        self.service, self.questions, self.groups, self.margin = service, questions, groups, margin
        self.sizes = np.bincount(groups, minlength=len(groups))  # Number of passages of each group

    def __call__(
        self, numbers: np.ndarray, queries: np.ndarray, k: int, *, num_vectors: int = 0, again: bool = False
    ) -> "FairHits":
        """Start the search of examples `numbers` with float32 `queries` [batch, dim]; no vectors come along."""
        source_groups = self.group_of(self.questions.sources(numbers))
        depth = min(k + self.margin, self.service.num_passages)
        pending = self.search(numbers, queries, depth, again=again)
        return FairHits(
            search=self, numbers=numbers, source_groups=source_groups, queries=queries, k=k, pending=pending
        )

    def group_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the group of near-duplicates of each passage. A text that replaced another one is in the group of that
        one; a passage that was added later is alone in its group."""
        first = self.questions.store.origin(numbers)
        known = (first >= 0) & (first < len(self.groups))
        return np.where(known, self.groups[np.where(known, first, 0)], first)


@dataclass(kw_only=True)
class FairHits:
    """A search under way, whose hits are cleaned when they are taken."""

    search: FairSearch
    numbers: np.ndarray  # int64 [batch]: numbers of the examples
    source_groups: np.ndarray  # int64 [batch]: groups of the passages that they were cut from
    queries: np.ndarray  # float32 [batch, dim]
    k: int
    pending: PendingHits

    def result(self) -> Hits:
        """Return hits [batch, k]. If the corpus holds too few other passages, ids end with -1 and scores with -inf."""
        hits = self.pending.result()
        fair = self._fair(hits)
        if (fair.sum(axis=1) < self.k).any():
            deepest = self.k + int(self.search.sizes[self.source_groups].max())
            depth = min(deepest, self.search.service.num_passages)
            if depth > hits.ids.shape[1]:
                hits = self.search.search(self.numbers, self.queries, depth, again=True).result()
                fair = self._fair(hits)
        order = np.argsort(~fair, axis=1, kind="stable")[:, : self.k]  # the fair ones first, in their order
        unfair = ~np.take_along_axis(fair, order, axis=1)
        return replace(filled(without(chosen(hits, order), unfair), self.k), vectors=None)

    def _fair(self, hits: Hits) -> np.ndarray:
        return (hits.ids >= 0) & (self.search.group_of(hits.ids) != self.source_groups[:, None])


def _row(side: TokenSide, text: str) -> np.ndarray:
    return np.array(side.tokenize([("", text)])[0], dtype=np.int32)


def _mask_word(tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.mask_token) if tokenizer.mask_token is not None else MASK_WORD


def _sentinels(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Return `<extra_id_0>`, `<extra_id_1>`, ... as far as the vocabulary has them; empty if it has fewer than two."""
    known = tokenizer.get_vocab()
    names: list[str] = []
    while f"<extra_id_{len(names)}>" in known:
        names.append(f"<extra_id_{len(names)}>")
    return tuple(names) if len(names) > 1 else ()
