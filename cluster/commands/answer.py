"""Holds the result of a question: the answer, and the passages that it was read from. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Any

WIDTH = 100  # Number of characters of a passage that are printed


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A passage that was found.

    Example
    -------
    >>> hit = run.search("where does she live?", k=1)[0]
    >>> isinstance(hit.score, float), hit.probability is None
    (True, True)
    """

    id: str
    title: str
    text: str
    score: float  # inner product with the question, or the score of the fused rankings or of the re-ranker
    probability: float | None = None  # p(z|q) among the passages that were read; None if nothing was read
    metadata: dict[str, Any] = field(default_factory=dict)
    dense_places: tuple[int, ...] = ()  # place in the ranking by vectors of each phrasing, from 1; 0: not in it
    lexical_places: tuple[int, ...] = ()  # place in the lexical ranking, likewise


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer with the passages that it was read from, best first.

    Example
    -------
    >>> answer = run.ask("where does she live?")
    >>> 0.0 <= answer.probability <= 1.0, len(answer.passages)
    (True, 3)
    """

    text: str
    probability: float  # of the answer given the question, over the passages that were read
    passages: list[Passage]
    checkpoint: str  # folder of the weights that answered


def printed(answer: Answer, hybrid: bool) -> str:
    """Return an answer as the command line prints it: the text, then a line for each passage with p(z|q), score,
    its places in the rankings, id, title and text. `hybrid` is true if a lexical index ranked passages, too."""
    several = any(len(passage.dense_places) > 1 for passage in answer.passages)
    places = "places, " if hybrid or several else ""
    lines = [answer.text, "", f"from {answer.checkpoint}; p(z|q), index score, {places}passage:"]
    for passage in answer.passages:
        origin = f"dense {_shown(passage.dense_places)}  " if hybrid or several else ""
        origin += f"lexical {_shown(passage.lexical_places)}  " if hybrid else ""
        text = passage.text if len(passage.text) <= WIDTH else f"{passage.text[:WIDTH]}..."
        found = f"{passage.probability or 0.0:.3f}  {passage.score:.3f}  {origin}{passage.id}  {passage.title}: {text}"
        lines.append(f"  {found}")
    return "\n".join(lines)


def _shown(places: tuple[int, ...]) -> str:
    return "/".join(str(place) if place else "-" for place in places)
