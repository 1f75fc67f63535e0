"""Pretraining tasks: pure functions from a passage's text and a random generator to a question and its answer.

    span_corruption   words of a passage are masked, and are the answer (Raffel et al. 2020, section 3.1.4)
    salient_span      a name, a date or a number of a sentence is masked (Guu et al. 2020, "REALM", section 3.4)
    prefix_lm         the beginning of a passage is the question, the rest the answer
    title_to_section  the title is the question, the first sentences are the answer

A question may hold `MASK` characters. `MaskWords` writes them as each tokeniser can read them: as T5's sentinels if it
has them, as its mask token, or as a word. Nothing here knows tokens; the length of a question is counted in words.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from indexing.corpus.files.corpus import Passage
from indexing.declare import refuse
from training.example_settings import PretrainingConfig
from training.plug_ins import load_function

MASK = "\ufffc"  # stands where words were taken out of a question
MASK_WORD = "_"  # the mask for a tokeniser that has none
MIN_CONTEXT_WORDS = 6  # a shorter sentence says too little around a mask
MAX_SALIENT_WORDS = 8
SECTION_WORDS = 64  # Number of words of the first sentences under a title, before the tokens are cut

Spans = list[tuple[int, int]]
Recognizer = Callable[[str], Spans]

_OPENING, _CLOSING = "\"'\u201c\u2018", "\"'\u201d\u2019"  # quotation marks
_NO_SPACE = "\"'\u201c\u2018\u201d\u2019()[].,;:!?"
_WORD = re.compile(r"\S+")
_SENTENCE_END = re.compile(rf"(?:(?<!\b[A-Z])\.|[!?])[{_CLOSING})\]]*\s+(?=[{_OPENING}(\[]*[A-Z0-9])")
_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Nov|Dec)\b\.?"
)
_DATE = re.compile(
    rf"\d{{4}}-\d{{2}}-\d{{2}}|\b\d{{1,2}} {_MONTH}(?: \d{{4}})?|"
    rf"\b{_MONTH} \d{{1,2}}(?:, \d{{4}})?(?!\d)|\b{_MONTH} \d{{4}}"
)
_NUMBER = re.compile(r"(?<![\w.])[$€£]?\d+(?:[.,:]\d+)*%?(?!\w)")
_PROPER = r"[A-Z][\w'\u2019-]*"
_NAME = re.compile(rf"\b{_PROPER}(?:(?: (?:of|the|de|la|von|van|der|and))? {_PROPER})*")


@dataclass(frozen=True)
class Example:
    """A question with a `MASK` for each of `spans`, or (without a mask) a question and its one answer."""

    question: str
    spans: tuple[str, ...]


@dataclass(frozen=True)
class MaskWords:
    """The words that show one tokeniser that something is missing."""

    word: str = MASK_WORD
    sentinels: tuple[str, ...] = ()  # marks of the first, second, ... span; empty: `word` for all

    def question(self, example: Example) -> str:
        """Return the question as text. Several masks of one span are the same."""
        if not self.sentinels:
            return example.question.replace(MASK, self.word)
        parts = example.question.split(MASK)
        marks = [self.sentinels[min(i, len(example.spans) - 1)] for i in range(len(parts) - 1)]
        return "".join(part + mark for part, mark in zip(parts, [*marks, ""], strict=True))

    def answer(self, example: Example) -> str:
        """Return the missing words: each span after its sentinel and a last one (T5), or the spans with `word`
        between."""
        if MASK not in example.question or (len(example.spans) == 1 and not self.sentinels):
            return example.spans[0]
        if not self.sentinels:
            return f" {self.word} ".join(example.spans)
        pairs = zip(self.sentinels, example.spans, strict=False)
        return " ".join([*(f"{mark} {span}" for mark, span in pairs), self.sentinels[len(example.spans)]])


def make_example(
    task: str,
    passage: Passage,
    *,
    random: np.random.Generator,
    config: PretrainingConfig,
    words: int,
    recognize: Recognizer,
) -> Example | None:
    """Return the example that `task` cuts from a passage, its question of at most `words` words; None if the passage
    lacks the parts that the task needs. Raises AssertionError for an unknown task."""
    match task:
        case "span_corruption":
            return span_corruption(
                passage.text, random, words=words, mask_share=config.mask_share, mean_span_words=config.mean_span_words
            )
        case "salient_span":
            return salient_span(passage.text, random, words, recognize)
        case "prefix_lm":
            return prefix_lm(passage.text, random, words)
        case "title_to_section":
            return title_to_section(passage, words)
    raise AssertionError(f"no task named {task}")


def span_corruption(
    text: str, random: np.random.Generator, *, words: int, mask_share: float, mean_span_words: float
) -> Example | None:
    """Mask random spans of a stretch of `words` words, `mask_share` of it, each `mean_span_words` long on average; None
    for fewer than three words. The lengths of spans and gaps are random partitions, as in T5; unlike there, a stretch
    may begin with a mask and need not end with one."""
    found = [match.group() for match in _WORD.finditer(text)]
    first = int(random.integers(max(0, len(found) - words) + 1))
    found = found[first : first + words]
    if len(found) < 3:
        return None
    num_masked = min(len(found) - 1, max(1, round(mask_share * len(found))))
    num_spans = min(num_masked, len(found) - num_masked + 1, max(1, round(num_masked / mean_span_words)))
    masked = _partition(num_masked, num_spans, random)
    kept = _partition(len(found) - num_masked + 2, num_spans + 1, random)
    kept[0], kept[-1] = kept[0] - 1, kept[-1] - 1  # a mask may stand at either end
    question, spans, place = found[: kept[0]], [], kept[0]
    for length, following in zip(masked, kept[1:], strict=True):
        spans.append(" ".join(found[place : place + length]))
        question += [MASK, *found[place + length : place + length + following]]
        place += length + following
    return Example(" ".join(question), tuple(spans))


def salient_span(text: str, random: np.random.Generator, words: int, recognize: Recognizer) -> Example | None:
    """Mask one of the spans that `recognize` finds, wherever its sentence says it; None without one. A sentence of more
    than `words` words is cut to those around the span; a very short one takes its neighbourhood in."""
    spans = [(start, stop) for start, stop in recognize(text) if len(text[start:stop].split()) <= MAX_SALIENT_WORDS]
    if not spans:
        return None
    start, stop = spans[int(random.integers(len(spans)))]
    answer = text[start:stop].strip()
    first, last = _context(text, start, stop, words)
    context = f"{text[first:start]}{MASK}{text[stop:last]}"
    edge_left, edge_right = (r"(?<!\w)" if answer[:1].isalnum() else ""), (r"(?!\w)" if answer[-1:].isalnum() else "")
    context = re.sub(f"{edge_left}{re.escape(answer)}{edge_right}", MASK, context)
    if not answer or not context.replace(MASK, "").strip():
        return None
    return Example(" ".join(context.split()), (answer,))


def prefix_lm(text: str, random: np.random.Generator, words: int) -> Example | None:
    """Cut a text into question and answer: the first words, between half of and all `words` of them, and the rest. None
    for a text of one word."""
    found = list(_WORD.finditer(text))
    most = min(words, len(found) - 1)
    if most < 1:
        return None
    number = int(random.integers(max(1, most // 2), most + 1))
    return Example(text[: found[number - 1].end()].strip(), (text[found[number].start() :].strip(),))


def title_to_section(passage: Passage, words: int) -> Example | None:
    """Make the title, at most `words` words of it, the question and the first sentences the answer, `SECTION_WORDS`
    words at most unless the first sentence alone is longer; None without a title."""
    title = " ".join(passage.title.split()[:words])
    if not title or not passage.text.strip():
        return None
    stop = 0
    for _, end in sentences(passage.text):
        if stop and len(passage.text[:end].split()) > SECTION_WORDS:
            break
        stop = end
    return Example(title, (passage.text[:stop].strip(),))


def sentences(text: str) -> Spans:
    """Return (start, stop) of the sentences, which end at ., ! or ? before a space and a capital letter or a digit."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    starts = [0, *ends]
    return [pair for pair in zip(starts, [*ends, len(text)], strict=True) if pair[0] < pair[1]]


def find_recognizer(setting: str) -> Recognizer:
    """Return the recogniser `regex`, or the user's function of `module:function`. Raises ValueError if there is
    none."""
    if setting == "regex":
        return regex_spans
    allowed = "must be regex, or module:function of a function from a text to a list of (start, stop)"
    signature = "(text: str) -> list[tuple[int, int]]"
    values = "regex, module:function or path/to/file.py:function"
    function: Recognizer = load_function(
        "pretraining.recognizer", setting, allowed=values, signature=signature, num_arguments=1
    )

    def checked(text: str) -> Spans:
        try:
            spans: Spans = [(int(start), int(stop)) for start, stop in function(text)]
        except (TypeError, ValueError) as error:
            raise refuse("pretraining.recognizer", setting, f"{allowed}: {error}") from error
        for start, stop in spans:
            if not 0 <= start < stop <= len(text):
                span = f"must return spans of a text of {len(text)} characters, not ({start}, {stop})"
                raise refuse("pretraining.recognizer", setting, span)
        return spans

    return checked


def regex_spans(text: str) -> Spans:
    """Return dates, numbers and names, in order and without overlap; a date is not a number too. Names are runs of
    capitalised words, of two or more words at the start of a sentence."""
    openings = {start for start, _ in sentences(text)}
    found: Spans = []
    for pattern in (_DATE, _NUMBER, _NAME):
        for match in pattern.finditer(text):
            start, stop = match.span()
            opens = any(not text[opening:start].strip(f"{_OPENING}([ ") for opening in openings if opening <= start)
            if pattern is _NAME and (stop - start < 2 or (opens and " " not in match.group())):
                continue
            if all(stop <= other or start >= end for other, end in found):
                found.append((start, stop))
    return sorted(found)


def _context(text: str, start: int, stop: int, words: int) -> tuple[int, int]:
    """Return the sentence around `[start, stop)`, or at most `words` whole words around it. The span stands in the
    middle of a long sentence as far as there are words on both sides."""
    first, last = next((a, b) for a, b in sentences(text) if a <= start < b)
    last = max(last, stop)
    if len(text[first:start].split()) + len(text[stop:last].split()) < MIN_CONTEXT_WORDS:
        first, last = 0, len(text)
    start -= len(text[first:start]) - len(text[first:start].rstrip(_NO_SPACE))  # brackets stay with it
    stop += len(text[stop:last]) - len(text[stop:last].lstrip(_NO_SPACE))
    before = [match.start() + first for match in _WORD.finditer(text[first:start])]
    after = [match.end() + stop for match in _WORD.finditer(text[stop:last])]
    room = max(0, words - 1)
    left = min(len(before), max(room // 2, room - len(after)))
    right = min(len(after), room - left)
    return (before[-left] if left else start), (after[right - 1] if right else stop)


def _partition(total: int, parts: int, random: np.random.Generator) -> list[int]:
    """Return `parts` positive numbers that sum to `total`, each way equally likely."""
    cuts = np.sort(random.choice(total - 1, size=parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()
