"""Which settings of a lexical index can be: known without numpy, so that a mistake is answered at once."""

import re

import Stemmer

from indexing.indexing_settings import LexicalConfig

# Names under which bm25s keeps lists of stop words.
STOP_WORDS = (
    *("english", "german", "dutch", "french", "spanish", "portuguese", "italian", "russian", "swedish", "norwegian"),
    *("chinese", "turkish", "korean", "danish"),
)


def check_lexical(config: LexicalConfig) -> None:
    """Raise ValueError, naming the setting, for what no index can be built with."""
    if not config.k1 >= 0:
        raise ValueError(f"lexical.k1={config.k1}: must not be negative")
    if not 0 <= config.b <= 1:
        raise ValueError(f"lexical.b={config.b}: must be between 0 and 1")
    if config.stemmer and config.stemmer not in Stemmer.algorithms():
        raise ValueError(f"lexical.stemmer={config.stemmer}: must be empty or one of {', '.join(Stemmer.algorithms())}")
    if config.stop_words and config.stop_words not in STOP_WORDS:
        raise ValueError(f"lexical.stop_words={config.stop_words}: must be empty or one of {', '.join(STOP_WORDS)}")
    try:
        pattern = re.compile(config.token_pattern)
    except re.error as error:
        raise ValueError(f"lexical.token_pattern={config.token_pattern}: no regular expression: {error}") from None
    if not config.token_pattern or pattern.groups:
        raise ValueError(
            f"lexical.token_pattern={config.token_pattern}: must be a pattern of words without groups (...)"
        )
