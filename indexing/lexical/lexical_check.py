"""Checks the settings of a lexical index without numpy, so that a mistake is answered at once."""

import re

import Stemmer

from indexing.declare import check_values, refuse
from indexing.indexing_settings import LexicalConfig

# names of the stop word lists of bm25s
STOP_WORDS = (
    *("english", "german", "dutch", "french", "spanish", "portuguese", "italian", "russian", "swedish", "norwegian"),
    *("chinese", "turkish", "korean", "danish"),
)


def check_lexical(config: LexicalConfig) -> None:
    """Raise ValueError, naming the setting, for settings that no index can be built with."""
    check_values(config, "lexical.")
    if config.stemmer and config.stemmer not in Stemmer.algorithms():
        raise refuse("lexical.stemmer", config.stemmer, f"must be empty or one of {', '.join(Stemmer.algorithms())}")
    if config.stop_words and config.stop_words not in STOP_WORDS:
        raise refuse("lexical.stop_words", config.stop_words, f"must be empty or one of {', '.join(STOP_WORDS)}")
    try:
        pattern = re.compile(config.token_pattern)
    except re.error as error:
        allowed = f"must be a regular expression: {error}"
        raise refuse("lexical.token_pattern", config.token_pattern, allowed) from None
    if not config.token_pattern or pattern.groups:
        raise refuse("lexical.token_pattern", config.token_pattern, "must be a pattern of words without groups (...)")
