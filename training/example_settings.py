"""Settings of examples that are cut from the corpus, and of answers that are judged or sampled."""

import re
from dataclasses import dataclass

from indexing.declare import setting

_RECOGNIZER = re.compile(r"regex|[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# Tables of settings, laid out by hand.
# fmt: off


@dataclass
class AlignmentConfig:
    """The reference and the samples of preference and sampling objectives."""

    reference: str = setting("copy", "Place of the frozen system that the trained one is compared with, its weights at "
        "the start of the stage: beside the trained ones (copy), in the host's memory and moved for each batch "
        "(offload), or nowhere (none: its log-likelihoods are 0). Where only fresh adapters train, copy and offload "
        "switch the adapters off instead.", choices=("copy", "offload", "none"))
    updates_per_sample: int = setting(1, "Number of optimiser steps on one batch of samples (grpo).", unit="steps",
        least=1)


@dataclass(kw_only=True)
class PretrainingConfig:
    """Training examples that are cut from the corpus itself (`training/feeding/tasks.py`). The first six are the
    mixture's weights; with none of them set the stage trains on questions."""

    span_corruption: float | None = setting(None, "Weight of masking spans of a passage; the answer is the text that "
        "was there.", unit="weight")
    salient_span: float | None = setting(None, "Weight of masking a name, a date or a number.", unit="weight")
    prefix_lm: float | None = setting(None, "Weight of continuing a passage.", unit="weight")
    title_to_section: float | None = setting(None, "Weight of writing the first sentences under a title.",
        unit="weight")
    inverse_cloze: float | None = setting(None, "Weight of matching a span with its passage among others; trains the "
        "retriever alone.", unit="weight")
    independent_cropping: float | None = setting(None, "Weight of matching two spans of one passage; trains the "
        "retriever alone.", unit="weight")
    contrast_passages: int = setting(64, "Number of passages that a micro-batch of inverse_cloze or "
        "independent_cropping contrasts; their spans are set in `objective`.", unit="passages", least=1)
    recognizer: str = setting("regex", "Finder of salient spans: regex, or module:function from a text to [(start, "
        "stop), ...].", holds=_RECOGNIZER.fullmatch, allowed="regex or module:function")
    context_words: int = setting(24, "Number of words of a passage in a question at most; fewer where its tokens would "
        "be cut.", unit="words", least=1)
    mask_share: float = setting(0.15, "Share of the words that span corruption masks.", unit="share", above=0, most=0.5)
    mean_span_words: float = setting(3.0, "Number of words of a masked span on average.", unit="words", above=0)
    duplicate_threshold: float = setting(0.7, "Jaccard similarity of token trigrams from which passages are "
        "near-duplicates; above 1: none are.", unit="similarity", above=0)
    margin: int = setting(8, "Number of hits that are searched beyond retrieval.k, in place of an example's passage "
        "and its near-duplicates.", unit="passages")
    held_out: float = setting(0.02, "Share of the passages (with near-duplicates) that only held-out examples are cut "
        "from.", unit="share", least=0, below=1)
    held_out_examples: int = setting(256, "Number of held-out examples that are measured. 0: none.", unit="examples")
