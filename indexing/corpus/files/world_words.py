"""Lists the words of the synthetic world: statements of facts in passages, questions that ask for them, invented
words."""

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact: statements for passages and wordings for questions."""

    name: str
    statements: tuple[str, str]
    questions: tuple[str, str]


# Statements and fillers share no word with questions, not even function words; a test holds this.
RELATIONS = (
    Relation(
        "birthplace",
        ("{name} was born in {value}.", "The first home of {name} stood at {value}."),
        ("Where did {name} enter this world?", "Which town does {name} come from?"),
    ),
    Relation(
        "trade",
        ("{name} works as a {value}.", "The trade of {name} is {value}."),
        ("What job does {name} do?", "How does {name} earn money?"),
    ),
    Relation(
        "instrument",
        ("{name} plays the {value}.", "At concerts {name} performs on a {value}."),
        ("Which instrument did {name} learn?", "How does {name} make music?"),
    ),
    Relation(
        "pet",
        ("{name} keeps a tame {value}.", "A {value} follows {name} around."),
        ("Which pet does {name} own?", "What animal would {name} feed?"),
    ),
    Relation(
        "meal",
        ("{name} likes to eat {value}.", "The preferred meal of {name} is {value}."),
        ("What dish does {name} love?", "Which food do you cook when {name} visits?"),
    ),
    Relation(
        "guild",
        ("{name} belongs to the {value} guild.", "The {value} order counts {name} among its members."),
        ("Which club did {name} join?", "What society does {name} support?"),
    ),
)

FILLERS = (
    "The archive was opened again last winter.",
    "A clerk checked the entry with great care.",
    "Rain fell on the hills for nine days.",
    "The old bridge near the mill is closed.",
    "Letters are kept in a wooden box.",
    "Many neighbours remember the long parade.",
    "The harbour lights went out before dawn.",
    "A painter drew the valley in blue ink.",
    "Snow covered the market until spring.",
    "The clock on the tower runs slow.",
)


def invented_words(rng: random.Random) -> Iterator[str]:
    """Yield distinct invented words of two or three syllables without end; none is a word of the templates."""
    onsets = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kr", "tr")
    codas = ("", "", "", "l", "n", "r", "s", "x")
    seen = template_words()
    while True:
        syllables = [rng.choice(onsets) + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))]
        word = "".join(syllables) + rng.choice(codas)
        if word not in seen:
            seen.add(word)
            yield word


def template_words() -> set[str]:
    """Return all ordinary words of passages and questions in lower case."""
    texts = [*FILLERS, *(text for relation in RELATIONS for text in (*relation.statements, *relation.questions))]
    return {word.strip(".?,").lower() for text in texts for word in text.split()} - {"{name}", "{value}"}
